# SPDX-License-Identifier: Apache-2.0
import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from accelerate import tracking as accelerate_tracking
from accelerate.utils import LoggerType

from adaptclip import __version__
from adaptclip.errors import ConfigError, StorageError, TrainingError
from adaptclip.files import read_json, read_yaml
from adaptclip.training import tracking
from adaptclip.training.tracking import check_processes, make_accelerator, start_run

NEW = ["config.yaml", "metrics.jsonl", "run.json", "run.lock", "run.lock.json"]
CONFIG = {"lr": 0.1, "card": "digits", "out": Path("somewhere"), "scale": (0.5, 1.0), "resume": False}


def _start(path, config=CONFIG, **flags):
    return start_run(path, config=config, accelerator=make_accelerator(cpu=True), **flags)


def _lines(run):
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def _pretend_checkpoint(run, step):
    run.checkpoints.mkdir(exist_ok=True)
    (run.checkpoints / f"step-{step:08d}-0123456789abcdef.safetensors").write_text("")


def test_new_run(tmp_path):
    run = _start(tmp_path / "run")
    assert run.start == 0
    assert read_yaml(run.path / "config.yaml") == CONFIG | {"out": "somewhere", "scale": [0.5, 1.0]}
    assert read_json(run.path / "run.json")["adaptclip"] == __version__
    assert sorted(p.name for p in run.path.iterdir()) == NEW


def test_an_empty_folder_is_a_new_run(tmp_path):
    (tmp_path / ".run.json.abc.tmp").write_text("left by a run that was killed at once")
    assert _start(tmp_path).start == 0


def test_log(tmp_path):
    run = _start(tmp_path / "run")
    run.log(1, loss=torch.tensor(0.5), grad_norm=None, lr=0.1)
    run.log(2, loss=float("nan"), num_images=3)
    assert _lines(run) == [{"step": 1, "loss": 0.5, "lr": 0.1}, {"step": 2, "loss": None, "num_images": 3}]
    assert "time" not in run.metrics.read_text()


def test_log_keeps_every_bit(tmp_path):
    run = _start(tmp_path / "run")
    run.log(1, value=math.pi)
    assert _lines(run)[0]["value"] == math.pi


def test_log_to_a_full_disk(tmp_path, monkeypatch):
    run = _start(tmp_path / "run")

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(StorageError, match=r"metrics\.jsonl.*No space left on device"):
        run.log(1, loss=0.5)


def test_an_earlier_run_is_never_touched_unasked(tmp_path):
    run = _start(tmp_path / "run")
    run.log(1, loss=0.5)
    with pytest.raises(TrainingError, match=r"holds an earlier run\. Go on with it \(--resume\), replace it"):
        _start(tmp_path / "run")
    assert len(_lines(run)) == 1
    # linear_probe and zero_shot have no loop and no --resume, so that none is proposed.
    with pytest.raises(TrainingError, match=r"holds an earlier run\. Replace it \(--overwrite\) or choose"):
        _start(tmp_path / "run", config={"overwrite": False})


