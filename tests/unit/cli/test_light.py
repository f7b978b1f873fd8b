# SPDX-License-Identifier: Apache-2.0
"""What does not need torch does not import it: help, lists, and judging from a file."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = (
    "accelerate", "albumentations", "datasets", "open_clip", "peft", "sklearn", "timm", "torch", "torchvision",
    "transformers",
)  # fmt: skip
SCRIPT = """
import sys
from adaptclip.cli import main
code = None
try:
    main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
print("\\nheavy:", *[name for name in {heavy!r} if name in sys.modules])
print("modules:", sum(name.startswith("adaptclip") for name in sys.modules), "code:", code)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("light")
    probs = {"cat": "0.9,0.1", "dog": "0.1,0.9"}
    rows = [f"{i}-{label},{label},{probs[label]},s{i % 2}" for i in range(150) for label in probs]
    (folder / "p.csv").write_text("id,label,prob_cat,prob_dog,site\n" + "\n".join(rows) + "\n", encoding="utf-8")
    (folder / "g.yaml").write_text("gates:\n  - {metric: accuracy, at_least: 0.5}\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("command", "modules"),
    [
        ("--help", 10),
        ("card --help", 10),
        ("card list", 12),
        ("recipes list", 10),
        ("gate p.csv --gates g.yaml", 30),
        ("report p.csv --out out", 30),
        ("compare p.csv p.csv --group site", 30),
        ("plan digits --expect 0.9 --groups stroke_weight=3 --num-classes 10", 25),
    ],
)
def test_no_command_imports_what_it_does_not_need(folder, command, modules):
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(heavy=HEAVY), *command.split()],
        capture_output=True, text=True, cwd=folder, check=True,
    )  # fmt: skip
    *_, heavy, last = result.stdout.rstrip().splitlines()
    assert heavy == "heavy:", result.stdout
    assert last.split()[-1] == ("3" if command.startswith("compare") else "0"), result.stdout + result.stderr
    assert int(last.split()[1]) >= modules, last  # it did something


def test_a_method_costs_torch_and_little_more():
    code = (
        "import sys, adaptclip; adaptclip.CoOp, adaptclip.GDA; "
        f"print([name for name in {HEAVY!r} if name != 'torch' and name in sys.modules], 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[] True"
