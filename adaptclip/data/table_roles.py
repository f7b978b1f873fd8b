# SPDX-License-Identifier: Apache-2.0
"""What the columns of somebody's table mean: roles by name, and what a card should say of the rest."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from adaptclip.data.card_block import normalise_text
from adaptclip.data.columns import ONE_LABEL, as_number, as_text, is_function_of_class, is_missing
from adaptclip.data.drafted_gates import Units
from adaptclip.data.image_files import IMAGE_SUFFIXES
from adaptclip.data.layouts import class_folder_names
from adaptclip.data.readers import ImagePlaces
from adaptclip.data.tables import open_table
from adaptclip.errors import CardError, DataError, shown
from adaptclip.words import FEW_VALUES, identity_rank, is_place, plain, role_of, words_of

_SAMPLE = 2_000
"""Rows that are looked at to tell what a column is."""


@dataclass(frozen=True)
class Proposal:
    """Lines for a card.

    Attributes:
        columns: below `columns:`.
        bins: bins of groups that are numbers, commented.
        notes: sentences about what was understood.
        units: patients and groups, for gates.
    """

    columns: list[str]
    bins: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    units: Units = field(default_factory=Units)


def column_roles(path: Path) -> dict[str, str]:
    """Returns role -> column: "image" and "label", and "split" and "id" where there are such.

    Raises:
        CardError: no column looks like the images or the classes, or each class has a column of its own.
        DataError: the table cannot be read.
    """
    table = open_table(path)
    rows = [row for _, row in islice(table.rows, _SAMPLE)]
    if not rows:
        listed = ", ".join(map(shown, table.columns)) or "none"
        raise CardError(f"{shown(path)} lists no image: its columns are {listed}, and there are no rows")
    roles: dict[str, str] = {}
    for name in table.columns:
        role = role_of(name)
        if role and role in roles and words_of(roles[role]) == words_of(name):
            raise CardError(
                f"{shown(path)} has {roles[role]!r} and {name!r}, which read the same; rename or remove one"
            )
        if role:
            roles.setdefault(role, name)
    image = roles.get("image") or _image_column(path, table.columns, rows)
    if image is None:
        raise _lacks(path, table.columns, "image", "image paths")
    if "label" not in roles:
        _refuse_columns_of_classes(path, [name for name in table.columns if name != image], rows)
        raise _lacks(path, table.columns, "label", "classes")
    return {**roles, "image": image}


def _lacks(path: Path, columns: Sequence[str], role: str, words: str) -> CardError:
    listed = ", ".join(map(shown, columns)) or "none"
    return CardError(
        f"{shown(path)} has no column that looks like the {words}: its columns are {listed}. Call one {role!r}"
    )


def _image_column(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The column whose cells are names of images, by their endings or because the files are there."""
    places = ImagePlaces(path)
    for name in columns:
        cells = [row.get(name) for row in rows]
        if all(isinstance(cell, str) and Path(cell.strip()).suffix.lower() in IMAGE_SUFFIXES for cell in cells):
            return name
        if role_of(name) == "id":  # as in the tables of ISIC, where an id names a file
            try:
                if places.path(cells[0], column=name, line=2).is_file():
                    return name
            except DataError:
                continue
    return None


