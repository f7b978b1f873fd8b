# SPDX-License-Identifier: Apache-2.0
"""Reads the predictions of any model from CSV, TSV or Parquet; `types.Predictions.load` is its only caller.

Columns, by name:

    id              text or number, all different; left out, rows are numbered from 0
    file            name of the image's file, for people; left out, they are called by their ids
    label           true class: a class name, or a whole number that counts through the class names
    prob_NAME       probability of the class NAME (or of class number NAME), for every class; rows sum to 1; or
    top_1 … top_k   the most probable classes in order, with their probabilities in top_1_prob … top_k_prob if known; or
    pred            the predicted class alone
    sigmoid_NAME    probability of the class NAME by itself, for every class, beside any of these; rows have any sum
    positive_NAME   whether the image shows the class NAME, for every class, where images may show several, or none:
                    1, 0, or empty (or -1) where nobody knows. Then sigmoid_NAME is all that is needed beside it: label,
                    pred and top_k are not read, and prob_NAME may be left out
    threshold_NAME  probability from which the class NAME is named, beside positive_NAME; the same in all rows
    group:NAME      value of the group attribute NAME; an empty cell is the group "unknown". Without the prefix, every
                    column that is none of the others is a group attribute too, but for those that name persons or
                    other units of resampling ("patient_id"): such a one is named `cluster` or `group:patient_id`
    cluster         unit of resampling: patient, lesion, place
    level:NAME      value of the taxonomy level NAME of the true class; the same for all rows of a class

CSV is UTF-8, or UTF-16 with its mark; commas, semicolons, tabs or bars stand between cells, points or commas in
numbers.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from adaptclip.errors import DataError, did_you_mean
from adaptclip.files import Dialect, check_is_file, dialect_of, read_parquet
from adaptclip.terminal import QUOTED
from adaptclip.words import blanks_apart, numbers_twice, spelt, tells_units

_RANKED = re.compile(r"top_[1-9]\d*(_prob)?")
_PLAIN_NUMBER = re.compile(r"-?(0|[1-9]\d{0,15})(\.\d+)?")
_TEXT_FILES = (".csv", ".tsv")
SIGMOID = "sigmoid_"
POSITIVE = "positive_"
THRESHOLD = "threshold_"
_ANSWERS = {"1": 1, "true": 1, "yes": 1, "0": 0, "false": 0, "no": 0, "-1": -1, "": -1}
"""What a cell of positive_NAME may hold where it is text."""
MAX_GROUP_VALUES = 200
"""A column with more values than this and without the prefix `group:` is taken for something else than a group."""


def read_predictions(path: Path, classes: Sequence[str] | None = None) -> dict[str, Any]:
    """Reads a file into the fields of `types.Predictions` and the "outcomes" and "intersections" that it declares.

    Args:
        path: .parquet, .csv or .tsv.
        classes: class names in the order of their ids, where the file does not give them.

    Raises:
        StorageError: the file is missing or damaged.
        DataError: columns are missing, or their values do not fit.
    """
    if path.suffix.lower() in _TEXT_FILES:
        table, metadata = _read_text(path), {}
    elif path.suffix.lower() in (".json", ".jsonl", ".npz", ".npy", ".xlsx", ".pkl"):
        raise DataError(f"{path} is no table of predictions; allowed: .parquet, .csv, .tsv")
    else:
        table, metadata = read_parquet(path)
    _check_columns(table, path)
    if table.num_rows == 0:
        raise DataError(f"{path} has columns and no rows: there is nothing to judge")
    own = "class_names" in metadata  # written by adaptclip: labels and probability columns carry class ids
    if not own:
        _refuse_two_spellings(table, path)
    names = _class_names(table, metadata["class_names"] if own else classes, path)
    fields: dict[str, Any] = {"class_names": names}
    if single := _of(table, SIGMOID):
        fields["sigmoid"] = _numbers(table, _ordered(single, names, path, numbered=own, prefix=SIGMOID), path)
    if _of(table, POSITIVE):
        fields |= _several(table, names, fields["sigmoid"], path, numbered=own)
    else:
        fields["labels"] = _class_ids(table["label"], names, "label", path, numbered=own)
        fields |= _answers(table, names, path, numbered=own)
    fields["ids"] = _filled(table, "id", path) or tuple(map(str, range(table.num_rows)))
    if "file" in table.column_names:
        fields["files"] = tuple(value or "" for value in table["file"].cast(pa.string()).to_pylist())
    fields["clusters"] = _filled(table, "cluster", path)
    if metadata.get("thresholds") is not None:
        fields["thresholds"] = np.array(metadata["thresholds"], np.float64)
    fields["groups"], fields["notes"] = _groups(table, path)
    fields["notes"] = (*fields["notes"], *fields.pop("answer_notes"))
    levels = {name: tuple(values) for name, values in metadata.get("levels", {}).items()}
    fields["levels"] = levels or _levels(table, fields["labels"], names, path)
    fields |= {name: metadata[name] for name in ("ranked", "confident", "fixed_classes") if name in metadata}
    fields["notes"] = (*metadata.get("notes", ()), *fields["notes"])
    fields |= {"expected": metadata.get("expected"), "made_by": metadata.get("made_by", {})}
    fields["cluster_name"] = metadata.get("cluster_name", "")
    return {**fields, "outcomes": metadata.get("outcomes", ()), "intersections": metadata.get("intersections", ())}


def _read_text(path: Path) -> pa.Table:
    if path.exists():
        check_is_file(path)
    try:
        dialect = dialect_of(path)
        table = _parsed(path, dialect, ".")
        if _has_text_for_numbers(table):
            with_commas = _parsed(path, dialect, ",")  # as spreadsheets of many countries write numbers
            table = table if _has_text_for_numbers(with_commas) else with_commas
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}") from error
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {path}: {error}. It should be UTF-8 text with one header line.") from error
    for i, (name, kind) in enumerate(_types(table)):
        column = table[i]
        if pa.types.is_string(kind):
            # What we and others write before text that a spreadsheet would run is no part of the text.
            column = pc.replace_substring_regex(column, QUOTED, r"\1")  # pyright: ignore[reportAttributeAccessIssue]
        if _of_classes(name):
            column = _as_numbers(column)
        table = table.set_column(i, name, column)
    return table


def _parsed(path: Path, dialect: Dialect, decimal: str) -> pa.Table:
    """Cells that name classes and rows stay text at first, so that "007" stays "007"."""
    encoding = "utf8" if dialect.encoding == "utf-8-sig" else dialect.encoding
    header = next(csv.reader([dialect.header], delimiter=dialect.delimiter), [])
    texts = {name: pa.string() for name in header if name == "id" or _of_classes(name)}
    return pyarrow.csv.read_csv(
        path,
        read_options=pyarrow.csv.ReadOptions(encoding=encoding, skip_rows=dialect.before),
        parse_options=pyarrow.csv.ParseOptions(delimiter=dialect.delimiter),
        convert_options=pyarrow.csv.ConvertOptions(decimal_point=decimal, column_types=texts),
    )


def _types(table: pa.Table) -> list[tuple[str, pa.DataType]]:
    return list(zip(table.column_names, table.schema.types, strict=True))


def _has_text_for_numbers(table: pa.Table) -> bool:
    return any(_of_numbers(name) and pa.types.is_string(kind) for name, kind in _types(table))


def _of_classes(name: str) -> bool:
    return name in ("label", "pred") or bool(_RANKED.fullmatch(name) and not name.endswith("_prob"))


def _of_numbers(name: str) -> bool:
    return name.startswith(("prob_", SIGMOID)) or bool(_RANKED.fullmatch(name) and name.endswith("_prob"))


def _as_numbers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of classes as numbers where it holds nothing else, each written in one way; else as it is."""
    found = [value for value in column.unique().to_pylist() if value]
    if not found or not all(_PLAIN_NUMBER.fullmatch(value) for value in found) or numbers_twice(found):
        return column
    empty = pc.equal(column, "")  # pyright: ignore[reportAttributeAccessIssue]
    filled = pc.if_else(empty, pa.scalar(None, pa.string()), column)  # pyright: ignore[reportAttributeAccessIssue]
    return filled.cast(pa.float64() if any("." in value for value in found) else pa.int64())


