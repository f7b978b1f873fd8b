# SPDX-License-Identifier: Apache-2.0
"""The script that runs the tests against another open_clip can be started; the figures are in the changelog."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import open_clip
import pytest
from recipe_files import ROOT

FILE = ROOT / "tests" / "compat" / "run_open_clip.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("run_open_clip", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_dry_run(script, capsys, tmp_path):
    installed = Path(open_clip.__file__).parents[1]
    assert script.main([str(installed), "--dry-run"]) == 0
    assert f"tests/unit/clip, tests/unit/methods with PYTHONPATH={installed}" in capsys.readouterr().out
    (tmp_path / "src" / "open_clip").mkdir(parents=True)
    (tmp_path / "src" / "open_clip" / "version.py").touch()
    assert script.source_folder(tmp_path) == tmp_path / "src"
    with pytest.raises(SystemExit, match="holds no open_clip"):
        script.source_folder(FILE.parent)


@pytest.mark.parametrize("name", ["ViT-M-32", "RN50", "vit_medium_patch16_gap_256"])
def test_an_architecture_is_tried(script, name):
    assert script._adapt(open_clip.get_model_config(name)).startswith("supported: ")
