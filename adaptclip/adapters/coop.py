"""CoOp: the context words of the prompt are learnt, CLIP stays frozen; with KgCoOp's regulariser as an option."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptclip.adapters.base import batch_features, check_state, scaled_logits
from adaptclip.adapters.sharding import encode_within_budget, gather_rows, process_share, split_by_cost
from adaptclip.backbone import ClipBackbone
from adaptclip.errors import ConfigError
from adaptclip.prompts import clean_class_name, fill, zero_shot_weights
from adaptclip.seeding import generator
from adaptclip.types import Batch

DEFAULT_MEMORY_BUDGET_BYTES = 4 * 2**30
"""Activations of the text tower that a step may keep; beyond it, classes are computed twice."""

CHUNK_TOKENS = {"cpu": 1024, "cuda": 32768}
"""Most tokens worked on together: on a CPU few, so that the activations in use stay in its cache."""


@dataclass(frozen=True)
class _Share:
    """The classes one process encodes, cut into chunks of prompts of few different lengths.

    Attributes:
        chunks: per chunk, the token ids (G, l) of its suffixes, one tensor per length.
        costs_bytes: per chunk, the activations its backward pass keeps.
        counts: classes of every process.
        inverse: (C,) position of each class among the rows of all processes.
    """

    chunks: tuple[tuple[Tensor, ...], ...]
    costs_bytes: tuple[int, ...]
    counts: tuple[int, ...]
    inverse: Tensor


@dataclass(frozen=True)
class _Encoded:
    """Text features kept for evaluation, with the context and the autocast they belong to."""

    context: Tensor
    autocast: bool
    features: Tensor


class CoOp(nn.Module):
    """Context optimisation (Zhou et al. 2022, arXiv:2109.01134) with a shared context and the class name at the end.

    The prompt of a class is `SOS ctx_1 … ctx_M name . EOT`; only the M context vectors learn, the logit scale is
    frozen. The text features come from the exact shared-prefix path of the tower where it has one
    (`adaptclip.backbone.text`). In training, the classes are shared out over the processes; wrap the module in
    DistributedDataParallel (Accelerate's `prepare`), whose averaged gradient is then that of all classes. In evaluation
    without gradients, the text features are computed once and kept until the context changes.

    Args:
        backbone: frozen CLIP with a text tower whose prompts can be learnt.
        class_names: C names in the order of the label ids.
        n_ctx: M, number of context vectors drawn from N(0, 0.02²); ignored where `ctx_init` gives words.
        ctx_init: words to start from, for example "a photo of a"; M is then their number of tokens.
        templates: prompts of the features that KgCoOp keeps near to.
        kg_weight: weight of KgCoOp's penalty (Yao et al. 2023, eq. 5; the paper uses 8); 0 is plain CoOp.
        seed: chooses the initial context.
        memory_budget_bytes: most bytes of activations kept for the backward pass; beyond it, the classes that do not
            fit are computed a second time during the backward pass. The gradients are the same.
        fast: takes the shared-prefix path where the tower has it; False always encodes whole prompts.
        shard_classes: shares the classes out over the processes in training.

    Raises:
        ConfigError: a class name does not fit behind the context, or a setting is out of range.
        DataError: a class name has no words.
        BackboneError: the backbone's text tower is of a kind whose prompts cannot be learnt, or a template of KgCoOp
            is longer than its context.
    """

    consumes: Literal["features", "pixels"] = "features"

    def __init__(
        self,
        backbone: ClipBackbone,
        class_names: Sequence[str],
        *,
        n_ctx: int = 16,
        ctx_init: str = "",
        templates: Sequence[str] = ("a photo of a {}.",),
        kg_weight: float = 0.0,
        seed: int = 0,
        memory_budget_bytes: int = DEFAULT_MEMORY_BUDGET_BYTES,
        fast: bool = True,
        shard_classes: bool = True,
    ) -> None:
        super().__init__()
        if not class_names:
            raise ConfigError("CoOp needs at least one class name, got none")
        if kg_weight < 0 or memory_budget_bytes <= 0:
            raise ConfigError(
                f"kg_weight must be at least 0 and memory_budget_bytes positive, got {kg_weight}, {memory_budget_bytes}"
            )
        if kg_weight:
            # The features are computed when training starts; that the prompts fit is better known now.
            backbone.tokenize([prompt for prompts in fill(templates, class_names) for prompt in prompts])
        self.backbone = backbone
        self.class_names = tuple(class_names)
        self.ctx_init, self.templates, self.kg_weight, self.seed = ctx_init, tuple(templates), float(kg_weight), seed
        self.memory_budget_bytes, self.shard_classes = memory_budget_bytes, shard_classes
        self.tower = backbone.text
        self.fast = fast and self.tower.supports_prefix
        self.context = nn.Parameter(self._initial_context(n_ctx))
        self._suffixes = self._suffix_ids()
        self._shares: dict[tuple[int, int, torch.device], _Share] = {}
        self._penalty: Tensor | None = None
        self._anchor: Tensor | None = None
        self._cached: _Encoded | None = None

    @property
    def encoder(self) -> ClipBackbone:
        """The backbone."""
        return self.backbone

    @property
    def settings(self) -> dict[str, Any]:
        """JSON-able keyword arguments that build the same adapter again, beside backbone and class names."""
        return {
            "n_ctx": len(self.context),
            "ctx_init": self.ctx_init,
            "templates": list(self.templates),
            "kg_weight": self.kg_weight,
            "seed": self.seed,
        }

    def forward(self, batch: Batch) -> Tensor:
        """Returns (B, C) logits of a batch of image features, and computes what `penalty` returns."""
        features = batch_features(batch, self.backbone.embed_dim)
        self._penalty = None
        if not self.training and not torch.is_grad_enabled():
            return scaled_logits(features, self.class_weights(), self.backbone.logit_scale)
        self._cached = None
        text = self.text_features()
        if self.kg_weight:
            self._penalty = self.kg_weight * (1 - (text * self._template_features()).sum(-1)).mean()
        return scaled_logits(features, text, self.backbone.logit_scale)

    def text_features(self) -> Tensor:
        """Encodes the prompts of all classes with the present context to (C, D) unit-norm float32 features."""
        # Evaluation may run on one process alone, where waiting for the others would never end.
        rank, world = process_share() if self.training and self.shard_classes else (0, 1)
        if world > len(self.class_names):
            rank, world = 0, 1
        share = self._share(rank, world)
        device = self.context.device
        start = self.tower.embed_tokens(torch.tensor(self.tower.start_ids, dtype=torch.long, device=device))
        prefix = torch.cat([start, self.context])
        # A single chunk takes its prefix along; several share one.
        state = self.tower.encode_prefix(prefix) if self.fast and len(share.chunks) > 1 else None

        def encode(chunk: int) -> Tensor:
            suffixes = [self.tower.embed_tokens(ids) for ids in share.chunks[chunk]]
            if state is not None:
                return self.tower.encode_suffixes(state, suffixes)
            if self.fast:
                return self.tower.encode_packed(prefix, suffixes)
            return torch.cat([self._encode_whole(prefix, suffix) for suffix in suffixes])

        rows = encode_within_budget(encode, share.costs_bytes, self.memory_budget_bytes)
        rows = F.normalize(rows.float(), dim=-1)
        if world > 1:
            rows = gather_rows(rows, share.counts, rank)
        return rows.index_select(0, share.inverse)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Returns the context."""
        return [self.context]

    def adapter_state(self) -> dict[str, Tensor]:
        """Returns the (M, T) context."""
        return {"context": self.context.detach()}

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes over a context. Raises ArtifactError when it does not fit."""
        check_state(state, {"context": self.context.shape}, "CoOp")
        with torch.no_grad():
            self.context.copy_(state["context"])

    def penalty(self) -> Tensor:
        """Returns KgCoOp's weighted penalty of the last forward in training; 0 without it."""
        return self.context.new_zeros(()) if self._penalty is None else self._penalty

    def class_weights(self) -> Tensor:
        """Returns (C, D) unit-norm text features without gradients, computed again only when the context changed."""
        # Compared by value: fused optimizers change a parameter without raising its version counter.
        autocast = torch.is_autocast_enabled(self.context.device.type)
        known = self._cached
        if known is None or known.autocast != autocast or not _same(known.context, self.context):
            was_training = self.training
            self.training = False
            try:
                with torch.no_grad():
                    known = _Encoded(self.context.detach().clone(), autocast, self.text_features())
            finally:
                self.training = was_training
            self._cached = known
        return known.features

    def _initial_context(self, n_ctx: int) -> Tensor:
        """(M, T) float32: the embeddings of `ctx_init`'s words, or N(0, 0.02²) drawn on the CPU from the seed."""
        if self.ctx_init.strip():
            (ids,) = self.tower.word_ids([self.ctx_init.replace("_", " ").strip()])
            if not ids:
                raise ConfigError(f"ctx_init {self.ctx_init!r} has no tokens; give words such as 'a photo of a'")
            device = next(self.backbone.parameters()).device
            with torch.no_grad():
                return self.tower.embed_tokens(torch.tensor(ids, device=device)).float().clone()
        if n_ctx < 1:
            raise ConfigError(f"n_ctx must be at least 1, got {n_ctx}; the paper uses 16 (or 4)")
        context = torch.empty(n_ctx, self.tower.width).normal_(std=0.02, generator=generator(self.seed, "context"))
        return context.to(next(self.backbone.parameters()).device)

    def _suffix_ids(self) -> list[list[int]]:
        """Token ids `name . EOT` of every class, checked to fit behind the context."""
        words = self.tower.word_ids([f"{clean_class_name(name)}." for name in self.class_names])
        suffixes = [[*ids, *self.tower.end_ids] for ids in words]
        longest = max(range(len(suffixes)), key=lambda c: len(suffixes[c]))
        room = self.tower.context_length - len(self.tower.start_ids) - len(suffixes[longest])
        if room < len(self.context):
            name = textwrap.shorten(self.class_names[longest], 80, placeholder=" …")
            remedy = f"At most {room} context tokens (n_ctx) would fit; or give" if room > 0 else "Give"
            raise ConfigError(
                f"class {name!r} takes {len(words[longest])} tokens (with the full stop) and does not fit behind "
                f"{len(self.context)} context tokens in a text tower of {self.tower.context_length} tokens. "
                f"{remedy} the class a shorter name (an alias in the data card)."
            )
        return suffixes

    @torch.inference_mode(False)
    def _share(self, rank: int, world: int) -> _Share:
        """The classes of process `rank` of `world`: dealt out in order of length, so that all have equal work."""
        key = (rank, world, self.context.device)
        if key not in self._shares:
            order = sorted(range(len(self._suffixes)), key=lambda c: len(self._suffixes[c]))
            dealt = [order[r::world] for r in range(world)]
            own = dealt[rank]
            start = len(self.tower.start_ids) + len(self.context)
            costs = [self._cost_bytes(len(self._suffixes[c]), start) for c in own]
            limit = CHUNK_TOKENS.get(self.context.device.type, CHUNK_TOKENS["cuda"])
            limit_bytes = min(limit * self.tower.activation_bytes(1, start), self.memory_budget_bytes)
            runs = split_by_cost(costs, limit_bytes)
            inverse = torch.empty(len(order), dtype=torch.long)
            inverse[torch.tensor([c for part in dealt for c in part])] = torch.arange(len(order))
            self._shares[key] = _Share(
                chunks=tuple(self._by_length([own[i] for i in run]) for run in runs),
                costs_bytes=tuple(sum(costs[run.start : run.stop]) for run in runs),
                counts=tuple(len(part) for part in dealt),
                inverse=inverse.to(self.context.device),
            )
        return self._shares[key]

    def _cost_bytes(self, length: int, start: int) -> int:
        """Activations that the backward pass keeps of one class with a suffix of `length` tokens."""
        tokens = length if self.fast else start + length
        return self.tower.activation_bytes(tokens, start + length)

    def _by_length(self, classes: Sequence[int]) -> tuple[Tensor, ...]:
        """Token ids (G, l) of classes sorted by suffix length, one tensor per length."""
        groups: dict[int, list[list[int]]] = {}
        for c in classes:
            groups.setdefault(len(self._suffixes[c]), []).append(self._suffixes[c])
        return tuple(torch.tensor(ids, device=self.context.device) for ids in groups.values())

    def _encode_whole(self, prefix: Tensor, suffix: Tensor) -> Tensor:
        """Plain path: (P, T) prefix and (G, l, T) suffixes to (G, D), each prompt whole up to its EOT."""
        whole = torch.cat([prefix.expand(len(suffix), -1, -1), suffix.to(prefix.dtype)], dim=1)
        eot = torch.full((len(whole),), whole.shape[1] - 1, device=whole.device)
        return self.tower.encode_embeddings(whole, eot)

    def _template_features(self) -> Tensor:
        """(C, D) unit-norm features of the fixed templates, computed once, in full precision."""
        if self._anchor is None or self._anchor.device != self.context.device:
            device_type = self.context.device.type
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(device_type=device_type, enabled=False):
                self._anchor = zero_shot_weights(self.backbone, self.class_names, self.templates).detach()
        return self._anchor


def _same(first: Tensor, second: Tensor) -> bool:
    return first.device == second.device and torch.equal(first, second)
