# SPDX-License-Identifier: Apache-2.0
"""From an adapter and cached features to one row of probabilities per image, on one or several processes.

Also the scores of extra words beside a classifier's own classes, for the text probe (`reports.probe`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from adaptclip.clip import ClipBackbone
from adaptclip.errors import DataError
from adaptclip.methods.base import check_features, objective_of
from adaptclip.predictions import Predictions
from adaptclip.progress import progress_bar
from adaptclip.prompts import zero_shot_weights
from adaptclip.training.criterion import check_several
from adaptclip.types import Batch, Features

if TYPE_CHECKING:
    from accelerate import Accelerator

    from adaptclip.data.dataset import ImageDataset
    from adaptclip.methods.method import Method


def predict(
    adapter: nn.Module,
    features: Features,
    dataset: ImageDataset,
    *,
    batch_size: int = 1024,
    accelerator: Accelerator | None = None,
) -> Predictions:
    """Judges every image of a split; every process returns the same complete predictions.

    Args:
        adapter: maps a Batch of features to logits (B, C). Its modules are put in evaluation mode and back.
        features: (1, N, D) of the split, evaluation transform.
        dataset: the same rows: ids, labels, class names, and where there are any groups, clusters and levels.
        batch_size: images per forward pass and process.
        accelerator: gathers over processes; None judges everything here.

    Returns:
        N rows in the order of the data set, probabilities in float32. They are the softmax of the logits; an adapter of
        the sigmoid objective also has those of the single classes.

    Raises:
        DataError: there are no images, the features are of other rows, or probabilities are not finite.
        ConfigError: the images may show several classes, and the adapter names exactly one.
    """
    _check(features, dataset, batch_size)
    check_several(dataset, objective_of(adapter))
    if isinstance(encoder := getattr(adapter, "encoder", None), ClipBackbone):
        check_features(features, encoder)
    num_images = len(features)
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    # Every process judges equally many rows, so that collective operations inside the adapter stay in step; the rows
    # past the end repeat the last one and are cut off after gathering.
    share = -(-num_images // world)
    rows = (torch.arange(share) + rank * share).clamp(max=num_images - 1)
    device = accelerator.device if accelerator else _device(adapter)
    with evaluation_mode(adapter), torch.no_grad():
        batches = progress_bar(rows.split(batch_size), desc="predict", unit="batch", show=rank == 0, leave=False)
        logits = torch.cat([_logits(adapter, features, index, device) for index in batches])
    if accelerator is not None:
        logits = accelerator.gather(logits)
    assert isinstance(logits, Tensor)
    logits, least = logits[:num_images], getattr(adapter, "thresholds_", None)
    return Predictions(
        ids=features.ids,
        labels=np.asarray(dataset.labels, dtype=np.int64),
        probs=logits.softmax(dim=-1).cpu().numpy(),
        sigmoid=logits.sigmoid().cpu().numpy() if objective_of(adapter) == "sigmoid" else None,
        positive=None if dataset.multi_hot is None else dataset.multi_hot == 1,
        known=None if dataset.multi_hot is None else dataset.multi_hot >= 0,
        thresholds=least.values if dataset.several and least is not None else None,
        class_names=tuple(dataset.class_names),
        groups=dict(dataset.groups),
        clusters=dataset.clusters,
        levels=dict(dataset.levels),
        fixed_classes=dataset.fixed_classes,
        files=dataset.files,
        cluster_name=dataset.cluster_name,
        features=features.values[0].float().cpu().numpy(),
    )


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Puts every submodule in evaluation mode, and each one back in its own mode afterwards.

    `module.train()` afterwards would also wake up the frozen towers inside the adapter.
    """
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


def _logits(adapter: nn.Module, features: Features, index: Tensor, device: torch.device) -> Tensor:
    batch = Batch(labels=features.labels[index], index=index, features=features.values[0, index])
    # Half-precision logits lose digits in the softmax: rows would no longer sum to 1.
    return adapter(batch.to(device)).float()


def _device(adapter: nn.Module) -> torch.device:
    return next((p.device for p in adapter.parameters()), torch.device("cpu"))


def _check(features: Features, dataset: ImageDataset, batch_size: int) -> None:
    if batch_size < 1:
        raise DataError(f"batch_size must be at least 1, got {batch_size}")
    if len(features) == 0:
        raise DataError("there are no images to predict: the split is empty")
    if len(features.values) != 1:
        raise DataError(
            f"predictions use the evaluation transform, one view per image; got {len(features.values)} augmented views"
        )
    if features.ids != tuple(dataset.ids):
        raise DataError(
            f"features ({len(features)} rows) and data set ({len(dataset.ids)} rows) are not of the same images in "
            "the same order; extract the features of this split"
        )


@torch.no_grad()
def probe_scores(
    adapter: Method, features: Features, words: Sequence[str], templates: Sequence[str], *, batch_size: int = 1024
) -> np.ndarray:
    """Scores every image against the classes and against extra words, as if the words were classes too.

    The classes' scores are the adapter's own logits; the words are read by the text tower of the adapter's encoder and
    scaled as CLIP does. Where an adapter's logits are not on that scale (`is_comparable`), the two cannot be weighed
    against each other.

    Args:
        adapter: a classifier with its encoder.
        features: (1, N, D) of the images, made by `adapter.encoder` with the evaluation transform.
        words: E extra words or phrases.
        templates: prompts with one `{}` for a word.
        batch_size: images per forward pass.

    Returns:
        (N, C + E) float32 logits.

    Raises:
        DataError: a word that is empty.
        BackboneError: a prompt longer than the context.
    """
    encoder = adapter.encoder
    extra = zero_shot_weights(encoder, words, templates)
    values, scale = features.values[0], encoder.logit_scale
    parts = []
    with evaluation_mode(adapter):  # pyright: ignore[reportArgumentType]
        for index in torch.arange(len(features)).split(batch_size):
            batch = Batch(labels=features.labels[index], index=index, features=values[index]).to(extra.device)
            assert batch.features is not None
            parts.append(torch.cat([adapter(batch).float(), scale * batch.features.float() @ extra.T], dim=1).cpu())
    return torch.cat(parts).numpy()


@torch.no_grad()
def is_comparable(adapter: Method, features: Features, scores: np.ndarray) -> bool:
    """Returns whether the classes' logits are cosines times CLIP's scale, as the extra words' are.

    Args:
        adapter: the classifier.
        features: as in `probe_scores`.
        scores: what `probe_scores` returned.
    """
    weights = adapter.class_weights().float().cpu()
    plain = adapter.encoder.logit_scale.cpu() * features.values[0][:256].float() @ weights.T
    own = torch.from_numpy(scores[:256, : len(weights)])
    # Caches, biases and contexts of single images move logits a little; a head of its own scale moves them altogether.
    return bool((own - plain).abs().mean() <= 0.25 * plain.std())
