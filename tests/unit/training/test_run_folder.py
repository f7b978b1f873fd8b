# SPDX-License-Identifier: Apache-2.0
"""Run folders on disk: locked, made from what they say, damaged."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import adaptclip as ac
from adaptclip.errors import StorageError, TrainingError
from adaptclip.files import read_json, write_json
from adaptclip.training import run_folder
from adaptclip.training.run_folder import what_is_kept
from adaptclip.training.tracking import make_accelerator, start_run

ROOT = Path(__file__).parents[3]
CUT_LINE = '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.4}\n{"step": 3, "lo'
"""As ../shared/cases/run/metrics_cut_line.jsonl: the machine went away in the middle of a line."""
NUL = '{"step": 1, "loss": 0.5}\n' + "\0" * 40 + '\n{"step": 3, "loss": 0.3}\n'
"""As metrics_nul.jsonl: a file system gave back zeros for what was not on the disk yet."""


def _start(path, config=None, **about):
    return start_run(path, config=config or {"lr": 0.1}, accelerator=make_accelerator(cpu=True), **about)


def _pretend_checkpoint(run, step):
    run.checkpoints.mkdir(exist_ok=True)
    (run.checkpoints / f"step-{step:08d}-0123456789abcdef.safetensors").write_text("")


def _whole(folder: Path) -> dict[str, bytes]:
    locks = ("run.lock", "run.lock.json")
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in locks
    }


# --- the lock


HOLD = """
import sys
from adaptclip.training.tracking import make_accelerator, start_run
run = start_run(sys.argv[1], config={"lr": 0.1}, accelerator=make_accelerator(cpu=True))
print("started", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_told_who_holds_the_folder(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    ) as holder:  # fmt: skip
        assert holder.stdout is not None
        assert holder.stdout.readline() == "started\n"
        before = _whole(tmp_path / "run")
        for flags in ({}, {"resume": True}, {"overwrite": True}):
            message = rf"another run is writing to .*run: process {holder.pid} on this machine, since 20\d\d-"
            with pytest.raises(TrainingError, match=message):
                _start(tmp_path / "run", **flags)
        assert _whole(tmp_path / "run") == before
        holder.kill()
    # The lock of a dead process is none.
    assert _start(tmp_path / "run", overwrite=True).start == 0


def test_the_lock_survives_emptying_and_is_given_back(tmp_path):
    run = _start(tmp_path / "run")
    file = (run.path / "run.lock").stat().st_ino
    run = _start(tmp_path / "run", overwrite=True)
    assert (run.path / "run.lock").stat().st_ino == file
    assert run.lock is not None
    assert run.lock.is_locked
    run.finish()
    assert not run.lock.is_locked


def test_a_run_that_failed_in_this_process_does_not_lock_the_next_one_out(tmp_path):
    kept = _start(tmp_path / "run")  # as a notebook keeps it, through the last traceback
    assert _start(tmp_path / "run", resume=True).lock is kept.lock


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, caplog):
    def none(self):
        raise NotImplementedError("no flock here")

    monkeypatch.setattr(run_folder.FileLock, "acquire", none)
    assert _start(tmp_path / "run").start == 0
    assert "cannot be locked (no flock here): a second run in it would not be noticed" in caplog.text


def test_the_holder_on_another_machine_may_be_gone(tmp_path):
    write_json(tmp_path / "run.lock.json", {"host": "node17", "pid": 5, "since": "yesterday"})
    assert "process 5 on node17, since yesterday" in run_folder._who_holds(tmp_path)
    assert f"delete {tmp_path / 'run.lock'}" in run_folder._who_holds(tmp_path)
    for damaged in ("[]", "{}", "{", "\0"):
        (tmp_path / "run.lock.json").write_text(damaged)
        assert "another process" in run_folder._who_holds(tmp_path)


# --- what a run is made from


def _images(folder: Path, classes=("one", "two", "zero"), count=12) -> Path:
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            _picture(folder / name / f"{i:03d}.png", 100 * number + i)
    return folder


def _picture(path: Path, seed: int) -> None:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)


class Weights:
    """The part of a backbone that a run remembers."""

    def __init__(self, digest="a" * 64):
        self.name, self.digest = "tiny", digest


def _about(folder) -> dict[str, Any]:
    data = ac.open_data(ac.load_card(folder))
    split = ac.sample_few_shot(data, shots=4, seed=1)
    return {"data": data, "split": split, "backbone": Weights()}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTCLIP_CACHE", str(tmp_path / "cache"))


