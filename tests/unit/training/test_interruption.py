# SPDX-License-Identifier: Apache-2.0
"""Signals and the clock: when a loop saves, and when it stops."""

import os
import signal
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from adaptclip.entrypoint import run_and_exit
from adaptclip.errors import Stopped
from adaptclip.training import interruption
from adaptclip.training.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint, step_of
from adaptclip.training.interruption import Pace, Signals
from adaptclip.training.steps import FeatureLoader, backward_and_step, train_steps
from adaptclip.training.tracking import make_accelerator, start_run
from adaptclip.types import Features

NUM_STEPS = 12


@pytest.fixture(autouse=True)
def _signals_as_in_a_terminal():
    """Tests in the background (nohup) inherit that Ctrl-C is ignored, which adaptclip rightly leaves as it is."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((3, 4), 0.1))

    def forward(self, batch):
        return batch.features @ self.weight.T

    def adapter_state(self):
        return {"weight": self.weight}

    def load_adapter_state(self, state):
        self.load_state_dict(state)


def train(out, *, at=None, do=lambda: None, accumulate=1, resume=False, **pace):
    """The loop of the recipes; `do` happens in the forward pass of micro-step `at`, counted from 1. Returns saves."""
    accelerator = make_accelerator(accumulate=accumulate, cpu=True)
    flags: dict[str, Any] = {"save_every": 5} | pace
    run = start_run(out, config={}, accelerator=accelerator, resume=resume, **flags)
    values = F.normalize(torch.randn(1, 24, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    features = Features(values=values, labels=torch.arange(24) % 3, ids=tuple(map(str, range(24))))
    loader = FeatureLoader(features, batch_size=4, seed=0, accelerator=accelerator)
    adapter = Linear()
    optimizer = SGD(adapter.parameters(), lr=0.5, momentum=0.9)
    scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    model, optimizer = accelerator.prepare(adapter, optimizer)
    start = load_checkpoint(run.checkpoints, adapter, optimizer, scheduler, accelerator)
    saved = []
    for micro_step, (step, batch) in enumerate(train_steps(loader, NUM_STEPS, accelerator, start=start, run=run), 1):
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(batch), batch.labels)
            if micro_step == at:
                do()
            backward_and_step(accelerator, loss, model, optimizer, scheduler, step=step)
        if run.save_is_due(step, NUM_STEPS):
            save_checkpoint(run.checkpoints, step, adapter, optimizer, scheduler, accelerator)
            saved.append(step)
    return saved, adapter.weight.detach()


def send(signum):
    return lambda: os.kill(os.getpid(), signum)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("accumulate", "save_every"), [(1, 5), (2, 5), (1, 1), (1, 0), (2, 3)])
def test_a_signal_lets_the_step_finish_and_be_saved(tmp_path, capfd, signum, accumulate, save_every):
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Stopped) as caught:
        train(tmp_path / "run", at=2 * accumulate + 1, do=send(signum), accumulate=accumulate, save_every=save_every)
    assert caught.value.signum == signum
    assert isinstance(caught.value, KeyboardInterrupt), "a notebook knows it"
    newest = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert step_of(newest) == 3, "the step in which it came, whether a checkpoint was due then or not"
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before
    assert f"{signal.Signals(signum).name}: the step is finished and saved first" in capfd.readouterr().err
    _, resumed = train(tmp_path / "run", accumulate=accumulate, resume=True)
    _, undisturbed = train(tmp_path / "whole", accumulate=accumulate)
    assert torch.equal(resumed, undisturbed)


def test_a_signal_in_the_last_step_stops_after_it(tmp_path):
    with pytest.raises(Stopped):
        train(tmp_path / "run", at=NUM_STEPS, do=send(signal.SIGTERM))
    newest = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert step_of(newest) == NUM_STEPS
    assert train(tmp_path / "run", resume=True)[0] == []


def test_a_second_signal_ends_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(interruption, "SAME_S", 0.05)

    def twice():
        send(signal.SIGTERM)()
        send(signal.SIGTERM)()  # what a launcher passes on is the same signal
        time.sleep(0.06)
        send(signal.SIGINT)()

    with pytest.raises(Stopped) as caught:
        train(tmp_path / "run", at=8, do=twice)
    assert caught.value.signum == signal.SIGINT
    newest = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert step_of(newest) == 5


def test_without_a_run_ctrl_c_is_what_it_was():
    accelerator = make_accelerator(cpu=True)
    loader: Any = SimpleNamespace(batch=lambda micro_step: None)
    steps = []

    def loop():
        for step, _ in train_steps(loader, 5, accelerator):
            steps.append(step)
            if step == 2:
                send(signal.SIGINT)()

    with pytest.raises(KeyboardInterrupt) as caught:
        loop()
    assert not isinstance(caught.value, Stopped)
    assert steps == [1, 2]


def test_handlers_come_back_after_an_error_in_the_loop(tmp_path):
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]

    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "run", at=3, do=fail)
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before
    assert interruption.wishes() == 0


def test_an_ignored_signal_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        saved, _ = train(tmp_path / "run", at=3, do=send(signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)
    assert saved == [5, 10, 12]


def test_a_loop_in_a_thread_takes_no_signals(tmp_path):
    saved = []
    thread = threading.Thread(target=lambda: saved.extend(train(tmp_path / "run")[0]))
    thread.start()
    thread.join()
    assert saved == [5, 10, 12]


def test_checkpoints_by_the_clock(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(interruption.time, "monotonic", lambda: now[0])

    def later():
        now[0] += 301

    assert train(tmp_path / "a", at=3, do=later)[0] == [3, 5, 10, 12]
    assert train(tmp_path / "b", at=3, do=later, save_every=0)[0] == [3, 12]
    assert train(tmp_path / "c", at=3, do=later, save_every=0, save_minutes=0)[0] == [12]
    assert train(tmp_path / "d", at=3, do=later, save_every=0, save_minutes=6)[0] == [12]


def test_processes_agree_through_one_sum():
    """What three processes wish, added to a count as every step does: the main one's clock, anybody's signal."""
    paces = [Pace(is_main=rank == 0, num_processes=3, minutes=5) for rank in range(3)]
    for pace in paces:
        pace._saved_at = time.monotonic() - 301
    paces[2]._signals.got = signal.SIGTERM
    total = sum(pace.wishes() for pace in paces) + 2  # two losses that are not finite
    interruption._running.append(paces[1])
    try:
        assert interruption.take(total) == 2
    finally:
        interruption._running.remove(paces[1])
    assert (paces[1]._save, paces[1]._stop) == (1, 1)
    assert paces[1].asks_to_save()
    with pytest.raises(Stopped) as caught:
        paces[1].stop_if_asked()
    assert caught.value.signum == signal.SIGTERM, "its own process got none"
    alone = Pace(is_main=False, num_processes=3, minutes=5)
    alone._saved_at = time.monotonic() - 301
    alone.take(alone.wishes())
    assert not alone.asks_to_save(), "the clock of another process decides nothing"


@pytest.mark.parametrize(("signum", "code", "name"), [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C")])
def test_outside_of_a_loop_a_signal_ends_the_program_with_a_message(capsys, signum, code, name):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        run_and_exit(send(signum), kept=lambda: "All is kept.")
    assert caught.value.code == code
    assert capsys.readouterr().err == f"\nstopped by {name}. All is kept.\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_handler_of_somebody_else_for_sigterm_is_kept():
    got = []
    before = signal.signal(signal.SIGTERM, lambda *about: got.append("theirs"))
    try:
        with pytest.raises(SystemExit) as caught:
            run_and_exit(send(signal.SIGTERM))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (caught.value.code, got) == (0, ["theirs"])


def test_signals_at_once():
    with pytest.raises(Stopped), Signals() as signals:
        send(signal.SIGTERM)()
    assert signals.got == signal.SIGTERM
