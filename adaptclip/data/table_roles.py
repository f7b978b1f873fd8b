# SPDX-License-Identifier: Apache-2.0
"""What the columns of somebody's table mean: roles by name, and what a card should say of the rest."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from adaptclip.data.asking import Given, Question, Unclear
from adaptclip.data.card_block import normalise_text
from adaptclip.data.columns import (
    as_number,
    as_text,
    is_function_of_class,
    is_like_a_cluster,
    is_missing,
)
from adaptclip.data.drafted_gates import Units
from adaptclip.data.image_files import IMAGE_SUFFIXES
from adaptclip.data.image_places import ImagePlaces
from adaptclip.data.tables import open_table
from adaptclip.errors import CardError, DataError, agree, did_you_mean, shown
from adaptclip.words import FEW_VALUES, identity_rank, is_measure, is_place, plain, role_of, words_of

SAMPLE = 2_000
"""Rows that are looked at to tell what a column is."""

_UNITS_OF_A_BIN = 15
"""Patients (or images) from which on a bin has some among the test images of a drawn split, 199 times of 200."""

_MOST_VALUES = 50
"""Different values up to which a column can be a group when it is asked for."""


@dataclass(frozen=True)
class Proposal:
    """Lines for a card.

    Attributes:
        columns: below `columns:`.
        bins: bins of groups that are numbers, commented unless they are asked for.
        notes: sentences about what was understood.
        units: patients and groups, for gates.
        allow: checks that may fail.
    """

    columns: list[str]
    bins: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    units: Units = field(default_factory=Units)
    allow: list[str] = field(default_factory=list)


def column_roles(
    path: Path, given: Given, joined: Sequence[str] = (), encoded: str | None = None, has_flags: bool = False
) -> dict[str, str]:
    """Returns role -> column: "image" and "label", and "split" and "id" where there are such.

    Args:
        path: the table that lists the images.
        given: what the flags say.
        joined: columns of tables that are joined.
        encoded: column of encoded images.
        has_flags: whether there is a column of 0 and 1 for each class, which may stand for the one of the classes.

    Raises:
        Unclear: no column looks like the images or the classes.
        CardError: a flag names a column that there is not, there are no rows, or two names read the same.
        DataError: the table cannot be read.
    """
    table = open_table(path, given.sheet)
    rows = [row for _, row in islice(table.rows, SAMPLE)]
    if not rows:
        listed = ", ".join(map(shown, table.columns)) or "none"
        raise CardError(f"{shown(path)} lists no image: its columns are {listed}, and there are no rows")
    columns = list(dict.fromkeys([*table.columns, *joined]))
    _refuse_unknown(path, [*columns, *([encoded] if encoded else [])], given)
    asked = {"image": encoded or normalise_text(given.image_column), "label": normalise_text(given.label_column)}
    roles: dict[str, str] = {role: name for role, name in asked.items() if name is not None}
    for name in columns:
        role = role_of(name)
        if role and asked.get(role) is None and role in roles and words_of(roles[role]) == words_of(name):
            raise CardError(
                f"{shown(path)} has {roles[role]!r} and {name!r}, which read the same; rename or remove one, or name "
                f"the one that is meant with --{role}-column"
            )
        if role and name not in roles.values():
            roles.setdefault(role, name)
    questions: list[Question] = []
    image = roles.get("image") or _image_column(path, table.columns, rows)
    if image is None:
        questions.append(_lacks(path, table.columns, "image", "image paths", _likely_image(table.columns, rows)))
    if "label" not in roles and not has_flags:
        others = [name for name in table.columns if name != image]
        questions.append(_lacks(path, table.columns, "label", "classes", _likely_label(others, rows)))
    if questions:
        raise Unclear(questions)
    assert image is not None
    return {**roles, "image": image}


def _refuse_unknown(path: Path, columns: Sequence[str], given: Given) -> None:
    """Raises CardError about columns that flags name and that there are not."""
    named = [("--image-column", given.image_column), ("--label-column", given.label_column)]
    named += [("--cluster-column", given.cluster_column)]
    named += [("--group", name) for name in given.group] + [("--shared", name) for name in given.shared]
    wrong = [(flag, name) for flag, name in named if name is not None and normalise_text(name) not in columns]
    if wrong:
        flag, name = wrong[0]
        more = "".join(f"; nor {other!r} for {other_flag}" for other_flag, other in wrong[1:])
        raise CardError(f"{shown(path)} has no column {name!r} for {flag}{more}. {did_you_mean(name, columns)}")


def _lacks(path: Path, columns: Sequence[str], role: str, words: str, guess: str | None) -> Question:
    listed = ", ".join(map(shown, columns)) or "none"
    flag = f"--{role}-column"
    return Question(
        f"{shown(path)} has no column that looks like the {words}: its columns are {listed}",
        {flag: tuple(columns)},
        (flag, guess or "COLUMN"),
    )


def _likely_image(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The column in which most cells end like images, or none."""

    def ends_so(name: str) -> int:
        return sum(Path(str(row.get(name) or "")).suffix.lower() in IMAGE_SUFFIXES for row in rows)

    best = max(columns, key=ends_so, default=None)
    return best if best is not None and ends_so(best) else None


