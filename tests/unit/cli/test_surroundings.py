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

from adaptclip.types import Predictions

PLAIN = {"LC_ALL": "C.UTF-8", "TZ": "UTC", "COLUMNS": "300"}

pytestmark = pytest.mark.slow

SURROUNDINGS: dict[str, dict[str, Any]] = {
    "another terminal, zone, locale and umask": {
        "env": {"COLUMNS": "40", "LINES": "10", "TERM": "dumb", "TZ": "Asia/Tokyo", "LC_ALL": "C"},
        "preexec_fn": functools.partial(os.umask, 0o077),
    },
    "nobody": {"user": 65534, "group": 65534, "extra_groups": []},
}

COMMANDS = """
import sys
from adaptclip.cli import main

def run(*words):
    try:
        main(list(words))
    except SystemExit as stop:
        print("exit", stop.code)

folder = sys.argv[1]
run("gate", folder + "/good.parquet", folder + "/bad.parquet", "--gates", folder + "/gates.yaml")
run("gate", folder + "/none.parquet", "--gates", folder + "/gates.yaml")
run("recipes", "list")
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
        for place in (Path(made), path):
            place.chmod(0o755)
        yield path


def output(folder: Path, *, env: dict[str, str] | None = None, **how: Any) -> str:
    kept = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "TERM", "LANG", "NO_COLOR")}
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, str(folder)], capture_output=True, encoding="utf-8", check=True, cwd="/",
        env={**kept, "CUDA_VISIBLE_DEVICES": "", **PLAIN, **(env or {})}, **how,
    )  # fmt: skip
    return done.stdout + "\n-- errors --\n" + done.stderr


@pytest.fixture(scope="module")
def usual(folder) -> str:
    return output(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="users and umasks are those of Linux")
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_the_output_is_the_same(folder, usual, name):
    how = SURROUNDINGS[name]
    if "user" in how:
        if os.geteuid() != 0:
            pytest.skip("only root can run as somebody else")
        try:
            subprocess.run([sys.executable, "-c", "import rich"], check=True, capture_output=True, cwd="/", **how)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip(f"another user cannot run {sys.executable}")
    assert output(folder, **how) == usual


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
