# SPDX-License-Identifier: Apache-2.0
"""The bench as a user runs it: killed and started again, two processes, a folder of images, wrong input."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from PIL import Image
from recipe_files import CPU, ROOT, load_recipe

from adaptclip.bench.summary import TIMES
from adaptclip.errors import AdaptclipError
from adaptclip.files import read_parquet
from adaptclip.methods.closed_form import SSText
from adaptclip.methods.registry import named

METHODS_HERE = ("zero_shot", "ss_text", "gda", "tip_adapter_f", "coop")
SHORT = ("coop.epochs=20", "coop.views=2", "gda.views=2", "tip_adapter_f.views=2", "tip_adapter_f.epochs=5")

recipe = load_recipe("few_shot")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A user's folder: one folder per class, nothing else."""
    folder = tmp_path_factory.mktemp("mine") / "my_images"
    colours = {"red": (200, 20, 20), "green": (20, 180, 20), "blue": (20, 20, 200), "grey_stone": (120, 120, 120)}
    for number, (name, colour) in enumerate(colours.items()):
        (folder / name).mkdir(parents=True)
        for i in range(24):
            noise = Image.effect_noise((40, 36), 30 + 5 * i + number).convert("RGB")
            Image.blend(noise, Image.new("RGB", noise.size, colour), 0.4).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture
def cfg(tiny, images, tmp_path):
    return recipe.Config(
        cards=(str(images),), backbone=tiny, methods=METHODS_HERE, shots=(1, 2, 4), seeds=(1, 2), settings=SHORT,
        cache=tmp_path / "cache", out=tmp_path / "run",
    )  # fmt: skip


def command(cfg, *launcher) -> list[str]:
    flags = []
    for name in ("cards", "methods", "shots", "seeds", "settings", "backbone", "cache", "out"):
        value = getattr(cfg, name)
        flags += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return [sys.executable, *launcher, str(ROOT / "recipes" / "few_shot.py"), *flags]


def rows(out: Path) -> list[dict]:
    table, _ = read_parquet(out / "results.parquet")
    return table.drop_columns(list(TIMES)).to_pylist()


