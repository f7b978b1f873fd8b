# SPDX-License-Identifier: Apache-2.0
"""Damaged files of every kind that is read back: a clear error or the right answer, nothing else."""

from __future__ import annotations

import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from hostile.kinds import KINDS, Kind, cases
from hostile.mutations import Mutation, Unfit
from hostile.reading import LIMIT_S, Hang, limit
from hostile.world import World

from adaptclip.errors import AdaptclipError

_answers: dict[str, Any] = {}


def _copy(kind: Kind, world: World, tmp_path: Path, run: str = "one") -> Path:
    copy = tmp_path / "case"
    source = world.root / run / kind.folder
    if kind.folder == ".":
        copy.mkdir()
        for path in source.iterdir():
            if path.is_file():
                shutil.copyfile(path, copy / path.name)
    else:
        shutil.copytree(source, copy)
    return copy


def _said(value: Any, folder: Path) -> str:
    """An answer as text in which the folder has no name."""
    return repr(value).replace(str(folder), "FOLDER")


def _right_answer(kind: Kind, world: World, tmp_path: Path) -> str:
    if kind.name not in _answers:
        base = tmp_path / "right"
        base.mkdir()
        copy = _copy(kind, world, base)
        _answers[kind.name] = _said(kind.read(world, copy), copy)
    return _answers[kind.name]


@pytest.mark.parametrize(
    ("kind", "file", "mutation", "seed"),
    [pytest.param(*case, id=f"{case[0].name}|{case[1]}|{case[2].__name__}|{case[3]}") for case in cases()],
)
def test_damage_is_refused_or_harmless(
    kind: Kind, file: str, mutation: Mutation, seed: int, world, tmp_path, record_property
):
    right = _right_answer(kind, world, tmp_path)
    copy = _copy(kind, world, tmp_path)
    draw = random.Random(f"{kind.name} {file} {mutation.__name__} {seed}")
    path = draw.choice(sorted(copy.glob(file)))
    others = sorted((world.root / "two" / kind.folder).glob(file)) or [path]
    spare = tmp_path / "spare" / path.name
    spare.parent.mkdir()
    shutil.copyfile(others[0], spare)
    record_property("kind", kind.name)
    try:
        mutation(path, draw, spare)
    except Unfit:
        record_property("outcome", "nothing to change")
        return  # such a file has nothing for this mutation; counted apart
    outcome, detail = _outcome(kind, mutation, world, copy, path, right)
    record_property("outcome", outcome)
    assert outcome in ("clear error", "right answer"), detail


def _outcome(kind: Kind, mutation: Mutation, world: World, copy: Path, path: Path, right: str) -> tuple[str, str]:
    try:
        with limit(path), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            said = _said(kind.read(world, copy), copy)
    except Hang:
        return "hang", f"no answer within {LIMIT_S} s"
    except AdaptclipError as error:
        text = str(error)
        named = any(name in text for name in (path.name, str(copy), *kind.called))
        return ("clear error", text) if named and len(text) > 20 else ("unclear error", f"names no file: {text}")
    except Exception as error:  # what a user would see as a traceback
        return "traceback", f"{type(error).__name__}: {error}"
    if said != right:
        return "silent change", _difference(right, said)
    if mutation in kind.must_refuse:
        return "not refused", "read as if nothing were wrong"
    return "right answer", ""


def _difference(right: str, said: str) -> str:
    start = next((i for i, (a, b) in enumerate(zip(right, said, strict=False)) if a != b), 0)
    return f"before …{right[max(0, start - 60) : start + 100]}…  after …{said[max(0, start - 60) : start + 100]}…"


def test_every_kind_is_there():
    assert len(KINDS) >= 15
    assert len(list(cases())) >= 300