def _refuse_columns_of_classes(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Raises CardError where each class has a column of its own, as in tables of findings."""
    cells = {name: [row[name] for row in rows if not is_missing(row.get(name))] for name in columns}
    numbers = {name: {as_number(cell) for cell in found} for name, found in cells.items()}
    flags = [name for name in columns if numbers[name] and numbers[name] <= {0.0, 1.0, -1.0}]
    if len(flags) < 2:
        return
    marked = [sum(not is_missing(row.get(name)) and as_number(row[name]) == 1 for name in flags) for row in rows]
    listed = ", ".join(map(shown, flags[:4])) + (", ..." if len(flags) > 4 else "")
    if set(marked) == {1}:
        raise CardError(
            f"{shown(path)} has a column for each class ({listed}), and one of them is 1 in each row. A card needs one "
            "column with the class's name; in pandas: table['label'] = table[[those columns]].idxmax(axis=1)"
        )
    uncertain = ", with -1 for what is uncertain" if any(-1.0 in numbers[name] for name in flags) else ""
    raise CardError(
        f"{shown(path)} has a column for each finding ({listed}), and its rows have {min(marked)} to {max(marked)} of "
        f"them{uncertain}: an image has several labels. {ONE_LABEL}"
    )


def describing_classes(folder: Path, tables: Sequence[Path]) -> dict[Path, str]:
    """Returns tables that describe the classes of class folders and list no images, each with a sentence about it."""
    folders = {normalise_text(name) for name in class_folder_names(folder)}
    found: dict[Path, str] = {}
    for path in tables:
        table = open_table(path)
        rows = [row for _, row in islice(table.rows, _SAMPLE)]
        if any(role_of(name) == "image" for name in table.columns) or _image_column(path, table.columns, rows):
            continue
        for name in table.columns:
            named = {as_text(row[name]) for row in rows if not is_missing(row.get(name))}
            if len(folders) > 1 and len(named & folders) >= len(folders) / 2:
                found[path] = (
                    f"{shown(path.name)} is not used: it describes the classes, whose folders stand in its column "
                    f"{name!r}, and lists no images. To use levels, list the images in a table with a column for each"
                )
                break
    return found


def propose_columns(
    roles: Mapping[str, str],
    labels: Sequence[Any],
    others: Mapping[str, Sequence[Any]],
    parts: Sequence[str] | None = None,
) -> Proposal:
    """Returns the lines of a card about the columns of a table.

    Args:
        roles: of `column_roles`.
        labels: N cells of the label column.
        others: column -> N cells, of all but images and labels.
        parts: N names of the parts that the table itself makes, "" for rows of none; None where they are drawn.
    """
    lines = [f"image: {_quoted(roles['image'])}", f"label: {_quoted(roles['label'])}"]
    notes = []
    ids = others.get(roles.get("id", ""), ())
    if ids and len(set(map(str, ids))) == len(ids) and not any(map(is_missing, ids)):
        lines.append(f"id: {_quoted(roles['id'])}")
    cluster = _cluster_column(labels, {name: cells for name, cells in others.items() if name not in roles.values()})
    found: dict[str, Mapping[str, int]] = {}
    number = 0
    if cluster is not None:
        number = len({plain(as_text(cell)) for cell in others[cluster] if not is_missing(cell)})
        torn = _in_two_parts(others[cluster], parts)
        info = f"{number} of them, {torn or 'none'} in two parts"
        lines.append(f"cluster: {_quoted(cluster)}  # {info}" + ", which `card check` refuses" * bool(torn))
        mend = (
            "; `card check` refuses that: put each into one part, or let a split be drawn (`splits: {fractions: ...}`)"
        )
        notes.append(f"the column {cluster!r} says who or what images are of: {info}" + mend * bool(torn))
    else:
        lines.append("# cluster: patient  # a column of what must never be in two parts, if the table has one")
    groups, levels, bins = [], [], []
    for name, cells in others.items():
        if name in roles.values() or name == cluster:
            continue
        counts = Counter("unknown" if is_missing(cell) else as_text(cell) for cell in cells)
        edges = _edges(cells)
        if edges:
            found[name] = {}
            groups.append(f"#   {_quoted(name)}: {_quoted(name)}  # numbers, whose bins stand under `groups:` below")
            bins.append(f"#   {_quoted(name)}: {{bins: [{', '.join(f'{edge:g}' for edge in edges)}]}}")
        elif 2 <= len(counts) <= FEW_VALUES:
            found[name] = dict(counts.most_common())
            info = ", ".join(f"{shown(value)}: {count}" for value, count in counts.most_common(FEW_VALUES))
            groups.append(f"#   {_quoted(name)}: {_quoted(name)}  # {info}")
        classes = {as_text(label) for label in labels if not is_missing(label)}
        if 1 < len(counts) < len(classes) and is_function_of_class(cells, labels):
            levels.append(f"#   {_quoted(name)}: {_quoted(name)}  # {len(counts)} names, each class has one")
    if groups:
        lines += ["# Uncomment what shall be reported group by group:", "# groups:", *groups]
    if levels:
        lines += ["# Uncomment what is a level of a taxonomy, coarse to fine:", "# levels:", *levels]
    head = ["# Numbers become groups by rising lower edges; uncomment together with the group above:", "# groups:"]
    units = Units(None if cluster is None else (cluster, number), found)
    return Proposal(lines, [*head, *bins] if bins else [], notes, units)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _cluster_column(labels: Sequence[Any], others: Mapping[str, Sequence[Any]]) -> str | None:
    """The column of the widest thing that images can be of; places count where there are too many for groups."""
    ranked: list[tuple[int, int, str]] = []
    for position, (name, cells) in enumerate(others.items()):
        values = {as_text(cell) for cell in cells if not is_missing(cell)}
        same = is_function_of_class(cells, labels) and len(values) == len({as_text(x) for x in labels})
        rank = identity_rank(name)
        if rank is None and is_place(name) and len(values) > FEW_VALUES:
            rank = 100
        if rank is not None and len(values) > 1 and not same:
            ranked.append((rank, position, name))
    return min(ranked)[2] if ranked else None


def _in_two_parts(cells: Sequence[Any], parts: Sequence[str] | None) -> int:
    """How many values are in two or more parts, in whatever spelling; a drawn split tears none apart."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for cell, part in zip(cells, parts or (), strict=False):
        if part and not is_missing(cell):
            found[plain(as_text(cell))].add(part)
    return sum(len(several) > 1 for several in found.values())


def _edges(cells: Sequence[Any]) -> list[float]:
    """Rounded lower edges of three bins of about as many rows each; [] for what is no measured number."""
    known = [cell for cell in cells if not is_missing(cell)]
    numbers = [number for cell in known if (number := as_number(cell)) is not None]
    different = len(set(numbers))
    if len(numbers) < len(known) or different < 5 or (different <= FEW_VALUES and len(numbers) >= 5 * different):
        return []
    ordered = sorted(numbers)
    low, high = ordered[0], ordered[-1]
    step = next(s for e in range(-6, 12) for s in (10.0**e, 2 * 10.0**e, 5 * 10.0**e) if (high - low) / s <= 20)
    cuts = [low, ordered[len(ordered) // 3], ordered[2 * len(ordered) // 3]]
    return sorted({step * (cut // step) for cut in cuts})
