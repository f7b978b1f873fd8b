# SPDX-License-Identifier: Apache-2.0
"""Data cards: a Hugging Face dataset card (YAML front matter and prose) with one validated `adaptclip:` block.

The block says where the images are, which column means what, which words go into the prompt, which groups are reported
and which gates decide. A bare image folder is a card too: one is made up for it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from adaptclip.data.card_block import (
    SOURCE_KINDS,
    Augmentation,
    CardBlock,
    Columns,
    GroupBins,
    Splits,
)
from adaptclip.data.file_rules import DicomRule, VideoRule
from adaptclip.data.layouts import read_layout, require_text
from adaptclip.errors import CardError, StorageError, did_you_mean, listed, shown
from adaptclip.files import digest, no_such_path, parse_yaml, read_text
from adaptclip.gate_rules import Expected, GateRule, Outcome

_log = logging.getLogger(__name__)


class Card(CardBlock):
    """A loaded data card: the block's fields, and where they come from.

    Attributes:
        name: file name without ending, or the folder's name.
        path: the card's file; None when it was made up for a folder.
        front_matter: the whole YAML head, with the hub's own fields (license, pretty_name, ...).
        prose: the Markdown below the head.
        digest: SHA-256 of the validated block; prose and licence do not change it.
    """

    name: str
    path: Path | None = None
    front_matter: dict[str, Any] = Field(default_factory=dict)
    prose: str = ""
    digest: str

    def __repr__(self) -> str:
        """One line; the fields are attributes."""
        classes = listed(self.class_names or (), "classes") if self.class_names else "classes from the data"
        return f"<Card {self.name}: {classes}, {len(self.gates)} gates, from {self.path or 'a folder'}>"

    __str__ = __repr__

    @property
    def is_made_up(self) -> bool:
        """Whether this card was made for a bare image folder."""
        return self.path is None


def card_folders() -> tuple[Path, ...]:
    """Returns the folders in which cards are looked up by name: the project's own, then `data_cards` where you are."""
    package = Path(__file__).resolve().parents[1]
    # An installed package carries them; in a checkout they lie beside it.
    own = next((f for f in (package / "data_cards", package.parent / "data_cards") if f.is_dir()), package)
    candidates = [own, Path.cwd() / "data_cards"] if own != package else [Path.cwd() / "data_cards"]
    return tuple(dict.fromkeys(folder.resolve() for folder in candidates if folder.is_dir()))


def list_cards() -> list[str]:
    """Returns the names of all cards in `card_folders()`, sorted."""
    files = [path for folder in card_folders() for path in folder.glob("*.md")]
    return sorted({path.stem for path in files} - {"README", "TEMPLATE"})


def _named(name: str) -> Path | None:
    """The file of a card that is known by its name; None where there is none."""
    files = [folder / f"{name}.md" for folder in card_folders()] if name in list_cards() else []
    return next((file for file in files if file.is_file()), None)


def describe_card(name: str) -> str:
    """Words what a card by name is about and where its images come from, for a list; a wrong card is called so."""
    path = _named(name)
    try:
        if path is None:
            raise CardError(f"no data card {name!r}")
        card = parse_card(read_text(path), name=name, path=path)
    except (CardError, StorageError):
        return f"is not valid; adaptclip card check {name} says why"
    file = getattr(card.source, "file", None)
    if card.source.kind == "embedded" or (file and (path.parent / file).is_file()):
        place = "comes with the package"
    elif card.source.kind == "hub":
        place = "downloaded from the Hugging Face hub"
    else:
        place = "from files of yours: --data-root"
    title = card.front_matter.get("pretty_name")
    return f"{title} ({place})" if isinstance(title, str) else place


def load_card(name_or_path: str | Path) -> Card:
    """Loads a card by its name in `data_cards/`, from its file, or makes one up for an image folder.

    Logs a warning for each known issue of the card, and when a card is made up.

    Raises:
        CardError: there is no such card, or it is not valid; the message names the key and what is allowed. Or it
            cannot be told which folders are classes.
        DataError: a folder has no class folders, or one whose name cannot be used.
    """
    text = str(name_or_path)
    path = Path(text).expanduser()
    found = _named(text) or path
    if found.is_dir():
        return _card_for_folder(found)
    if not found.is_file():
        if path.parent != Path() or path.suffix:
            raise CardError(f"no data card {text!r}: {no_such_path(path)} Cards by name: adaptclip card list")
        raise CardError(
            f"no data card {text!r}: neither a card's name, nor a card's file, nor a folder of images. "
            f"{did_you_mean(text, list_cards(), lead='Cards by name')}"
        )
    try:
        content = read_text(found)
    except StorageError as error:
        raise CardError(f"{error}; a card is a UTF-8 text file") from error
    card = parse_card(content, name=found.stem, path=found)
    for issue in card.known_issues:
        _log.warning("card %s, known issue: %s", card.name, issue)
    return card


