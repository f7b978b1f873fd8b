# SPDX-License-Identifier: Apache-2.0
"""Turning a trained update down: every number of the curve recomputed from merged stock models, and the choice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from adaptclip.bench.interpolation import SCALES, best_scale, check_setting, choose_scale, scale_curve
from adaptclip.clip import ClipBackbone
from adaptclip.data.card import load_card
from adaptclip.data.shots import base_and_new
from adaptclip.data.sources import open_data
from adaptclip.errors import ConfigError
from adaptclip.methods import LoRA
from adaptclip.types import Batch

TEMPLATES = ("a photo of the digit {}.", "the number {}.")


@pytest.fixture(scope="module")
def halves():
    """Validation images of the digits 0 to 4 and 5 to 9, five of each, with two attributes."""
    base, new = base_and_new(open_data(load_card("digits"), check=False))

    def few(part):
        return part.select(np.concatenate([np.flatnonzero(part.labels == c)[:5] for c in range(5)]))

    validation = few(base.validation)
    writers = tuple("left" if i % 4 else "right" for i in range(len(validation)))
    groups = {**validation.groups, "writer": writers}
    return replace(validation, groups=groups), (few(new.validation), new.prompt_names), base.prompt_names


@pytest.fixture(scope="module")
def trained(tiny_backbone, halves):
    """LoRA after a few steps on the images it is judged on, so that its answers change with the scale."""
    validation, _, names = halves
    lora = LoRA(tiny_backbone, names, templates=TEMPLATES, dropout=0.0)
    pixels = torch.stack([tiny_backbone.transform(validation.image(i)) for i in range(len(validation))])
    labels = torch.as_tensor(validation.labels)
    optimizer = torch.optim.AdamW(lora.trainable_parameters(), lr=2e-2)
    lora.train()
    for _ in range(25):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(
            lora(Batch(labels, torch.arange(len(labels)), images=pixels)), labels
        ).backward()
        optimizer.step()
    return lora.adapter_state()


@pytest.fixture
def adapter(tiny_backbone, halves, trained):
    lora = LoRA(tiny_backbone, halves[2], templates=TEMPLATES, scale=0.7)
    lora.load_adapter_state(trained)
    return lora


def features(model: Any, images) -> np.ndarray:
    """(N, D) float64 unit-norm features by a stock model."""
    pixels = torch.stack([images[0].transform(images[1].image(i)) for i in range(len(images[1]))])
    with torch.no_grad():
        values = model.encode_image(pixels).double().numpy()
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def classifier(model: Any, backbone: ClipBackbone, names) -> np.ndarray:
    """(C, D) float64 mean of the templates' unit-norm features by a stock model."""
    rows = []
    for name in names:
        with torch.no_grad():
            values = model.encode_text(backbone.tokenize([t.format(name) for t in TEMPLATES])).double().numpy()
        mean = (values / np.linalg.norm(values, axis=1, keepdims=True)).mean(axis=0)
        rows.append(mean / np.linalg.norm(mean))
    return np.stack(rows)


def calibration_error(probs: np.ndarray, labels: np.ndarray) -> float:
    """Guo et al. 2017 with 15 bins, bin by bin."""
    confidence, right, error = probs.max(axis=1), probs.argmax(axis=1) == labels, 0.0
    for low in np.arange(15) / 15:
        own = (confidence > low) & (confidence <= low + 1 / 15)
        if own.any():
            error += abs(right[own].mean() - confidence[own].mean()) * own.mean()
    return error


def test_every_number_is_that_of_a_merged_stock_model(adapter, halves, tiny_backbone):
    validation, (new, new_names), names = halves
    scales = (0.0, 0.4, 1.0)
    curve = scale_curve(adapter, validation, (new, new_names), scales=scales)
    assert [row["scale"] for row in curve] == list(scales)
    for row in curve:
        adapter.set_scale(row["scale"])
        merged = adapter.merged_model()
        logits = features(merged, (tiny_backbone, validation)) @ classifier(merged, tiny_backbone, names).T
        logits *= float(tiny_backbone.logit_scale)
        probs = np.exp(logits - logits.max(axis=1, keepdims=True))
        probs /= probs.sum(axis=1, keepdims=True)
        right = probs.argmax(axis=1) == validation.labels
        assert row["n"] == len(validation) == 25
        assert row["accuracy"] == pytest.approx(right.mean())
        assert row["ece"] == pytest.approx(calibration_error(probs, validation.labels), abs=1e-4)
        by_group = {
            (f"{attribute} = {value}"): right[[v == value for v in values]]
            for attribute, values in validation.groups.items()
            for value in set(values)
        }
        lowest = min(own.mean() for own in by_group.values())
        assert len(by_group) == 5
        assert row["worst_group"] == pytest.approx(lowest)
        named = by_group[row["worst_group_name"]]
        assert (named.mean(), len(named)) == (pytest.approx(lowest), row["worst_group_n"])
        others = features(merged, (tiny_backbone, new)) @ classifier(merged, tiny_backbone, new_names).T
        assert row["new_accuracy"] == pytest.approx((others.argmax(axis=1) == new.labels).mean())
        assert row["new_n"] == 25
    assert len({row["accuracy"] for row in curve}) == len({row["new_accuracy"] for row in curve}) == 3


