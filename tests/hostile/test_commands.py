# SPDX-License-Identifier: Apache-2.0
"""Every command on paths that nobody should give: one message and exit code 1, no traceback, no endless wait."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile.kinds import CommandError, command
from hostile.reading import Hang, limit


def _made(path: Path, make: Callable[[Path], Any]) -> str:
    make(path)
    return str(path)


BAD: dict[str, Callable[[Path], str]] = {
    "nothing there": lambda folder: str(folder / "nothing"),
    "empty name": lambda folder: "",
    "empty folder": lambda folder: _made(folder / "empty", Path.mkdir),
    "pipe": lambda folder: _made(folder / "pipe", os.mkfifo),
    "endless device": lambda folder: "/dev/zero",
    "dangling link": lambda folder: _made(folder / "link", lambda p: p.symlink_to(folder / "nowhere")),
    "link to itself": lambda folder: _made(folder / "loop", lambda p: p.symlink_to(p.name)),
    "empty file": lambda folder: _made(folder / "file", Path.touch),
    "NUL bytes": lambda folder: _made(folder / "nul", lambda p: p.write_bytes(bytes(5000))),
    "no text": lambda folder: _made(folder / "random", lambda p: p.write_bytes(bytes(range(256)) * 20)),
    "long name": lambda folder: str(folder / ("x" * 300)),
    "escape in the name": lambda folder: _made(folder / "a\x1b[31mb\n", Path.touch),
}
"""What stands where a path is wanted -> how it is made in a folder. No argument of a process can hold a NUL."""

COMMANDS: dict[str, Callable[[Path, str, Path], tuple[Any, ...]]] = {
    "gate": lambda one, bad, out: ("gate", bad, "--gates", one / "gates.yaml"),
    "gate --gates": lambda one, bad, out: ("gate", one / "predictions.csv", "--gates", bad),
    "gate --baseline": lambda one, bad, out: ("gate", one / "run", "--baseline", bad),
    "report": lambda one, bad, out: ("report", bad, "--out", out),
    "report --validation": lambda one, bad, out: ("report", one / "run", "--validation", bad, "--out", out),
    "compare": lambda one, bad, out: ("compare", one / "run", bad, "--group", "site", "--out", out),
    "predict ARTIFACT": lambda one, bad, out: ("predict", bad, one / "data" / "images"),
    "predict IMAGES": lambda one, bad, out: ("predict", one / "run", bad),
    "export": lambda one, bad, out: ("export", bad, "--to", "classifier", "--out", out),
    "export --images": lambda one, bad, out: ("export", one / "run", "--to", "hf", "--images", bad, "--out", out),
    "search": lambda one, bad, out: ("search", bad, "red"),
    "search --model": lambda one, bad, out: ("search", one / "index", "red", "--model", bad),
    "embed": lambda one, bad, out: ("embed", bad, "--out", out, "--cache", out.with_name("cache")),
    "inspect": lambda one, bad, out: ("inspect", bad),
    "inspect local-dir": lambda one, bad, out: ("inspect", f"local-dir:{bad}"),
    "card check": lambda one, bad, out: ("card", "check", bad),
    "card new": lambda one, bad, out: ("card", "new", bad, "--out", out),
    "probe": lambda one, bad, out: ("probe", one / "run", "--card", one / "data" / "csv.md", "--words", bad),
}
"""Command -> its arguments, from the world's first run, a bad path and a place for its output."""


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_bad_path_is_one_message_and_exit_code_1(name, bad, world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = BAD[bad](tmp_path)
    out = tmp_path / "out"
    before = {p.name for p in tmp_path.iterdir()}
    pipe = Path(path) if bad == "pipe" else tmp_path
    try:
        with limit(pipe), pytest.raises(CommandError) as refused:
            command(*COMMANDS[name](world.root / "one", path, out))
    except Hang:
        pytest.fail("no answer within the limit")
    text = str(refused.value)
    assert len(text.strip()) > 15
    assert "\x1b" not in text
    assert "\0" not in text
    assert {p.name for p in tmp_path.iterdir()} <= before | {"cache"}, "something was written although it was refused"
