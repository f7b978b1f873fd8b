# SPDX-License-Identifier: Apache-2.0
"""`adaptclip card new`: looks at a folder of images or a table of image paths, and writes a card to fill in."""

from __future__ import annotations

import glob
import itertools
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adaptclip.data.asking import Ask, Given, Unclear, answered
from adaptclip.data.card import Card, parse_card
from adaptclip.data.card_block import PARTS, Splits, normalise_text
from adaptclip.data.checks import division, fold_parts, folds
from adaptclip.data.columns import as_text, merged_labels
from adaptclip.data.drafted_gates import Units, drafted_gates, drafted_outcome
from adaptclip.data.image_files import list_images
from adaptclip.data.label_forms import Labels, understood_labels
from adaptclip.data.layouts import MADE_UP_FRACTIONS, nested_levels, read_layout, require_text
from adaptclip.data.readers import RawRows
from adaptclip.data.several_forms import flag_columns, of_cells, of_flags, several_labels
from adaptclip.data.sources import read_rows
from adaptclip.data.table_files import (
    Key,
    describing_classes,
    encoded_column,
    join_of,
    likely_join,
    other_sheets,
    own_columns,
    sheet_of,
    sorted_tables,
    too_many,
)
from adaptclip.data.table_roles import column_roles, level_lines, propose_columns
from adaptclip.data.tables import TABLE_SUFFIXES, open_table
from adaptclip.data.transforms import decode_image
from adaptclip.errors import CardError, DataError, shown
from adaptclip.files import write_text
from adaptclip.outputs import check_file
from adaptclip.words import is_junk

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
    labels: Labels
    bins: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    units: Units = field(default_factory=Units)
    allow: list[str] = field(default_factory=list)


def new_card(
    folder: Path,
    out: Path,
    *,
    given: Given = Given(),  # noqa: B008 - frozen
    ask: Ask | None = None,
    say: Callable[[str], object] = lambda sentence: None,
) -> Path:
    """Writes a commented card for a folder or a table, with what can be found out filled in.

    A folder with a table at its top is read through the table; any other by its class folders.

    Args:
        folder: class folders, split folders of class folders, nested folders, images with a table of their paths, that
            table, or Parquet files.
        out: the card to write; its paths are made relative to its own folder.
        given: what cannot be guessed. With `classes` "folders" the folders at the top are the classes whatever they
            look like, with "nested" the innermost ones.
        ask: asks a person about what is unclear; None raises an error that says all of it.
        say: gets each sentence about what was understood and what was left aside, before the card is written.

    Returns:
        `out`.

    Raises:
        Unclear: something is unclear that a flag can say; the message has the command line to type.
        CardError: the folder is missing or holds no images, its table lacks a column of images or labels, or `out`
            exists.
        DataError: the table or a path in it cannot be used.
        StorageError: `out` cannot be written.
    """
    folder, out = Path(folder).expanduser(), Path(out).expanduser()
    is_table = folder.is_file() and folder.suffix.lower() in TABLE_SUFFIXES
    if not is_table and not folder.is_dir():
        if folder.is_file():
            open_table(folder)  # says what its ending is not
        raise CardError(
            f"{shown(folder)} is neither a folder nor a table of image paths ({', '.join(TABLE_SUFFIXES)}); give the "
            "folder that holds the images, or the table of their paths"
        )
    if is_table and (given.classes != "auto" or given.level):
        raise CardError(f"{shown(folder)} is a table, which has no folders for classes; give the folder of the images")
    if out.suffix != ".md":
        raise CardError(f"a card is a Markdown file: {out} should end in .md")
    if not out.exists():
        check_file(out)  # a link that leads nowhere is not followed
    else:
        raise CardError(f"{out} exists already and may hold your work; choose another name, or remove it yourself")
    for path in (folder, out):
        require_text(path)
    while True:
        try:
            found = _looked_at(folder, out.resolve().parent, given, is_table=is_table)
            break
        except Unclear as unclear:
            worded = unclear.with_command(given, folder, out)
            if ask is None:
                raise worded from unclear
            given = answered(given, worded, ask)
    text = _card_text(folder.stem if is_table else folder.resolve().name, found)
    parse_card(text, name=out.stem, path=out)  # a card that adaptclip itself refuses must never be written
    for sentence in (understood(found.labels.counts), *found.notes):
        say(sentence)
    write_text(out, text)
    return out


