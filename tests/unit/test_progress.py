# SPDX-License-Identifier: Apache-2.0
"""Long waits say a line every 30 seconds where no terminal is; the clock here is a number, so that nothing waits."""

from __future__ import annotations

import ast
import fcntl
import io
import os
import struct
import sys
import termios
from pathlib import Path

import pytest
import torch
from torch import nn

import adaptclip as ac
from adaptclip import progress
from adaptclip.bench.jobs import Job, JobStore
from adaptclip.bench.runner import Progress, run_jobs
from adaptclip.progress import lines_to, progress_bar
from adaptclip.terminal import is_terminal


class Clock:
    """Seconds since some moment; goes on only when told."""

    now = 5000.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """The clock of all bars, and a process that has had none yet."""
    made = Clock()
    monkeypatch.setattr(progress, "monotonic", made)
    monkeypatch.setattr(progress, "_voice", progress._Voice())
    return made


def follow(clock, count, each, **how):
    for _ in progress_bar(range(count), **{"desc": "working", "unit": "image", **how}):
        clock.wait(each)


def test_a_line_every_thirty_seconds_and_none_before(clock, capsys):
    follow(clock, 100, 1)
    assert capsys.readouterr().err.splitlines() == [
        "working: 30/100 images, 30 s so far, about 70 s left",
        "working: 60/100 images, 60 s so far, about 40 s left",
        "working: 90/100 images, 2 min so far, about 10 s left",
    ]


def test_a_short_wait_says_nothing(clock, capsys):
    follow(clock, 29, 1)
    assert capsys.readouterr() == ("", "")


def test_what_was_done_before_costs_no_time(clock, capsys):
    with progress_bar(desc="training", unit="step", total=1000, initial=900) as bar:
        for _ in range(40):
            clock.wait(1)
            bar.update()
    assert capsys.readouterr().err == "training: 930/1,000 steps, 30 s so far, about 70 s left\n"


def test_slow_steps_say_one_line_each_and_an_unknown_total_no_time_left(clock, capsys):
    follow(clock, 2, 45, unit="batch")
    for _ in progress_bar(iter("abc"), desc="reading"):
        clock.wait(45)
    assert capsys.readouterr().err.splitlines() == [
        "working: 1/2 batches, 45 s so far, about 45 s left",
        "working: 2/2 batches, 2 min so far",
        "reading: 1, 45 s so far",
        "reading: 2, 2 min so far",
        "reading: 3, 2 min so far",
    ]


def test_many_short_waits_one_after_another_are_a_long_one(clock, capsys):
    for _ in range(10):
        follow(clock, 7, 1)
    assert capsys.readouterr().err.splitlines() == [
        "working: 2/7 images, 2.0 s so far, about 5.0 s left",
        "working: 4/7 images, 4.0 s so far, about 3.0 s left",
    ]


def test_after_a_pause_the_thirty_seconds_begin_anew(clock, capsys):
    follow(clock, 10, 1)
    clock.wait(3600)  # somebody reads their notebook
    follow(clock, 29, 1)
    assert capsys.readouterr().err == ""


def test_slow_steps_with_bars_of_their_own_are_heard(clock, capsys):
    for _ in progress_bar(range(4), desc="report", unit="attribute"):
        clock.wait(40)
        follow(clock, 1, 0.1, desc="inner")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4
    assert said[0] == "inner: 1/1 image, 0.1 s so far"


@pytest.mark.parametrize("variable", ["RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK"])
def test_only_the_main_process_says_lines(clock, capsys, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    follow(clock, 100, 1)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv(variable, "0")
    follow(clock, 100, 1)
    assert "working" in capsys.readouterr().err


def test_a_process_that_is_not_shown_says_nothing(clock, capsys, monkeypatch):
    follow(clock, 100, 1, show=False)
    monkeypatch.setattr(progress, "_BEGAN_AS_MAIN", False)
    follow(clock, 100, 1)
    assert capsys.readouterr().err == ""


def test_lines_can_go_elsewhere(clock, capsys):
    stream = io.StringIO()
    with lines_to(stream, "[2/5] coop: "):
        follow(clock, 40, 1)
    with lines_to(None):
        follow(clock, 40, 1)
    assert stream.getvalue() == "[2/5] coop: working: 30/40 images, 30 s so far, about 10 s left\n"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("broken", [None, "closed", "full"])
def test_a_log_that_cannot_be_written_stops_nothing(clock, monkeypatch, broken):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    stream = Full()
    if broken == "closed":
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream if broken else None)
    done = []
    for i in progress_bar(range(3), desc="working"):
        clock.wait(40)
        done.append(i)
    assert done == [0, 1, 2]


