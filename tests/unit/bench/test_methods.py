# SPDX-License-Identifier: Apache-2.0
"""Every method of the bench does what its recipe does; settings, new names and searches."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from recipe_files import load_recipe

import adaptclip as ac
from adaptclip.bench import jobs as store_module
from adaptclip.bench.jobs import FeatureStore, Grid, Worker, make_grid
from adaptclip.bench.methods import choose_methods, fit_named, not_published, read_settings
from adaptclip.bench.search import Budget, search
from adaptclip.data.dataset import DomainData
from adaptclip.data.shots import base_and_new
from adaptclip.errors import ConfigError
from adaptclip.methods.registry import named
from adaptclip.metrics import METRICS
from adaptclip.predictions import Predictions
from adaptclip.reports.measuring import judged


@pytest.fixture(scope="module", autouse=True)
def fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def data() -> DomainData:
    return ac.open_data(ac.load_card("digits"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def make_worker(data, tiny, cache, tmp_path_factory):
    backbone = ac.load_backbone(tiny)

    def make(changes=(), methods=None, *, protocol="all-classes", shots=(2,), seeds=(1,), source=data, **more):
        methods = methods or tuple(named())
        settings = read_settings(changes, methods)
        grid = make_grid(
            {"digits": source},
            [],
            backbone,
            protocol=protocol,
            settings=settings,
            shots=shots,
            seeds=seeds,
            **more,
        )
        store = FeatureStore(ac.FeatureCache(cache), backbone, tmp_path_factory.mktemp("locks"))
        return Worker(grid, store, ac.make_accelerator())

    return make


def run(worker: Worker, method: str) -> dict[str, Any]:
    return worker.run(next(job for job in worker.grid.jobs if job.method == method))


def fit(worker: Worker, method: str) -> Any:
    job = next(job for job in worker.grid.jobs if job.method == method)
    data = worker.grid.cases[job.card, job.shots, job.seed].data
    support, words = worker.support(job), (data.prompt_names, data.card.templates)
    return fit_named(named()[method], support, *words, job.settings).adapter


RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "zero_shot": ("zero_shot", {}),
    "logistic": ("linear_probe", {"head": "logistic"}),
    "lp_plus_plus": ("linear_probe", {"head": "lp_plus_plus"}),
    "text_init": ("linear_probe", {"head": "text_init"}),
    "clap": ("linear_probe", {"head": "clap"}),
    "tip_adapter": ("tip_adapter", {"variant": "tip_adapter"}),
    "tip_adapter_f": ("tip_adapter", {"variant": "tip_adapter_f"}),
    "gda": ("tip_adapter", {"variant": "gda"}),
    "ss_text": ("tip_adapter", {"variant": "ss_text"}),
    "coop": ("coop", {}),
    "kgcoop": ("coop", {"kg_weight": 8.0, "ctx_init": "a photo of a"}),
    "cocoop": ("cocoop", {}),
    "lora": ("lora", {}),
    "two_stage": ("two_stage", {}),
}
"""Method -> its recipe, and what its name stands for there. The others have the recipe of any method."""


@pytest.mark.parametrize("method", [name for name in named() if name not in ("ensemble", "bitfit")])
def test_recipe_fit_and_bench_give_the_same_at_default_settings(
    method, data, make_worker, tiny, cache, tmp_path, monkeypatch
):
    """The short preset is the one setting that is given, the same to all three; bitfit is the class of layernorm."""
    few = replace(data, test=data.test.select(range(0, len(data.test), 9)))  # judging is not what takes the time here
    monkeypatch.setattr(ac, "open_data", lambda *_, **__: few, raising=False)
    name, config = RECIPES.get(method, ("adapt", {"method": method}))
    recipe = load_recipe(name)
    cfg = recipe.Config(backbone=tiny, gates="report", cache=cache, out=tmp_path / "run", **config)
    if name != "zero_shot":
        cfg = replace(cfg, shots=1, preset="smoke")
    recipe.main(cfg)
    expected = Predictions.load(tmp_path / "run" / "predictions.parquet")

    worker = make_worker(methods=(method,), shots=(1,), preset="smoke", source=few)
    found = run(worker, method)
    own = found["judged"]["test"]
    assert own["n"] == len(expected)
    assert own["accuracy"] == (expected.pred == expected.labels).mean()
    assert own["ece"] == pytest.approx(METRICS["ece"].value(judged(expected)), abs=1e-4)

    case = worker.grid.cases["digits", 1, 1]
    few_shots, validation = case.split.select(case.data)
    one, card = named()[method], case.data.card
    fitted = one.build(worker.store.backbone, case.data.prompt_names, card.templates, seed=1)
    fitted.fit(few_shots, validation=validation, preset="smoke", augmentation=card.augmentation)
    np.testing.assert_allclose(fitted.predict_proba(case.data.test), expected.probs, atol=2e-5)
    assert one.learns == (method != "zero_shot")
    if one.learns:
        report = json.loads((tmp_path / "run" / "report.json").read_text())
        schedules = {report["training"]["schedule"], found["schedule"], fitted.info_["schedule"]}
        assert len(schedules) == 1
        assert report["training"]["trainable_parameters"] == found["trainable_parameters"]
        assert (found["train_images"], found["validation_images"]) == (10, 10)


def test_ensembles_average_more_prompts(make_worker):
    worker = make_worker(methods=("zero_shot", "ensemble"))
    adapter: Any = fit(worker, "ensemble")
    assert len(adapter.templates) == len({*ac.load_card("digits").templates}) + 7
    assert run(worker, "ensemble")["judged"]["test"]["ece"] != run(worker, "zero_shot")["judged"]["test"]["ece"]


def test_new_classes_are_judged_by_their_names(make_worker, data):
    changes = ("coop.epochs=3", "coop.views=1", "lora.steps=2", "lora.lr=1e-2")
    worker = make_worker(changes, ("zero_shot", "coop", "lora"), protocol="base-to-new")
    base, new = base_and_new(data)
    for method in ("zero_shot", "coop", "lora"):
        found = run(worker, method)["judged"]
        assert (found["base"]["n"], found["new"]["n"]) == (len(base.test), len(new.test))
        b, n = found["base"]["accuracy"], found["new"]["accuracy"]
        assert found["harmonic mean"]["accuracy"] == pytest.approx(2 * b * n / (b + n) if b + n else 0)
    # Zero-shot again, without the bench.
    backbone = worker.store.backbone
    features = ac.FeatureCache(None).get(backbone, new.test)
    own = ac.predict(ac.ZeroShotClassifier(backbone, new.prompt_names, new.card.templates), features, new.test)
    assert run(worker, "zero_shot")["judged"]["new"]["accuracy"] == (own.pred == own.labels).mean()
    # CoOp's context is what goes over to the new names.
    adapter: Any = fit(worker, "coop")
    moved: Any = adapter.for_classes(new.prompt_names)
    assert torch.equal(moved.context, adapter.context)
    assert moved.class_names == tuple(new.prompt_names)


def test_every_job_of_a_grid_has_a_key_of_its_own_that_knows_what_matters(make_worker, data):
    def keys(grid: Grid) -> set[str]:
        return {job.key for job in grid.jobs}

    methods = ("gda", "coop")
    one = make_worker(methods=methods, shots=(1, 2), seeds=(1, 2)).grid
    assert len(keys(one)) == len(one.jobs) == 8
    assert keys(make_worker(methods=("coop", "gda"), shots=(2, 1), seeds=(2, 1)).grid) == keys(one)
    assert keys(make_worker(methods=("gda",), shots=(1,), seeds=(1,)).grid) < keys(one)
    for other in (
        make_worker(("coop.lr=0.01",), ("coop",), shots=(1, 2)),
        make_worker(methods=("coop",), shots=(1, 2), budget=Budget(3)),
        make_worker(methods=("coop",), shots=(1, 2), protocol="missing-class"),
    ):
        assert not keys(other.grid) & keys(one)
    assert [job.method for job in one.jobs] == ["gda"] * 4 + ["coop"] * 4  # cheap before dear, few shots first
    assert [job.shots for job in one.jobs[:4]] == [1, 1, 2, 2]


# Settings and names


def test_settings_are_read_and_wrong_ones_refused():
    settings = read_settings(("coop.epochs=7", "tip_adapter_f.lr=0.5"), ("coop", "tip_adapter_f"))
    assert settings["coop"] == {**named()["coop"].settings(), "epochs": 7}
    assert settings["tip_adapter_f"]["lr"] == 0.5
    for text, message in (
        ("coop.epoch=7", 'Did you mean "epochs"'),
        ("cop.epochs=7", 'is no method. Did you mean "coop"'),
        ("lora.steps=7", "does not run here"),
        ("coop.epochs", "METHOD.SETTING=VALUE"),
        ("coop.epochs=many", "should be int"),
        ("tip_adapter_f.learn_keys=1", "no setting"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_settings((text,), ("coop", "tip_adapter_f"))


def test_methods_are_chosen_cheap_before_dear():
    assert choose_methods(("coop", "gda", "coop"), new_names=False) == ("gda", "coop")
    ladder = choose_methods(("ladder",), new_names=False)
    assert ladder[:2] == ("zero_shot", "ensemble")
    assert ladder[-2:] == ("coop", "lora")
    assert "two_stage" in choose_methods(("ladder", "two_stage"), new_names=False)
    assert choose_methods(("ladder",), new_names=True) == ("zero_shot", "ensemble", "coop", "lora")
    with pytest.raises(ConfigError, match='Did you mean "kgcoop"'):
        choose_methods(("kg-coop",), new_names=False)
    with pytest.raises(ConfigError, match=r"gda has a weight for each class .* Methods that can: zero_shot"):
        choose_methods(("gda",), new_names=True)
    with pytest.raises(ConfigError, match="at least one"):
        choose_methods((), new_names=False)


def test_what_is_not_as_published_is_named():
    names = ("gda", "coop", "lora", "zero_shot")
    assert not_published(names, ()) == {}
    assert not_published(names, ("coop.views=10", "coop.lr=1e-3", "lora.rank=4")) == {
        "coop": "views=10, lr=1e-3", "lora": "rank=4"
    }  # fmt: skip
    assert not_published(names, ("coop.lr=1e-3",), preset="smoke") == {
        "coop": "lr=1e-3, preset smoke", "lora": "preset smoke"
    }  # fmt: skip
    assert set(not_published(names, (), searched=True)) == {"coop", "lora"}


# Search


def test_a_search_takes_the_best_on_validation_images_and_tells_all(make_worker):
    budget = Budget(4)
    worker = make_worker(("clap.epochs=5", "clap.views=1"), ("clap", "gda"), budget=budget)
    found = run(worker, "clap")
    trials = found["search"]["trials"]
    assert len(trials) == 4
    assert trials[0]["settings"] == {"lr": 0.1, "clap_weight": 1.0}  # as published
    best = max(trials, key=lambda t: t["right"] - t["loss"] / (1 + t["loss"]))
    assert {name: found["chosen"][name] for name in ("lr", "clap_weight")} == best["settings"] or best is trials[0]
    assert found["search"]["images"] == found["validation_images"] == 20
    assert found["validation_used_for"].startswith("choosing lr, clap_weight among 4 settings")
    assert run(worker, "clap")["search"]["trials"] == trials
    assert run(worker, "gda")["search"] is None  # nothing to search
    # The settings that were chosen give the same adapter without a search.
    if best is not trials[0]:
        fixed = tuple(f"clap.{name}={value!r}" for name, value in best["settings"].items())
        alone = run(make_worker((*fixed, "clap.epochs=5", "clap.views=1"), ("clap",)), "clap")
        assert alone["judged"] == found["judged"]


def test_a_search_has_limits():
    with pytest.raises(ConfigError, match="two trials or more"):
        Budget(1)
    with pytest.raises(ConfigError, match="0 seconds or more"):
        Budget(3, -1.0)


def test_a_search_stops_in_time_and_needs_validation_images(make_worker, data):
    worker = make_worker(("coop.epochs=2", "coop.views=1"), ("coop",), budget=Budget(50, 1e-9))
    assert len(run(worker, "coop")["search"]["trials"]) == 1
    support = worker.support(worker.grid.jobs[0])
    support.validation_images = support.validation_images.select([])
    coop = named()["coop"]

    with pytest.raises(ConfigError, match="no validation images"):
        search(coop, support, data.prompt_names, data.card.templates, coop.settings(), Budget(3))


# The shared features


def test_the_store_reads_each_picture_once_and_in_the_same_parts(make_worker, data, monkeypatch, tmp_path):
    monkeypatch.setattr(store_module, "SHARD_ROWS", 64)
    worker = make_worker()
    backbone, pool = worker.store.backbone, data.train.select(range(200))
    crop = ac.train_augment(backbone.image_size)
    asked = []
    get = ac.FeatureCache.get

    def spy(self, backbone, dataset, **settings):
        asked.append((len(dataset), settings["views"]))
        return get(self, backbone, dataset, **settings)

    monkeypatch.setattr(ac.FeatureCache, "get", spy)
    store = FeatureStore(ac.FeatureCache(tmp_path / "c"), backbone, tmp_path / "locks")
    some = pool.select([150, 3, 77])
    found = store.get(some, pool, views=3, augment=crop)
    assert asked == [(64, 3), (64, 3), (64, 3), (8, 3)]
    fewer = store.get(pool.select([3]), pool, views=2, augment=crop)
    assert len(asked) == 4  # in memory, and the first of more views
    assert torch.equal(fewer.values[:, 0], found.values[:2, 1])
    assert found.ids == some.ids
    assert found.labels.tolist() == some.labels.tolist()
    monkeypatch.undo()
    alone = ac.FeatureCache(None).get(backbone, some, views=3, augment=crop)
    torch.testing.assert_close(found.values, alone.values, atol=1e-5, rtol=0)
    with pytest.raises(KeyError):
        store.get(data.train.select([300]), pool)
    empty = store.get(pool.select([]), pool.select([]))
    assert empty.values.shape == (1, 0, backbone.embed_dim)
    assert np.isfinite(found.values.numpy()).all()