def _looked_at(folder: Path, base: Path, given: Given, *, is_table: bool) -> _Findings:
    if is_table:
        return of_tables(folder.resolve().parent, [folder], base, given)
    tables = sorted(p for p in folder.iterdir() if p.suffix.lower() in TABLE_SUFFIXES and not p.name.startswith("."))
    nested = given.level or given.classes != "auto"
    describing = describing_classes(folder, tables) if not nested else []
    lists = [table for table in tables if table not in [key.path for key in describing]]
    if lists and not nested:
        return of_tables(folder, lists, base, given)
    return of_folder(folder, base, given, describing)


def understood(counts: Mapping[str, int]) -> str:
    """Words what was taken for the classes, with numbers of images, so that a wrong guess is seen at once."""
    listed = ", ".join(f"{shown(name)} {count:,}" for name, count in list(counts.items())[:MAX_LISTED])
    more = f" and {len(counts) - MAX_LISTED:,} more" if len(counts) > MAX_LISTED else ""
    return f"{len(counts):,} classes with their images: {listed}{more}"


def _relative(path: Path, base: Path) -> str:
    """The path as a card should name it: relative to the card's folder where it lies below, else in full."""
    path = path.resolve()
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else path.as_posix()


def _quoted(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def of_folder(folder: Path, base: Path, given: Given, describing: Sequence[Key]) -> _Findings:
    """Looks at class folders.

    Args:
        folder: of the class folders.
        base: folder of the card.
        given: what the flags say.
        describing: how tables beside the folders are joined to the classes.
    """
    listing = list_images(folder)
    if not listing.images:
        passed = f" (passed over: {listing.words()})" if listing.passed_over else ""
        raise CardError(
            f"{shown(folder)} holds no image and no table of image paths{passed}. Put the images of each class into a "
            f"folder with the class's name, or add a table ({', '.join(TABLE_SUFFIXES)}) with a column of paths and "
            "one of classes"
        )
    asked = given.classes == "folders"
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not is_junk(p.name)) if asked else None
    levels = given.level or nested_levels(folder, asked=given.classes == "nested")
    layout = read_layout(folder, Splits(fractions=dict(MADE_UP_FRACTIONS)) if asked else None, names, len(levels))  # pyright: ignore[reportArgumentType]
    splits, source = layout.rule, {"kind": "image_folder", "path": str(layout.folder.resolve())}
    source |= {"levels": list(levels)} if levels else {}
    classes = {"label": [name for _, name, _ in layout.classes]}
    joins = [*describing, *(join_of(text, classes) for text in given.join)]
    source |= {"join": _in_card(joins, base)} if joins else {}
    block = {"source": source, "splits": splits.model_dump(exclude_none=True), "class_names": names}
    rows = read_rows(_provisional(block), base)
    labels = list(rows.values["label"])
    counts = Counter(labels)
    of_rows = None if splits.fractions or rows.splits is None else [splits.parts.get(name, "") for name in rows.splits]
    lines = [f"class_names: [{', '.join(map(_quoted, names))}]"] if names else []
    notes = [*rows.passed_over, *rows.notes, _division_words(of_rows), *_opened(rows)]
    columns, proposed = [], None
    if joins:
        proposed = propose_columns(
            {"image": "image", "label": "label"}, "label: label", labels, rows.unused, None, given
        )
        columns = [*proposed.columns[:2], *level_lines(rows.unused, labels, proposed.columns[2:])]
        notes = [*(key.words() for key in joins), *proposed.notes, *notes]
    if levels:
        notes.insert(0, f"the folders above the classes are levels: {', '.join(levels)}")
    parts = [f"{part}: {_quoted(name)}" for part, name in splits.names.items()]
    return _Findings(
        source=["kind: image_folder", f"path: {_quoted(_relative(layout.folder, base))}", *_more_lines(source)],
        splits=_drawn_lines(splits.fractions) if splits.fractions else parts,
        columns=columns,
        labels=Labels(labels, lines, [], dict(counts)),
        bins=proposed.bins if proposed else [],
        notes=notes,
        units=proposed.units if proposed else Units(),
        allow=proposed.allow if proposed else [],
    )