def same_results(a: Path, b: Path) -> None:
    assert rows(a) == rows(b)
    for name in ("tables.md", "tables.tex", "curves_my_images.svg"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


@pytest.fixture(scope="module")
def undisturbed(tiny, images, tmp_path_factory):
    """The whole grid in one process, with a cache of its own."""
    folder = tmp_path_factory.mktemp("undisturbed")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert recipe.main(
        recipe.Config(
            cards=(str(images),), backbone=tiny, methods=METHODS_HERE, shots=(1, 2, 4), seeds=(1, 2), settings=SHORT,
            cache=folder / "cache", out=folder / "run",
        )
    ) == 0  # fmt: skip
    return folder / "run"


def test_a_users_folder_gives_tables_curves_and_a_page(undisturbed):
    found = rows(undisturbed)
    assert len(found) == 30
    assert {row["card"] for row in found} == {"my_images"}
    best = max(row["accuracy"] for row in found if row["shots"] == 4)
    chance = next(row["accuracy"] for row in found if row["method"] == "zero_shot")
    assert best > chance + 0.2  # even a random tower tells colours apart
    names = {p.name for p in undisturbed.iterdir()}
    expected = {"index.html", "tables.md", "tables.tex", "costs.md", "results.csv", "results.parquet", "config.yaml"}
    assert {*expected, "curves_my_images.svg", "curves_my_images.png"} <= names
    page = (undisturbed / "tables.md").read_text()
    assert "at most min(shots, 4) images per class" in page
    assert "used by gda, tip_adapter_f" in page
    assert "Settings other than published: coop.epochs=20" in page
    assert "No published number fits" in page


def test_the_same_command_again_does_nothing_twice_and_more_seeds_add(cfg, undisturbed, tmp_path, capsys):
    """Tables show all that was done in the folder, and leave out what was done in another way."""
    undisturbed = Path(shutil.copytree(undisturbed.parent, tmp_path / "copy")) / "run"
    jobs = undisturbed / "jobs"
    before = {p.name: p.stat().st_mtime_ns for p in jobs.glob("*.json")}
    assert len(before) == 30
    again = replace(cfg, out=undisturbed, cache=undisturbed.parent / "cache")
    assert recipe.main(again) == 0
    assert {p.name: p.stat().st_mtime_ns for p in jobs.glob("*.json")} == before
    more = replace(again, seeds=(1, 2, 3), methods=("zero_shot", "ss_text"), settings=())
    assert recipe.main(more) == 0
    assert len(list(jobs.glob("*.json"))) == 30 + 6
    found = rows(undisturbed)
    assert len(found) == 30 + 6
    assert {row["method"] for row in found} == set(METHODS_HERE)
    assert "the tables also show 18 jobs that earlier commands did in this folder" in capsys.readouterr().out
    tables = (undisturbed / "tables.md").read_text()
    assert "36 of 36 jobs are done; seeds: 1, 2, 3" in tables
    assert "tip_adapter_f.epochs=5" in tables.split("Settings other than published: ")[1].split("\n")[0]
    assert recipe.main(again) == 0
    assert len(rows(undisturbed)) == 30 + 6
    other = replace(again, methods=("coop",), shots=(1,), seeds=(1,), settings=("coop.epochs=2",))
    assert recipe.main(other) == 0
    found = rows(undisturbed)
    assert [row["shots"] for row in found if row["method"] == "coop"] == [1]
    assert len(found) == 36 - 6 + 1
    assert f"not in the tables: 6 results in {jobs}" in capsys.readouterr().out


@pytest.mark.slow
def test_killed_and_started_again_ends_with_the_same_table(cfg, undisturbed):
    jobs = cfg.out / "jobs"
    process = subprocess.Popen(command(cfg), env=CPU, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while len(list(jobs.glob("*.json"))) < 20 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, process.stderr.read() if process.stderr else ""
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {p.name: p.read_bytes() for p in jobs.glob("*.json")}
    assert 20 <= len(kept) < 30
    result = subprocess.run(command(cfg), env=CPU, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"30 jobs, {len(kept)} of them done before" in result.stdout
    assert {name: (jobs / name).read_bytes() for name in kept} == kept
    same_results(cfg.out, undisturbed)


@pytest.mark.slow
def test_two_processes_share_the_jobs_and_give_the_same_table(cfg, undisturbed):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    env = {**CPU, "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(command(cfg, *launcher), env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    same_results(cfg.out, undisturbed)
    done = [line for line in result.stdout.splitlines() if line.startswith("[")]
    # One process tells, of both; what the other had finished before it looked is in its first line.
    info = re.search(r"30 jobs(?:, (\d+) of them done before)?", result.stdout)
    assert info is not None
    assert len(done) + int(info[1] or 0) == 30
    assert len(list((cfg.out / "jobs").glob("*.json"))) == 30


def test_a_failed_job_is_listed_and_the_exit_code_tells(cfg, monkeypatch, capsys):
    def broken(self, support, schedule, loop):
        if support.shots == 2:
            raise RuntimeError("out of luck")
        return {}

    monkeypatch.setattr(SSText, "_learn", broken)
    cfg = replace(cfg, methods=("zero_shot", "ss_text"), settings=(), shots=(1, 2))
    assert recipe.main(cfg) == 1
    said = capsys.readouterr().out
    assert "6 of 8 jobs" in said
    assert "failed: my_images, ss_text, 2 shots, seed 1: RuntimeError: out of luck" in said
    assert "out of luck" in (cfg.out / "index.html").read_text()
    monkeypatch.undo()
    assert recipe.main(cfg) == 0
    assert len(rows(cfg.out)) == 8


def test_ctrl_c_shows_what_is_there_and_the_same_command_goes_on(cfg, monkeypatch, capsys):
    def stopped(self, support, schedule, loop):
        raise KeyboardInterrupt

    monkeypatch.setattr(SSText, "_learn", stopped)
    cfg = replace(cfg, methods=("zero_shot", "ss_text"), settings=(), shots=(1, 2))
    assert recipe.main(cfg) == 130
    assert "4 of 8 jobs" in capsys.readouterr().out
    assert len(rows(cfg.out)) == 4
    monkeypatch.undo()
    assert recipe.main(cfg) == 0
    assert len(rows(cfg.out)) == 8


def test_the_ladder_ends_with_advice(cfg, capsys):
    changes = (
        "coop.epochs=3",
        "coop.views=1",
        "lora.steps=3",
        "lora.lr=1e-2",
        "clap.epochs=5",
        "lp_plus_plus.epochs=5",
    )
    cfg = replace(cfg, methods=("ladder",), settings=changes, shots=(2,))
    assert recipe.main(cfg) == 0
    said = capsys.readouterr().out
    assert "- my_images, 2 shots (accuracy): " in said
    assert " is best with " in said
    assert len({row["method"] for row in rows(cfg.out)}) == sum(one.variant.ladder for one in named().values())
    assert "## Advice" in (cfg.out / "costs.md").read_text()


@pytest.mark.parametrize("protocol", ["base-to-new", "imbalanced", "missing-class", "domain-shift", "cross-dataset"])
def test_every_protocol_runs(cfg, protocol, images):
    takes = protocol in ("domain-shift", "cross-dataset")
    cfg = replace(cfg, protocol=protocol, methods=("zero_shot", "coop"), settings=("coop.epochs=2", "coop.views=1"))
    if takes:
        # The same images under another name: a shift of nothing.
        other = images.parent / "others"
        if not other.exists():
            shutil.copytree(images, other)
        cfg = replace(cfg, targets=(str(other),))
    cfg = replace(cfg, shots=(4,), seeds=(1,))
    assert recipe.main(cfg) == 0
    found = {(row["method"], row["target"]): row for row in rows(cfg.out)}
    targets = {target for _, target in found}
    if takes:
        assert targets == {"my_images", "others"}
        assert found["coop", "my_images"]["accuracy"] == found["coop", "others"]["accuracy"]
    else:
        assert len(targets) == (4 if protocol == "missing-class" else 3)
    record = json.loads(next((cfg.out / "jobs").glob("*.json")).read_text())
    assert record["job"]["protocol"] == protocol


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("gdaa",)}, 'Did you mean "gda"'),
        ({"protocol": "base-to-news"}, 'Did you mean "base-to-new"'),
        ({"protocol": "base-to-new"}, "new class names"),
        ({"protocol": "domain-shift"}, "--targets"),
        ({"baseline": "zeroshot"}, 'Did you mean "zero_shot"'),
        ({"settings": ("coop.epoch=3",)}, 'Did you mean "epochs"'),
        ({"shots": (1, 1)}, "each once"),
        ({"seeds": ()}, "one value or more"),
        ({"search_trials": 1}, "two trials"),
        ({"threads": 0}, "threads"),
        ({"cards": ("digit",), "settings": ()}, 'Did you mean "digits"'),
        ({"cards": ("digits", str(ROOT / "data_cards" / "digits.md"))}, "two cards are called digits"),
    ],
)
def test_wrong_input_is_said_before_anything_runs(cfg, changes, message):
    with pytest.raises(AdaptclipError, match=message):
        recipe.main(replace(cfg, **changes))
    assert not (cfg.out / "jobs").exists()


