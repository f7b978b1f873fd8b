"""The Python of the documentation runs, and prints what it shows."""

from __future__ import annotations

import contextlib
import io
import re
from typing import Any

import pytest
from recipe_files import ROOT

NUMBER = re.compile(r"-?\d+\.\d+")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_python_md_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data_cards").symlink_to(ROOT / "data_cards")
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", text, flags=re.S)
    assert len(blocks) == 4
    names: dict[str, Any] = {}
    for code, shown in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "docs/python.md", "exec"), names)
        # Another processor rounds otherwise: a few points of some forty images are the same result.
        assert NUMBER.sub("#", printed.getvalue()) == NUMBER.sub("#", shown)
        for found, said in zip(NUMBER.findall(printed.getvalue()), NUMBER.findall(shown), strict=True):
            assert float(found) == pytest.approx(float(said), abs=0.06)
    assert (tmp_path / "digits_model" / "manifest.json").is_file()