def _found_joins(
    folder: Path, tables: Sequence[Path], others: Sequence[Path], own: Mapping[str, Sequence[Any]]
) -> list[Key]:
    """How the tables that lie beside the one of the images are joined to it."""
    found = [likely_join(path, own) for path in others]
    if None in found:
        raise too_many(folder, tables)
    return [key for key in found if key is not None]


def _in_card(keys: Sequence[Key], base: Path) -> list[dict[str, Any]]:
    return [key.in_card(_relative(key.path, base)) for key in keys]


def _more_lines(source: Mapping[str, Any]) -> list[str]:
    """Lines of the source's keys that not every card has."""
    lines = [f"{key}: {_quoted(source[key])}" for key in ("sheet", "levels") if source.get(key)]
    if source.get("join"):
        lines += ["join:", *(f"  - {_quoted(join)}" for join in source["join"])]
    return lines


def _opened(rows: RawRows) -> list[str]:
    """Opens three images, and returns sentences about those that cannot be read.

    Raises:
        DataError: none can be read, for another reason than a window that the card is to say.
    """
    chosen = sorted({0, len(rows) // 2, len(rows) - 1})
    problems = [problem for row in chosen if (problem := _problem(rows, row))]
    if len(problems) == len(chosen) and "window" not in problems[0]:
        raise DataError(f"the first, middle and last image cannot be read: {'; '.join(problems)}")
    if problems:
        return [f"{len(problems)} of {len(chosen)} images that were opened cannot be read: {problems[0]}"]
    return [f"{len(chosen)} images were opened and can be read"]


def _problem(rows: RawRows, row: int) -> str:
    """Why an image cannot be read; "" where it can."""
    where = rows.store.where(row)
    try:
        decode_image(rows.store.read(row), row=where)
    except DataError as error:
        return str(error) if str(error).startswith(where) else f"{where}: {error}"
    return ""


def _division_words(parts: Sequence[str] | None) -> str:
    """Words how the images are divided: N names of parts, "" for none; None for a split that is drawn."""
    if parts is None:
        return "a split is drawn: " + ", ".join(f"{part} {share:.0%}" for part, share in MADE_UP_FRACTIONS.items())
    counts = Counter(parts)
    return "parts: " + ", ".join(f"{part} {counts[part]:,}" for part in PARTS if counts[part])


def _provisional(block: Mapping[str, Any]) -> Card:
    """A card that is only read with, so that what is found is what the card's own reader will find."""
    return parse_card(f"---\n{json.dumps({'adaptclip': block}, ensure_ascii=False)}\n---\n", name="new")


def _drawn_lines(shares: Mapping[Any, float]) -> list[str]:
    return [
        "# No division was found, so one is drawn: stratified by class, clusters and copies kept together.",
        "fractions: {" + ", ".join(f"{part}: {share:g}" for part, share in shares.items()) + "}",
        "seed: 0",
    ]


def of_tables(folder: Path, tables: list[Path], base: Path, given: Given) -> _Findings:
    """Looks at the table of the images, or at a table of each part, and at those that can be joined to it."""
    for table in tables:
        require_text(table)
    named, listing, others = sorted_tables(folder, tables)
    first = listing[0]
    sheet = sheet_of(first, given.sheet)
    encoded = encoded_column(first, normalise_text(given.image_column))
    own = own_columns(first, sheet)
    beside, unused = other_sheets(first, sheet, own)
    joins = [*(join_of(text, own) for text in given.join), *_found_joins(folder, tables, others, own), *beside]
    added = [name for key in joins for name in open_table(key.path, key.sheet).columns]
    tables_of_flags = [own, *(own_columns(key.path, key.sheet) for key in joins)]
    flagged = next(((columns, flags) for columns in tables_of_flags if (flags := flag_columns(columns, given))), None)
    roles = column_roles(first, replace(given, sheet=sheet), added, encoded, flagged is not None)
    files = {part: _pattern(paths, base) for part, paths in named.items()} or _pattern(listing, base)
    source: dict[str, Any] = {"kind": "manifest" if encoded is None else "parquet", "files": files}
    source |= {"sheet": sheet} if sheet else {}
    source |= {"join": _in_card(joins, base)} if joins else {}
    label = roles.get("label")
    form = of_flags(*flagged, given) if label is None and flagged else None
    columns: dict[str, Any] = {"image": roles["image"]}
    columns |= {"labels": list(form.columns)} if form else {"label": label}
    rows = read_rows(_provisional({"source": source, "columns": columns} | (form.block() if form else {})), base)
    form = form or of_cells(str(label), rows.values[str(label)])
    if form is not None:
        labels = several_labels(form, rows.values, label, rows.class_names, rows.store.where)
    else:
        labels = understood_labels(str(label), rows.values[str(label)], rows.class_names, rows.store.where)
    of_classes = [label] if label is not None else [*form.columns] if form else []
    aside = {*of_classes, *(form.none if form else ())}
    cells = {name: found for name, found in {**rows.values, **rows.unused}.items() if name not in aside}
    roles, notes, splits = _division(roles, cells)
    of_rows = rows.splits if named else _part_names(splits, cells)
    line = f"labels: {_quoted(of_classes)}" if label is None else f"label: {_quoted(label)}"
    proposed = propose_columns(roles, line, labels.values, cells, of_rows, given, levels=form is None)
    taxonomy = form is None and any(key.own == label for key in joins)
    lines = proposed.columns
    if taxonomy:
        at = next((i for i, line in enumerate(lines) if line.startswith("#") or line.startswith("groups:")), len(lines))
        lines = [*lines[:at], *level_lines(rows.unused, labels.values, lines[at:])]
    return _Findings(
        source=[f"kind: {source['kind']}", f"files: {_quoted(files)}", *_more_lines(source)],
        splits=[f"{part}: {part}" for part in named] or _table_splits(splits, of_rows),
        columns=lines,
        bins=proposed.bins,
        labels=labels,
        notes=[
            *rows.passed_over,
            *rows.notes,
            *(merged_labels(rows.values[label], rows.store.where) if label is not None and form is None else ()),
            *labels.notes,
            *([] if named else notes),
            *(key.words() for key in joins),
            *unused,
            *proposed.notes,
            _division_words(of_rows),
            *_opened(rows),
        ],
        units=proposed.units,
        allow=proposed.allow,
    )


def _pattern(paths: Sequence[Path], base: Path) -> str | list[str]:
    """What `files` of a card says: patterns, so that brackets and stars in a name must not act as such."""
    patterns = [glob.escape(_relative(path, base)) for path in paths]
    folder, names = paths[0].parent, [path.name for path in paths]
    if len(paths) > 2 and {path.parent for path in paths} == {folder}:
        pattern = glob.escape(_shared_start(names)) + "*" + paths[0].suffix
        if sorted(folder.glob(pattern)) == sorted(paths):
            return f"{glob.escape(_relative(folder, base))}/{pattern}"
    return patterns[0] if len(patterns) == 1 else patterns


def _shared_start(names: Sequence[str]) -> str:
    """The characters that all names begin with."""
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in same)


def _division(
    roles: Mapping[str, str], values: Mapping[str, Sequence[Any]]
) -> tuple[dict[str, str], list[str], dict[str, Any]]:
    """Returns the roles with the column that divides the images, sentences about it, and the card's `splits`."""
    own = [roles["split"]] if "split" in roles else []
    free = [name for name in values if name not in roles.values()]
    found = {name: parts for name in [*own, *free] if (parts := division(name, values[name]))}
    rest = {role: name for role, name in roles.items() if role != "split"}
    if found:
        name = next(iter(found))
        said = ", ".join(f"{part} is {shown(value)}" for part, value in found[name].items())
        notes = [f"the column {name!r} divides the images, and the card follows it: {said}"] * (name not in own)
        notes += [f"the column {other!r} divides the images too, and is not used" for other in list(found)[1:]]
        return {**rest, "split": name}, notes, {"column": name, **found[name]}
    numbered = {name: of_folds for name in [*own, *free] if (of_folds := folds(name, values[name]))}
    if numbered:
        name, of_folds = next(iter(numbered.items()))
        parts = fold_parts(of_folds)
        said = ", ".join(f"{part} is {', '.join(names)}" for part, names in parts.items())
        return (
            {**rest, "split": name},
            [f"the column {name!r} numbers {len(of_folds)} folds, and the card follows it: {said}"],
            {"column": name, **parts},
        )
    unclear = [
        f"the column {name!r} may divide the images and is not used, as none of its values is called train and "
        "test; name them under `splits:` if it does" for name in own
    ]  # fmt: skip
    return rest, unclear, {}


def _part_names(splits: Mapping[str, Any], values: Mapping[str, Sequence[Any]]) -> list[str] | None:
    if not splits:
        return None
    part_of = {}
    for part in PARTS:
        own = splits.get(part, ())
        part_of |= dict.fromkeys([own] if isinstance(own, str) else own, part)
    return [part_of.get(as_text(cell), "") for cell in values[splits["column"]]]


def _table_splits(splits: Mapping[str, Any], of_rows: Sequence[str] | None) -> list[str]:
    if not splits:
        return _drawn_lines(MADE_UP_FRACTIONS)
    counts = Counter(of_rows)
    lines = [f"column: {_quoted(splits['column'])}"]
    return lines + [f"{part}: {_quoted(splits[part])}  # {counts[part]} images" for part in PARTS if part in splits]


def _card_text(name: str, found: _Findings) -> str:
    counts = found.labels.counts
    smallest = min(counts, key=lambda label: counts[label])
    classes = sorted(counts)
    indent = "\n    ".join
    aliases = "\n".join(f"  #   {_quoted(label)}: {_quoted(_words(label))}" for label in classes[:20])
    more = "" if len(classes) <= 20 else f"\n  #   # and {len(classes) - 20} more"
    columns = f"  columns:\n    {indent(found.columns)}\n" if found.columns else ""
    names = "".join(f"  {line}\n" for line in found.labels.lines)
    named = found.labels.named
    allow = f"  allow: {_quoted(found.allow)}\n" if found.allow else ""
    bins = "".join(f"  {line}\n" for line in found.bins)
    several = found.labels.shown is not None
    outcome = "" if several else "".join(f"  {line}\n" for line in drafted_outcome(named))
    gates = drafted_gates(named, found.units, several=several)
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
{columns}{bins}{names}{allow}  # Words for the prompt, where a class's name is a code, Latin or an abbreviation:
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
    {indent(gates)}
  known_issues: []
---
# {name}

{len(found.labels.values):,} images of {len(counts)} classes; the smallest class, {smallest}, has {counts[smallest]}.

{_SECTIONS}"""


def _words(label: str) -> str:
    """A class's name as a person would write it, as a first proposal."""
    return " ".join(label.replace("_", " ").replace("-", " ").split()).lower()