def _refuse_two_spellings(table: pa.Table, path: Path) -> None:
    """Raises DataError where a class is written in two ways, which would make two of one or, as numbers, one of two."""
    columns = [name for name in table.column_names if _of_classes(name)]
    found = {value for column in columns for value in _distinct(table[column])}
    found |= {name.removeprefix("prob_") for name in table.column_names if name.startswith("prob_")}
    for several, why in (
        (numbers_twice(found), "are one number spelt in several ways"),
        (blanks_apart(found), "differ only in blanks around them or in the Unicode form of a letter"),
    ):
        if several:
            raise DataError(f"{path}: the classes {spelt(several)} {why}; write each in one way")


def _check_columns(table: pa.Table, path: Path) -> None:
    names = table.column_names
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise DataError(f"{path} has two columns named {', '.join(map(repr, twice))}; each needs its own name")
    if _of(table, POSITIVE):
        _check_several(table, path)
        return
    if "label" not in names:
        has = did_you_mean("label", names, lead="It has")
        raise DataError(f"{path} is no predictions file: it has no column 'label'. {has}")
    if not ("pred" in names or "top_1" in names or any(n.startswith("prob_") for n in names)):
        raise DataError(
            f"{path} says nothing about what the model answered: it needs prob_CLASS columns, top_1 … top_k, or pred; "
            f"its columns are {', '.join(names)}"
        )


