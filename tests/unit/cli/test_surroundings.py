# SPDX-License-Identifier: Apache-2.0
"""What programs read from a command depends on no terminal, locale, time zone, umask or user."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adaptclip
from adaptclip.predictions import Predictions

PLAIN = {"LC_ALL": "C.UTF-8", "TZ": "UTC", "COLUMNS": "300"}

pytestmark = pytest.mark.slow

SURROUNDINGS: dict[str, dict[str, Any]] = {
    "another terminal, zone, locale and umask": {
        "env": {"LINES": "10", "TERM": "dumb", "TZ": "Asia/Tokyo", "LC_ALL": "C"},
        "preexec_fn": functools.partial(os.umask, 0o077),
    },
    "nobody": {"user": "nobody"},
}

PROGRAM = """
import os, sys
from adaptclip.cli import main

folder, user, *words = sys.argv[1:]

def run(*words):
    try:
        main(list(words))
    except SystemExit as stop:
        print("exit", stop.code)

def commands():
    run("gate", folder + "/good.parquet", folder + "/bad.parquet", "--gates", folder + "/gates.yaml")
    run("gate", folder + "/none.parquet", "--gates", folder + "/gates.yaml")
    run("recipes", "list")

if user == "nobody":  # where Python lies may be closed to others: all is imported before the rights are given up
    kept, nowhere = [os.dup(1), os.dup(2)], os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    commands()
    run("gate", folder + "/good.parquet", "--gates", folder + "/gates.yaml", "--junit", folder + "/first.xml")
    os.unlink(folder + "/first.xml")  # what lies beside a missing file is told, and is to be the same for all
    sys.stdout.flush()
    for stream, before in zip((1, 2), kept):
        os.dup2(before, stream)
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    os.umask(0o077)
for line in words:
    run(*line.split("|"))
if not words:
    commands()
"""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Predictions and gates under a path long enough to be wrapped, which any user may read."""
    with tempfile.TemporaryDirectory() as made:
        path = Path(made) / ("a_long_name_" * 12)
        path.mkdir()
        for name, right in (("good", 400), ("bad", 200)):
            labels = np.arange(400) % 2
            pred = np.where(np.arange(400) < right, labels, 1 - labels)
            probs = np.where(np.eye(2)[pred] == 1, 0.9, 0.1).astype(np.float32)
            Predictions(tuple(map(str, range(400))), labels, probs, ("Größe", "[red]犬")).save(path / f"{name}.parquet")
        (path / "gates.yaml").write_text("gates:\n  - {metric: accuracy, at_least: 0.8}\n")
        (path / "secret.parquet").write_bytes((path / "good.parquet").read_bytes())
        (path / "secret.parquet").chmod(0o600)
        for name, mode in (("closed", 0o700), ("theirs", 0o777)):
            (path / name).mkdir()
            (path / name).chmod(mode)
        (path / "closed" / "good.parquet").write_bytes((path / "good.parquet").read_bytes())
        for place in (Path(made), path):
            place.chmod(0o755)
        for file in path.glob("g*"):
            file.chmod(0o644)
        yield path


def output(folder: Path, *words: str, user: str = "", env: dict[str, str] | None = None, **how: Any) -> str:
    kept = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "TERM", "LANG", "NO_COLOR")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), user, *words], capture_output=True, encoding="utf-8", check=True,
        cwd="/", env={**kept, "CUDA_VISIBLE_DEVICES": "", **PLAIN, **(env or {})}, **how,
    )  # fmt: skip
    return done.stdout + "\n-- errors --\n" + done.stderr


@pytest.fixture(scope="module")
def usual(folder) -> str:
    return output(folder)


def need_another_user() -> None:
    """Skips where no other user can be tried, or none may read the recipes."""
    if os.geteuid() != 0:
        pytest.skip("only root can run as somebody else")
    package = Path(adaptclip.__file__).resolve().parent
    if any(place.stat().st_mode & 0o005 != 0o005 for place in (package, *package.parents)):
        pytest.skip(f"another user cannot look into {package}")


@pytest.mark.skipif(sys.platform != "linux", reason="users and umasks are those of Linux")
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_the_output_is_the_same(folder, usual, name):
    how = SURROUNDINGS[name]
    if "user" in how:
        need_another_user()
    assert output(folder, **how) == usual


@pytest.mark.skipif(sys.platform != "linux", reason="users and umasks are those of Linux")
def test_what_another_user_may_not_do_is_said(folder):
    need_another_user()
    gates = ("--gates", f"{folder}/gates.yaml")
    allowed = ("gate", f"{folder}/good.parquet", *gates, "--junit", f"{folder}/theirs/mine.xml")
    refused = {
        ("gate", f"{folder}/secret.parquet", *gates): "secret.parquet",
        ("gate", f"{folder}/closed/good.parquet", *gates): "closed/good.parquet",
        ("gate", f"{folder}/good.parquet", *gates, "--junit", f"{folder}/mine.xml"): "mine.xml",
        ("gate", f"{folder}/good.parquet", *gates, "--junit", f"{folder}/closed/mine.xml"): "closed/mine.xml",
    }
    info = output(folder, *map("|".join, (*refused, allowed)), user="nobody")
    codes = [line for line in info.splitlines() if line.startswith("exit")]
    assert codes == ["exit 1"] * len(refused) + ["exit 0"], info
    assert "Traceback" not in info
    errors = [line for line in info.splitlines() if "Permission denied" in line]
    assert len(errors) == len(refused), info
    for error, said in zip(errors, refused.values(), strict=True):
        assert said in error
    written = (folder / "theirs" / "mine.xml").stat()
    assert (written.st_uid, written.st_mode & 0o777) == (65534, 0o600)


def test_the_output_has_whole_lines(folder, usual):
    assert f"{folder}/good.parquet: pass (1 of 1 gates pass)" in usual.splitlines()
    assert f"{folder}/bad.parquet: fail (0 of 1 gates pass)" in usual.splitlines()
    assert "exit 2" in usual.splitlines()
    assert "exit 1" in usual.splitlines()


def test_an_encoding_without_our_letters_ends_in_no_traceback(folder, usual):
    poor = output(folder, env={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
    assert "Traceback" not in poor
    assert [line for line in poor.splitlines() if line.startswith("exit")] == [
        line for line in usual.splitlines() if line.startswith("exit")
    ]
