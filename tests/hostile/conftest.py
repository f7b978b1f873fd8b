# SPDX-License-Identifier: Apache-2.0
"""The world of the damaged files, and the table of counts at the end."""

from __future__ import annotations

import hashlib
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hostile.kinds import quick
from hostile.world import World, make_world

OUTCOMES = ("clear error", "right answer", "silent change", "not refused", "unclear error", "traceback", "hang")


def _state(folder: Path) -> str:
    """Digest of all names and bytes below a folder."""
    sha = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        sha.update(
            path.relative_to(folder).as_posix().encode() + b"\0" + (path.read_bytes() if path.is_file() else b"")
        )
    return sha.hexdigest()


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = make_world(tmp_path_factory.mktemp("world"), patch)
        shutil.copytree(made.root / "one", made.scratch)
        patch.setenv("ADAPTCLIP_CACHE", str(made.scratch / "kept"))
        quick(made, patch)
        before = _state(made.root)
        yield made
        assert _state(made.root) == before, "a read or a mutation changed the original data"


def pytest_terminal_summary(terminalreporter):
    counts: dict[str, Counter[str]] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            info = dict(getattr(report, "user_properties", ()))
            if getattr(report, "when", "") == "call" and "outcome" in info:
                counts.setdefault(info["kind"], Counter())[info["outcome"]] += 1
    if not counts:
        return
    write = terminalreporter.write_line
    write("\ndamaged files: kind x outcome\n")
    write("| kind | " + " | ".join(OUTCOMES) + " | all |")
    write("|---" * (len(OUTCOMES) + 2) + "|")
    total = Counter()
    for kind, own in counts.items():
        total += own
        write(f"| {kind} | " + " | ".join(str(own[o]) for o in OUTCOMES) + f" | {sum(own[o] for o in OUTCOMES)} |")
    write("| all | " + " | ".join(str(total[o]) for o in OUTCOMES) + f" | {sum(total[o] for o in OUTCOMES)} |")