def _class_names(table: pa.Table, classes: Sequence[str] | None, path: Path) -> tuple[str, ...]:
    """Names given, else those of the probability columns, else the distinct names in label and answers, sorted."""
    if classes is not None:
        if len(set(classes)) < len(classes):
            raise DataError("the list of classes names a class twice; each needs its own name")
        return tuple(classes)
    named = [n.removeprefix(POSITIVE) for n in _of(table, POSITIVE)]
    named = named or [n.removeprefix("prob_") for n in table.column_names if n.startswith("prob_")]
    if named:
        numbered = all(name.isdecimal() for name in named)
        return tuple(sorted(named, key=int)) if numbered else tuple(named)
    answers = [c for c in table.column_names if c in ("label", "pred") or (c.startswith("top_") and c[4:].isdecimal())]
    found = {name for column in answers for name in _distinct(table[column])} - {""}
    if not found:
        raise DataError(f"{path} names no class in {', '.join(answers)}")
    numbered = all(name.isdecimal() and name == str(int(name)) for name in found)
    return tuple(map(str, range(max(map(int, found)) + 1))) if numbered else tuple(sorted(found))


def _distinct(column: pa.ChunkedArray) -> list[str]:
    return [value for value in column.cast(pa.string()).unique().to_pylist() if value is not None]


def _class_ids(
    column: pa.ChunkedArray, names: Sequence[str], what: str, path: Path, *, numbered: bool = False
) -> np.ndarray:
    """(N,) int64 class ids of a column that holds names throughout, or else ids throughout.

    Args:
        column: text or numbers.
        names: the class names.
        what: the column's name.
        path: the file, for messages.
        numbered: whole numbers are ids even where classes have numbers for names.
    """
    empty = column.null_count
    if pa.types.is_floating(column.type) and not empty:
        values = column.to_numpy()
        if not np.isfinite(values).all() or (values != np.round(values)).any():
            raise DataError(f"{path}: column {what!r} holds fractions; a class is a name or a whole number")
        column = pa.chunked_array([pa.array(values.astype(np.int64))])
    encoded = pa.concat_arrays([*column.cast(pa.string()).chunks, pa.array([], pa.string())]).dictionary_encode()
    found = encoded.dictionary.to_pylist()
    if empty or "" in found:
        raise DataError(f"{path}: column {what!r} has empty cells; each row needs a class")
    position = {name: i for i, name in enumerate(names)}
    as_ids = {str(i): i for i in range(len(names))} if pa.types.is_integer(column.type) else {}
    for table in (as_ids, position) if numbered else (position, as_ids):
        if all(value in table for value in found):
            ids = np.asarray([table[value] for value in found], dtype=np.int64)
            return ids[encoded.indices.to_numpy(zero_copy_only=False)]
    unknown = next(value for value in found if value not in (as_ids if numbered else position))
    hint = " Labels that are numbers count from 0 through the class names (--classes)." if as_ids else ""
    raise DataError(
        f"{path}: column {what!r} has the unknown class {unknown!r}; there are {len(names)} classes. "
        f"{did_you_mean(unknown, names, lead='They are')}{hint}"
    )


