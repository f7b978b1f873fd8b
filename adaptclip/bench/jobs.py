# SPDX-License-Identifier: Apache-2.0
"""Jobs (one method fitted to one draw of images, and judged once), and the folder in which processes share them.

The folder holds a result per job and a lock while a process is at it. Every image is encoded once, by whichever process
comes first.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from adaptclip import __version__
from adaptclip.bench.methods import Fitted, fit_named
from adaptclip.bench.protocols import HARMONIC_MEAN, PROTOCOLS, Case, Judged
from adaptclip.bench.search import Budget, search
from adaptclip.data.shots import Rule, harmonic_mean
from adaptclip.errors import ConfigError, StorageError, did_you_mean
from adaptclip.features import SHARD_ROWS, FeatureCache
from adaptclip.files import digest
from adaptclip.methods.predicting import predict
from adaptclip.methods.registry import Named, named
from adaptclip.metrics import GENERAL_METRICS, METRICS
from adaptclip.reports.measuring import judged
from adaptclip.seals import read_sealed, write_sealed
from adaptclip.training.support import Preset, Support
from adaptclip.types import Features

if TYPE_CHECKING:
    from accelerate import Accelerator

    from adaptclip.clip import ClipBackbone
    from adaptclip.data.dataset import DomainData, ImageDataset
    from adaptclip.data.transforms import Augment
    from adaptclip.predictions import Predictions


def launch_id() -> str:
    """Returns a name that the processes of one launch share on a machine, and no other launch has.

    Address and port are always the same under `accelerate launch`: what tells its launches apart is the launcher, which
    is the parent of its processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
        return digest([*(os.environ.get(name, "") for name in names), socket.gethostname(), str(os.getppid())])[:16]
    return uuid.uuid4().hex[:16]


class JobStore:
    """Results and claims of jobs.

    A job is done when its result file is there, and files come whole or not at all. A claim is a lock that the
    operating system takes back when its process ends in whatever way, so that a killed process leaves nothing to clean
    up and no job is done twice. A failure counts for the launch in which it happened; the next one tries again.

        <folder>/<key>.json          result
        <folder>/<key>.failed.json   why it has none
        <folder>/<key>.lock          exists while and after somebody worked on it
    """

    def __init__(self, folder: Path, launch: str) -> None:
        """Shares jobs in `folder`, which need not exist yet, with all processes that name the same one."""
        self.folder, self._launch = folder, launch

    def result(self, key: str) -> dict[str, Any] | None:
        """Returns the result of a job, or None where there is none (or only a damaged one)."""
        try:
            found, _ = read_sealed(self.folder, f"{key}.json")
        except StorageError:
            return None
        return found if isinstance(found, dict) and found.get("key") == key else None

    def failure(self, key: str) -> dict[str, Any] | None:
        """Returns why a job failed in this launch, or None."""
        try:
            found, _ = read_sealed(self.folder, f"{key}.failed.json")
        except StorageError:
            return None
        return found if isinstance(found, dict) and found.get("launch") == self._launch else None

    def is_settled(self, key: str) -> bool:
        """Whether there is nothing left to do: the job has a result, or failed in this launch."""
        return self.result(key) is not None or self.failure(key) is not None

    def finish(self, key: str, result: dict[str, Any]) -> None:
        """Writes the result of a job."""
        write_sealed(self.folder / f"{key}.json", {"key": key, **result})
        (self.folder / f"{key}.failed.json").unlink(missing_ok=True)

    def fail(self, key: str, failure: dict[str, Any]) -> None:
        """Writes why a job has no result."""
        write_sealed(self.folder / f"{key}.failed.json", {"key": key, "launch": self._launch, **failure})

    @contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Yields whether the job is this process's now; it is given back when the block ends."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / f"{key}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            yield False
            return
        try:
            # Somebody may have finished it between the last look and the lock.
            yield not self.is_settled(key)
        finally:
            lock.release()


MAX_CHUNKS = 32
"""Most parts that a pool of images is encoded in; each part is read by looking through all shards."""

MEMORY_BYTES = 2 * 2**30
"""What is kept in memory between jobs; beyond it, the pool that was read first is dropped."""