def _likely_label(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The column with the fewest values of those that have two or more, each in several rows; or none."""
    found = []
    for position, name in enumerate(columns):
        counts = Counter(as_text(row[name]) for row in rows if not is_missing(row.get(name)))
        if 2 <= len(counts) <= len(rows) / 2 and role_of(name) is None and identity_rank(name) is None:
            found.append((len(counts), position, name))
    return min(found)[2] if found else None


def _image_column(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The column whose cells are names of images, by their endings or because the files are there.

    Raises:
        DataError: the files of a column of ids are there but for the zeros before their numbers.
    """
    places = ImagePlaces(path)
    for name in columns:
        cells = [cell for row in rows if not is_missing(cell := row.get(name))]
        if cells and all(
            isinstance(cell, str) and Path(cell.strip()).suffix.lower() in IMAGE_SUFFIXES for cell in cells
        ):
            return name
    # As in the tables of ISIC, where an id names a file; columns that are called so come first.
    for name in sorted(columns, key=lambda name: role_of(name) != "id"):
        cells = [cell for row in rows if not is_missing(cell := row.get(name))]
        different = list(dict.fromkeys(map(str, cells)))
        if len(different) < 2 or 2 * len(different) < len(cells) or role_of(name) in ("label", "split"):
            continue
        try:
            if all(places.path(cell, column=name, line=2).is_file() for cell in different[:3]):
                return name
        except DataError as error:
            if role_of(name) == "id" and "zeros" in str(error):
                raise
    return None


def lists_images(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a table has a column of images, by its name or by its cells."""
    return any(role_of(name) == "image" for name in columns) or _image_column(path, columns, rows) is not None


def propose_columns(
    roles: Mapping[str, str],
    label_line: str,
    labels: Sequence[Any],
    others: Mapping[str, Sequence[Any]],
    parts: Sequence[str] | None = None,
    given: Given = Given(),  # noqa: B008 - frozen
    *,
    levels: bool = True,
) -> Proposal:
    """Returns the lines of a card about the columns of a table.

    Args:
        roles: of `column_roles`.
        label_line: the line about the column or columns of the classes.
        labels: N class names.
        others: column -> N cells, of all but images and labels.
        parts: N names of the parts that the table itself makes, "" for rows of none; None where they are drawn.
        given: what the flags say.
        levels: whether there may be levels of a taxonomy, which only classes have of which an image shows one.

    Raises:
        Unclear: a column may say who or what images are of, and nothing says whether it does.
        CardError: a column that is asked for is no group.
    """
    lines = [f"image: {_quoted(roles['image'])}", label_line]
    ids = others.get(roles.get("id", ""), ())
    if ids and len(set(map(str, ids))) == len(ids) and not any(map(is_missing, ids)):
        lines.append(f"id: {_quoted(roles['id'])}")
    free = {name: cells for name, cells in others.items() if name not in roles.values()}
    asked = [normalise_text(name) for name in given.group]
    cluster = normalise_text(given.cluster_column) or _cluster_column(
        labels, {name: cells for name, cells in free.items() if name not in (*asked, *given.shared)}
    )
    line, notes, number = _cluster_line(cluster, others, parts)
    lines.append(line)
    free = {name: cells for name, cells in others.items() if name not in (*roles.values(), cluster) or name in asked}
    units = others[cluster] if cluster is not None else None
    straddling = [name for name, cells in free.items() if _straddles(name, cells, labels, units, parts)]
    asked += [name for name in straddling if is_measure(name) and _edges(free[name]) and name not in asked]
    unclear = [name for name in straddling if name not in (*asked, *map(normalise_text, given.shared))]
    if unclear:
        raise Unclear([_unit_or_not(name, free[name], cluster) for name in unclear])
    found: dict[str, Mapping[str, int]] = {}
    active, groups, chain, bins, active_bins = [], [], [], [], []
    classes = set(labels)
    for name, cells in free.items():
        counts = Counter("unknown" if is_missing(cell) else as_text(cell) for cell in cells)
        edges = _edges(cells)
        if name in asked:
            safe = _filled(edges, cells, units, parts) if edges else []
            info = _group_info(name, counts, safe)
            found[name] = {} if edges else dict(counts.most_common())
            active.append(f"  {_quoted(name)}: {_quoted(name)}  # {info}")
            if edges:
                active_bins.append(f"  {_quoted(name)}: {{bins: [{', '.join(map(_number, safe))}]}}")
            notes.append(f"results are reported by {name!r}: {info}")
        elif edges:
            found[name] = {}
            groups.append(f"#   {_quoted(name)}: {_quoted(name)}  # numbers, whose bins stand under `groups:` below")
            bins.append(f"#   {_quoted(name)}: {{bins: [{', '.join(map(_number, edges))}]}}")
        elif 2 <= len(counts) <= FEW_VALUES:
            found[name] = dict(counts.most_common())
            info = ", ".join(f"{shown(value)}: {count}" for value, count in counts.most_common(FEW_VALUES))
            groups.append(f"#   {_quoted(name)}: {_quoted(name)}  # {info}")
        whole = levels and not any(map(is_missing, cells))
        if whole and 1 < len(counts) < len(classes) and is_function_of_class(cells, labels):
            line = f"#   {_quoted(name)}: {_quoted(name)}  # {len(counts)} names, each class has one"
            chain.append((len(counts), line))
    lines += ["groups:", *active] if active else []
    if groups:
        lines += ["# Uncomment what shall be reported group by group:", *([] if active else ["# groups:"])]
        lines += groups
    if chain:
        lines += ["# Uncomment what is a level of a taxonomy, coarse to fine:", "# levels:"]
        lines += [line for _, line in sorted(chain, key=lambda one: one[0])]
    head = ["# Numbers become groups by rising lower edges; uncomment together with the group above:"]
    below = ["groups:", *active_bins] if active_bins else []
    below += [*head, *([] if active_bins else ["# groups:"]), *bins] if bins else []
    allow = [f"shared_values.{normalise_text(name)}" for name in given.shared]
    return Proposal(lines, below, notes, Units(None if cluster is None else (cluster, number), found), allow)


def _cluster_line(
    cluster: str | None, others: Mapping[str, Sequence[Any]], parts: Sequence[str] | None
) -> tuple[str, list[str], int]:
    """Returns the line of the card about who or what images are of, sentences about it, and how many there are."""
    if cluster is None:
        return "# cluster: patient  # a column of what must never be in two parts, if the table has one", [], 0
    number = len({plain(as_text(cell)) for cell in others[cluster] if not is_missing(cell)})
    torn = _in_two_parts(others[cluster], parts)
    info = f"{number} of them, {torn or 'none'} in two parts"
    mend = "; `card check` refuses that: put each into one part, or let a split be drawn (`splits: {fractions: ...}`)"
    note = f"the column {cluster!r} says who or what images are of: {info}" + mend * bool(torn)
    return f"cluster: {_quoted(cluster)}  # {info}" + ", which `card check` refuses" * bool(torn), [note], number


def _group_info(name: str, counts: Mapping[str, int], edges: Sequence[float]) -> str:
    if edges:
        few = ", as there are too few patients or images for more" if len(edges) == 1 else ""
        stand = agree(len(edges), "bin that stands", "bins that stand")
        return f"numbers, in {len(edges)} {stand} under `groups:` below{few}"
    if len(counts) > _MOST_VALUES:
        example = shown(next(iter(counts)))
        raise CardError(
            f"the column {name!r} has {len(counts):,} different values, such as {example!r}, and is no group; where it "
            "holds numbers, write every cell as one and leave unknown ones empty, and it is read in bins"
        )
    return ", ".join(f"{shown(value)}: {count}" for value, count in Counter(counts).most_common(FEW_VALUES))


def _unit_or_not(name: str, cells: Sequence[Any], cluster: str | None) -> Question:
    """Asks whether a column says who or what images are of."""
    number = len({as_text(cell) for cell in cells if not is_missing(cell)})
    beside = f" beside {cluster!r}" if cluster else ""
    one = {"--cluster-column": (name,), "--group": (name,), "--shared": (name,)}
    if not _edges(cells) and number > _MOST_VALUES:
        del one["--group"]
    what = " for a number or another attribute by which results are reported," if "--group" in one else ""
    return Question(
        f"the column {name!r}{beside} has {number} values that several images share, and may say who or what images "
        f"are of: --cluster-column if it does, so that none is in two parts;{what} --shared if it may be in several",
        one,
        ("--shared" if cluster else "--cluster-column", name),
    )


def _straddles(
    name: str, cells: Sequence[Any], labels: Sequence[Any], units: Sequence[Any] | None, parts: Sequence[str] | None
) -> bool:
    """Whether `card check` would ask about a column that the card does not use: its values are in several parts."""
    if not is_like_a_cluster(name, cells, labels):
        return False
    found: defaultdict[str, set[Any]] = defaultdict(set)
    for row, cell in enumerate(cells):
        if is_missing(cell) or (parts is not None and not parts[row]):
            continue
        own = row if units is None or is_missing(units[row]) else plain(as_text(units[row]))
        found[as_text(cell)].add(parts[row] if parts is not None else own)
    return any(len(several) > 1 for several in found.values())


def level_lines(columns: Mapping[str, Sequence[Any]], labels: Sequence[str], others: Sequence[str]) -> list[str]:
    """Returns the lines of a card below `columns:` with the levels of a taxonomy that was joined to the classes.

    Levels are columns of which each finer one decides the coarser ones, as families decide orders.

    Args:
        columns: column -> N cells.
        labels: N class names.
        others: lines that are proposed besides.
    """
    names = {
        name: len({as_text(cell) for cell in cells if not is_missing(cell)})
        for name, cells in columns.items()
        if is_function_of_class(cells, labels) and not any(map(is_missing, cells))
    }
    chain: list[str] = []
    finer: Sequence[Any] = labels
    for name in sorted(names, key=lambda name: -names[name]):
        if 1 < names[name] < len(set(finer)) and is_function_of_class(columns[name], finer):
            chain.insert(0, name)
            finer = [as_text(cell) for cell in columns[name]]
    lines = (
        ["levels:", *(f"  {_quoted(name)}: {_quoted(name)}  # {names[name]} names" for name in chain)] if chain else []
    )
    said = "# Uncomment what is a level of a taxonomy, coarse to fine:"
    kept = list(others[: others.index(said)]) if said in others else list(others)
    return [*lines, *(line for line in kept if not any(line.startswith(f"#   {_quoted(name)}:") for name in chain))]


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
    step = next(
        (s for e in range(-12, 15) for s in (10.0**e, 2 * 10.0**e, 5 * 10.0**e) if (high - low) / s <= 20), None
    )
    if step is None:
        return []
    cuts = [low, ordered[len(ordered) // 3], ordered[2 * len(ordered) // 3]]
    edges = sorted({float(_number(step * (cut // step))) for cut in cuts})
    while edges[0] > low:  # rounding may lift it above the smallest number
        edges[0] = float(_number(edges[0] - step))
    return edges


def _filled(
    edges: list[float], cells: Sequence[Any], units: Sequence[Any] | None, parts: Sequence[str] | None
) -> list[float]:
    """Returns the edges of those bins that have test images, or so many units that a drawn test part has some."""
    rows: list[tuple[float, Any]] = []
    for row, cell in enumerate(cells):
        number = as_number(cell)
        if number is None or (parts is not None and parts[row] != "test"):
            continue
        rows.append((number, row if units is None or is_missing(units[row]) else plain(as_text(units[row]))))
    least = _UNITS_OF_A_BIN if parts is None else 1
    kept = list(edges)
    for _ in edges[1:]:
        inner = [{unit for x, unit in rows if low <= x < high} for low, high in pairwise([*kept, float("inf")])]
        thin = next((i for i, held in enumerate(inner) if len(held) < least), None)
        if thin is None or len(kept) == 1:
            break
        del kept[max(thin, 1)]  # the first edge must stay
    return kept


def _number(value: float) -> str:
    """A number as a card writes it, without rounding that shows."""
    return f"{value:.12g}"
