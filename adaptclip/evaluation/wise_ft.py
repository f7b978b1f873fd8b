"""How good a tuned CLIP is at its task and how much it forgot: measurements along the line between two models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from adaptclip.backbone import ClipBackbone
from adaptclip.backbone.saving import with_weights
from adaptclip.data.dataset import DomainData, ImageDataset
from adaptclip.evaluation.predict import predict
from adaptclip.evaluation.retrieval import KS, encode_captions, retrieval
from adaptclip.features import FeatureCache
from adaptclip.methods.contrastive import caption_tokens, interpolate
from adaptclip.methods.zero_shot import ZeroShotClassifier
from adaptclip.metrics.intervals import wilson
from adaptclip.storage import write_json, write_text
from adaptclip.types import Features

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
    for alpha in tqdm(alphas if yardsticks else (), desc="WiSE-FT", unit="model", disable=None, leave=False):
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
