# SPDX-License-Identifier: Apache-2.0
"""`adaptclip card new`: looks at a folder of images or a table of image paths, and writes a card to fill in."""

from __future__ import annotations

import glob
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from adaptclip.data.card import Card, parse_card
from adaptclip.data.card_block import PARTS, Splits
from adaptclip.data.checks import division, folds, folds_in_words
from adaptclip.data.columns import as_text, merged_labels, refuse_unclear_labels
from adaptclip.data.drafted_gates import Units, drafted_gates, drafted_outcome
from adaptclip.data.image_files import list_images
from adaptclip.data.layouts import MADE_UP_FRACTIONS, read_layout, require_text
from adaptclip.data.readers import read_image_folder, read_manifest
from adaptclip.data.table_roles import column_roles, describing_classes, propose_columns
from adaptclip.errors import CardError, shown
from adaptclip.files import write_text
from adaptclip.outputs import check_file
from adaptclip.words import is_junk, split_part

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")
"""Endings of files that are taken for a manifest; a folder with one of them is read through it."""

MAX_LISTED = 30
"""Classes that are listed by name where the understood ones are printed."""

_SECTIONS = """## Motivation

Fill in: why the set was made, and which question a model shall answer.

## Collection

Fill in: who took the images, when, where and with what; how labels were given and checked.

## How groups and levels were made

Fill in: who assigned each group and by which rule; how many images lack it.

## Known issues

Fill in, and repeat the important ones under `known_issues:` above, where they are shown at every use.

## Uses to avoid

Fill in: what the set cannot answer.

## Licence

Fill in: the terms, where the images can be had, and whom to cite.
"""


@dataclass(frozen=True)
class _Findings:
    """What a folder holds: lines of YAML for the card, and the labels for its comments."""

    source: list[str]
    splits: list[str]
    columns: list[str]
    labels: Sequence[Any]
    class_names: Sequence[str] | None = None
    bins: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    units: Units = field(default_factory=Units)


def new_card(
    folder: Path,
    out: Path,
    *,
    classes: Literal["auto", "folders"] = "auto",
    say: Callable[[str], object] = lambda sentence: None,
) -> Path:
    """Writes a commented card for a folder or a table, with what can be found out filled in.

    A folder with a CSV, TSV or JSONL table at its top is read through the table; any other by its class folders.

    Args:
        folder: class folders, split folders of class folders, images with a table of their paths, or that table.
        out: the card to write; its paths are made relative to its own folder.
        classes: "folders" takes the folders for classes whatever they look like; "auto" asks where there is a doubt.
        say: gets each sentence about what was understood and what was left aside.

    Returns:
        `out`.

    Raises:
        CardError: the folder is missing or holds no images, its table lacks a column of images or labels, or `out`
            exists.
        DataError: the table or a path in it cannot be used.
        StorageError: `out` cannot be written.
    """
    folder, out = Path(folder).expanduser(), Path(out).expanduser()
    is_table = folder.is_file() and folder.suffix.lower() in TABLE_SUFFIXES
    if not is_table and not folder.is_dir():
        raise CardError(
            f"{shown(folder)} is neither a folder nor a table of image paths ({', '.join(TABLE_SUFFIXES)}); give the "
            "folder that holds the images, or the table of their paths"
        )
    if is_table and classes == "folders":
        raise CardError(f"{shown(folder)} is a table, which has no folders for classes; give the folder of the images")
    if out.suffix != ".md":
        raise CardError(f"a card is a Markdown file: {out} should end in .md")
    if not out.exists():
        check_file(out)  # a link that leads nowhere is not followed
    else:
        raise CardError(f"{out} exists already and may hold your work; choose another name, or remove it yourself")
    for path in (folder, out):
        require_text(path)
    given, folder = (folder, folder.resolve().parent) if is_table else (None, folder)
    tables = sorted(p for p in folder.iterdir() if p.suffix.lower() in TABLE_SUFFIXES and not p.name.startswith("."))
    base = out.resolve().parent
    aside = {} if given else describing_classes(folder, tables)
    tables = [given] if given else tables
    tables = [table for table in tables if table not in aside]
    by_table = bool(tables) and classes == "auto"
    found = _of_tables(folder, tables, base) if by_table else _of_folder(folder, base, asked=classes == "folders")
    text = _card_text(given.stem if given else folder.resolve().name, found)
    parse_card(text, name=out.stem, path=out)  # a card that adaptclip itself refuses must never be written
    write_text(out, text)
    for sentence in (understood(Counter(as_text(label) for label in found.labels)), *found.notes, *aside.values()):
        say(sentence)
    return out


