"""How the work on many classes is divided: chunks that fit a memory budget, and shares of the processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm


def process_share() -> tuple[int, int]:
    """Returns (rank, number of processes); (0, 1) without distributed training."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def split_by_cost(costs: Sequence[int], limit: int) -> list[range]:
    """Cuts items in order into runs whose costs sum to at most `limit`; an item above the limit is a run of its own.

    Returns:
        Ranges of indices that cover all items, none empty.
    """
    runs, start, total = [], 0, 0
    for i, cost in enumerate(costs):
        if i > start and total + cost > limit:
            runs.append(range(start, i))
            start, total = i, 0
        total += cost
    return [*runs, range(start, len(costs))] if costs else []


def encode_within_budget(
    encode: Callable[[int], Tensor],
    costs_bytes: Sequence[int],
    memory_budget_bytes: int,
    *,
    preserve_rng_state: bool = False,
) -> Tensor:
    """Concatenates `encode(0)`, `encode(1)`, … and lets the backward pass keep at most the budget of activations.

    As many of the last chunks as fit the budget keep their activations; the ones before are computed again during the
    backward pass, one at a time, which gives the same gradients (gradient checkpointing, Chen et al. 2016,
    arXiv:1604.06174). The kept ones come last because the backward pass frees them before it recomputes the first.

    Args:
        encode: chunk number -> (rows, D).
        costs_bytes: what the backward pass would keep of each chunk.
        memory_budget_bytes: the most that may be kept at any moment.
        preserve_rng_state: draws the same random numbers when a chunk is computed again; needed where `encode` draws
            any (dropout), a little slower.
    """
    first_kept, kept = len(costs_bytes), 0
    while first_kept > 0 and kept + costs_bytes[first_kept - 1] <= memory_budget_bytes:
        first_kept -= 1
        kept += costs_bytes[first_kept]
    if not torch.is_grad_enabled():
        chunks = tqdm(range(len(costs_bytes)), desc="Encoding classes", disable=None, leave=False, delay=2)
        return torch.cat([encode(i) for i in chunks])
    again = [
        checkpoint(encode, i, use_reentrant=False, preserve_rng_state=preserve_rng_state) for i in range(first_kept)
    ]
    return torch.cat([*again, *(encode(i) for i in range(first_kept, len(costs_bytes)))])


def gather_rows(rows: Tensor, counts: Sequence[int], rank: int) -> Tensor:
    """Joins the rows that the processes computed, so that gradients reach the process that computed them.

    Let process s compute the rows W_s(x) from shared parameters x, and process r its own loss L_r from all rows W.
    Distributed data parallel training averages the parameters' gradients over the R processes and must arrive at

        d/dx (1/R) sum_r L_r  =  (1/R) sum_s sum_r (dL_r/dW_s) (dW_s/dx).

    Process s owns the factor dW_s/dx, so its share before the average must be (sum_r dL_r/dW_s) (dW_s/dx): the backward
    pass sums the gradients of W over the processes and keeps its own rows. No division by R here: the average does it.

    Args:
        rows: (counts[rank], D) of this process.
        counts: rows of every process.
        rank: number of this process.

    Returns:
        (sum of counts, D) rows, those of process 0 first; the same on every process.
    """
    return _GatherRows.apply(rows, tuple(counts), rank)


class _GatherRows(torch.autograd.Function):
    """All-gather of unequal parts whose backward is the sum over processes; see `gather_rows`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: tuple[int, ...], rank: int) -> Tensor:  # type: ignore[override]
        ctx.counts, ctx.rank = counts, rank
        padded = rows.new_zeros(max(counts), rows.shape[1])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.split(list(ctx.counts))[ctx.rank], None, None
