# SPDX-License-Identifier: Apache-2.0
"""Runs every recipe that learns in a loop, once undisturbed and once under signals at random moments.

A program, so that torch is imported once: each run is a fork of it, a process of its own that is really killed. Only
`starter`, which reads its own corpora and takes a step of seconds, is not among them: tests/recipes/test_starter.py
interrupts it between steps. `few_shot` has no loop: its jobs are done or not (tests/recipes/test_few_shot.py kills it).
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipe_files import load_recipe
from tiny_clip import write_tiny_checkpoint

import adaptclip as ac
from adaptclip.entrypoint import launch
from adaptclip.training.checkpoint import newest_checkpoint, step_of

FLAGS = {
    "coop": "--epochs 12 --views 2 --batch-size 20 --n-ctx 4 --lr 0.02",
    "cocoop": "--epochs 6 --views 2 --batch-size 10 --lr 0.02",
    "lora": "--steps 12 --batch-size 10 --lr 0.01",
    "two_stage": "--steps 14 --batch-size 10 --lr 0.01 --views 2",
    "contrastive": "--epochs 6 --batch-size 10 --lr 0.001",
    "tip_adapter": "--epochs 12 --views 2 --batch-size 20 --lr 0.01",
    "adapt": "--method layernorm --settings steps=12 batch_size=10 lr=0.01",
}
"""About twelve steps each, on two digits per class and a tiny model."""
KILLS = {"coop": 3, "cocoop": 3, "lora": 3, "two_stage": 3, "contrastive": 3, "tip_adapter": 3, "adapt": 2}
TERMS = {"coop": 2, "cocoop": 1, "lora": 2, "two_stage": 1, "contrastive": 2, "tip_adapter": 1, "adapt": 1}


def start(recipe: Any, arguments: list[str], out: Path, said: Path) -> int:
    """Forks a process that runs a recipe; returns its id."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        file = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        launch(recipe.main, recipe.Config, [*arguments, "--out", str(out), "--resume"])
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.stdout.flush()
        os._exit(code)


def taken(out: Path) -> int:
    """Steps in the newest checkpoint of a run, those of a second stage on top."""
    found = [newest_checkpoint(folder / "checkpoints") for folder in (out, out / "head")]
    return sum(step_of(path) for path in found if path is not None)


def has_begun(out: Path, child: int, moment: int) -> bool:
    """Whether the process has its run folder; for the earliest moments it need not."""
    holder = out / "run.lock.json"
    return moment < 1 or (holder.exists() and f'"pid": {child},' in holder.read_text())


def disturb(recipe: Any, arguments: list[str], out: Path, signals: list[int], chance: random.Random) -> list[dict]:
    """Sends each signal to a run of its own, from its first moments to its report; returns what came of each."""
    moments = sorted(chance.sample(range(-1, 13), len(signals)))
    events = []
    for signum, moment in zip(signals, moments, strict=True):
        said = out.parent / "said"
        child = start(recipe, arguments, out, said)
        ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while not (has_begun(out, child, moment) and taken(out) >= moment):
            if os.waitid(os.P_PID, child, ended):
                break
            time.sleep(0.0005)
        if moment < 1:  # somewhere in reading, encoding, or the first step
            time.sleep(chance.uniform(0.1, 0.4))
        else:
            time.sleep(chance.uniform(0, 0.004))
        os.kill(child, signum)
        _, status = os.waitpid(child, 0)
        kept = sorted(path.name for path in out.glob("**/step-*.safetensors"))
        code, text = os.waitstatus_to_exitcode(status), said.read_text(errors="replace")
        events.append({"signal": signum, "moment": moment, "code": code, "kept": kept, "said": text})
    return events


def main(folder: Path) -> None:
    torch.set_num_threads(1)  # a fork must not inherit half of a thread pool
    tiny = f"local-dir:{write_tiny_checkpoint(folder / 'tiny')}"
    whole = ac.open_data(ac.load_card("digits"))
    data = replace(whole, test=whole.test.select(range(0, len(whole.test), 12)))
    backbone, load = ac.load_backbone(tiny), ac.load_backbone
    # What every child would read anew.
    setattr(ac, "open_data", lambda *about, **more: data)  # noqa: B010
    setattr(ac, "load_backbone", lambda name, *a, **more: backbone if name == tiny else load(name, *a, **more))  # noqa: B010
    chance, events = random.Random(0), {}
    for name, flags in FLAGS.items():
        recipe, own = load_recipe(name), folder / name
        own.mkdir()
        arguments = [*flags.split(), "--backbone", tiny, "--shots", "2", "--gates", "report", "--save-every", "1"]
        arguments += ["--cache", str(folder / "cache")]
        began = time.perf_counter()
        child = start(recipe, arguments, own / "undisturbed", own / "said")
        assert os.waitpid(child, 0)[1] == 0, (own / "said").read_text()
        signals = [int(signal.SIGKILL)] * KILLS[name] + [int(signal.SIGTERM)] * TERMS[name]
        chance.shuffle(signals)
        events[name] = disturb(recipe, arguments, own / "disturbed", signals, chance)
        child = start(recipe, arguments, own / "disturbed", own / "said")
        assert os.waitpid(child, 0)[1] == 0, (own / "said").read_text()
        print(f"{name}: {time.perf_counter() - began:.1f} s", file=sys.stderr)  # noqa: T201
    (folder / "events.json").write_text(json.dumps(events))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
