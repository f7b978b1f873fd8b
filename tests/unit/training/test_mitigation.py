# SPDX-License-Identifier: Apache-2.0
"""Settings, what they make of the images, and the loss; checkpoints hold what group DRO has learnt."""

from __future__ import annotations

import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

from adaptclip.data.dataset import ImageDataset, MemoryStore
from adaptclip.errors import ConfigError, TrainingError
from adaptclip.methods.linear_fits import epoch_rate, fit_from_text
from adaptclip.seeding import generator as seeded
from adaptclip.training.checkpoint import load_checkpoint, save_checkpoint
from adaptclip.training.mitigation import balanced_order, build_mitigation, parse_mitigation
from adaptclip.training.optim import build_scheduler
from adaptclip.training.steps import FeatureLoader, StepPlan, backward_and_step, train_steps
from adaptclip.training.tracking import make_accelerator
from adaptclip.types import Batch, Features

NAMES = ("cat", "dog", "owl")


def _images(sizes=(30, 8, 22), *, sex=("f", "m", "m", "unknown"), **groups) -> ImageDataset:
    """Images of three classes; the attribute `sex` goes through its values in turn."""
    labels = np.repeat(np.arange(3), sizes)
    columns = {"sex": tuple(sex[i % len(sex)] for i in range(len(labels)))} | groups
    ids = tuple(map(str, range(len(labels))))
    return ImageDataset(MemoryStore([], []), np.arange(len(labels)), NAMES, ids, labels, ids, groups=columns)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("group-dor:sex", 'unknown mitigation .group-dor.*Did you mean "group-dro"'),
        ("group-dro", "group-dro needs the group attribute.*group-dro:sex"),
        ("group-sampling:sex+", "needs the group attribute"),
        ("class-weights:sex", "class-weights takes no argument, got 'sex'"),
        ("class-balanced", "beta of class-balanced must be a number from 0 to below 1, for example 0.999; got ''"),
        ("class-balanced:1", "beta of class-balanced must be a number from 0 to below 1.*got '1'"),
        ("class-balanced:nan", "got 'nan'"),
        ("group-dro:sex,stepp=1", 'group-dro has no option .stepp.*Did you mean "step"'),
        ("group-dro:sex,step=0", "step must be a number above 0"),
        ("group-dro:sex,adjust=-1", "adjust must be a number 0 or more; got '-1'"),
        ("group-sampling:sex,step=1", "group-sampling has no option 'step'"),
    ],
)
def test_settings_that_are_not_valid(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_mitigation(text)


def test_settings():
    assert parse_mitigation(" ") is None
    full = parse_mitigation("group-dro:sex+class, step=0.05, adjust=2")
    assert full is not None
    assert (full.attributes, full.step, full.adjust) == (("sex", "class"), 0.05, 2.0)
    balanced = parse_mitigation("class-balanced:0.99")
    assert balanced is not None
    assert (balanced.kind, balanced.beta) == ("class-balanced", 0.99)


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("group-sampling:sxe", {}, 'no attribute .sxe.*Did you mean "sex"'),
        ("group-dro:sex", {"groups": {}}, "have no group attributes; name the columns in the card"),
        ("group-dro:sex", {"groups": {"sex": ("f",) * 60}}, "all 60 training images are 'f'; there is nothing"),
        ("group-dro:sex", {"groups": {"sex": ("f", "unknown") * 30}}, "are 'f' or unknown; there is nothing"),
        ("group-dro:sex", {"groups": {"sex": ("unknown",) * 60}}, "all 60 training images are 'unknown'"),
        ("class-weights", {"labels": np.repeat([0, 2], 30)}, r"1 of 3 classes has no training image \(dog\)"),
        ("class-sampling", {"class_names": ("cat",), "labels": np.zeros(60, int)}, "of the one class cat"),
    ],
)
def test_images_that_cannot_be_balanced(text, changes, message):
    with pytest.raises(ConfigError, match=message):
        build_mitigation(text, replace(_images(), **changes))


def test_a_group_that_was_not_drawn_is_named():
    whole = _images(sex=("f", "m", "x"))
    drawn = whole.select([i for i, sex in enumerate(whole.groups["sex"]) if sex != "x"])
    with pytest.raises(ConfigError, match="none of the 40 training images drawn has sex = x, which the training part"):
        build_mitigation("group-sampling:sex", drawn, whole)
    build_mitigation("group-dro:sex", drawn, drawn)


