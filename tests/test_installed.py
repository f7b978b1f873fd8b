# SPDX-License-Identifier: Apache-2.0
"""A built wheel, installed away from the checkout, is enough: cards, starter, recipes and commands come with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("adaptclip", "recipes", "data_cards", "pyproject.toml", "setup.py", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The folder with sdist and wheel, built from a copy, so that nothing is left in the checkout; no network."""
    copy = tmp_path_factory.mktemp("build") / "project"
    copy.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(copy.parent / "dist"), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stdout + done.stderr
    return copy.parent / "dist"


@pytest.fixture(scope="module")
def site(built, tmp_path_factory) -> Path:
    """The folder that the wheel is installed into."""
    target = tmp_path_factory.mktemp("installed") / "site"
    wheel = next(built.glob("*.whl"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    done = subprocess.run([*command, str(wheel)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module")
def empty(tmp_path_factory) -> Path:
    """An empty folder to work in."""
    return tmp_path_factory.mktemp("elsewhere")


def run(site: Path, folder: Path, *command: str) -> str:
    """Runs a program with the installed package alone, and returns what it prints."""
    env = {**os.environ, "PYTHONPATH": str(site), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    env |= {"ADAPTCLIP_CACHE": str(folder / "checks"), "COLUMNS": "120"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def expected_files() -> set[str]:
    """What an installed package must have, by its path in the wheel: all but caches, with recipes and cards in it."""
    found = {p.relative_to(ROOT).as_posix() for p in (ROOT / "adaptclip").rglob("*") if p.is_file()}
    found |= {f"adaptclip/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "recipes").rglob("*") if p.is_file()}
    found |= {f"adaptclip/data_cards/{p.name}" for p in (ROOT / "data_cards").iterdir() if p.is_file()}
    return {name for name in found if "__pycache__" not in name}


def test_the_wheel_has_every_file_and_nothing_else(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        licences = [name for name in wheel.namelist() if name.endswith("licenses/LICENSE")]
    expected = expected_files()
    assert len(expected) >= 100
    assert names == expected
    assert len(licences) == 1


def test_the_source_archive_is_complete(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md", "recipes/coop.py", "data_cards/digits.md"):
        assert name in names
    assert "adaptclip/clip/starter_clip/text_tower.safetensors" in names


def test_it_is_the_installed_package_that_runs(site, empty):
    where = run(site, empty, sys.executable, "-c", "import adaptclip; print(adaptclip.__file__)")
    assert Path(where.strip()).is_relative_to(site)


def test_cards_and_recipes_come_with_it(site, empty):
    adaptclip = str(site / "bin" / "adaptclip")
    names = {line.split()[0] for line in run(site, empty, adaptclip, "card", "list").splitlines()}
    assert names == {p.stem for p in (ROOT / "data_cards").glob("*.md")} - {"README", "TEMPLATE"}
    listed = run(site, empty, adaptclip, "recipes", "list").splitlines()
    assert [line.split()[0] for line in listed] == sorted(p.stem for p in (ROOT / "recipes").glob("*.py"))
    assert all(len(line.split()) > 4 for line in listed)
    run(site, empty, adaptclip, "recipes", "copy")
    copied = {p.relative_to(empty) for p in (empty / "recipes").rglob("*") if p.is_file()}
    assert copied == {p.relative_to(ROOT) for p in (ROOT / "recipes").rglob("*") if p.suffix in (".py", ".md", ".svg")}
    for file in copied:
        assert (empty / file).read_text() == (ROOT / file).read_text()


def test_a_copied_recipe_runs_and_what_it_makes_is_used(site, empty):
    adaptclip = str(site / "bin" / "adaptclip")
    run(site, empty, adaptclip, "recipes", "copy", "zero_shot", "--out", "mine")
    assert sorted(p.name for p in (empty / "mine").iterdir()) == ["README.md", "figures", "zero_shot.py"]
    run(site, empty, sys.executable, "mine/zero_shot.py", "--gates", "report", "--out", "run")
    made = run(site, empty, adaptclip, "export", "run", "--to", "classifier", "--out", "out", "--allow-failed-gates")
    assert "largest difference from the adapter on 27 images" in made


def test_recipes_are_not_overwritten_unasked(tmp_path, monkeypatch, capsys):
    from adaptclip.cli import main

    def command(*arguments: str) -> int:
        with pytest.raises(SystemExit) as stop:
            main(["recipes", "copy", *arguments])
        return int(stop.value.code or 0)

    monkeypatch.chdir(tmp_path)
    assert command("coop") == command("coop.py") == 0  # the same text may be written again
    (tmp_path / "recipes" / "coop.py").write_text("mine")
    assert command("coop") == 1
    assert "would be replaced and differs" in capsys.readouterr().err
    assert (tmp_path / "recipes" / "coop.py").read_text() == "mine"
    assert command("coop", "--overwrite") == 0
    assert (tmp_path / "recipes" / "coop.py").read_text() == (ROOT / "recipes" / "coop.py").read_text()
    assert command("cop") == 1
    assert 'Did you mean "coop"' in capsys.readouterr().err