def _numbers(table: pa.Table, columns: Sequence[str], path: Path) -> np.ndarray:
    """(N, len(columns)) float32."""
    out = np.empty((table.num_rows, len(columns)), np.float32)
    for i, name in enumerate(columns):
        column = table[name]
        if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
            raise DataError(f"{path}: column {name!r} should hold numbers, and has {_no_number(column)}")
        if column.null_count:
            first = int(np.argmax(column.is_null().to_numpy()))
            raise DataError(
                f"{path}: column {name!r} should hold numbers, and has {column.null_count} empty cells or NaN; the "
                f"first in row {first + 1}"
            )
        out[:, i] = column.to_numpy()
    return out


def _no_number(column: pa.ChunkedArray) -> str:
    """Says what stands in a column instead of numbers: its first text that is none, or its type."""
    if pa.types.is_string(column.type):
        for row, value in enumerate(column.to_pylist(), start=1):
            if not _is_number(value or ""):
                return f"{value!r} in row {row}" if value else f"an empty cell in row {row}"
    return f"values of type {column.type}"


def _of(table: pa.Table, prefix: str) -> list[str]:
    return [name for name in table.column_names if name.startswith(prefix)]


def _check_several(table: pa.Table, path: Path) -> None:
    """Images that may show several classes are judged by the probabilities of single ones, and have no one value."""
    if not _of(table, SIGMOID):
        given = [name.removeprefix("prob_") for name in _of(table, "prob_")]
        mends = "".join(f"; rename prob_{n} … to {SIGMOID}{n} … if each is a probability by itself" for n in given[:1])
        raise DataError(
            f"{path} says which classes an image shows ({_of(table, POSITIVE)[0]} …) and needs the probability of each "
            f"by itself beside it ({SIGMOID}CLASS){mends}"
        )
    if levels := _of(table, "level:"):
        raise DataError(
            f"{path}: column {levels[0]!r} is a value of the one class of a row, and here rows may show several; leave "
            "it out"
        )


def _several(
    table: pa.Table, names: Sequence[str], sigmoid: np.ndarray, path: Path, *, numbered: bool
) -> dict[str, Any]:
    """Fields of images that may show several classes; without prob_CLASS their share of the sigmoid stands for it."""
    columns = _ordered(_of(table, POSITIVE), names, path, numbered=numbered, prefix=POSITIVE)
    cells = np.stack([_yes_or_no(table, name, path) for name in columns], axis=1)
    fields: dict[str, Any] = {"positive": cells == 1, "labels": (cells == 1).argmax(axis=1), "answer_notes": ()}
    fields["known"] = None if (cells >= 0).all() else cells >= 0
    if given := _of(table, "prob_"):
        fields["probs"] = _numbers(table, _ordered(given, names, path, numbered=numbered), path)
    else:
        fields["probs"] = shares(sigmoid)
    if least := _of(table, THRESHOLD):
        values = _numbers(table, _ordered(least, names, path, numbered=numbered, prefix=THRESHOLD), path)
        for name, column in zip(names, values.T, strict=True):
            if (column != column[0]).any():
                raise DataError(f"{path}: column {THRESHOLD}{name} holds several numbers; a class has one threshold")
        fields["thresholds"] = values[0].astype(np.float64)
    return fields


def shares(sigmoid: np.ndarray) -> np.ndarray:
    """(N, C) float32 shares of the classes in the sum of their own probabilities (N, C); even ones where that is 0."""
    total = sigmoid.sum(axis=1, keepdims=True, dtype=np.float64)
    even = np.full(sigmoid.shape, 1 / sigmoid.shape[1])
    return np.divide(sigmoid, total, out=even, where=total > 0).astype(np.float32)


def _yes_or_no(table: pa.Table, name: str, path: Path) -> np.ndarray:
    """(N,) int8 of a column that says whether an image shows a class: 1, 0, or -1 where that is not known."""
    column = table[name]
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        found = [(value or "").strip().lower() for value in column.to_pylist()]
        bad = next((row for row, value in enumerate(found, start=1) if value not in _ANSWERS), None)
        if bad is None:
            return np.array([_ANSWERS[value] for value in found], np.int8)
        values, first = None, repr(found[bad - 1]) + f" in row {bad}"
    elif not any(is_kind(column.type) for is_kind in _FLAG_TYPES):
        values, first = None, f"values of type {column.type}"
    else:
        numbers = column.cast(pa.int8()) if pa.types.is_boolean(column.type) else column
        values = np.nan_to_num(numbers.cast(pa.float64()).to_numpy(zero_copy_only=False), nan=-1)
        odd = np.flatnonzero(~np.isin(values, (0, 1, -1)))
        first = f"{values[odd[0]]:g} in row {odd[0] + 1}" if len(odd) else ""
    if values is None or first:
        raise DataError(
            f"{path}: column {name!r} says whether an image shows a class: 1, 0, or nothing (or -1) where that is not "
            f"known; got {first}"
        )
    return values.astype(np.int8)


