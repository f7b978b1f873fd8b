# SPDX-License-Identifier: Apache-2.0
"""Attention over packed tokens: a prefix that all sequences share, and one short suffix per sequence.

Tokens lie in one list without padding: first those of the prefix (where its keys and values are not known yet), then
the suffixes, one run of equal or similar lengths after another. Only the attention needs to know which token belongs
to which suffix; runs of different lengths are padded at their end for it, and causality hides what was padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptclip.clip.low_rank import project

KeyValue = tuple[Tensor, Tensor]
"""Keys and values of the shared prefix in one block, each (heads, P, T / heads) float32 for P prefix tokens."""

PrefixState = tuple[KeyValue | None, ...]
"""Keys and values of the shared prefix, one pair per block; None in every block where there is no prefix."""

MAX_JOINED_TOKENS = {"cpu": 512, "cuda": 32768}
"""Suffixes of different lengths are attended together up to this many tokens with padding: below it, the many small
operations of separate runs cost more than padding does. On a GPU each of them costs more (measured on an H200: a CoOp
step of 1,000 classes takes 70 ms instead of 128)."""


@dataclass(frozen=True)
class Run:
    """G suffixes that follow each other in the packed list and are attended together, padded to l tokens.

    Attributes:
        num_tokens: n, tokens of the run without padding.
        places: (G l,) number within the run of the token at each padded place; None where no padding is needed.
        tokens: (n,) padded place of each token; None where no padding is needed.
        last: (G,) number within the run of each suffix's last token.
        hidden: (1, l, l) additive mask: -inf where a key comes after the query.
        hidden_from_last: (G, 1, l) the same for queries from the last tokens alone.
    """

    num_tokens: int
    places: Tensor | None
    tokens: Tensor | None
    last: Tensor
    hidden: Tensor
    hidden_from_last: Tensor

    def pad(self, packed: Tensor) -> Tensor:
        """(n, ...) tokens to (G l, ...) places."""
        return packed if self.places is None else packed.index_select(0, self.places)

    def unpad(self, padded: Tensor) -> Tensor:
        """(G l, ...) places to (n, ...) tokens."""
        return padded if self.tokens is None else padded.index_select(0, self.tokens)


def plan_runs(shapes: Sequence[tuple[int, int]], device: torch.device) -> tuple[Run, ...]:
    """Joins neighbouring groups of suffixes as long as they are small; remembered, as every step asks for the same.

    Args:
        shapes: (G, l) of groups of suffixes of one length, in the order in which they are packed.
        device: where the index tensors go.
    """
    return _plan_runs(tuple(shapes), device)


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _plan_runs(shapes: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Run, ...]:
    # Made anew in every step, each of these tensors would be copied to a GPU that the program then waits for.
    joined: list[list[tuple[int, int]]] = []
    most = MAX_JOINED_TOKENS.get(device.type, MAX_JOINED_TOKENS["cuda"])
    for shape in shapes:
        together = [*joined[-1], shape] if joined else [shape]
        longest = max(length for _, length in together)
        if joined and longest * sum(groups for groups, _ in together) <= most:
            joined[-1] = together
        else:
            joined.append([shape])
    return tuple(_run(groups, device) for groups in joined)


def _run(shapes: Sequence[tuple[int, int]], device: torch.device) -> Run:
    lengths = torch.tensor([length for groups, length in shapes for _ in range(groups)])
    longest, first = int(lengths.max()), lengths.cumsum(0) - lengths
    inside = torch.arange(longest)
    is_token = inside < lengths[:, None]
    places = first[:, None] + inside.minimum(lengths[:, None] - 1)
    padded = not bool(is_token.all())
    infinity = float("-inf")
    return Run(
        num_tokens=int(lengths.sum()),
        places=places.flatten().to(device) if padded else None,
        tokens=is_token.flatten().nonzero().flatten().to(device) if padded else None,
        last=(first + lengths - 1).to(device),
        hidden=torch.full((1, longest, longest), infinity).triu_(1).to(device),
        hidden_from_last=torch.zeros(len(lengths), 1, longest).masked_fill_(~is_token[:, None], infinity).to(device),
    )


def last_tokens(x: Tensor, runs: Sequence[Run]) -> Tensor:
    """The last token of every suffix: packed (n, T) to (sum of G, T)."""
    offset, rows = 0, []
    for run in runs:
        rows.append(run.last + offset)
        offset += run.num_tokens
    return x.index_select(0, torch.cat(rows))


def attend(
    block: Any, x: Tensor, prefix: Run | None, runs: Sequence[Run], known: KeyValue | None
) -> tuple[Tensor, KeyValue | None]:
    """Causal self-attention of all packed tokens of one block, up to its output projection.

    Args:
        block: a default block of open_clip.
        x: (P + n, T) normalised tokens, those of the prefix first where it is not known.
        prefix: the prefix as a run of one; None where `known` is given or the sequences share nothing.
        runs: the suffixes.
        known: keys and values of the prefix, or None.

    Returns:
        (P + n, T) float32, and the prefix's keys and values (None without a prefix).
    """
    heads = block.attn.num_heads
    parts = _in_proj(block, x).split(_sizes(prefix, runs))
    outputs = []
    if prefix is not None:
        q, k, v = _heads_first(parts[0], heads, 3)
        known = (k, v)
        outputs.append(_attend_run(q, k, v, prefix.hidden, None))
    for run, part in zip(runs, parts[-len(runs) :] if runs else (), strict=True):
        q, k, v = _heads_first(run.pad(part), heads, 3)
        outputs.append(run.unpad(_attend_run(q, k, v, run.hidden, known)))
    return torch.cat(outputs), known


def attend_last(
    block: Any, x: Tensor, prefix: Run | None, runs: Sequence[Run], known: KeyValue | None
) -> tuple[Tensor, KeyValue | None]:
    """`attend` with queries from the last token of every suffix alone: (P + n, T) to (sum of G, T)."""
    heads = block.attn.num_heads
    parts = _in_proj(block, x, slice(1, 3)).split(_sizes(prefix, runs))
    if prefix is not None:
        k, v = _heads_first(parts[0], heads, 2)
        known = (k, v)
    if not runs:
        return x[:0], known
    tokens = last_tokens(x if prefix is None else x[prefix.num_tokens :], runs)
    queries = _in_proj(block, tokens, slice(0, 1)).split([len(run.last) for run in runs])
    outputs = []
    for run, query, part in zip(runs, queries, parts[-len(runs) :], strict=True):
        (q,) = _heads_first(query, heads, 1)
        k, v = _heads_first(run.pad(part), heads, 2)
        outputs.append(_attend_run(q, k, v, run.hidden_from_last, known))
    return torch.cat(outputs), known


def finish_block(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    """What follows the attention in a default block: (n, T) residual stream and attention output to (n, T)."""
    x = x + block.ls_1(block.attn.out_proj(attended.to(x.dtype)))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def _sizes(prefix: Run | None, runs: Sequence[Run]) -> list[int]:
    return [run.num_tokens for run in ([prefix] if prefix else []) + list(runs)]


def _in_proj(block: Any, x: Tensor, parts: slice = slice(0, 3)) -> Tensor:
    """Query, key and value of (n, T) tokens side by side, (n, 3 T); `parts` picks some of the three."""
    from adaptclip.clip.attention import PROJECTIONS, SplitAttention

    attn = block.attn
    if isinstance(attn, SplitAttention):
        return project([getattr(attn, name) for name in PROJECTIONS[parts]], x)
    width = x.shape[-1]
    rows = slice(parts.start * width, parts.stop * width)
    bias = attn.in_proj_bias
    return F.linear(x, attn.in_proj_weight[rows], None if bias is None else bias[rows])


def _heads_first(packed: Tensor, heads: int, parts: int) -> tuple[Tensor, ...]:
    """Splits (n, parts T) projections into tensors (heads, n, T / heads) in float32, each in memory order."""
    split = packed.float().unflatten(-1, (parts, heads, -1)).permute(1, 2, 0, 3)
    return split.contiguous().unbind(0)


def _attend_run(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, known: KeyValue | None) -> Tensor:
    """Attention of G sequences of l tokens to themselves and, before that, to a prefix they share.

    The two kinds of scores are computed apart and share one softmax, so the prefix is never copied per class: its part
    is one matrix product per head over the tokens of all classes. It is done in float32 whatever the autocast: scores
    are few, and half precision hurts them.

    Args:
        q: (heads, G m, w) queries of the last m tokens of each sequence.
        k: (heads, G l, w) keys.
        v: (heads, G l, w) values.
        hidden: (1 or G, m, l) additive mask of the sequences.
        known: keys and values of the prefix, or None.

    Returns:
        (G m, heads w) float32.
    """
    heads, rows, head_width = q.shape
    _, num_queries, length = hidden.shape
    groups, scale = k.shape[1] // length, head_width**-0.5
    with torch.autocast(device_type=q.device.type, enabled=False):
        own_q, own_k, own_v = (t.view(heads * groups, -1, head_width) for t in (q, k, v))
        mask = hidden.expand(heads, groups, -1, -1).reshape(heads * groups, num_queries, length)
        scores = torch.baddbmm(mask, own_q, own_k.mT, alpha=scale)
        if known is None:
            out = scores.softmax(-1) @ own_v
        else:
            keys, values = known
            size = keys.shape[1]
            to_prefix = (q @ (keys * scale).mT).view(heads * groups, num_queries, size)
            weights = torch.cat([to_prefix, scores], dim=-1).softmax(-1)
            from_prefix = weights[..., :size].view(heads, rows, size) @ values
            out = torch.baddbmm(from_prefix.view_as(own_q), weights[..., size:], own_v)
        return out.view(heads, rows, head_width).transpose(0, 1).reshape(rows, heads * head_width)
