"""Scores of extra words beside a classifier's own classes, for the text probe (`reports.text_probe`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from adaptclip.evaluation.predict import evaluation_mode
from adaptclip.methods.method import Method
from adaptclip.prompts import zero_shot_weights
from adaptclip.types import Batch, Features


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