class FeatureStore:
    """The feature cache as jobs see it.

    Jobs of different shots and seeds ask for overlapping images. What is encoded is the whole pool that any job of the
    grid may ask for, in parts that do not depend on who asks first; so the batches, and with them the last bits of
    every feature, are the same however many processes there are and whichever job comes first. A part is encoded under
    a lock, and a process that finds it taken goes on to the next.
    """

    def __init__(self, cache: FeatureCache, backbone: ClipBackbone, locks: Path) -> None:
        """Reads and fills `cache` with features of `backbone`; `locks` is a folder that all processes share."""
        self._cache, self.backbone, self._locks = cache, backbone, locks
        self._pools: dict[tuple[str, str], Tensor] = {}

    def get(
        self, images: ImageDataset, pool: ImageDataset, *, views: int = 0, augment: Augment | None = None
    ) -> Features:
        """Returns the features (V, N, D) of images that are part of a pool; V is 1 for the evaluation transform.

        Raises:
            KeyError: an image is not in the pool.
            DataError, BackboneError, StorageError, ConfigError: see `FeatureCache.get`.
        """
        key = (pool.digest, augment.spec if views and augment else "")
        values = self._pools.get(key)
        # Features that somebody else computed have the views that they have.
        if values is None or (pool.has_pixels and len(values) < max(views, 1)):
            self._pools.pop(key, None)
            values = self._pools[key] = self._read(pool, views, augment)
            self._drop_oldest()
        row_of = {content: row for row, content in enumerate(pool.contents)}
        rows = [row_of[content] for content in images.contents]
        return Features.of(values[: max(views, 1), rows], images, weights=self.backbone.image_digest)

    def _read(self, pool: ImageDataset, views: int, augment: Augment | None) -> Tensor:
        size = SHARD_ROWS * max(1, -(-len(pool) // (SHARD_ROWS * MAX_CHUNKS)))
        chunks = [pool.select(range(i, min(i + size, len(pool)))) for i in range(0, len(pool), size)]
        parts: dict[int, Tensor] = {}
        self._locks.mkdir(parents=True, exist_ok=True)
        for patience_s in (0, -1):  # first what nobody else is busy with, then whatever is left
            for number, chunk in enumerate(chunks):
                if number in parts:
                    continue
                name = digest(pool.digest, augment.spec if augment else "", str(number))[:24]
                try:
                    with FileLock(self._locks / f"{name}.lock", timeout=patience_s):
                        features = self._cache.get(self.backbone, chunk, views=views, augment=augment)
                except Timeout:
                    continue
                parts[number] = features.values
        if not parts:
            return torch.empty(max(views, 1), 0, self.backbone.embed_dim)
        return torch.cat([parts[number] for number in sorted(parts)], dim=1)

    def _drop_oldest(self) -> None:
        while len(self._pools) > 1 and sum(v.nbytes for v in self._pools.values()) > MEMORY_BYTES:
            del self._pools[next(iter(self._pools))]


class PooledFeatures:
    """The store as the source of one case's support set: each part is read from the pool that it belongs to."""

    def __init__(self, store: FeatureStore, pool_of: Sequence[tuple[ImageDataset, ImageDataset]]) -> None:
        """`pool_of` has (part, its pool) for the parts of a case."""
        self._store, self._pool_of = store, tuple(pool_of)

    def get(
        self, backbone: Any, dataset: ImageDataset, *, views: int = 0, augment: Augment | None = None, **_: Any
    ) -> Features:
        """Returns features of one of the parts; see `FeatureStore.get`."""
        pool = next(pool for part, pool in self._pool_of if part is dataset)
        return self._store.get(dataset, pool, views=views, augment=augment)


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
        world: digest of what all jobs have in common: model, protocol, rule of the draws, search, version.
        data: card that is learnt from -> digest of its images, and of what else is judged.
        budget: of the search for settings, or None.
        preset: whose values the settings take that are not given.
    """

    protocol: str
    cases: Mapping[tuple[str, int, int], Case]
    jobs: tuple[Job, ...]
    world: str
    data: Mapping[str, str]
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
    rest = [part for target in targets for part in (target.card.digest, target.digest)]
    own_data = {name: digest(data.card.digest, data.digest, *rest) for name, data in cards.items()}
    return Grid(
        protocol, cases, tuple(jobs), digest(json.dumps(world, sort_keys=True), rule), own_data, budget, preset
    )  # fmt: skip


@dataclass(frozen=True)
class Earlier:
    """Results in a bench folder that are not of this grid.

    Attributes:
        results: those that belong beside the grid's, as they were made in the same way.
        changes: settings of their methods that differ from the published ones, METHOD.SETTING=VALUE.
        num_others: the rest, made from other data, settings or versions.
    """

    results: tuple[dict[str, Any], ...]
    changes: tuple[str, ...]
    num_others: int

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods of the results."""
        return tuple(dict.fromkeys(result["job"]["method"] for result in self.results))


def earlier_results(store: JobStore, grid: Grid) -> Earlier:
    """Finds what earlier commands left in a bench folder, so that tables show all that was done there.

    Beside the grid's results belong those of the same model, protocol, rule, search and version. A card that the grid
    has must have the same images, a method that it has the same settings; of others the newest count.
    """
    own = {job.key for job in grid.jobs}
    files = sorted(store.folder.glob("*.json"), key=lambda file: (file.stat().st_mtime_ns, file.name), reverse=True)
    found = [result for file in files if file.stem not in own and (result := store.result(file.stem)) is not None]
    data, settings = dict(grid.data), {job.method: dict(job.settings) for job in grid.jobs}
    kept, changes = [], {}
    for result in found:
        job = result["job"]
        if job.get("world") != grid.world or job["method"] not in named():
            continue
        same_data = data.setdefault(job["card"], job["data"]) == job["data"]
        if same_data and settings.setdefault(job["method"], job["asked"]) == job["asked"]:
            kept.append(result)
            usual = named()[job["method"]].settings()
            if job["method"] not in {one.method for one in grid.jobs}:
                changed = {name: value for name, value in job["asked"].items() if value != usual.get(name)}
                changes |= {f"{job['method']}.{name}={value}": None for name, value in changed.items()}
    return Earlier(tuple(kept), tuple(changes), len(found) - len(kept))


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
            if support.images.several:
                fitted.adapter.choose_thresholds(support)
            judged = {part.name: self.judge(fitted, one, part) for part in case.judged}
        if case.joined is not None:
            judged[HARMONIC_MEAN] = _harmonic(*(judged[name] for name in case.joined))
        return {
            "job": {
                "protocol": self.grid.protocol, "card": job.card, "method": job.method, "shots": job.shots,
                "seed": job.seed, "settings": fitted.info["settings"], "split": case.split.digest,
                "backbone": self.store.backbone.name, "pretrained": self.store.backbone.pretrained,
                "weights": self.store.backbone.digest, "adaptclip": __version__,
                "world": self.grid.world, "data": self.grid.data[job.card], "asked": dict(job.settings),
            },
            "judged": judged,
            "train_images": len(case.split.train),
            "validation_images": len(case.split.validation),
            "validation_used_for": fitted.info["validation_used_for"],
            "schedule": fitted.info["schedule"],
            "chosen": fitted.info["chosen"],
            "search": fitted.info.get("search"),
            "trainable_parameters": fitted.info["trainable_parameters"],
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

SEVERAL_METRICS = (
    "labels_macro_auc", "labels_macro_f1", "labels_macro_sensitivity", "labels_macro_specificity", "labels_micro_f1",
    "example_f1", "subset_accuracy", "hamming_loss",
)  # fmt: skip
"""Those of images that may show several classes."""


def metric_of(asked: str, several: Sequence[bool]) -> str:
    """Returns what tables and curves show.

    Args:
        asked: a metric, or "auto": the accuracy, or of images that may show several classes the mean AUC.
        several: of each card, whether its images may.

    Raises:
        ConfigError: cards of both kinds stand in one table, or the metric is not one of theirs.
    """
    if len(set(several)) > 1:
        raise ConfigError(
            "some of the cards have images of one class each and others of several: no metric is that of both. Give "
            "them benches of their own"
        )
    allowed = SEVERAL_METRICS if several[0] else BENCH_METRICS
    if asked == "auto":
        return allowed[0]
    if asked not in allowed:
        kind = "may show several classes" if several[0] else "show one class each"
        raise ConfigError(f"the images {kind}, and {asked} is no metric of theirs. {did_you_mean(asked, allowed)}")
    return asked


def measure(predictions: Predictions, classes: Sequence[int] = ()) -> dict[str, Any]:
    """Returns the metrics of predictions, restricted to the images of some classes where any are given.

    Returns:
        `n`, `num_classes` (to choose among), `accuracy`, `mean_per_class_accuracy`, `top5_accuracy` (None with five
        classes or fewer), `ece`; rates from 0 to 1. Of images that may show several classes these are None, and
        SEVERAL_METRICS stand beside them.
    """
    images = judged(predictions, np.flatnonzero(np.isin(predictions.labels, classes)) if len(classes) else None)
    values: dict[str, float | None] = dict.fromkeys(BENCH_METRICS)
    names = SEVERAL_METRICS if predictions.several else BENCH_METRICS
    values |= {name: METRICS[name].value(images) for name in names}
    return {"n": len(images), "num_classes": len(predictions.class_names), **values}


def _harmonic(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "n": first["n"] + second["n"],
        "num_classes": None,
        **{m: harmonic_mean(first[m], second[m]) if METRICS[m].decides else None for m in BENCH_METRICS},
    }
