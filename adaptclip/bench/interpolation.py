# SPDX-License-Identifier: Apache-2.0
"""What lies between the pretrained model and the tuned one: both judged, and the points of the line between them.

LoRA's scale (accuracy, worst group, new classes, calibration at each), WiSE-FT's share of the tuned weights (how good a
model is at its task and how much it forgot), and classes that it has never seen, judged by their names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptclip.clip.saving import with_weights
from adaptclip.data.shots import harmonic_mean
from adaptclip.errors import ConfigError
from adaptclip.features import FeatureCache
from adaptclip.files import write_json, write_text
from adaptclip.methods.contrastive import caption_tokens, interpolate
from adaptclip.methods.lora import check_scale
from adaptclip.methods.predicting import predict
from adaptclip.methods.zero_shot import ZeroShotClassifier
from adaptclip.metrics.calibration import ece
from adaptclip.metrics.intervals import wilson
from adaptclip.progress import progress_bar
from adaptclip.prompts import zero_shot_weights
from adaptclip.reports.measuring import judged as judged_images
from adaptclip.retrieval.recall import KS, encode_captions, retrieval

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from adaptclip.clip import ClipBackbone
    from adaptclip.data.dataset import DomainData, ImageDataset
    from adaptclip.predictions import Predictions
    from adaptclip.types import Features


def predict_new_classes(
    encoder: ClipBackbone, backbone: ClipBackbone, new: DomainData, *, accelerator: Accelerator | None = None
) -> tuple[Predictions, Predictions]:
    """Predicts the test images of new classes among the new classes, by their names alone.

    Args:
        encoder: the adapted towers.
        backbone: the frozen model.
        new: the new classes (`base_and_new`).
        accelerator: divides the encoding among its processes.

    Returns:
        The adapted model's predictions and the frozen one's, of the same images.
    """
    made = []
    for model in (encoder, backbone):
        features = FeatureCache(None).get(model, new.test, accelerator=accelerator)
        classifier = ZeroShotClassifier(model, new.prompt_names, new.card.templates).to(model.device)
        made.append(predict(classifier, features, new.test, accelerator=accelerator))
    return made[0], made[1]


SCALES = tuple(i / 10 for i in range(11))


def scale_curve(
    adapter: Any,
    validation: ImageDataset,
    new: tuple[ImageDataset, Sequence[str]] | None = None,
    *,
    scales: Sequence[float] = SCALES,
    accelerator: Accelerator | None = None,
) -> list[dict[str, Any]]:
    """Judges an adapter on validation images at several scales; its own scale is the same afterwards.

    Args:
        adapter: LoRA, or another adapter with `scale`, `set_scale`, `encoder` and `templates`.
        validation: images of the classes it was trained on.
        new: images of classes it was not trained on, judged among themselves by their names, and these names; or None.
        scales: from 0 (zero-shot) to 1 (as trained).
        accelerator: divides the encoding among its processes.

    Returns:
        Per scale: "scale", "n", "accuracy", "ece", "worst_group" (lowest accuracy of a group of any attribute with its
        "worst_group_name" and "worst_group_n"; None without groups), "new_accuracy" and "new_n" (None without new
        classes). Rates from 0 to 1.

    Raises:
        ConfigError: there are no validation images.
    """
    if not len(validation):
        raise ConfigError("the scale is chosen on validation images, and there are none; give it as a number instead")
    validation.require_one_class("choosing LoRA's scale")
    before, rows = adapter.scale, []
    try:
        for scale in scales:
            adapter.set_scale(scale)
            encoder = adapter.encoder
            features = FeatureCache(None).get(encoder, validation, accelerator=accelerator)
            judged = predict(adapter, features, validation, accelerator=accelerator)
            row: dict[str, Any] = {"scale": float(scale), "n": len(judged)}
            row["accuracy"] = float((judged.pred == judged.labels).mean())
            row["ece"] = ece(judged_images(judged)).value
            row |= _worst_group(judged)
            row |= {"new_accuracy": None, "new_n": 0}
            if new is not None and len(new[0]):
                values = FeatureCache(None).get(encoder, new[0], accelerator=accelerator).values[0]
                weights = zero_shot_weights(encoder, new[1], adapter.templates).cpu()
                pred = (values @ weights.T).argmax(dim=1).numpy()
                row |= {"new_accuracy": float((pred == new[0].labels).mean()), "new_n": len(pred)}
            rows.append(row)
    finally:
        adapter.set_scale(before)
    return rows


def best_scale(curve: Sequence[dict[str, Any]]) -> float:
    """Returns the scale of the highest accuracy on validation; of equal ones the smallest, nearest to zero-shot.

    Where new classes were judged, it is the harmonic mean of both accuracies that counts.
    """

    def value(row: dict[str, Any]) -> float:
        base, new = row["accuracy"], row["new_accuracy"]
        return base if new is None else harmonic_mean(base, new)

    return max(curve, key=lambda row: (value(row), -row["scale"]))["scale"]


def _worst_group(judged: Predictions) -> dict[str, Any]:
    right = judged.pred == judged.labels
    found: list[tuple[float, str, int]] = []
    for attribute, values in judged.groups.items():
        column = np.asarray(values)
        for group in sorted(set(values)):
            own = column == group
            found.append((float(right[own].mean()), f"{attribute} = {group}", int(own.sum())))
    accuracy, name, count = min(found) if found else (None, None, 0)
    return {"worst_group": accuracy, "worst_group_name": name, "worst_group_n": count}


def check_setting(setting: float | str, validation: ImageDataset) -> None:
    """Says before training whether `choose_scale` will be able to choose.

    Raises:
        ConfigError: the setting is neither a number from 0 to 1 nor "validation", or there are no validation images.
    """
    if isinstance(setting, str):
        if setting != "validation":
            raise ConfigError(f'lora_scale should be a number from 0 to 1 or "validation", got {setting!r}')
        if not len(validation):
            raise ConfigError("lora_scale is to be chosen on validation images, and there are none; give a number")
    else:
        check_scale(setting)


def choose_scale(
    setting: float | str,
    adapter: Any,
    validation: ImageDataset,
    new: tuple[ImageDataset, Sequence[str]] | None = None,
    *,
    accelerator: Accelerator | None = None,
) -> dict[str, Any]:
    """Sets an adapter's scale to a number, or to the best one on validation images.

    Args:
        setting: from 0 to 1, or "validation".
        adapter: see `scale_curve`, as for the next ones.
        validation: images of the classes it was trained on.
        new: validation images of other classes, and their prompt names.
        accelerator: divides the encoding.

    Returns:
        What a report says of it: "chosen" and, where it was chosen, "scale_curve" and "validation_used_for".

    Raises:
        ConfigError: see `check_setting`.
    """
    check_setting(setting, validation)
    if not isinstance(setting, str):
        adapter.set_scale(setting)
        return {"chosen": {"lora_scale": float(setting)}, "validation_used_for": "nothing"}
    curve = scale_curve(adapter, validation, new, accelerator=accelerator)
    adapter.set_scale(best_scale(curve))
    images = f"{len(validation)} images" + (f" and {len(new[0])} of new classes" if new is not None else "")
    return {
        "chosen": {"lora_scale": adapter.scale},
        "scale_curve": curve,
        "validation_used_for": f"the scale of the update, {len(curve)} values ({images})",
    }


ALPHAS = tuple(i / 10 for i in range(11))
"""Shares of the tuned weights at which a curve is measured."""

DIRECTIONS = {"image_to_text": "image to text", "text_to_image": "text to image"}


class Yardstick:
    """Measures models of one architecture on one set of images: retrieval of captions, zero-shot accuracy of classes.

    Args:
        backbone: the model before tuning.
        dataset: the N images, one or more.
        data: the data set they are part of; gives classes and templates.
        cache: of the features before tuning; those of tuned image towers are not kept.
        accelerator: divides the encoding of images; None works alone.

    Attributes:
        num_cut: captions that were longer than the context and were cut.
    """

    def __init__(
        self,
        backbone: ClipBackbone,
        dataset: ImageDataset,
        data: DomainData,
        *,
        cache: FeatureCache,
        accelerator: Accelerator | None = None,
    ) -> None:
        self._dataset, self._accelerator = dataset, accelerator
        self._names = data.prompt_names if data.has_classes else None
        self._templates = data.card.templates
        self._captions, self.num_cut = None, 0
        if dataset.captions is not None:
            self._captions, self.num_cut = caption_tokens(backbone, dataset.captions)
        self._features = cache.get(backbone, dataset, accelerator=accelerator)

    def __call__(self, model: ClipBackbone) -> dict[str, Any]:
        """Measures a model.

        Returns:
            Where there are captions, `image_to_text` and `text_to_image` (`Retrieval.to_dict`); where there are
            classes, `accuracy`: value, low, high (95 % Wilson interval), correct and n.
        """
        features, found = self._features_of(model), {}
        if self._captions is not None:
            texts = encode_captions(model, self._captions.tokens)
            sides = retrieval(features.values[0], texts, self._captions.owner)
            found |= {name: side.to_dict() for name, side in sides.items()}
        if self._names is not None:
            classifier = ZeroShotClassifier(model, self._names, self._templates).to(model.device)
            judged = predict(classifier, features, self._dataset, accelerator=self._accelerator)
            correct, n = int((judged.pred == judged.labels).sum()), len(judged)
            low, high = wilson(correct, n)
            found["accuracy"] = {"value": correct / n, "low": low, "high": high, "correct": correct, "n": n}
        return found

    def _features_of(self, model: ClipBackbone) -> Features:
        """Image features by `model`; those known already where its image tower is the one before tuning."""
        if model.image_digest == self._features.weights:
            return self._features
        return FeatureCache(None).get(model, self._dataset, accelerator=self._accelerator)


def wise_ft_curve(
    backbone: ClipBackbone,
    tuned: Mapping[str, Tensor],
    images: Mapping[str, tuple[ImageDataset, DomainData]],
    *,
    cache: FeatureCache,
    accelerator: Accelerator | None = None,
    alphas: Sequence[float] = ALPHAS,
) -> list[dict[str, Any]]:
    """Measures the models between two (WiSE-FT: Wortsman et al. 2022, arXiv:2109.01903, fig. 1).

    Args:
        backbone: the model before tuning.
        tuned: all weights after tuning.
        images: name -> the images to measure on and the data set they are part of; never the test images that the
            chosen model will be judged on. A set without images is passed over.
        cache: of the features before tuning.
        accelerator: divides the encoding of images.
        alphas: shares of the tuned weights, 0 to 1.

    Returns:
        One entry per alpha: `alpha`, and under the name of each set what a `Yardstick` found; none without images.
    """
    before = backbone.model.state_dict()
    yardsticks = {
        name: Yardstick(backbone, *own, cache=cache, accelerator=accelerator)
        for name, own in images.items()
        if len(own[0])
    }
    curve = []
    for alpha in progress_bar(alphas if yardsticks else (), desc="WiSE-FT", unit="model", leave=False):
        model = with_weights(backbone, interpolate(before, tuned, alpha))
        curve.append({"alpha": alpha, **{name: measure(model) for name, measure in yardsticks.items()}})
    return curve


def measured_markdown(rows: Sequence[tuple[str, Mapping[str, Any]]], title: str) -> str:
    """Returns a table of measurements: one row per (name, what a Yardstick found), with intervals and n.

    Args:
        rows: at least one; all with the same measurements.
        title: head of the first column.
    """
    columns: list[tuple[str, str, str]] = []
    for kind in rows[0][1]:
        if kind in DIRECTIONS:
            columns += [(kind, f"R@{k}", f"{DIRECTIONS[kind]} R@{k}") for k in KS]
        else:
            columns.append((kind, "", kind))
    head = [title, *(f"{label} (n = {_cell(rows[0][1], kind, key)['n']:,})" for kind, key, label in columns)]
    lines = [head, ["---"] * len(head)]
    for name, found in rows:
        cells = [_cell(found, kind, key) for kind, key, _ in columns]
        lines.append([name, *(f"{c['value']:.1%} {interval_words(c)}" for c in cells)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def interval_words(found: Mapping[str, Any]) -> str:
    """Returns the interval of a measured share, or that there are too few queries for one."""
    return "[too few]" if found["low"] is None else f"[{found['low']:.1%}, {found['high']:.1%}]"


def curve_markdown(curve: Sequence[Mapping[str, Any]]) -> str:
    """Returns one table per yardstick of a curve; empty text for an empty curve."""
    names = [name for name in curve[0] if name != "alpha"] if curve else []
    tables = [
        f"## WiSE-FT: {name}\n\n" + measured_markdown([(f"{p['alpha']:g}", p[name]) for p in curve], "alpha")
        for name in names
    ]
    return "\n".join(tables)


def judge_retrieval(
    out: Path,
    before: ClipBackbone,
    after: ClipBackbone,
    data: DomainData,
    alpha: float,
    *,
    cache: FeatureCache,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Measures retrieval on the test images, and writes retrieval.json and retrieval.md. Every process calls it.

    Args:
        out: the run folder.
        before: the model before tuning.
        after: the tuned model.
        data: its test part has captions.
        alpha: share of the tuned weights in `after`, for the record.
        cache: of the features before tuning.
        accelerator: the main process writes and prints.

    Returns:
        `alpha`, `captions_cut`, and under `before` and `after` what a Yardstick found.
    """
    measure = Yardstick(before, data.test, data, cache=cache, accelerator=accelerator)
    found = {"before": measure(before), "after": measure(after)}
    record = {"alpha": alpha, "captions_cut": measure.num_cut, **found}
    if accelerator.is_main_process:
        rows = [("before", found["before"]), (f"after, alpha = {alpha:g}", found["after"])]
        table = measured_markdown(rows, f"{data.card.name}, test")
        note = f"{measure.num_cut} captions were longer than the context and were cut.\n" if measure.num_cut else ""
        write_json(out / "retrieval.json", record)
        write_text(out / "retrieval.md", f"# Retrieval on {data.card.name}\n\n{table}\n{note}")
        accelerator.print(table)
    return record


def _cell(found: Mapping[str, Any], kind: str, key: str) -> Mapping[str, Any]:
    return found[kind][key] if key else found[kind]
