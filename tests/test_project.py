# SPDX-License-Identifier: Apache-2.0
"""What a project carries beside its code: one version, a citation, licence lines, types, templates and hooks."""

from __future__ import annotations

import datetime
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from recipe_files import ROOT

import adaptclip as ac

PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
SPDX = "# SPDX-License-Identifier: Apache-2.0"


def read(name: str) -> Any:
    """A YAML file of the project."""
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_one_version_everywhere_and_the_changelog_is_dated():
    (version,) = re.findall(r'^version = "([\d.]+)"$', PROJECT, re.M)
    assert ac.__version__ == version
    citation = read("CITATION.cff")
    assert citation["version"] == version
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## (\d+\.\d+\.\d+) \((\d{4}-\d{2}-\d{2})\)$", changes, re.M)
    assert released[0] == (version, str(citation["date-released"]))
    assert len(released) == len(dict(released)) >= 2
    assert sorted(released, key=lambda r: tuple(map(int, r[0].split("."))), reverse=True) == released
    section = changes.split(f"## {version} ")[1].split("\n## ")[0]
    assert "### Upgrading from" in section


def test_the_citation_is_valid():
    """The keys that version 1.2.0 of the Citation File Format requires, each of its kind, and no unknown one."""
    citation = read("CITATION.cff")
    assert set(citation) >= {"cff-version", "message", "title", "authors"}
    known = {"abstract", "type", "version", "date-released", "license", "keywords", "repository-code", "url", "doi"}
    assert set(citation) <= {"cff-version", "message", "title", "authors"} | known
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert all(isinstance(citation[key], str) and citation[key] for key in ("message", "title", "license"))
    assert citation["authors"] == [{"name": "The adaptclip authors"}]  # an entity; a person has family-names
    assert isinstance(citation["version"], str)
    assert isinstance(citation["date-released"], datetime.date)
    (licence,) = re.findall(r'^license = "(.+)"$', PROJECT, re.M)
    assert citation["license"] == licence
    assert len(set(citation["keywords"])) == len(citation["keywords"]) >= 1


NAMES_OF_0_1 = """
    AdaptclipError AdaptedModel CaptionLoader CoCoOp CoOp ContrastiveTuning FeatureCache FeatureLoader Features GDA
    LinearProbe LoRA PixelLoader Predictions SSText TipAdapter TwoStage ZeroShotClassifier backward_and_step
    build_mitigation build_optimizer build_report build_scheduler check_gates choose_gates compare_groups finish_run
    full_report is_due launch load load_backbone load_card load_checkpoint make_accelerator nearest_words open_data
    parse_objective predict predict_held_out read_prompt sample_few_shot save_artifact save_checkpoint
    seed_everything start_run train_augment train_steps
"""
"""What `import adaptclip as ac` had in version 0.1 and keeps; the upgrade notes name the one that left."""


def test_public_names_stay():
    names = NAMES_OF_0_1.split()
    assert len(names) >= 45
    renamed = {"predict_held_out": "predict_validation"}
    assert not set(names) - set(ac.__all__) - set(renamed)
    for old, new in renamed.items():
        with pytest.warns(FutureWarning, match=f"{old} is now adaptclip.{new}"):
            assert getattr(ac, old) is getattr(ac, new)
    notes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    moved = re.findall(r"^\| `adaptclip\.[\w.]+` \| (.+) \|$", notes, re.M)
    assert len(moved) >= 7
    for new in moved:
        for name in re.findall(r"`adaptclip\.([\w.]+)`", new):
            place = ROOT / "adaptclip" / name.replace(".", "/")
            assert place.is_dir() or place.with_suffix(".py").is_file(), f"the upgrade notes lead to adaptclip.{name}"


def test_the_package_has_types():
    assert (ROOT / "adaptclip" / "py.typed").read_bytes() == b""
    assert re.search(r'^adaptclip = \[.*"py\.typed"', PROJECT, re.M)


LICENSED = ("adaptclip", "docs", "recipes", "tests")
"""Folders of which every Python file names its licence."""


def licensed_files() -> list[Path]:
    """Every file of code of these folders, and those beside them."""
    found = [p for top in LICENSED for p in (ROOT / top).rglob("*.py")]
    return sorted([*found, ROOT / "setup.py", ROOT / ".ci" / "run"])


def test_every_file_of_code_names_its_licence():
    """In its first line, or in its second after a shebang."""
    lacking = []
    for path in licensed_files():
        lines = path.read_text(encoding="utf-8").splitlines()[:2]
        if lines[lines[0].startswith("#!") if lines else 0 :][:1] != [SPDX]:
            lacking.append(path.relative_to(ROOT).as_posix())
    assert not lacking, f"without {SPDX!r} at the top: {lacking}"
    assert len(licensed_files()) >= 350


FORMS = sorted(p.name for p in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if p.name != "config.yml")


@pytest.mark.parametrize("name", FORMS)
def test_issue_forms_are_forms(name):
    form = read(f".github/ISSUE_TEMPLATE/{name}")
    assert all(isinstance(form[key], str) and form[key] for key in ("name", "description"))
    ids = [element["id"] for element in form["body"]]
    assert len(set(ids)) == len(ids) >= 3
    for element in form["body"]:
        assert set(element) <= {"type", "id", "attributes", "validations"}
        assert element["type"] in {"textarea", "input", "dropdown", "checkboxes"}
        assert element["attributes"]["label"]
        if element["type"] in {"dropdown", "checkboxes"}:
            labels = [o["label"] if element["type"] == "checkboxes" else o for o in element["attributes"]["options"]]
            assert all(isinstance(label, str) for label in labels)  # an unquoted Yes is true
    assert any(element.get("validations", {}).get("required") for element in form["body"])


def test_there_is_a_form_for_each_kind_of_issue_and_a_template_for_changes():
    assert FORMS == ["bug.yml", "feature.yml", "question.yml"]
    assert "bash .ci/run" in (ROOT / ".github" / "PULL_REQUEST_TEMPLATE.md").read_text(encoding="utf-8")


def test_hooks_are_those_of_the_gate_and_need_no_network(tmp_path):
    hooks = {}
    for repo in read(".pre-commit-config.yaml")["repos"]:
        assert repo["repo"] == "local"
        for hook in repo["hooks"]:
            assert hook["language"] == "system"
            hooks[hook["id"]] = shlex.split(hook["entry"])
    assert list(hooks) == ["ruff-check", "ruff-format", "pyright"]
    gate = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    dev = re.search(r"^dev = \[(.*)\]$", PROJECT, re.M)
    assert dev
    for command in hooks.values():
        tool = " ".join(word for word in command if not word.startswith("-"))
        assert tool in gate
        assert f'"{command[0]}>=' in dev[1]
    # A hook is run on the files that change: ruff finds what is wrong in one, and rewrites one that is not formatted.
    bad = tmp_path / "bad.py"
    bad.write_text("import os\nx = {  'a':1}\n")
    where = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    ruff = shutil.which("ruff", path=where)
    assert ruff
    check, form = ([ruff, *hooks[name][1:], str(bad)] for name in ("ruff-check", "ruff-format"))
    assert subprocess.run(check, capture_output=True, text=True).returncode == 1
    assert subprocess.run(form, capture_output=True, text=True).returncode == 0
    assert bad.read_text() == 'import os\n\nx = {"a": 1}\n'