@pytest.mark.parametrize("text", ["class-weights", "class-balanced:0.9", "group-dro:sex"])
def test_a_loss_of_pairs_has_no_images_to_weigh(text):
    with pytest.raises(ConfigError, match="weighs the loss of single images, and a contrastive loss has none"):
        build_mitigation(text, _images(), pairs=True)
    assert build_mitigation("class-sampling", _images(), pairs=True).strata is not None


def test_warnings_of_what_balances_nothing_or_repeats_much():
    with pytest.warns(UserWarning, match="class-sampling changes nothing: all 3 have 20 images"):
        build_mitigation("class-sampling", _images((20, 20, 20)))
    rare = ("rare",) + ("often",) * 59
    with pytest.warns(UserWarning, match="each of the 1 images of 'rare' 30 times per epoch"):
        build_mitigation("group-sampling:kind", _images(kind=rare))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_mitigation("group-dro:sex", _images())


def test_groups_are_named_and_unknown_is_none():
    images = _images()
    one = build_mitigation("group-sampling:sex", images)
    assert one.strata is not None
    assert dict(one.sizes) == {"f": 15, "m": 30}
    assert [("f", "m", "unknown")[p] for p in one.strata] == list(images.groups["sex"])
    cells = build_mitigation("group-sampling:sex+class", images)
    pairs = list(zip(images.groups["sex"], (NAMES[i] for i in images.labels), strict=True))
    expected = {f"{s} & {c}": pairs.count((s, c)) for s in "fm" for c in NAMES}
    assert dict(cells.sizes) == expected
    info = cells.describe()
    assert info is not None
    assert info["groups"]["f & dog"] == {"images": expected["f & dog"], "weight": pytest.approx(45 / 60 / 6)}


def _batch(images, seed=0) -> tuple[torch.Tensor, Batch]:
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(images), (16,), generator=generator)
    return torch.randn(16, 3, generator=generator), Batch(torch.from_numpy(images.labels)[index], index)


@pytest.mark.parametrize("text", ["", "group-sampling:sex", "class-sampling"])
def test_without_weights_the_loss_is_plain_cross_entropy_bit_for_bit(text):
    logits, batch = _batch(_images())
    assert torch.equal(build_mitigation(text, _images()).loss(logits, batch), F.cross_entropy(logits, batch.labels))


@pytest.mark.parametrize("text", ["class-weights", "class-balanced:0.9"])
def test_weighted_loss_against_numpy(text):
    images = _images()
    logits, batch = _batch(images)
    counts = np.array([30, 8, 22])
    of_class = 1 / counts if text == "class-weights" else (1 - 0.9) / (1 - 0.9**counts)
    of_class = of_class / (of_class[images.labels].mean())
    shifted = logits.double().numpy()
    own = shifted[np.arange(16), batch.labels] - np.log(np.exp(shifted).sum(axis=1))
    built = build_mitigation(text, images)
    assert built.strata is None
    assert built.loss(logits, batch).item() == pytest.approx(float((of_class[batch.labels] * -own).mean()), rel=1e-5)
    info = built.describe()
    assert info is not None
    assert [group["weight"] for group in info["groups"].values()] == pytest.approx(of_class, rel=1e-6)


@pytest.mark.parametrize(("processes", "accumulate", "batch_size"), [(2, 1, 4), (1, 2, 4), (2, 2, 2)])
def test_balanced_steps_are_the_same_however_they_are_divided(processes, accumulate, batch_size):
    strata = build_mitigation("group-sampling:sex", _images()).strata

    def steps(processes, accumulate, batch_size):
        of_rank: Any = [
            SimpleNamespace(process_index=rank, num_processes=processes, gradient_accumulation_steps=accumulate)
            for rank in range(processes)
        ]
        plans = [StepPlan(60, batch_size=batch_size, seed=0, accelerator=a, strata=strata) for a in of_rank]
        assert plans[0].steps_per_epoch == 7
        found = []
        for step in range(15):
            parts = [plan.rows(step * accumulate + turn)[1] for plan in plans for turn in range(accumulate)]
            assert {len(part) for part in parts} == {batch_size}
            found.append(sorted(torch.cat(parts).tolist()))
        return found

    assert steps(processes, accumulate, batch_size) == steps(1, 1, 8)


