# SPDX-License-Identifier: Apache-2.0
"""Retrieval between images and captions: recall at k in both directions, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from adaptclip.errors import DataError, agree
from adaptclip.methods.contrastive import encode_packed, packed_tower
from adaptclip.metrics.estimates import mean_of
from adaptclip.progress import progress_bar

if TYPE_CHECKING:
    from adaptclip.clip import ClipBackbone

KS = (1, 5, 10)


@dataclass(frozen=True)
class Recall:
    """Share of the queries with a right answer among the first k.

    Attributes:
        k: how many answers are looked at.
        value: the share, 0 to 1.
        low: lower bound of the 95 % interval; None where the queries are of too few images for one.
        high: upper bound; likewise.
        correct: how many queries.
        n: of how many.
    """

    k: int
    value: float
    low: float | None
    high: float | None
    correct: int
    n: int


@dataclass(frozen=True)
class Retrieval:
    """One direction.

    Attributes:
        num_queries: how many searches were made.
        num_candidates: among how many.
        median_rank: median over the queries of the rank of the best right answer, from 1.
        recall: one per k.
    """

    num_queries: int
    num_candidates: int
    median_rank: float
    recall: tuple[Recall, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields, JSON-able, with the recalls under "R@k"."""
        shares = {f"R@{r.k}": {key: value for key, value in asdict(r).items() if key != "k"} for r in self.recall}
        sizes = {"num_queries": self.num_queries, "num_candidates": self.num_candidates}
        return {**sizes, "median_rank": self.median_rank, **shares}


def retrieval(
    images: Tensor, texts: Tensor, owner: Tensor, *, ks: Sequence[int] = KS, chunk: int = 1024
) -> dict[str, Retrieval]:
    """Searches the texts of each image, and the image of each text, by cosine similarity; exact.

    An image is answered rightly by any of its texts. The rank of the best right answer is 1 plus the number of wrong
    candidates that are at least as similar: a tie counts against the model, so the result depends neither on the order
    of the candidates nor on chance. A k beyond the number of candidates is always right.

    Intervals are those of every share (`metrics.estimates.mean_of`), at 95 %: Wilson's, and where images have several
    texts, which are no independent queries, with the images as units.

    Args:
        images: (N, D) unit-norm features.
        texts: (R, D) unit-norm features.
        owner: (R,) image of each text, 0 to N - 1; each image has one or more.
        ks: numbers of answers looked at, each 1 or more.
        chunk: queries compared with all candidates at once.

    Returns:
        "image_to_text" and "text_to_image".

    Raises:
        DataError: shapes do not fit, an image has no text, or a feature is not finite.
    """
    _check(images, texts, owner, ks, chunk)
    owner = owner.to(images.device)
    rows = torch.arange(len(images), device=images.device)
    to_text = [
        _ranks(images[part] @ texts.T, rows[part, None] == owner[None, :]) for part in _parts(len(images), chunk)
    ]
    to_image = [
        _ranks(texts[part] @ images.T, owner[part, None] == rows[None, :]) for part in _parts(len(texts), chunk)
    ]
    return {
        "image_to_text": _summary(torch.cat(to_text).cpu().numpy(), None, len(texts), ks),
        "text_to_image": _summary(torch.cat(to_image).cpu().numpy(), owner.cpu().numpy(), len(images), ks),
    }


@torch.no_grad()
def encode_captions(backbone: ClipBackbone, tokens: Tensor, *, batch_size: int = 256) -> Tensor:
    """Encodes (R, L) token ids as (R, D) unit-norm float32 features on the CPU, in order of length.

    Where the tower allows it, nothing is computed for what follows the end token; the features are the same.
    """
    tower = packed_tower(backbone)
    tokens = tokens.to(backbone.device)
    order = torch.arange(len(tokens), device=tokens.device)
    if tower is not None:
        order = tower.pooled_position(tokens).argsort(stable=True)
    parts = []
    for rows in progress_bar(order.split(batch_size), desc="encoding captions", unit="batch", leave=False):
        own = tokens[rows]
        parts.append(F.normalize(encode_packed(tower, own).float(), dim=-1) if tower else backbone.encode_text(own))
    return torch.cat(parts)[order.argsort()].cpu()


def _parts(count: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, count, chunk)]


def _ranks(similarity: Tensor, right: Tensor) -> Tensor:
    """(q, c) similarities and which candidates are right, to (q,) ranks of the best right one, from 1."""
    best = similarity.masked_fill(~right, float("-inf")).amax(dim=1, keepdim=True)
    return 1 + ((similarity >= best) & ~right).sum(dim=1)


def _summary(ranks: np.ndarray, clusters: np.ndarray | None, num_candidates: int, ks: Sequence[int]) -> Retrieval:
    recalls = []
    for k in ks:
        hits = ranks <= k
        low, high = mean_of(hits, clusters).interval(0.95) or (None, None)
        recalls.append(Recall(k, float(hits.mean()), low, high, int(hits.sum()), len(hits)))
    return Retrieval(len(ranks), num_candidates, float(np.median(ranks)), tuple(recalls))


def _check(images: Tensor, texts: Tensor, owner: Tensor, ks: Sequence[int], chunk: int) -> None:
    if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1] or owner.shape != texts.shape[:1]:
        raise DataError(
            "retrieval needs images (N, D), texts (R, D) and the image of each text (R,), got "
            f"{tuple(images.shape)}, {tuple(texts.shape)} and {tuple(owner.shape)}"
        )
    if not len(images) or not ks or min(ks) < 1 or chunk < 1:
        got = f"{len(images)} images, ks {list(ks)} and chunk {chunk}"
        raise DataError(f"retrieval needs images, and every k and the chunk 1 or more; got {got}")
    if owner.min() < 0 or owner.max() >= len(images):
        raise DataError(f"owners of texts are {owner.min()} to {owner.max()}; allowed 0 to {len(images) - 1}")
    without = len(images) - len(torch.unique(owner))
    if without:
        raise DataError(
            f"{without} of {len(images)} images {agree(without, 'has', 'have')} no text, so no answer could be right"
        )
    if not (torch.isfinite(images).all() and torch.isfinite(texts).all()):
        raise DataError("features have values that are not finite")