def test_a_card_of_features_takes_methods_with_views_too(tmp_path):
    cfg = recipe.Config(
        cards=("aerial_features",), methods=("zero_shot", "gda", "tip_adapter_f", "text_init"), shots=(1, 2),
        seeds=(1,), settings=("tip_adapter_f.epochs=2", "text_init.epochs=2"),
        cache=tmp_path / "cache", out=tmp_path / "run",
    )  # fmt: skip
    assert recipe.main(cfg) == 0
    rows, _ = read_parquet(tmp_path / "run" / "results.parquet")
    found = {(row["method"], row["shots"]): row["accuracy"] for row in rows.to_pylist()}
    assert len(found) == 8
    assert found["zero_shot", 1] == pytest.approx(0.8095, abs=0.01)
    assert min(found.values()) > 0.5


def test_a_method_that_the_backbone_does_not_allow_is_refused_before_any_job(tmp_path):
    cfg = recipe.Config(methods=("gda", "maple", "prolip"), cache=tmp_path / "cache", out=tmp_path / "run")
    message = r"prolip: .*; maple: .*\. Leave out prolip, maple, and take --methods gda$"
    with pytest.raises(AdaptclipError, match=message):
        recipe.main(cfg)
    assert not (tmp_path / "run" / "jobs").exists()