def parse_card(text: str, *, name: str, path: Path | None = None) -> Card:
    """Parses and validates the text of a card.

    Args:
        text: front matter between `---` lines, then prose.
        name: the card's name.
        path: its file, for messages and as the base of relative paths.

    Raises:
        CardError: the front matter is missing, is no YAML, or its `adaptclip:` block is not valid.
    """
    where = f"card {name}" + (f" ({path})" if path else "")
    try:
        front_matter, prose = parse_front_matter(text, where=where)
    except StorageError as error:
        raise CardError(str(error)) from error
    if not isinstance(front_matter.get("adaptclip"), dict):
        raise CardError(
            f"{where}: the front matter has no `adaptclip:` block; its keys are "
            f"{', '.join(map(str, front_matter)) or 'none'}. See data_cards/TEMPLATE.md."
        )
    return _make_card(front_matter["adaptclip"], where, name=name, path=path, front_matter=front_matter, prose=prose)


def _make_card(block: dict[str, Any], where: str, **about: Any) -> Card:
    try:
        valid = CardBlock.model_validate(block)
    except ValidationError as error:
        lines = "\n  ".join(_explain(detail) for detail in error.errors())
        raise CardError(f"{where} is not valid:\n  {lines}") from error
    dumped = json.dumps(valid.model_dump(mode="json"), sort_keys=True, ensure_ascii=False)
    return Card(**dict(valid), **about, digest=digest(dumped))


def parse_front_matter(text: str, *, where: str) -> tuple[dict[str, Any], str]:
    """Splits the text of a Hugging Face card into its YAML head, parsed as `parse_yaml` does, and the prose below.

    Raises:
        StorageError: there is no head between two lines of `---` at the top, or it is not valid.
    """
    lines = text.splitlines()
    ends = [i for i, line in enumerate(lines) if line.rstrip() == "---"]
    if len(ends) < 2 or any(line.strip() for line in lines[: ends[0]]):
        raise StorageError(f"{where}: needs YAML front matter between two lines of `---` at its top")
    # Blank lines stand in for what precedes the YAML, so that its errors count lines as an editor does.
    head = "\n" * (ends[0] + 1) + "\n".join(lines[ends[0] + 1 : ends[1]])
    return parse_yaml(head, where=f"{where}: the front matter"), "\n".join(lines[ends[1] + 1 :]).strip()


_MODELS: dict[str, type[BaseModel]] = {
    "splits": Splits,
    "columns": Columns,
    "augmentation": Augmentation,
    "video": VideoRule,
    "dicom": DicomRule,
    "groups": GroupBins,
    "gates": GateRule,
    "outcomes": Outcome,
    "expect": Expected,
}
"""Key of the block -> model whose fields are allowed below it."""


def _key(loc: Sequence[str]) -> str:
    """A place of the block in words; entries of a list count from 1: "adaptclip.gates, gate 2, at_least"."""
    key, kind = "adaptclip", ""
    for part in loc:
        if part.isdecimal():
            key += f", {'gate' if kind == 'gates' else 'entry'} {int(part) + 1}"
        else:
            key += f"{', ' if key[-1:].isdecimal() else '.'}{part}"
        kind = part
    return key


def _explain(detail: Any) -> str:
    """Words one of pydantic's errors: the key, what is wrong, what is allowed."""
    loc = [str(part) for part in detail["loc"]]
    model: type[BaseModel] = _MODELS.get(loc[0], CardBlock) if loc[1:] else CardBlock
    if loc[:1] == ["source"] and len(loc) > 1:
        # pydantic puts the kind between `source` and the key; the card does not.
        model = SOURCE_KINDS[loc.pop(1)]
    key, got = _key(loc), detail.get("input")
    match detail["type"]:
        case "extra_forbidden":
            return f"{key}: unknown key. {did_you_mean(loc[-1], model.model_fields)}"
        case "missing":
            return f"{key}: is missing. Keys here: {', '.join(model.model_fields)}."
        case "union_tag_not_found":
            return f"{key}.kind: is missing. Allowed: {', '.join(SOURCE_KINDS)}."
        case "union_tag_invalid":
            return f"{key}: {did_you_mean(str(got.get('kind')), SOURCE_KINDS)} Got kind {got.get('kind')!r}."
        case "string_type":
            quoted = f'; write it in quotes: "{got}"' if isinstance(got, bool | int | float) else ""
            return f"{key}: expected text, got {got!r} ({type(got).__name__}){quoted}"
        case _:
            message = detail["msg"].removeprefix("Value error, ")
            shown = "" if detail["type"] == "value_error" else f"; got {got!r}"
            return f"{key}: {message}{shown}"


def _card_for_folder(folder: Path) -> Card:
    require_text(folder)
    layout = read_layout(folder.resolve())
    splits, named = layout.rule, dict.fromkeys(name for _, name, _ in layout.classes)
    how = (
        "by its own folders " + ", ".join(splits.names.values())
        if splits.fractions is None
        else f"made here from {splits.fractions}, stratified by class"
    )
    classes = f"classes are its folders {', '.join(list(named)[:5])}" + f" and {len(named) - 5} more" * (len(named) > 5)
    _log.warning("made up a card for the image folder %s: %s, split %s", shown(layout.folder), classes, how)
    block = {
        "source": {"kind": "image_folder", "path": str(layout.folder)},
        "splits": splits.model_dump(exclude_none=True),
    }
    front_matter = {"pretty_name": folder.name, "adaptclip": block}
    return _make_card(block, f"card for {shown(folder)}", name=folder.resolve().name, front_matter=front_matter)