def test_overwrite_empties_the_run_folder(tmp_path):
    run = _start(tmp_path / "run")
    run.log(1, loss=0.5)
    _pretend_checkpoint(run, 10)
    (run.path / "artifact").symlink_to(tmp_path)
    run = _start(tmp_path / "run", CONFIG | {"lr": 0.2}, overwrite=True)
    assert run.start == 0
    assert _lines(run) == []
    assert read_yaml(run.path / "config.yaml")["lr"] == 0.2
    assert not run.checkpoints.exists()
    assert not (run.path / "artifact").exists()


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}])
def test_a_folder_that_is_no_run_is_never_touched(tmp_path, flags):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(TrainingError, match="holds files and is not a run folder"):
        _start(tmp_path, **flags)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_no_run_folder(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(TrainingError, match="is a file"):
        _start(tmp_path / "run")


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        _start(tmp_path / "file" / "run")


def test_resume_cuts_metrics_back_to_the_checkpoint(tmp_path):
    run = _start(tmp_path / "run")
    for step in range(1, 6):
        run.log(step, loss=step)
    with run.metrics.open("a") as file:
        file.write('{"step": 6, "lo')  # killed in the middle of a line
    _pretend_checkpoint(run, 3)
    resumed = _start(tmp_path / "run", CONFIG | {"resume": True, "out": "moved"}, resume=True)
    assert resumed.start == 3
    resumed.log(4, loss=40)
    assert [line["step"] for line in _lines(resumed)] == [1, 2, 3, 4]
    assert read_yaml(run.path / "config.yaml")["resume"] is False


def test_settings_of_a_resumed_run_are_those_it_was_judged_with(tmp_path):
    run = _start(tmp_path / "run", CONFIG | {"gates": "card", "resume": False})
    changed = CONFIG | {"gates": "strict.yaml", "resume": True}
    _start(tmp_path / "run", changed, resume=True)
    saved = read_yaml(run.path / "config.yaml")
    assert (saved["gates"], saved["resume"]) == ("strict.yaml", False)
    assert read_json(run.path / "run.json")["config"]["gates"] == "card"  # what it was started with
    with pytest.raises(TrainingError):
        _start(tmp_path / "run", changed | {"lr": 0.3, "gates": "other.yaml"}, resume=True)
    assert read_yaml(run.path / "config.yaml") == saved


def test_resume_without_checkpoint_starts_anew(tmp_path):
    run = _start(tmp_path / "run")
    run.log(1, loss=0.5)
    assert _start(tmp_path / "run", resume=True).start == 0
    assert _lines(run) == []


def test_resume_where_nothing_is_starts_a_run(tmp_path):
    assert _start(tmp_path / "run", resume=True).start == 0


def test_resume_of_a_run_killed_before_its_files_were_written(tmp_path):
    run = _start(tmp_path / "run")
    (run.path / "config.yaml").unlink()
    run.metrics.unlink()
    (run.path / ".metrics.jsonl.abc.tmp").write_text("half")
    (run.path / ".artifact.abc.tmp").mkdir()
    (run.path / ".artifact.abc.tmp" / "adapter.safetensors").write_text("half")
    assert _start(tmp_path / "run", resume=True).start == 0
    assert sorted(p.name for p in run.path.iterdir()) == NEW


def test_resume_with_other_settings_names_them(tmp_path):
    _start(tmp_path / "run")
    changed = {key: value for key, value in CONFIG.items() if key != "card"} | {"lr": 0.2, "seed": 3}
    message = r"card \(was 'digits', is None\), lr \(was 0.1, is 0.2\), seed \(was None, is 3\)"
    with pytest.raises(TrainingError, match=message):
        _start(tmp_path / "run", changed, resume=True)
    _start(tmp_path / "run", changed, resume=True, may_change=("card", "lr", "seed"))


def test_resume_with_another_number_of_processes(tmp_path):
    run = _start(tmp_path / "run")
    record = read_json(run.path / "run.json") | {"num_processes": 4}
    (run.path / "run.json").write_text(json.dumps(record))
    with pytest.raises(TrainingError, match="was started with 4 processes and there are 1 now"):
        _start(tmp_path / "run", resume=True)


def test_resume_and_overwrite_contradict_each_other(tmp_path):
    with pytest.raises(ConfigError, match="contradict"):
        _start(tmp_path / "run", resume=True, overwrite=True)


def test_processes_that_did_not_find_each_other_are_refused(tmp_path, monkeypatch):
    accelerator = make_accelerator(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = "started 2 processes .* joined 1.*ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node 2"
    with pytest.raises(TrainingError, match=message):
        check_processes(accelerator)
    with pytest.raises(TrainingError, match=message):
        start_run(tmp_path / "run", config=CONFIG, accelerator=accelerator)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixed_precision": "fp61"}, "unknown mixed_precision 'fp61'. Did you mean \"fp16\""),
        ({"mixed_precision": "fp16", "cpu": True}, '"fp16" needs a GPU.*take "bf16" or "no"'),
        ({"accumulate": -1}, "accumulate must be 1 or more, or 0 .*; got -1"),
        ({"trackers": "tensorbord"}, "unknown tracker 'tensorbord'. Did you mean \"tensorboard\""),
        ({"trackers": " comet_ml ,"}, "tracker 'comet_ml' needs its package.*pip install comet-ml"),
    ],
)
def test_bad_accelerators(options, message):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ConfigError, match=message):
            make_accelerator(**options)


class ListTracker(accelerate_tracking.GeneralTracker):
    """Stands for an installed tracker; remembers what it was told."""

    name = "tensorboard"
    requires_logging_directory = True
    told: list = []  # noqa: RUF012

    def __init__(self, run_name, logging_dir, **kwargs):
        super().__init__()
        self.told.append(("start", Path(logging_dir)))

    @property
    def tracker(self):
        return self.told

    def store_init_configuration(self, values):
        self.told.append(("config", values))

    def log(self, values, step, **kwargs):
        self.told.append((step, values))

    def finish(self):
        self.told.append(("finish",))


def test_trackers_are_told_what_is_logged(tmp_path, monkeypatch):
    for module in (tracking, accelerate_tracking):
        monkeypatch.setattr(module, "get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    monkeypatch.setitem(accelerate_tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", ListTracker)
    accelerator = make_accelerator(trackers="tensorboard", out=tmp_path / "run", cpu=True)
    run = start_run(tmp_path / "run", config=CONFIG, accelerator=accelerator)
    run.log(1, loss=torch.tensor(0.5))
    run.finish()
    flat = {"lr": 0.1, "card": "digits", "out": "somewhere", "scale": "[0.5, 1.0]", "resume": False}
    assert ListTracker.told == [
        ("start", tmp_path / "run"),
        ("config", flat),
        (1, {"loss": 0.5}),
        ("finish",),
    ]
