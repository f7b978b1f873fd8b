# SPDX-License-Identifier: Apache-2.0
"""docs/layout.md lists every module and recipe, says what it is, and lists nothing that is not there."""

from __future__ import annotations

import re

from recipe_files import ROOT

LISTED = re.compile(r"^(\S+) +# (\S.*)$", re.M)


def test_the_file_list_is_what_is_there():
    page = (ROOT / "docs" / "layout.md").read_text(encoding="utf-8")
    files = page.split("## Files")[1]
    (block,) = re.findall(r"```text\n(.*?)```", files, flags=re.S)
    lines = [line for line in block.splitlines() if line.strip()]
    unread = [line for line in lines if not LISTED.match(line)]
    assert not unread, f"should read `path  # what it is`: {unread}"
    listed = [name for name, _ in LISTED.findall(block)]
    gone = [name for name in listed if not (ROOT / name).exists()]
    assert not gone, f"listed in docs/layout.md and not there: {gone}"
    assert len(listed) == len(set(listed)), "listed twice in docs/layout.md"
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "adaptclip").rglob("*.py") if p.name != "__init__.py"}
    modules |= {p.relative_to(ROOT).as_posix() for p in (ROOT / "recipes").glob("*.py")}
    assert modules <= set(listed), f"not in docs/layout.md: {sorted(modules - set(listed))}"
    assert len(listed) >= 60
