# SPDX-License-Identifier: Apache-2.0
"""The documentation as tests read it: fenced blocks, commands and their flags, what is shown against what is printed.

A block with a file's name as its title (```python title="shift.py") is that file. One with another title ("Needs a
download") is checked and not run. Python without a title runs, and so do commands above a block of their output.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
from recipe_files import ROOT, load_recipe

from adaptclip import entrypoint
from adaptclip.cli import COMMANDS, main
from adaptclip.entrypoint import launch, parse, parse_command

BLOCK = re.compile(r'^```(\w*)(?: title="([^"]*)")?\n(.*?)^```$', re.M | re.S)
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block; `shown` is the block of text right below it, None where there is none."""

    language: str
    title: str
    code: str
    shown: str | None

    @property
    def is_file(self) -> bool:
        """Whether the title is the name of a file."""
        return re.fullmatch(r"[\w./-]+\.\w+", self.title) is not None


def blocks_of(text: str) -> list[Block]:
    """Returns the blocks of a page, in their order."""
    found = list(BLOCK.finditer(text))
    assert len(found) * 2 == len(re.findall(r"^ *```", text, re.M)), "a fence is not closed, or not understood"
    blocks = []
    for match, after in itertools.zip_longest(found, found[1:]):
        below = after is not None and after[1] == "text" and not text[match.end() : after.start()].strip()
        blocks.append(Block(match[1], match[2] or "", match[3], after[3] if after is not None and below else None))
    return blocks


def commands_of(code: str) -> Iterator[list[str]]:
    """Yields the words of every command line that starts a program; what the shell would fill in is a 1."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(re.sub(r"\$\{?\w+\}?", "1", line.strip().removesuffix("; done")), comments=True)
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        if words and words[0] in ("adaptclip", "accelerate", "torchrun", "python"):
            yield words


def check_command(words: list[str]) -> None:
    """Parses a command's flags as the command itself would, the launcher's too; nothing is run, nor has to be there."""
    if words[0] == "adaptclip":
        with mock.patch.object(entrypoint, "_check_paths"):  # runs and files of the reader's
            parse_command(_parsed_only(COMMANDS), words[1:], prog="adaptclip", description="")
        return
    place = next((i for i, word in enumerate(words) if word.startswith("recipes/")), None)
    if place is None:
        assert words[:3] in (["python", "-m", "pip"], ["python", "-m", "mkdocs"]) or words[1].startswith("tests/"), (
            words
        )
        return
    flags = words[place + 1 :]
    if "--config" in flags:  # a file of the reader's
        del flags[flags.index("--config") : flags.index("--config") + 2]
    if flags != ["--help"]:
        with mock.patch.object(entrypoint, "_check_paths"):
            parse(_recipe(Path(words[place]).stem).Config, flags)
    if words[0] == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        launch_command_parser().parse_args(words[2 : place + 1])
    elif words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        get_args_parser().parse_args(words[1 : place + 1])


def run_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a command in this process, which has torch already."""
    with contextlib.suppress(SystemExit):
        if words[0] == "adaptclip":
            main(words[1:])
        else:
            recipe = _recipe(Path(words[1]).stem)
            monkeypatch.setattr(sys, "argv", words[1:])
            launch(recipe.main, recipe.Config)


@functools.cache
def _recipe(name: str) -> ModuleType:
    assert (ROOT / "recipes" / f"{name}.py").is_file(), f"there is no recipe {name}"
    return load_recipe(name)


def _parsed_only(commands: Mapping[str, Any]) -> dict[str, Any]:
    """The same commands, which do nothing once their flags are read."""

    def inert(command: Callable[..., Any]) -> Callable[..., Any]:
        return functools.wraps(command)(lambda *_, **__: 0)

    return {n: _parsed_only(c) if isinstance(c, Mapping) else inert(c) for n, c in commands.items()}


def run_page(text: str, where: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the blocks of a page from top to bottom in `folder`, and compares what they print with what is shown."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "120")  # as wide as in a file; runners of tests set it too
    monkeypatch.syspath_prepend(str(folder))
    names: dict[str, Any] = {}
    for block in blocks_of(text):
        if block.is_file:
            (folder / block.title).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.title).write_text(block.code, encoding="utf-8")
        printed = io.StringIO()
        if block.language == "python":
            code = compile(block.code, f"{where} {block.title}", "exec")
            if not block.title:
                with contextlib.redirect_stdout(printed):
                    exec(code, names)
        elif block.language == "bash":
            for words in commands_of(block.code):
                check_command(words)
                if block.shown is not None:
                    with contextlib.redirect_stdout(printed):
                        run_command(words, monkeypatch)
        if block.language in ("python", "bash") and not block.title:
            compare(block.shown or "", printed.getvalue(), where)


def run_notebook(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Runs the cells of a notebook in `folder`; returns what each is said to print and what it prints."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    pairs = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile("".join(cell["source"]), path.name, "exec"), names)
            pairs.append(("".join("".join(output["text"]) for output in cell["outputs"]), printed.getvalue()))
    return pairs


def keep_outputs(path: Path) -> None:
    """Puts what the cells of a notebook print now into its file, and nothing of the machine they ran on."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
        printed = [new for _, new in run_notebook(path, Path(folder), monkeypatch)]
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            lines = printed.pop(0).splitlines(keepends=True)
            cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": lines}] if lines else []
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def compare(shown: str, printed: str, where: str) -> None:
    """Holds that all that is shown was printed, in this order; "..." stands for lines that are left out, "…" for words.

    Blanks, rules of tables and the last digits may differ: another processor rounds otherwise.
    """
    rest = [line for line in map(_plain, printed.splitlines()) if line]
    skipping = False
    for line in map(_plain, shown.splitlines()):
        if line == "...":
            skipping = True
        elif line:
            found = next((i for i, other in enumerate(rest if skipping else rest[:1]) if _same(line, other)), None)
            assert found is not None, f"{where} shows\n{line}\nbut it prints\n{printed}"
            rest, skipping = rest[found + 1 :], False
    assert skipping or not rest, f"{where} does not show\n" + "\n".join(rest)


def _plain(line: str) -> str:
    return " ".join(re.sub(r"[─━┏┓┃│└┘┡┩╇┳┴┬┼]+", " ", line).split())


def _same(shown: str, printed: str) -> bool:
    if shown.endswith("…"):
        shown = shown.removesuffix("…").strip()
        numbers = len(NUMBER.findall(shown))
        there = list(NUMBER.finditer(printed))[:numbers]
        end = (there[-1].end() if there else 0) + len(NUMBER.split(shown)[-1])
        printed = printed[:end]
    if NUMBER.sub("#", shown) != NUMBER.sub("#", printed).strip():
        return False
    pairs = zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=True)
    return all(_near(a, b) for a, b in pairs)


def _near(shown: str, printed: str) -> bool:
    a, b = (float(text.replace(",", "")) for text in (shown, printed))
    places = len(shown.partition(".")[2])
    return a == b or (places > 0 and abs(a - b) <= max(0.06, 0.05 * abs(a), 3 * 10**-places))


if __name__ == "__main__":  # python tests/documents.py: after a notebook was changed
    for notebook in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        keep_outputs(notebook)