def understood(counts: Mapping[str, int]) -> str:
    """Words what was taken for the classes, with numbers of images, so that a wrong guess is seen at once."""
    listed = ", ".join(f"{shown(name)} {count:,}" for name, count in list(counts.items())[:MAX_LISTED])
    more = f" and {len(counts) - MAX_LISTED:,} more" if len(counts) > MAX_LISTED else ""
    return f"{len(counts):,} classes with their images: {listed}{more}"


def _relative(path: Path, base: Path) -> str:
    """The path as a card should name it: relative to the card's folder where it lies below, else in full."""
    path = path.resolve()
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else path.as_posix()


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _of_folder(folder: Path, base: Path, *, asked: bool) -> _Findings:
    listing = list_images(folder)
    if not listing.images:
        passed = f" (passed over: {listing.words()})" if listing.passed_over else ""
        raise CardError(
            f"{shown(folder)} holds no image and no table of image paths{passed}. Put the images of each class into a "
            f"folder with the class's name, or add a table ({', '.join(TABLE_SUFFIXES)}) with a column of paths and "
            "one of classes"
        )
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not is_junk(p.name)) if asked else None
    layout = read_layout(folder, Splits(fractions=dict(MADE_UP_FRACTIONS)) if asked else None, names)  # pyright: ignore[reportArgumentType]
    splits, source = layout.rule, {"kind": "image_folder", "path": str(layout.folder.resolve())}
    block = {"source": source, "splits": splits.model_dump(exclude_none=True), "class_names": names}
    rows = read_image_folder(_provisional(block), None)
    lines = [f"{part}: {_quoted(name)}" for part, name in splits.names.items()]
    return _Findings(
        source=["kind: image_folder", f"path: {_quoted(_relative(layout.folder, base))}"],
        splits=_drawn_lines(splits.fractions) if splits.fractions else lines,
        columns=[],
        labels=rows.values["label"],
        class_names=names,
        notes=list(rows.passed_over),
    )


def _provisional(block: Mapping[str, Any]) -> Card:
    """A card that is only read with, so that what is found is what the card's own reader will find."""
    return parse_card(f"---\n{json.dumps({'adaptclip': block}, ensure_ascii=False)}\n---\n", name="new")


def _drawn_lines(shares: Mapping[Any, float]) -> list[str]:
    return [
        "# No division was found, so one is drawn: stratified by class, clusters and copies kept together.",
        "fractions: {" + ", ".join(f"{part}: {share:g}" for part, share in shares.items()) + "}",
        "seed: 0",
    ]


def _of_tables(folder: Path, tables: list[Path], base: Path) -> _Findings:
    by_part = {part: [t for t in tables if split_part(t.stem)[0] == part] for part in PARTS}
    named = {part: found[0] for part, found in by_part.items() if len(found) == 1}
    if not {"train", "test"} <= set(named):
        named = {}
    if len(tables) > 1 and len(named) < len(tables):
        listed = ", ".join(shown(table.name) for table in tables[:5])
        raise CardError(
            f"{shown(folder)} holds {len(tables)} tables ({listed}); keep one, or name them after their parts (train, "
            "validation, test)"
        )
    for table in tables:
        require_text(table)
    roles = column_roles(tables[0])
    # A card's `files` are patterns, so brackets and stars in a name must not act as such.
    by_name = {part: glob.escape(_relative(table, base)) for part, table in named.items()}
    files = by_name or glob.escape(_relative(tables[0], base))
    columns = {"image": roles["image"], "label": roles["label"]}
    rows = read_manifest(_provisional({"source": {"kind": "manifest", "files": files}, "columns": columns}), base)
    labels = rows.values[roles["label"]]
    refuse_unclear_labels(labels, (), rows.store.where)
    roles, notes, parts = _division(roles, rows.unused)
    of_rows = rows.splits if named else _part_names(roles, parts, rows.unused)
    proposed = propose_columns(roles, labels, rows.unused, of_rows)
    listed = "{" + ", ".join(f"{part}: {_quoted(name)}" for part, name in by_name.items()) + "}"
    return _Findings(
        source=["kind: manifest", f"files: {listed if by_name else _quoted(str(files))}"],
        splits=[f"{part}: {part}" for part in named] or _table_splits(roles, parts, rows.unused),
        columns=proposed.columns,
        bins=proposed.bins,
        labels=labels,
        notes=[
            *rows.passed_over,
            *merged_labels(labels, rows.store.where),
            *([] if named else notes),
            *proposed.notes,
        ],
        units=proposed.units,
    )