def test_the_scale_is_the_same_afterwards(adapter, halves, monkeypatch):
    before = {name: value.clone() for name, value in adapter.adapter_state().items()}
    scale_curve(adapter, halves[0], scales=(0.0, 1.0))
    assert adapter.scale == 0.7
    with pytest.raises(ConfigError, match="from 0"):
        scale_curve(adapter, halves[0], scales=(0.2, 1.3))
    assert adapter.scale == 0.7

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("adaptclip.bench.interpolation.predict", stop)
    with pytest.raises(KeyboardInterrupt):
        scale_curve(adapter, halves[0], scales=(0.2,))
    assert adapter.scale == 0.7
    assert all(torch.equal(before[name], value) for name, value in adapter.adapter_state().items())


def test_without_groups_and_without_new_classes(adapter, halves):
    plain = replace(halves[0], groups={})
    for new in (None, (halves[1][0].select([]), halves[1][1])):
        (row,) = scale_curve(adapter, plain, new, scales=(1.0,))
        assert (row["worst_group"], row["worst_group_name"], row["worst_group_n"]) == (None, None, 0)
        assert (row["new_accuracy"], row["new_n"]) == (None, 0)
    assert best_scale([row]) == 1.0


def rows(*values: tuple[float, float, float | None]) -> list[dict[str, Any]]:
    return [{"scale": scale, "accuracy": accuracy, "new_accuracy": new} for scale, accuracy, new in values]


@pytest.mark.parametrize(
    ("curve", "best"),
    [
        (rows((0, 0.5, None), (0.5, 0.7, None), (1, 0.6, None)), 0.5),
        (rows((0, 0.5, None), (0.5, 0.7, None), (1, 0.7, None)), 0.5),  # of equal ones the nearest to zero-shot
        (rows((1, 0.7, None), (0.5, 0.7, None), (0.8, 0.7, None)), 0.5),  # in whatever order they come
        (rows((0, 0.0, None), (1, 0.0, None)), 0),
        # harmonic means 0.545, 0.6 and 0.327: neither the best base (1.0) nor the best new (0.0) accuracy decides
        (rows((0, 0.5, 0.6), (0.5, 0.6, 0.6), (1, 0.9, 0.2)), 0.5),
        (rows((0, 0.4, 0.6), (0.5, 0.5, 0.5), (1, 0.9, 0.0)), 0.5),  # 0.48, 0.5 and 0
        (rows((0.2, 0.6, 0.4), (0.4, 0.4, 0.6)), 0.2),
    ],
)
def test_the_choice(curve, best):
    assert best_scale(curve) == best


def test_choosing_sets_the_scale_and_says_what_for(adapter, halves):
    validation, new, _ = halves
    info = choose_scale("validation", adapter, validation, new)
    assert [row["scale"] for row in info["scale_curve"]] == pytest.approx([i / 10 for i in range(11)])
    assert tuple(row["scale"] for row in info["scale_curve"]) == SCALES
    value = {}
    for row in info["scale_curve"]:
        a, b = row["accuracy"], row["new_accuracy"]
        value[row["scale"]] = 2 * a * b / (a + b) if a + b else 0
    best = min(scale for scale in value if value[scale] == max(value.values()))
    assert len(set(value.values())) > 1
    assert adapter.scale == best == info["chosen"]["lora_scale"]
    assert "11 values" in info["validation_used_for"]
    assert "25 images" in info["validation_used_for"]
    assert "25 of new classes" in info["validation_used_for"]
    assert "new classes" not in choose_scale("validation", adapter, validation)["validation_used_for"]


def test_a_number_is_taken_as_it_is(adapter, halves):
    info = choose_scale(0.25, adapter, halves[0].select([]))
    assert adapter.scale == 0.25
    assert info == {"chosen": {"lora_scale": 0.25}, "validation_used_for": "nothing"}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (1.01, "from 0 .zero-shot. to 1 .as trained., got 1.01"),
        (-0.1, "got -0.1"),
        (float("nan"), "got nan"),
        ("valdation", "number from 0 to 1 or \"validation\", got 'valdation'"),
    ],
)
def test_wrong_settings(adapter, halves, setting, message):
    with pytest.raises(ConfigError, match=message):
        check_setting(setting, halves[0])
    with pytest.raises(ConfigError, match=message):
        choose_scale(setting, adapter, halves[0])
    assert adapter.scale == 0.7


def test_without_validation_images_nothing_can_be_chosen(adapter, halves):
    nothing = halves[0].select([])
    with pytest.raises(ConfigError, match="there are none; give a number"):
        check_setting("validation", nothing)
    with pytest.raises(ConfigError, match="there are none; give it as a number"):
        scale_curve(adapter, nothing)
    check_setting(0.5, nothing)