_FLAG_TYPES = (pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating, pa.types.is_null)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _answers(table: pa.Table, names: Sequence[str], path: Path, *, numbered: bool) -> dict[str, Any]:
    columns = [n for n in table.column_names if n.startswith("prob_")]
    if columns:
        probs = _numbers(table, _ordered(columns, names, path, numbered=numbered), path)
        _check_pred(table, probs, names, path, numbered=numbered)
        return {"probs": probs, "answer_notes": ()}
    ranked = [f"top_{k}" for k in range(1, table.num_columns + 1)]
    ranked = ranked[: next(i for i, name in enumerate(ranked) if name not in table.column_names)]
    if not ranked:
        probs = np.zeros((table.num_rows, len(names)), np.float32)
        probs[np.arange(table.num_rows), _class_ids(table["pred"], names, "pred", path)] = 1
        note = "the file holds predicted classes only: nothing is known about calibration, ranking or AUC"
        return {"probs": probs, "ranked": 1, "confident": False, "answer_notes": (note,)}
    return _from_ranking(table, ranked, names, path)


def _ordered(
    columns: Sequence[str], names: Sequence[str], path: Path, *, numbered: bool, prefix: str = "prob_"
) -> list[str]:
    """The probability columns in the order of the classes, whether they carry names or numbers."""
    by_name, by_number = [f"{prefix}{name}" for name in names], [f"{prefix}{i}" for i in range(len(names))]
    for wanted in (by_number, by_name) if numbered else (by_name, by_number):
        if set(wanted) == set(columns):
            return wanted
    absent = [name for name in by_name if name not in columns]
    extra = [c for c in columns if c.removeprefix(prefix) not in names]
    has = did_you_mean(extra[0].removeprefix(prefix), names, lead="The classes are") if extra else ""
    raise DataError(
        f"{path}: {len(columns)} {'probability' if prefix == 'prob_' else prefix + '…'} columns do not fit the "
        f"{len(names)} classes"
        + (f"; missing {', '.join(absent[:5])}" if absent else "")
        + (f"; unknown {', '.join(extra[:5])}. {has}" if extra else "")
    )


def _check_pred(table: pa.Table, probs: np.ndarray, names: Sequence[str], path: Path, *, numbered: bool) -> None:
    """A `pred` beside probabilities must be the most probable class; a threshold or a shift would be lost otherwise."""
    if "pred" not in table.column_names:
        return
    pred = _class_ids(table["pred"], names, "pred", path, numbered=numbered)
    differ = int((np.take_along_axis(probs, pred[:, None], 1)[:, 0] < probs.max(axis=1, initial=0)).sum())
    if differ:
        raise DataError(
            f"{path}: in {differ} of {len(pred)} rows `pred` is not the most probable class. Reports use the most "
            "probable one: drop `pred`, or drop the probabilities if another rule decides."
        )


def _from_ranking(table: pa.Table, ranked: Sequence[str], names: Sequence[str], path: Path) -> dict[str, Any]:
    """Probabilities from the k best classes: what is left is spread over the others, below the k-th."""
    n, k, c = table.num_rows, len(ranked), len(names)
    order = np.stack([_class_ids(table[name], names, name, path) for name in ranked], axis=1)
    if (np.diff(np.sort(order, axis=1), axis=1) == 0).any():
        raise DataError(f"{path}: some rows name a class twice among {ranked[0]} … {ranked[-1]}")
    confident = all(f"{name}_prob" in table.column_names for name in ranked)
    if confident:
        best = _numbers(table, [f"{name}_prob" for name in ranked], path)
        if not np.isfinite(best).all() or (np.diff(best, axis=1) > 0).any() or best.sum(axis=1).max(initial=0) > 1.005:
            raise DataError(f"{path}: top_1_prob … must fall and sum to 1 at most in every row")
    else:
        weights = 0.5 ** np.arange(1, k + 1)
        best = np.broadcast_to(weights if k < c else weights / weights.sum(), (n, k))
    rest = np.clip(1 - best.sum(axis=1, dtype=np.float64), 0, 1) / max(c - k, 1)
    probs = np.repeat(np.minimum(rest, best[:, -1])[:, None], c, axis=1)
    np.put_along_axis(probs, order, best, axis=1)
    # What the others could not take without passing the k-th class goes back to all in proportion.
    probs /= probs.sum(axis=1, keepdims=True)
    what = (
        f"the {k} most probable of {c} classes" if confident else f"a ranking of {k} of {c} classes, no probabilities"
    )
    note = f"the file holds {what}: nothing is known about AUC and the Brier score" + (
        "" if confident else ", or calibration"
    )
    return {
        "probs": probs.astype(np.float32),
        "ranked": None if confident and k == c else k,
        "confident": confident,
        "answer_notes": () if confident and k == c else (note,),
    }