def _division(
    roles: Mapping[str, str], values: Mapping[str, Sequence[Any]]
) -> tuple[dict[str, str], list[str], dict[str, str]]:
    """Returns the roles with the column that divides the images, sentences about it, and its part -> value."""
    own = [roles["split"]] if "split" in roles else []
    free = [name for name in values if name not in roles.values()]
    found = {name: parts for name in [*own, *free] if (parts := division(name, values[name]))}
    rest = {role: name for role, name in roles.items() if role != "split"}
    if not found:
        numbered = {name: of_folds for name in [*own, *free] if (of_folds := folds(name, values[name]))}
        unclear = [
            f"the column {name!r} may divide the images and is not used, as none of its values is called train and "
            "test; name them under `splits:` if it does" for name in own if name not in numbered
        ]  # fmt: skip
        return rest, [*unclear, *(". ".join(folds_in_words(*of_folds)) for of_folds in numbered.items())], {}
    name = next(iter(found))
    said = ", ".join(f"{part} is {shown(value)}" for part, value in found[name].items())
    notes = [f"the column {name!r} divides the images, and the card follows it: {said}"] * (name not in own)
    notes += [f"the column {other!r} divides the images too, and is not used" for other in list(found)[1:]]
    return {**rest, "split": name}, notes, found[name]


def _part_names(
    roles: Mapping[str, str], parts: Mapping[str, str], values: Mapping[str, Sequence[Any]]
) -> list[str] | None:
    part_of = {value: part for part, value in parts.items()}
    return [part_of.get(as_text(cell), "") for cell in values[roles["split"]]] if parts else None


def _table_splits(roles: Mapping[str, str], parts: Mapping[str, str], values: Mapping[str, Sequence[Any]]) -> list[str]:
    if not parts:
        return _drawn_lines(MADE_UP_FRACTIONS)
    found = Counter(as_text(cell) for cell in values[roles["split"]])
    lines = [f"column: {_quoted(roles['split'])}"]
    return lines + [f"{part}: {_quoted(value)}  # {found[value]} images" for part, value in parts.items()]


def _card_text(name: str, found: _Findings) -> str:
    counts = Counter(as_text(label) for label in found.labels)
    smallest = min(counts, key=lambda label: counts[label])
    classes = sorted(counts)
    indent = "\n    ".join
    aliases = "\n".join(f"  #   {_quoted(label)}: {_quoted(_words(label))}" for label in classes[:20])
    more = "" if len(classes) <= 20 else f"\n  #   # and {len(classes) - 20} more"
    columns = f"  columns:\n    {indent(found.columns)}\n" if found.columns else ""
    names = f"  class_names: [{', '.join(map(_quoted, found.class_names))}]\n" if found.class_names else ""
    named = dict(counts)
    if found.columns and all(label.isdecimal() for label in classes):
        named = {f"class {i}": counts.get(str(i), 0) for i in range(max(map(int, classes)) + 1)}
        numbers = ", ".join(map(_quoted, named))
        names = (
            "  # The labels are numbers: put the words that CLIP shall read here, in the order of the numbers.\n"
            f"  class_names: [{numbers}]\n"
        )
        if min(map(int, classes)) > 0:
            named = dict(counts)
            names = (
                "  # The labels are numbers that do not count from 0, and so names; words go under `aliases`.\n"
                f"  class_names: [{', '.join(map(_quoted, classes))}]\n"
            )
    bins = "".join(f"  {line}\n" for line in found.bins)
    outcome = "".join(f"  {line}\n" for line in drafted_outcome(named))
    return f"""---
# Written by `adaptclip card new`. Every key is explained in data_cards/README.md of adaptclip.
license: unknown                  # fill in: an identifier of the Hugging Face hub, such as cc-by-4.0 or other
pretty_name: {_quoted(name)}
task_categories: [image-classification]

adaptclip:
  source:
    {indent(found.source)}
  splits:
    {indent(found.splits)}
{columns}{bins}{names}  # Words for the prompt, where a class's name is a code, Latin or an abbreviation:
  # aliases:
{aliases}{more}
  # Say what the images are; for example "a photo of a {{}}, a type of flower.", or "an x-ray image of {{}}."
  templates:
    - "a photo of a {{}}."
  augmentation:
    scale: [0.08, 1.0]            # raise 0.08 where a detail decides
    horizontal_flip: true         # false for text, digits, and what has a left and a right
{outcome}  # Conditions for release; set them before you look at results.
  gates:
    {indent(drafted_gates(named, found.units))}
  known_issues: []
---
# {name}

{len(found.labels):,} images of {len(counts)} classes; the smallest class, {smallest}, has {counts[smallest]}.

{_SECTIONS}"""


def _words(label: str) -> str:
    """A class's name as a person would write it, as a first proposal."""
    return " ".join(label.replace("_", " ").replace("-", " ").split()).lower()
