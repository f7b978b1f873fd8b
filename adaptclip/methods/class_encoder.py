# SPDX-License-Identifier: Apache-2.0
"""Text features of many classes whose prompts begin alike, within a memory budget and shared out over processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from adaptclip.clip.packed import PrefixState
from adaptclip.clip.text import TextTower, make_text_tower, shares_prefix
from adaptclip.errors import ConfigError
from adaptclip.progress import progress_bar
from adaptclip.prompts import class_tokens, fill, zero_shot_weights

if TYPE_CHECKING:
    from adaptclip.clip import ClipBackbone


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
        chunks = progress_bar(range(len(costs_bytes)), desc="Encoding classes", leave=False, delay=2)
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


DEFAULT_MEMORY_BUDGET_BYTES = 4 * 2**30
"""Activations of the text tower that a step may keep; beyond it, classes are computed twice."""

CHUNK_TOKENS = {"cpu": 1024, "cuda": 32768}
"""Most tokens worked on together: on a CPU few, so that the activations in use stay in its cache."""

Embed = Callable[[Tensor, Tensor], Tensor]
"""(G,) class numbers and (G, l) token ids of their suffixes to (G, l + inserted, T) embeddings."""


@dataclass(frozen=True)
class Group:
    """G classes whose suffixes have the same length.

    Attributes:
        classes: (G,) int64 class numbers.
        ids: (G, l) int64 token ids of their suffixes.
    """

    classes: Tensor
    ids: Tensor


@dataclass(frozen=True)
class Plan:
    """The classes one process encodes, cut into chunks of prompts of few different lengths.

    Attributes:
        chunks: the groups of each chunk.
        costs_bytes: per chunk, the activations its backward pass keeps.
        counts: classes of every process.
        inverse: (C,) position of each class among the rows of all processes.
    """

    chunks: tuple[tuple[Group, ...], ...]
    costs_bytes: tuple[int, ...]
    counts: tuple[int, ...]
    inverse: Tensor


class ClassEncoder:
    """Encodes the prompts `prefix suffix_c` of C classes in chunks, on one process or shared out over several.

    Where the tower has it, the exact shared-prefix path is taken (`adaptclip.clip.text`), elsewhere whole prompts
    at the shortest length that is exact for the tower. It holds no weights and follows the tower, whatever becomes of
    it.

    Args:
        tower: text tower that encodes.
        suffixes: token ids of each class after the prefix, the end token last.
        prefix_length: P, number of embeddings before the suffixes; with 0 the prompts share nothing.
        num_inserted: embeddings that `embed` adds to the tokens of every suffix.
        fast: takes the shared-prefix path where the tower has it; False always encodes whole prompts.
        memory_budget_bytes: most bytes of activations kept for the backward pass; beyond it, the classes that do not
            fit are computed a second time during the backward pass. The gradients are the same.
        shard_classes: False lets every process encode all classes, whatever `encode` is told.

    Raises:
        ConfigError: there are no classes, or the budget is not positive.
    """

    def __init__(
        self,
        tower: TextTower,
        suffixes: Sequence[Sequence[int]],
        *,
        prefix_length: int,
        num_inserted: int = 0,
        fast: bool = True,
        memory_budget_bytes: int = DEFAULT_MEMORY_BUDGET_BYTES,
        shard_classes: bool = True,
    ) -> None:
        if not suffixes:
            raise ConfigError("encoding classes needs at least one prompt, got none")
        if memory_budget_bytes <= 0:
            raise ConfigError(f"memory_budget_bytes must be positive, got {memory_budget_bytes}")
        self.tower = tower
        self.prefix_length, self.num_inserted = prefix_length, num_inserted
        self._shared = tower if fast and shares_prefix(tower) else None
        self.memory_budget_bytes, self.shard_classes = memory_budget_bytes, shard_classes
        self._suffixes = tuple(tuple(ids) for ids in suffixes)
        self._plans: dict[tuple[int, int, torch.device], Plan] = {}

    def encode(
        self, prefix: Tensor, *, embed: Embed | None = None, share: bool = False, preserve_rng_state: bool = False
    ) -> Tensor:
        """Encodes all classes behind one prefix.

        Args:
            prefix: (P, T) embeddings without positions, on the device to work on.
            embed: embeddings of a group's suffixes, (G,) classes and (G, l) ids to (G, l + num_inserted, T); None
                takes the tower's token embeddings.
            share: shares the classes out over the processes, all of which must call. The result is the same on each,
                and gradients of parameters, averaged over the processes, are those of all classes.
            preserve_rng_state: whether a chunk that is computed a second time must draw the same random numbers again,
                as dropout in the tower needs.

        Returns:
            (C, D) unit-norm float32 text features.

        Raises:
            ConfigError: the prefix has another length than `prefix_length`.
            BackboneError: a prompt is longer than the tower's context.
        """
        rank, world = process_share() if share and self.shard_classes else (0, 1)
        if world > len(self._suffixes):
            rank, world = 0, 1
        plan = self.plan(rank, world, prefix.device)
        rows = self._rows(plan, prefix[None], embed, preserve_rng_state)
        if world > 1:
            rows = gather_rows(rows, plan.counts, rank)
        return rows.index_select(0, plan.inverse)

    def encode_each(self, prefixes: Tensor, *, embed: Embed | None = None, preserve_rng_state: bool = False) -> Tensor:
        """Encodes all classes behind each of B prefixes, which share one memory budget.

        Args:
            prefixes: (B, P, T) embeddings; for the rest see `encode`.
            embed: as in `encode`.
            preserve_rng_state: as in `encode`.

        Returns:
            (B, C, D) unit-norm float32 text features.

        Raises:
            ConfigError: the prefixes have another length than `prefix_length`.
            BackboneError: a prompt is longer than the tower's context.
        """
        plan = self.plan(0, 1, prefixes.device)
        rows = self._rows(plan, prefixes, embed, preserve_rng_state)
        return rows.unflatten(0, (len(prefixes), -1)).index_select(1, plan.inverse)

    def _rows(self, plan: Plan, prefixes: Tensor, embed: Embed | None, preserve_rng_state: bool) -> Tensor:
        """(B, P, T) prefixes to (B · classes of the plan, D) features, in the plan's order within each prefix."""
        if prefixes.shape[1] != self.prefix_length:
            raise ConfigError(f"the prefix should have {self.prefix_length} embeddings, got {prefixes.shape[1]}")
        num_chunks = len(plan.chunks)
        # A single chunk takes its prefix along; several share one.
        shared, states = self._shared, list[PrefixState]()
        if shared is not None and num_chunks > 1 and self.prefix_length:
            states = [shared.encode_prefix(prefix) for prefix in prefixes]

        def encode(number: int) -> Tensor:
            i, chunk = divmod(number, num_chunks)
            suffixes = [self._embedded(group, embed) for group in plan.chunks[chunk]]
            if shared is None:
                return self._encode_whole(prefixes[i], suffixes)
            return (
                shared.encode_suffixes(states[i], suffixes) if states else shared.encode_packed(prefixes[i], suffixes)
            )

        costs = plan.costs_bytes * len(prefixes)
        rows = encode_within_budget(encode, costs, self.memory_budget_bytes, preserve_rng_state=preserve_rng_state)
        return F.normalize(rows.float(), dim=-1)

    def _embedded(self, group: Group, embed: Embed | None) -> Tensor:
        """(G, l + inserted, T) embeddings of a group's suffixes."""
        return self.tower.embed_tokens(group.ids) if embed is None else embed(group.classes, group.ids)

    def _encode_whole(self, prefix: Tensor, suffixes: Sequence[Tensor]) -> Tensor:
        """Plain path: (P, T) prefix and tensors (G, l, T) to (sum of G, D), all prompts side by side."""
        lengths = [len(prefix) + suffix.shape[1] for suffix in suffixes]
        whole, ends = [], []
        for own, length in zip(suffixes, lengths, strict=True):
            prompts = torch.cat([prefix.expand(len(own), -1, -1), own.to(prefix.dtype)], dim=1)
            # Behind its end token a prompt may hold anything; here zeros, up to the longest.
            whole.append(F.pad(prompts, (0, 0, 0, max(lengths) - length)))
            ends.append(torch.full((len(own),), length - 1, device=own.device))
        return self.tower.encode_embeddings(torch.cat(whole), torch.cat(ends))

    @torch.inference_mode(False)
    def plan(self, rank: int, world: int, device: torch.device) -> Plan:
        """Returns the classes of process `rank` of `world`: dealt out by length, so that all have equal work."""
        key = (rank, world, device)
        if key not in self._plans:
            order = sorted(range(len(self._suffixes)), key=lambda c: len(self._suffixes[c]))
            dealt = [order[r::world] for r in range(world)]
            own = dealt[rank]
            costs = [self._cost_bytes(len(self._suffixes[c])) for c in own]
            limit = CHUNK_TOKENS.get(device.type, CHUNK_TOKENS["cuda"])
            limit_bytes = min(limit * self.tower.activation_bytes(1, self.prefix_length), self.memory_budget_bytes)
            runs = split_by_cost(costs, limit_bytes)
            inverse = torch.empty(len(order), dtype=torch.long)
            inverse[torch.tensor([c for part in dealt for c in part])] = torch.arange(len(order))
            self._plans[key] = Plan(
                chunks=tuple(self._by_length([own[i] for i in run], device) for run in runs),
                costs_bytes=tuple(sum(costs[run.start : run.stop]) for run in runs),
                counts=tuple(len(part) for part in dealt),
                inverse=inverse.to(device),
            )
        return self._plans[key]

    def _cost_bytes(self, length: int) -> int:
        """Activations that the backward pass keeps of one class with a suffix of `length` tokens."""
        own = length + self.num_inserted
        whole = self.tower.computed_length(self.prefix_length + own)
        return self.tower.activation_bytes(whole if self._shared is None else own, whole)

    def _by_length(self, classes: Sequence[int], device: torch.device) -> tuple[Group, ...]:
        """Classes sorted by suffix length, one group per length."""
        groups: dict[int, list[int]] = {}
        for c in classes:
            groups.setdefault(len(self._suffixes[c]), []).append(c)
        return tuple(
            Group(torch.tensor(own, device=device), torch.tensor([self._suffixes[c] for c in own], device=device))
            for own in groups.values()
        )