def _filled(table: pa.Table, column: str, path: Path) -> tuple[str, ...] | None:
    """The values of an id column as text; None where there is no such column."""
    if column not in table.column_names:
        return None
    values = tuple(value or "" for value in table[column].cast(pa.string()).to_pylist())
    if "" in values:
        raise DataError(f"{path}: column {column!r} has {values.count('')} empty cells; give each row an id of its own")
    return values


def _groups(table: pa.Table, path: Path) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """Group attributes, and notes on the columns that were not taken for one."""
    groups: dict[str, tuple[str, ...]] = {}
    notes: list[str] = []
    own = ("prob_", SIGMOID, POSITIVE, "level:", *((THRESHOLD,) if _of(table, POSITIVE) else ()))
    for column in table.column_names:
        used = column in ("id", "file", "label", "pred", "cluster") or column.startswith(own)
        if used or _RANKED.fullmatch(column):
            continue
        name = column.removeprefix("group:")
        filled = pc.fill_null(table[column].cast(pa.string()), "unknown")
        count = len(filled.unique())
        if name == column and count < table.num_rows and tells_units(name, count):
            _check_units(table, column, path)
            notes.append(f"column {column!r} is not taken for a group (group:{column} would be)")
            continue
        if name == column and count > min(MAX_GROUP_VALUES, table.num_rows / 2):
            notes.append(
                f"column {column!r} has {count:,} values and is not taken for a group (group:{column} would be)"
            )
            continue
        if name in groups:
            raise DataError(f"{path} has the group {name!r} twice, with and without the prefix group:")
        groups[name] = tuple(value or "unknown" for value in filled.to_pylist())
    return groups, tuple(notes)


def _check_units(table: pa.Table, column: str, path: Path) -> None:
    """Refuses a column of patients or the like unless the declared clusters hold its rows together already."""
    values = table[column].cast(pa.string()).to_pylist()
    if "cluster" not in table.column_names:
        raise DataError(
            f"{path}: column {column!r} seems to say who or what the rows are of, and several rows share a value: "
            f"rename it `cluster` if rows of one value belong together (intervals are too narrow otherwise), or "
            f"`group:{column}` if it really is a group to report"
        )
    clusters = table["cluster"].cast(pa.string()).to_pylist()
    first: dict[str, str] = {}
    for value, cluster in zip(values, clusters, strict=True):
        if value and first.setdefault(value, cluster) != cluster:
            raise DataError(
                f"{path}: rows of {column!r} = {value!r} are in several clusters ({first[value]!r}, {cluster!r}), so "
                f"that `cluster` seems too narrow: rename {column!r} `cluster` instead if rows of one value belong "
                f"together, or `group:{column}` if it really is a group to report"
            )


def _levels(table: pa.Table, labels: np.ndarray, names: Sequence[str], path: Path) -> dict[str, tuple[str, ...]]:
    levels = {}
    for column in (c for c in table.column_names if c.startswith("level:")):
        values = np.asarray([v or "unknown" for v in table[column].cast(pa.string()).to_pylist()], dtype=object)
        coarse = ["unknown"] * len(names)
        for c in np.unique(labels):
            own = set(values[labels == c])
            if len(own) > 1:
                raise DataError(
                    f"{path}: column {column!r} has several values for the class {names[c]!r}: "
                    f"{', '.join(sorted(own))}; a level is a function of the class"
                )
            coarse[c] = own.pop()
        levels[column.removeprefix("level:")] = tuple(coarse)
    return levels