def test_what_was_printed_before_stands_before_the_line(clock, tmp_path, monkeypatch):
    with (tmp_path / "log").open("a") as out, (tmp_path / "log").open("a") as err:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        out.write("settings\n")
        follow(clock, 31, 1)
        out.write("report\n")
    assert [line.partition(":")[0] for line in (tmp_path / "log").read_text().splitlines()] == [
        "settings", "working", "report",
    ]  # fmt: skip


@pytest.fixture
def screen():
    """A pseudo-terminal: its stream, a function that sets its width, and one that reads what is on it."""
    keeper, inside = os.openpty()
    stream = os.fdopen(inside, "w", buffering=1)

    def resize(columns):
        fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 24 if columns else 0, columns, 0, 0))

    resize(80)
    yield stream, resize, lambda: os.read(keeper, 100_000).decode()
    stream.close()
    os.close(keeper)


def test_on_a_terminal_there_is_a_bar_as_ever(clock, screen, monkeypatch):
    from tqdm import tqdm

    stream, _, read = screen
    monkeypatch.setattr(sys, "stderr", stream)
    bar = progress_bar(range(3), desc="working", unit="image", leave=False)
    assert isinstance(bar, tqdm)
    assert (bar.desc, bar.unit, bar.total, bar.leave) == ("working", "image", 3, False)
    assert bar.delay == progress.DELAY_S == 1.0
    assert list(bar) == [0, 1, 2]
    stream.write("end")
    stream.flush()
    assert read() == "end"  # what is done at once draws nothing
    assert list(progress_bar(range(3), desc="working", leave=False, delay=0)) == [0, 1, 2]
    assert "working:   0%|" in read()
    hidden = progress_bar(range(3), desc="working", show=False)
    assert isinstance(hidden, tqdm)
    assert hidden.disable is True


def test_a_terminal_of_width_0_gets_lines(clock, screen, monkeypatch):
    stream, resize, read = screen
    assert is_terminal(stream)
    resize(0)
    assert not is_terminal(stream)
    monkeypatch.setattr(sys, "stderr", stream)
    follow(clock, 31, 1)
    assert read().rstrip("\r\n") == "working: 30/31 images, 30 s so far, about 1.0 s left"


def test_no_stream_is_no_terminal():
    closed = io.StringIO()
    closed.close()
    assert not any(map(is_terminal, (None, closed, io.StringIO())))


def test_training_says_its_loss(clock, capsys):
    accelerator = ac.make_accelerator("no", cpu=True)
    model, optimizer = accelerator.prepare(nn.Linear(1, 1), None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

    class Loader:
        def batch(self, micro_step):
            return float(micro_step)

    for step, value in ac.train_steps(Loader(), 50, accelerator, start=10):
        clock.wait(2)
        with accelerator.accumulate(model):
            loss = model(torch.zeros(1, 1)).sum() * 0 + value / 8
            ac.backward_and_step(accelerator, loss, model, optimizer, scheduler, step=step)
    assert capsys.readouterr().err.splitlines() == [
        "training: 25/50 steps, loss 3, 30 s so far, about 50 s left",
        "training: 40/50 steps, loss 4.875, 60 s so far, about 20 s left",
    ]


def test_a_job_of_the_bench_says_which_one_it_is(clock, capsys, tmp_path):
    jobs = [Job("card", "coop", {}, shots, 1, f"key{shots}") for shots in (1, 2)]

    def run(job):
        follow(clock, 31, 1, desc="training", unit="step")
        return {"judged": {"test": {"accuracy": 0.5}}, "train_images": 1, "total_s": 31.0, "read_s": 0.0}

    for show in (True, False):
        board = JobStore(tmp_path / str(show), "one")
        run_jobs(jobs, run, board, Progress(jobs, board, metric="accuracy", show=show), wait=True)
        assert capsys.readouterr().err.splitlines() == show * [
            f"[1/2] {jobs[0]}: training: 30/31 steps, 30 s so far, about 1.0 s left",
            f"[2/2] {jobs[1]}: training: 29/31 steps, 29 s so far, about 2.0 s left",
        ]


def test_every_bar_of_the_package_is_one_of_these():
    found = {}
    root = Path(__file__).resolve().parents[2]
    for path in [*(root / "adaptclip").rglob("*.py"), *(root / "recipes").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                if name.startswith(("tqdm", "rich.progress", "rich.live", "rich.status")):
                    found.setdefault(path.relative_to(root).as_posix(), []).append(name)
    # The table of the bench is drawn by rich, and its jobs say their lines where it is not.
    assert found == {"adaptclip/progress.py": ["tqdm"], "adaptclip/bench/runner.py": ["rich.live"]}
