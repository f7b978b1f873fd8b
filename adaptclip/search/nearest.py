"""The exact nearest vectors of a query, by matrix products over blocks of rows."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from adaptclip.errors import ConfigError, DataError, did_you_mean

Engine = Literal["exact", "faiss"]

SCORES_BYTES = 64 * 2**20
"""Most bytes of one block's scores."""

MOST_ROWS = 32768
"""Most rows of a block: a block of a memory-mapped index should not be much larger than what the processor caches."""


def nearest(queries: Tensor, vectors: Tensor, k: int, *, engine: Engine = "exact") -> tuple[Tensor, Tensor]:
    """Returns the k rows of `vectors` with the largest dot product with each query, largest first.

    With "exact", equal scores are ordered by row, so the answer depends on nothing but its arguments. "faiss" is as
    exact, without an order of ties, and uses all cores (faiss.knn; the package is optional).

    Args:
        queries: (Q, D) float32.
        vectors: (N, D) float32; may be memory-mapped, since it is only read, block by block.
        k: number of answers, 1 or more; at most N are given.
        engine: who multiplies.

    Returns:
        Scores (Q, K) float32 and rows (Q, K) int64, K the smaller of k and N.

    Raises:
        DataError: shapes do not fit, or there is nothing to search.
        ConfigError: k below 1, an unknown engine, or faiss is not installed.
    """
    if queries.ndim != 2 or vectors.ndim != 2 or queries.shape[1] != vectors.shape[1] or not len(vectors):
        raise DataError(
            f"queries should be (Q, D) and vectors (N, D) with N above 0, got {tuple(queries.shape)} and "
            f"{tuple(vectors.shape)}"
        )
    if k < 1:
        raise ConfigError(f"the number of answers must be 1 or more, got {k}")
    k = min(k, len(vectors))
    if engine == "faiss":
        return _faiss(queries, vectors, k)
    if engine != "exact":
        raise ConfigError(f"unknown engine {engine!r}. {did_you_mean(str(engine), ('exact', 'faiss'))}")
    scores = torch.empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.int64)
    size = max(1, min(MOST_ROWS, SCORES_BYTES // (4 * max(1, len(queries)))))
    for start in range(0, len(vectors), size):
        found, where = _best(queries @ vectors[start : start + size].T, k)
        scores, rows = torch.cat([scores, found], dim=1), torch.cat([rows, where + start], dim=1)
        # Earlier blocks stand first, and a stable sort leaves equal scores in that order.
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        scores, rows = scores[:, :k], rows.gather(1, order)[:, :k]
    return scores, rows


def _best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the k best columns of each row, the earlier of equal ones first."""
    k = min(k, scores.shape[1])
    found, where = scores.topk(k, dim=1)
    # topk takes any of those that tie for the last place, and orders ties as it likes.
    where, back = where.sort(dim=1)
    found, order = found.gather(1, back).sort(dim=1, descending=True, stable=True)
    where = where.gather(1, order)
    for row in ((scores >= found[:, -1:]).sum(dim=1) > k).nonzero().flatten().tolist():
        found[row], where[row] = (part[:k] for part in scores[row].sort(descending=True, stable=True))
    return found, where


def _faiss(queries: Tensor, vectors: Tensor, k: int) -> tuple[Tensor, Tensor]:
    try:
        import faiss  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError("faiss is not installed: python -m pip install faiss-cpu, or leave --engine out") from error
    scores, rows = faiss.knn(queries.numpy(), vectors.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
    return torch.from_numpy(scores), torch.from_numpy(rows)