def test_images_added_and_a_class_renamed_are_refused_and_nothing_is_touched(tmp_path):
    """The case as it was found: exit 0, another order of classes, training images among the test images."""
    folder = _images(tmp_path / "images")
    run = _start(tmp_path / "run", **_about(folder))
    _pretend_checkpoint(run, 10)
    run.log(10, loss=0.5)
    before = _whole(run.path)
    for i in range(20):
        for name in ("one", "two", "zero"):
            _picture(folder / name / f"new_{i:03d}.png", 1000 + 100 * len(name) + i + 1000 * ord(name[0]))
    (folder / "zero").rename(folder / "0zero")
    with pytest.raises(TrainingError) as caught:
        _start(run.path, resume=True, **_about(folder))
    assert "1 class was renamed: zero -> 0zero" in str(caught.value)
    assert "60 images were added" in str(caught.value)
    assert "--overwrite" in str(caught.value)
    assert _whole(run.path) == before
    assert _start(run.path, overwrite=True, **_about(folder)).start == 0


def _remove_one(folder):
    (folder / "one" / "003.png").unlink()


def _exchange(folder):
    _picture(folder / "one" / "003.png", 7777)


def _relabel(folder):
    (folder / "one" / "003.png").rename(folder / "two" / "x.png")


def _new_class(folder):
    (folder / "three").mkdir()
    for i in range(12):
        _picture(folder / "three" / f"{i}.png", 5000 + i)


def _lose_class(folder):
    shutil.rmtree(folder / "two")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_remove_one, "1 images were removed"),
        (_exchange, "what is in the images, names, labels, groups or captions of t"),
        (_relabel, "1 images were added; 1 images were removed"),
        (_new_class, "1 class was added: three; 12 images were added"),
        (_lose_class, "1 class was removed: two; 12 images were removed"),
    ],
)
def test_what_changed_in_the_images_is_named(tmp_path, change, said):
    folder = _images(tmp_path / "images")
    _start(tmp_path / "run", **_about(folder))
    before = _whole(tmp_path / "run")
    change(folder)
    with pytest.raises(TrainingError, match=said):
        _start(tmp_path / "run", resume=True, **_about(folder))
    assert _whole(tmp_path / "run") == before


def test_unchanged_images_go_on_and_split_json_is_not_written_again(tmp_path):
    folder = _images(tmp_path / "images")
    run = _start(tmp_path / "run", **_about(folder))
    stamp = (run.path / "split.json").stat().st_mtime_ns
    for image in folder.rglob("*.png"):
        os.utime(image)  # touched, copied back from elsewhere
    (folder / "one" / "003.png").rename(folder / "one" / "003b.png")  # an image is known by its bytes
    assert _start(run.path, resume=True, **_about(folder)).start == 0
    assert (run.path / "split.json").stat().st_mtime_ns == stamp


def test_weights_version_card_and_other_inputs_are_compared(tmp_path, monkeypatch):
    about = _about(_images(tmp_path / "images"))
    about["others"] = {"flickr8k": "1"}
    _start(tmp_path / "run", **about)
    card = about["data"].card.model_copy(update={"templates": ("a scan of a {}.",)})
    changed = about | {"data": replace(about["data"], card=card)}
    with pytest.raises(TrainingError, match=r"changed since: the card \(templates\)\. Put it back"):
        _start(tmp_path / "run", resume=True, **changed)
    with pytest.raises(TrainingError, match=r"the weights of the backbone \(tiny aaaaaaaaaaaa -> tiny bbbbbbbbbbbb\)"):
        _start(tmp_path / "run", resume=True, **about | {"backbone": Weights("b" * 64)})
    with pytest.raises(TrainingError, match=r"changed since: flickr8k\."):
        _start(tmp_path / "run", resume=True, **about | {"others": {"flickr8k": "2"}})
    with pytest.raises(TrainingError, match="the few-shot split, which is drawn otherwise from the same images"):
        _start(tmp_path / "run", resume=True, **about | {"split": ac.sample_few_shot(about["data"], shots=3, seed=1)})
    monkeypatch.setattr("adaptclip.training.run_folder.__version__", "99.0")
    with pytest.raises(TrainingError, match=rf"was begun with adaptclip {ac.__version__}, and this is 99\.0"):
        _start(tmp_path / "run", resume=True, **about)


def test_a_run_of_before_this_was_recorded_is_not_gone_on_with(tmp_path):
    run = _start(tmp_path / "run")
    record = read_json(run.path / "run.json")
    del record["made_from"]
    write_json(run.path / "run.json", record)
    with pytest.raises(TrainingError, match=r"does not say which images, card and weights.*--overwrite"):
        _start(tmp_path / "run", resume=True)


def test_a_split_that_is_not_the_runs(tmp_path):
    about = _about(_images(tmp_path / "images"))
    path = _start(tmp_path / "run", **about).path / "split.json"
    whole = path.read_text()
    ac.sample_few_shot(about["data"], shots=4, seed=2).save(path)
    with pytest.raises(TrainingError, match=r"is not the split that the run was started with \(\d+ of its 12 training"):
        _start(tmp_path / "run", resume=True, **about)
    for damaged in ("", "{}", "[]", whole[:200], whole.replace('"shots": 4', '"shots": 5'), "\0" * 50, "[" * 10_000):
        path.write_text(damaged)
        with pytest.raises(TrainingError, match=r"split\.json.*put back a good copy, or remove the file"):
            _start(tmp_path / "run", resume=True, **about)
        assert path.read_text() == damaged
    path.unlink()
    _start(tmp_path / "run", resume=True, **about)
    assert path.read_text() == whole


