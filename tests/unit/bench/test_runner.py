# SPDX-License-Identifier: Apache-2.0
"""Jobs are shared, never doubled; errors stay with their job; what is done stays done."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch

from adaptclip.bench.jobs import Job, JobStore, launch_id
from adaptclip.bench.runner import Progress, duration, run_jobs, worker_rank


def jobs(count=12):
    methods = ("zero_shot", "gda", "coop")
    return [Job("card", methods[i % 3], {}, 1 + i // 3, 1, f"key{i:02d}") for i in range(count)]


def done(job: Job, seconds=1.0):
    return {
        "judged": {"test": {"accuracy": 0.5}}, "train_images": job.shots, "total_s": seconds, "read_s": 0.0,
        "job": str(job),
    }  # fmt: skip


def run(folder, own, work, *, launch="one", wait=True):
    store = JobStore(folder, launch)
    progress = Progress(own, store, metric="accuracy", show=False)
    run_jobs(own, work, store, progress, wait=wait)
    return store


def test_many_workers_do_every_job_once(tmp_path):
    own, count, lock = jobs(), dict.fromkeys((job.key for job in jobs()), 0), threading.Lock()

    def work(job):
        with lock:
            count[job.key] += 1
        time.sleep(0.01)
        return done(job)

    workers = [threading.Thread(target=run, args=(tmp_path, own, work)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert set(count.values()) == {1}
    store = JobStore(tmp_path, "later")
    assert [(store.result(job.key) or {}).get("job") for job in own] == list(map(str, own))


def test_an_error_stays_with_its_job_and_is_tried_again_by_the_next_launch(tmp_path):
    tried = []

    def work(job):
        tried.append(job.key)
        if job.key == "key04" and len(tried) < 20:
            raise ValueError("the message")
        return done(job)

    store = run(tmp_path, jobs(), work)
    assert len(tried) == 12
    failure = store.failure("key04")
    assert failure is not None
    assert (failure["error"], failure["message"]) == ("ValueError", "the message")
    assert "Traceback" in failure["traceback"]
    assert store.is_settled("key04")
    run(tmp_path, jobs(), work)  # the same launch
    assert len(tried) == 12
    tried += [""] * 20
    store = run(tmp_path, jobs(), work, launch="two")
    assert tried[-1] == "key04"
    assert len(tried) == 33
    assert store.failure("key04") is None
    assert store.result("key04")


def test_ctrl_c_keeps_what_is_done_and_gives_the_claim_back(tmp_path):
    def work(job):
        if job.key == "key03":
            raise KeyboardInterrupt
        return done(job)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, jobs(), work)
    assert len(list(tmp_path.glob("key??.json"))) == 3
    again = []
    run(tmp_path, jobs(), lambda job: again.append(job.key) or done(job), launch="two")
    assert len(again) == 9


def test_claims(tmp_path):
    store, other = JobStore(tmp_path, "a"), JobStore(tmp_path, "b")
    with store.claim("job") as mine:
        assert mine
        with other.claim("job") as theirs:
            assert not theirs
        store.finish("job", {"x": 1})
    with other.claim("job") as mine:
        assert not mine  # it is done
    with other.claim("else") as mine:
        assert mine


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"key": "other"}'])
def test_a_damaged_result_is_none(tmp_path, damage):
    store = JobStore(tmp_path, "a")
    store.finish("job", {"x": 1})
    (tmp_path / "job.json").write_bytes(damage)
    assert store.result("job") is None
    assert not store.is_settled("job")


def test_who_does_not_wait_leaves_what_others_are_at(tmp_path):
    store, own = JobStore(tmp_path, "a"), jobs(3)
    with store.claim(own[1].key):
        run(tmp_path, own, done, wait=False)
        assert [store.is_settled(job.key) for job in own] == [True, False, True]


def test_a_place_is_taken_from_the_launcher_once(monkeypatch):
    threads = torch.get_num_threads()
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_PORT": "5",
        "MASTER_ADDR": "h",
    }.items():
        monkeypatch.setenv(name, value)
    first = launch_id()
    monkeypatch.setenv("RANK", "0")
    assert launch_id() == first
    monkeypatch.setenv("MASTER_PORT", "6")
    assert launch_id() != first
    monkeypatch.setattr(os, "getppid", lambda: 1)  # `accelerate launch` gives every launch the same address and port
    assert launch_id() != first
    monkeypatch.undo()
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    worker = worker_rank(threads)
    assert (worker.rank, worker.size) == (0, 2)
    assert "WORLD_SIZE" not in os.environ
    assert launch_id() != launch_id()  # alone, every launch is another one


def test_the_time_left_comes_from_what_was_done(tmp_path, capsys):
    own = [Job("card", "gda", {}, shots, seed, f"{shots}-{seed}") for shots in (1, 4) for seed in (1, 2)]
    store = JobStore(tmp_path, "a")
    progress = Progress(own, store, metric="accuracy", processes=2)
    with progress:
        assert progress.seconds_left() is None
        store.finish("1-1", done(own[0], seconds=3.0))
        progress.update()
        # 3 s per image: 1 + 4 + 4 images are left, for two processes.
        assert progress.seconds_left() == pytest.approx(3 * 9 / 2)
        store.fail("1-2", {"job": "x", "error": "E", "message": "told"})
        progress.update()
        assert progress.seconds_left() == pytest.approx(3 * 8 / 2)
    said = capsys.readouterr().out
    assert "[1/4] card, gda, 1 shot, seed 1: test 50.0 % (3.0 s; about 14 s left)" in said
    assert "[2/4] card, gda, 1 shot, seed 2: failed, E: told" in said
    assert [duration(s) for s in (0.4, 40, 100, 4000, 7300)] == ["0.4 s", "40 s", "2 min", "67 min", "2 h 2 min"]
