# SPDX-License-Identifier: Apache-2.0
"""The training loops of the recipes are the same lines; a recipe stays short enough to be read in one go."""

from __future__ import annotations

import re
import textwrap

from recipe_files import RECIPES, ROOT

BEGIN, END = "# --- loop: the same lines in every recipe ---", "# --- end of loop ---"
LOSS_OF_ITS_OWN = {"contrastive"}
"""Recipes that contrast pairs instead of classifying: their loss line, and clipping, may differ; nothing else."""
NOT_A_METHOD = {"starter"}
"""Made the model that comes with the package, by three losses of its own."""


def loops() -> dict[str, str]:
    """Recipe name -> its loop, from recipes that train by steps."""
    found = {}
    for path in RECIPES:
        text = path.read_text(encoding="utf-8")
        blocks = re.findall(rf"^ *{re.escape(BEGIN)}\n(.*?)^ *{re.escape(END)}$", text, flags=re.S | re.M)
        assert len(blocks) == text.count("ac.train_steps(") or path.stem in NOT_A_METHOD, f"{path.name}: unmarked loop"
        assert len(blocks) <= 1, f"{path.name}: two loops"
        if blocks:
            found[path.stem] = textwrap.dedent(blocks[0])
    return found


def test_the_loops_are_the_same_lines(capsys):
    found = loops()
    reference = found.pop("coop").splitlines()
    assert len(reference) == 10
    compared = 0
    for name, block in found.items():
        lines = block.splitlines()
        if name in LOSS_OF_ITS_OWN:
            assert sum("loss = " in line for line in lines) == 1
            kept = [line.replace(", max_grad_norm=1)", ")") for line in lines if "loss = model(batch)" not in line]
            wanted = [line for line in reference if "logits = " not in line and "loss = " not in line]
            assert kept == wanted, name
        else:
            assert lines == reference, f"{name}: its loop differs from coop's"
        compared += len(lines)
    assert set(found) == {"adapt", "cocoop", "contrastive", "lora", "tip_adapter", "two_stage"}
    assert compared >= 59, f"only {compared} lines were compared"
    with capsys.disabled():
        print(f"\nloops of {len(found)} recipes compared with coop's, {compared} lines")  # noqa: T201


def test_the_loop_of_the_bench_is_a_recipes_without_log_and_checkpoints():
    reference = loops()["coop"].splitlines()
    text = (ROOT / "adaptclip" / "training" / "support.py").read_text(encoding="utf-8")
    (block,) = re.findall(rf"^ *{re.escape(BEGIN)}\n(.*?)^ *{re.escape(END)}$", text, flags=re.S | re.M)
    wanted, skip = [], False
    for line in reference:
        if "is_due(" in line:
            skip = True  # and the line that it guards
        elif skip:
            skip = False
        else:
            wanted.append(line.replace("ac.", "").replace("grad_norm = ", "").replace(", start=start, run=run", ""))
    assert textwrap.dedent(block).splitlines() == wanted
    assert len(wanted) == 6
    others = list((ROOT / "adaptclip" / "bench").glob("*.py"))
    assert len(others) >= 9
    assert not any("backward" in path.read_text(encoding="utf-8") for path in others)


def test_no_recipe_trains_without_the_marked_loop():
    with_loop = loops()
    looked_at = 0
    for path in RECIPES:
        text = path.read_text(encoding="utf-8")
        looked_at += 1
        if ".backward(" in text or "backward_and_step(" in text:
            assert path.stem in {*with_loop, *NOT_A_METHOD}, f"{path.name} has a loop of its own"
    assert looked_at >= 9


def test_recipes_are_short():
    for path in RECIPES:
        count = path.read_text(encoding="utf-8").count("\n")
        assert count < 200 or path.stem in NOT_A_METHOD, f"{path.name} has {count} lines"