# --- damaged files


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"null", b"3", b'"run"', b"{", b"\0" * 100, b"\xff\xfe{}", b"[" * 100_000, b'{"a":' * 5_000,
     b'{"adaptclip": "0.1.0"}', b'{"adaptclip": "0.1.0", "num_processes": 1, "config": []}',
     b'{"adaptclip": 1, "num_processes": 1, "config": {}}', b'{"config": {}, "config": {}}'],
    ids=lambda raw: raw[:24].decode("latin1"),
)  # fmt: skip
def test_damaged_run_json(tmp_path, content):
    run = _start(tmp_path / "run")
    run.log(1, loss=0.5)
    (run.path / "run.json").write_bytes(content)
    before = _whole(run.path)
    for flags in ({"resume": True}, {"overwrite": True}, {}):
        with pytest.raises(TrainingError, match=r"run\.json.*Put back a good copy"):
            _start(run.path, **flags)
        assert _whole(run.path) == before


@pytest.mark.parametrize(
    "made_from",
    [[], None, 3, {"classes": []}, {"classes": {"a": 3}}, {"card": 3}, {"parts": 1}, {"backbone": "x"}, {"others": 5}],
)
def test_damaged_record_of_what_a_run_is_made_from(tmp_path, made_from):
    about = _about(_images(tmp_path / "images"))
    run = _start(tmp_path / "run", **about)
    write_json(run.path / "run.json", read_json(run.path / "run.json") | {"made_from": made_from})
    with pytest.raises(TrainingError, match=r"run\.json|changed since"):
        _start(run.path, resume=True, **about)


@pytest.mark.parametrize(
    ("content", "steps", "damaged"),
    [
        (CUT_LINE, [1, 2], 0),
        (NUL, [1, 3], 1),
        ("", [], 0),
        ("\n\n", [], 2),
        ("\0" * 1000, [], 0),
        ('[]\n{"step": 2}\nnull\n{"loss": 1}\n{"step": "2"}\n{"step": NaN}\n', [2], 5),
        ("[" * 100_000 + '\n{"step": 1}\n', [1], 1),
        ('{"step": 1}\r\n{"step": 9}\r\n', [1], 0),
        ('{"step": 1, "step": 2}\n{"step": true}\n', [], 2),
        ('\udcff{"step": 1}\n{"step": 2}\n', [2], 1),
    ],
)
def test_damaged_metrics_are_used_as_far_as_they_can_be_read(tmp_path, caplog, content, steps, damaged):
    run = _start(tmp_path / "run")
    _pretend_checkpoint(run, 5)
    run.metrics.write_bytes(content.encode(errors="surrogateescape"))
    assert _start(run.path, resume=True).start == 5
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == steps
    said = [
        record.getMessage() for record in caplog.records if "cannot be read and are left out" in record.getMessage()
    ]
    assert len(said) == (damaged > 0)
    assert all(f"{damaged} of " in sentence for sentence in said)


def test_folders_where_files_should_be_and_files_where_folders_should_be(tmp_path):
    for name in ("config.yaml", "metrics.jsonl"):
        run = _start(tmp_path / name)
        (run.path / name).unlink()
        (run.path / name).mkdir()
        with pytest.raises(StorageError, match=name):
            _start(run.path, resume=True)
    run = _start(tmp_path / "checkpoints")
    run.checkpoints.write_text("")
    with pytest.raises(TrainingError, match="checkpoints is a file where the folder of checkpoints should be"):
        _start(run.path, resume=True)
    run = _start(tmp_path / "lock")
    run.finish()
    (run.path / "run.lock").unlink()
    (run.path / "run.lock").mkdir()
    with pytest.raises(StorageError, match="cannot write the run folder"):
        _start(run.path, resume=True)


def test_what_is_kept_is_told_from_what_is_there(tmp_path):
    out = tmp_path / "run"
    assert what_is_kept(out) == f"Nothing was written to {out} yet; the same command starts anew."
    run = _start(out)
    assert "no checkpoint yet: the same command with --resume starts with the first step" in what_is_kept(out)
    _pretend_checkpoint(run, 12)
    (path,) = run.checkpoints.iterdir()
    assert what_is_kept(out).startswith(f"The checkpoint of step 12 is kept ({path}); the same command with --resume")
    _pretend_checkpoint(_start(out / "head"), 3)
    assert what_is_kept(out).startswith("The checkpoint of step 3 is kept")