class _Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 5))

    def forward(self, batch):
        return 10 * batch.features @ self.weight.T

    def adapter_state(self):
        return {"weight": self.weight}

    def load_adapter_state(self, state):
        self.load_state_dict(state)


def _train(text, folder, *, until=20, images=None):
    """The loop of the recipes on 20 steps, from the newest checkpoint; writes one after step `until` and stops."""
    images = images or _images()
    accelerator = make_accelerator(cpu=True)
    mitigation = build_mitigation(text, images, accelerator=accelerator)
    values = F.normalize(torch.randn(1, 60, 5, generator=torch.Generator().manual_seed(0)), dim=-1)
    features = Features(values, torch.from_numpy(images.labels), images.ids)
    model = _Linear()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = FeatureLoader(features, batch_size=8, seed=0, accelerator=accelerator, strata=mitigation.strata)
    scheduler = build_scheduler(optimizer, total_steps=20, steps_per_epoch=loader.steps_per_epoch)
    model, optimizer = accelerator.prepare(model, optimizer)
    start = load_checkpoint(folder, model, optimizer, scheduler, accelerator, mitigation)
    for step, batch in train_steps(loader, until, accelerator, start=start):
        with accelerator.accumulate(model):
            loss = mitigation.loss(model(batch), batch)
            backward_and_step(accelerator, loss, model, optimizer, scheduler, step=step)
    save_checkpoint(folder, until, model, optimizer, scheduler, accelerator, mitigation)
    return model.weight.detach(), mitigation


@pytest.mark.parametrize("text", ["group-dro:sex,step=0.5", "group-sampling:sex", "class-weights"])
def test_an_interrupted_run_ends_like_an_undisturbed_one(tmp_path, text):
    expected, whole = _train(text, tmp_path / "whole")
    _train(text, tmp_path / "parts", until=9)
    got, resumed = _train(text, tmp_path / "parts")
    assert torch.equal(got, expected)
    assert [p.name for p in (tmp_path / "whole").iterdir()] == [p.name for p in (tmp_path / "parts").iterdir()]
    if whole.dro is not None and resumed.dro is not None:
        assert torch.equal(whole.dro.log_weights, resumed.dro.log_weights)
        assert (whole.dro.shares - 0.5).abs().max() > 0.01, "the weights moved"


def test_a_checkpoint_of_other_groups_is_refused(tmp_path):
    _train("group-dro:sex", tmp_path, until=3)
    for text in ("group-dro:sex+class", "class-weights"):
        with pytest.raises(TrainingError, match="does not fit this adapter: the mitigation should hold"):
            _train(text, tmp_path)


@pytest.mark.parametrize("text", ["class-weights", "group-sampling:sex", "group-dro:sex,step=0.5"])
def test_the_linear_heads_descend_on_the_same_loss(text):
    """The heads' hand-written gradient and order, against autograd on `Mitigation.loss` in batches of 20."""
    images, scale, epochs = _images(), 10.0, 3
    generator = torch.Generator().manual_seed(0)
    values = F.normalize(torch.randn(2, 60, 5, generator=generator), dim=-1)
    words = F.normalize(torch.randn(3, 5, generator=generator), dim=-1)
    labels = torch.from_numpy(images.labels)
    got = fit_from_text(
        values, labels, words, scale, start_norm=1.0, penalty=None, lr=0.1, epochs=epochs, batch_size=20, seed=4,
        balance=build_mitigation(text, images),
    )  # fmt: skip
    mitigation = build_mitigation(text, images)
    weight = words.clone().requires_grad_()
    optimizer = SGD([weight], lr=0.1, momentum=0.9)
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = epoch_rate(epoch, epochs=epochs, lr=0.1)
        order = (
            torch.randperm(120, generator=seeded(4, "order of the linear head", epoch)) if mitigation.strata is None
            else balanced_order(mitigation.strata.repeat(2), seed=4, epoch=epoch)
        )  # fmt: skip
        for rows in order[:60].split(20):  # of both views mixed
            image = rows % 60
            logits = scale * values.flatten(0, 1)[rows] @ F.normalize(weight, dim=-1).T
            optimizer.zero_grad()
            mitigation.loss(logits, Batch(labels[image], image)).backward()
            optimizer.step()
    torch.testing.assert_close(got, weight.detach(), atol=1e-5, rtol=1e-4)
    assert (got - words).abs().max() > 0.05
