"""Jobs: one method fitted to one draw of images, and judged once."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from accelerate import Accelerator

from adaptclip import __version__
from adaptclip.backbone import ClipBackbone
from adaptclip.data.base_new import harmonic_mean
from adaptclip.data.dataset import DomainData, ImageDataset
from adaptclip.data.fewshot import Rule
from adaptclip.evaluation.measuring import judged
from adaptclip.evaluation.predict import predict
from adaptclip.experiments.methods import Fitted, fit_named
from adaptclip.experiments.protocols import HARMONIC_MEAN, PROTOCOLS, Case, Judged
from adaptclip.experiments.search import Budget, search
from adaptclip.experiments.store import FeatureStore, PooledFeatures
from adaptclip.features import FeatureCache
from adaptclip.methods.registry import Named, named
from adaptclip.metrics import GENERAL_METRICS, METRICS
from adaptclip.storage import digest
from adaptclip.training.presets import Preset
from adaptclip.training.support import Support
from adaptclip.types import Features, Predictions

FORMAT = 1
"""Raised when results of older code must not be taken for those of newer code."""


@dataclass(frozen=True)
class Job:
    """One cell of the grid.

    Attributes:
        card: name of the card that is learnt from.
        method: a name of `methods.registry.named`.
        settings: all settings of the method.
        shots: k; 0 is all images.
        seed: of the draw and of the method.
        key: digest of everything that the result depends on.
    """

    card: str
    method: str
    settings: Mapping[str, Any]
    shots: int
    seed: int
    key: str

    def __str__(self) -> str:
        return f"{self.card}, {self.method}, {self.shots or 'all'} shot{'s' * (self.shots != 1)}, seed {self.seed}"


@dataclass(frozen=True)
class Grid:
    """All jobs of a run and the cases they are about.

    Attributes:
        protocol: a name of PROTOCOLS.
        cases: (card, shots, seed) -> the draw.
        jobs: in the order in which they are taken, cheap methods and few shots first.
        budget: of the search for settings, or None.
        preset: whose values the settings take that are not given.
    """

    protocol: str
    cases: Mapping[tuple[str, int, int], Case]
    jobs: tuple[Job, ...]
    budget: Budget | None = None
    preset: Preset = "paper"


def make_grid(
    cards: Mapping[str, DomainData],
    targets: Sequence[DomainData],
    backbone: ClipBackbone,
    *,
    protocol: str,
    settings: Mapping[str, Mapping[str, Any]],
    shots: Sequence[int],
    seeds: Sequence[int],
    rule: Rule = "nested",
    budget: Budget | None = None,
    preset: Preset = "paper",
) -> Grid:
    """Draws all cases and lists all jobs; every process arrives at the same ones.

    Args:
        cards: name -> data to learn from.
        targets: data to judge on, for protocols that ask for it.
        backbone: the frozen CLIP.
        protocol: a name of PROTOCOLS.
        settings: method -> all its settings (`read_settings`).
        shots: values of k.
        seeds: of the draws.
        rule: of the draws.
        budget: of the search for settings; None takes the settings as they are.
        preset: whose values the settings take that are not given.

    Raises:
        SplitError: a case cannot be drawn.
    """
    draw = PROTOCOLS[protocol].draw
    cases = {(name, k, seed): draw(data, targets, k, seed, rule) for name, data in cards.items() for k in shots
             for seed in seeds}  # fmt: skip
    world = {
        "format": FORMAT, "adaptclip": __version__, "protocol": protocol, "backbone": backbone.digest,
        "precision": backbone.precision, "transform": backbone.transform_spec,
        "search": None if budget is None else vars(budget), "preset": preset,
    }  # fmt: skip
    jobs = []
    for method in sorted(settings, key=lambda name: named()[name].cost):
        for k in sorted(shots, key=lambda k: k or float("inf")):
            for seed in seeds:
                for name, data in cards.items():
                    case = cases[name, k, seed]
                    judged = [
                        (j.name, j.data.test.digest, j.data.card.digest, j.learnt, j.classes) for j in case.judged
                    ]
                    own = {
                        **world, "card": data.card.digest, "data": data.digest, "judged": judged, "seed": seed,
                        "split": case.split.digest, "method": method, "settings": dict(settings[method]),
                    }  # fmt: skip
                    key = digest(json.dumps(own, sort_keys=True))[:32]
                    jobs.append(Job(name, method, settings[method], k, seed, key))
    return Grid(protocol, cases, tuple(jobs), budget, preset)


@dataclass
class Worker:
    """What one process needs to do any job of a grid.

    Attributes:
        grid: the jobs.
        store: features of the frozen backbone.
        accelerator: of this process alone.
    """

    grid: Grid
    store: FeatureStore
    accelerator: Accelerator
    _pools: dict[str, tuple[ImageDataset, ImageDataset]] = field(default_factory=dict)

    def run(self, job: Job) -> dict[str, Any]:
        """Fits, then judges. Returns what is kept of the job, JSON-able.

        The test images are read once, after fitting and every choice.
        """
        case, one = self.grid.cases[job.card, job.shots, job.seed], named()[job.method]
        started = time.perf_counter()
        support = self.support(job)
        words = case.data.prompt_names, case.data.card.templates
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit_started = time.perf_counter()
            how: Any = {"preset": self.grid.preset}
            if self.grid.budget is not None and one.variant.search:
                fitted = search(one, support, *words, job.settings, self.grid.budget, **how)
            else:
                fitted = fit_named(one, support, *words, job.settings, **how)
            fit_s = time.perf_counter() - fit_started - support.reading_s
            judged = {part.name: self.judge(fitted, one, part) for part in case.judged}
        if case.joined is not None:
            judged[HARMONIC_MEAN] = _harmonic(*(judged[name] for name in case.joined))
        return {
            "job": {
                "protocol": self.grid.protocol, "card": job.card, "method": job.method, "shots": job.shots,
                "seed": job.seed, "settings": fitted.told["settings"], "split": case.split.digest,
                "backbone": self.store.backbone.name, "pretrained": self.store.backbone.pretrained,
                "weights": self.store.backbone.digest, "adaptclip": __version__,
            },
            "judged": judged,
            "train_images": len(case.split.train),
            "validation_images": len(case.split.validation),
            "validation_used_for": fitted.told["validation_used_for"],
            "schedule": fitted.told["schedule"],
            "chosen": fitted.told["chosen"],
            "search": fitted.told.get("search"),
            "trainable_parameters": fitted.told["trainable_parameters"],
            "fit_s": fit_s,
            "read_s": support.reading_s,
            "total_s": time.perf_counter() - started,
            "warnings": sorted({str(w.message) for w in caught}),
        }  # fmt: skip

    def support(self, job: Job) -> Support:
        """Returns what the method of a job may see."""
        case = self.grid.cases[job.card, job.shots, job.seed]
        parts = case.split.select(case.data)
        pool_of = list(zip(parts, self.pools(job.card), strict=True))
        return Support(
            self.store.backbone, *parts, source=PooledFeatures(self.store, pool_of),
            augmentation=case.data.card.augmentation, shots=job.shots, seed=job.seed, accelerator=self.accelerator,
        )  # fmt: skip

    def pools(self, card: str) -> tuple[ImageDataset, ImageDataset]:
        """Returns all training and all validation images that any job of a card asks for, in the data's order."""
        if card not in self._pools:
            cases = [case for (name, *_), case in self.grid.cases.items() if name == card]
            parts = []
            for which in ("train", "validation"):
                wanted = {row for case in cases for row in getattr(case.split, which)}
                source = cases[0].data.train
                if not wanted <= set(source.ids):
                    source = cases[0].data.validation
                parts.append(source.select([i for i, row in enumerate(source.ids) if row in wanted]))
            self._pools[card] = (parts[0], parts[1])
        return self._pools[card]

    def judge(self, fitted: Fitted, one: Named, part: Judged) -> dict[str, Any]:
        """Judges an adapter on test images, read here for the first time."""
        adapter: Any = fitted.adapter
        names, test = part.data.prompt_names, part.data.test
        if not part.learnt:
            adapter = adapter.for_classes(names, one.templates(part.data.card.templates))
        features = self.test_features(adapter.encoder, test)
        predictions = predict(adapter.to(self.accelerator.device), features, test)
        return measure(predictions, part.classes)

    def test_features(self, encoder: ClipBackbone, test: ImageDataset) -> Features:
        """Returns test features: those all methods share, or of adapted towers, which no other job could use."""
        if encoder.image_digest == self.store.backbone.image_digest:
            return self.store.get(test, test)
        return FeatureCache(None).get(encoder, test)


BENCH_METRICS = tuple(name for name in GENERAL_METRICS if METRICS[name].per_cent)
"""Metrics of every cell of the grid."""


def measure(predictions: Predictions, classes: Sequence[int] = ()) -> dict[str, Any]:
    """Returns the metrics of predictions, restricted to the images of some classes where any are given.

    Returns:
        `n`, `num_classes` (to choose among), `accuracy`, `mean_per_class_accuracy`, `top5_accuracy` (None with five
        classes or fewer), `ece`; rates from 0 to 1.
    """
    images = judged(predictions, np.flatnonzero(np.isin(predictions.labels, classes)) if len(classes) else None)
    values = {name: METRICS[name].value(images) for name in BENCH_METRICS}
    return {"n": len(images), "num_classes": len(predictions.class_names), **values}


def _harmonic(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "n": first["n"] + second["n"],
        "num_classes": None,
        **{m: harmonic_mean(first[m], second[m]) if METRICS[m].decides else None for m in BENCH_METRICS},
    }