class ClassPrompts:
    """Token ids of C classes' prompts, each up to its EOT, and the text features that a tower makes of them.

    Args:
        backbone: gives tokenizer and kind of text tower.
        class_names: C names.
        templates: prompts with one `{}`; their unit-norm features are averaged.
        memory_budget_bytes: see `ClassEncoder`.
        fast: prompts share the tokens that they all begin with, where the tower can; exact.

    Raises:
        ConfigError: a template is not valid.
        BackboneError: a prompt is too long.
    """

    def __init__(
        self,
        backbone: ClipBackbone,
        class_names: Sequence[str],
        templates: Sequence[str],
        *,
        memory_budget_bytes: int = DEFAULT_MEMORY_BUDGET_BYTES,
        fast: bool = True,
    ) -> None:
        self._prompts = [prompt for prompts in fill(templates, class_names) for prompt in prompts]
        class_tokens(backbone, class_names, templates)  # a prompt that is too long is better known now
        self._backbone, self._num_classes, self._num_templates = backbone, len(class_names), len(templates)
        self._memory_budget_bytes, self._fast = memory_budget_bytes, fast
        self._names, self._templates = tuple(class_names), tuple(templates)
        self._frozen: Tensor | None = None

    @cached_property
    def _ids(self) -> list[list[int]]:
        tower = make_text_tower(self._backbone.model, self._backbone.tokenizer)
        return [[*tower.start_ids, *ids, *tower.end_ids] for ids in tower.word_ids(self._prompts)]

    def frozen(self) -> Tensor:
        """Returns (C, D) unit-norm features by the backbone's own text tower, made once, in full precision."""
        device = self._backbone.device
        if self._frozen is None or self._frozen.device != device:
            # The first call may stand under the autocast of training, and evaluation is in full precision.
            with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
                self._frozen = zero_shot_weights(self._backbone, self._names, self._templates)
        return self._frozen

    def encoder(self, model: nn.Module, *, share_prefix: bool = True) -> ClassEncoder:
        """Returns what encodes the prompts by a model's text tower; with dropout in it, prompts must share nothing."""
        tower, common = make_text_tower(model, self._backbone.tokenizer), 0
        if share_prefix and tower.supports_prefix and self._fast:
            shortest = min(map(len, self._ids))
            while common < shortest - 1 and len({row[common] for row in self._ids}) == 1:
                common += 1
        return ClassEncoder(
            tower, [row[common:] for row in self._ids], prefix_length=common, fast=self._fast,
            memory_budget_bytes=self._memory_budget_bytes,
        )  # fmt: skip

    def features(
        self, encoder: ClassEncoder, device: torch.device, *, share: bool = False, preserve_rng_state: bool = False
    ) -> Tensor:
        """Returns (C, D) unit-norm features of the classes, the mean over the templates; see `ClassEncoder.encode`."""
        ids = torch.tensor(self._ids[0][: encoder.prefix_length], dtype=torch.long, device=device)
        prefix = encoder.tower.embed_tokens(ids)
        features = encoder.encode(prefix, share=share, preserve_rng_state=preserve_rng_state)
        if self._num_templates == 1:
            return features
        return F.normalize(features.unflatten(0, (self._num_classes, -1)).mean(dim=1), dim=-1)
