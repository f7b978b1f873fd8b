# SPDX-License-Identifier: Apache-2.0
"""Trains once undisturbed and once under SIGKILLs at random moments. Run as a program: one import of torch for all."""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

from adaptclip.seeding import seed_everything
from adaptclip.training.checkpoint import load_checkpoint, save_checkpoint
from adaptclip.training.mitigation import GroupDRO, Mitigation
from adaptclip.training.optim import build_scheduler
from adaptclip.training.steps import FeatureLoader, backward_and_step, is_due, train_steps
from adaptclip.training.tracking import make_accelerator, start_run
from adaptclip.types import Features

NUM_STEPS = 60


class DropoutLinear(nn.Module):
    """An adapter that also draws from the global generator, which a checkpoint must therefore hold."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((4, 16), 0.1))

    def forward(self, batch):
        return 10 * F.dropout(batch.features, 0.25, self.training) @ self.weight.T

    def optimizer(self):
        return SGD(self.parameters(), lr=0.1, momentum=0.9)

    def adapter_state(self):
        return {"weight": self.weight}

    def load_adapter_state(self, state):
        self.load_state_dict(state)


def train(out: Path) -> None:
    """What a recipe does, with all of its pieces."""
    accelerator = make_accelerator(accumulate=2, cpu=True)
    seed_everything(5)
    run = start_run(out, config={"steps": NUM_STEPS}, accelerator=accelerator, resume=True, save_every=3)
    generator = torch.Generator().manual_seed(0)
    features = Features(
        values=F.normalize(torch.randn(2, 50, 16, generator=generator), dim=-1),
        labels=torch.randint(4, (50,), generator=generator),
        ids=tuple(map(str, range(50))),
    )
    adapter = DropoutLinear()
    optimizer = adapter.optimizer()
    place = torch.arange(50) % 7 // 3 - 1  # two groups, and images of none
    mitigation = Mitigation(place=place, dro=GroupDRO(place, step=0.1, accelerator=accelerator))
    loader = FeatureLoader(features, batch_size=4, seed=0, accelerator=accelerator, strata=mitigation.strata)
    scheduler = build_scheduler(optimizer, total_steps=NUM_STEPS, steps_per_epoch=loader.steps_per_epoch)
    adapter, optimizer = accelerator.prepare(adapter, optimizer)
    start = load_checkpoint(run.checkpoints, adapter, optimizer, scheduler, accelerator, mitigation)
    for step, batch in train_steps(loader, NUM_STEPS, accelerator, start=start, run=run):
        with accelerator.accumulate(adapter):
            loss = mitigation.loss(adapter(batch), batch)
            grad_norm = backward_and_step(accelerator, loss, adapter, optimizer, scheduler, step=step)
        if is_due(step, 1, NUM_STEPS):
            run.log(step, loss=loss, grad_norm=grad_norm, lr=scheduler.get_last_lr()[0])
        if run.save_is_due(step, NUM_STEPS):
            save_checkpoint(run.checkpoints, step, adapter, optimizer, scheduler, accelerator, mitigation)


def _train_in_child(out: Path) -> int:
    child = os.fork()
    if child == 0:
        train(out)
        os._exit(0)
    return child


def _wait_for_step(metrics: Path, step: int, child: int) -> bool:
    """Waits until the child has logged `step`; says whether it is still running then."""
    while not (metrics.exists() and len(metrics.read_bytes().splitlines()) >= step):
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.0005)
    return True


def main(folder: Path) -> None:
    torch.set_num_threads(1)  # a fork must not inherit half of a thread pool
    DropoutLinear().optimizer()  # imports a large part of torch, here once for all children
    os.waitpid(_train_in_child(folder / "undisturbed"), 0)
    chance = random.Random(0)
    killed = folder / "killed"
    num_kills = 0
    for step in sorted(chance.sample(range(NUM_STEPS - 10), 7)):
        child = _train_in_child(killed)
        if _wait_for_step(killed / "metrics.jsonl", step, child):
            time.sleep(chance.uniform(0, 0.008))  # somewhere in a step, a log line or a checkpoint
            os.kill(child, signal.SIGKILL)
            num_kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    os.waitpid(_train_in_child(killed), 0)
    (folder / "num_kills").write_text(str(num_kills))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
