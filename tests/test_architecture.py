# SPDX-License-Identifier: Apache-2.0
"""The arrows of the package: a module imports only from rooms before its own, and nothing imports a recipe."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDER = (
    "errors", "terminal", "progress", "files", "seals", "outputs", "seeding", "metrics", "gate_rules",
    "words", "prediction_files", "predictions", "types", "settings", "hub", "feature_clip", "datasets", "data",
    "clip", "prompts", "features", "training", "methods", "reports", "gates", "artifact", "retrieval", "bench",
    "entrypoint", "cli",
)  # fmt: skip
PACKAGE = sorted((ROOT / "adaptclip").rglob("*.py"))
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
FORBIDDEN_NAMES = {"utils", "helpers", "common", "misc", "trainer", "manager", "engine"}


def room_of(path: Path) -> str:
    """The room (top-level module) of a file of the package."""
    return path.relative_to(ROOT / "adaptclip").parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> list[tuple[int, str]]:
    """Line and room of every import of the package, wherever in the file it stands, type checking included."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        assert not getattr(node, "level", 0), f"{path}:{node.lineno} uses a relative import"
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        for name in names:
            parts = name.split(".")
            if parts[0] == "adaptclip":
                if len(parts) == 1 and isinstance(node, ast.ImportFrom):
                    found += [(node.lineno, alias.name) for alias in node.names if alias.name in ORDER]
                elif len(parts) > 1:
                    found.append((node.lineno, parts[1]))
            assert parts[0] != "recipes", f"{path}:{node.lineno} imports a recipe"
    return found


def test_imports_go_one_way():
    looked_at = 0
    for path in PACKAGE:
        room = room_of(path)
        if room == "__init__":
            continue  # the package's front door names everything, and imports it only when asked
        assert room in ORDER, f"{path} is in no room of ORDER"
        for line, target in imported_rooms(path):
            looked_at += 1
            assert target in ORDER, f"{path}:{line} imports adaptclip.{target}, which is in no room"
            assert ORDER.index(target) <= ORDER.index(room), f"{path}:{line}: {room} must not import {target}"
    assert len(PACKAGE) >= 35
    assert looked_at >= 120, f"only {looked_at} imports were looked at"


def test_only_the_entrypoint_imports_tyro():
    using = [p.name for p in PACKAGE + RECIPES if "import tyro" in p.read_text(encoding="utf-8")]
    assert using == ["entrypoint.py"]


def test_library_code_never_takes_a_config_object():
    for path in PACKAGE:
        if room_of(path) == "entrypoint":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                names = [a.arg for a in node.args.args + node.args.kwonlyargs]
                assert "cfg" not in names, f"{path}:{node.lineno} takes a config object"


def test_recipes_are_scripts_that_shadow_nothing():
    assert len(RECIPES) >= 3
    assert not (ROOT / "recipes" / "__init__.py").exists()
    packages = {"adaptclip", "accelerate", "datasets", "evaluate", "open_clip", "peft", "timm", "torch", "transformers"}
    for path in RECIPES:
        # A script's folder comes first on sys.path, so its file names must be nobody's module.
        assert path.stem not in packages | set(sys.stdlib_module_names), f"{path.name} would shadow a package"


@pytest.mark.parametrize("path", PACKAGE + RECIPES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_files_and_functions_stay_small(path: Path):
    text = path.read_text(encoding="utf-8")
    assert path.stem not in FORBIDDEN_NAMES
    assert text.count("\n") <= 550
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
            # A recipe's main is the one function that is read from top to bottom.
            limit = 85 if path.parent.name == "recipes" and node.name == "main" else 65
            assert length <= limit, f"{path.name}:{node.lineno} {node.name} has {length} lines"


def test_public_names_are_found_and_nothing_heavy_is_imported_early():
    import subprocess

    code = "import sys, adaptclip; assert 'torch' not in sys.modules; print(len(adaptclip.__all__))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    import adaptclip

    assert int(result.stdout) == len(adaptclip.__all__) >= 25
    for name in adaptclip.__all__:
        assert getattr(adaptclip, name) is not None
