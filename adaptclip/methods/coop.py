# SPDX-License-Identifier: Apache-2.0
"""CoOp: the context words of the prompt are learnt, CLIP stays frozen; with KgCoOp's regulariser as an option."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adaptclip.errors import ConfigError, did_you_mean
from adaptclip.methods.base import ClassBias, batch_features, check_state, scaled_logits
from adaptclip.methods.class_encoder import DEFAULT_MEMORY_BUDGET_BYTES, ClassEncoder
from adaptclip.methods.method import Method, Schedule, Variant
from adaptclip.prompts import class_tokens, clean_class_name, tell_of_names, zero_shot_weights
from adaptclip.seeding import generator
from adaptclip.training.criterion import ObjectiveName, check_objective

if TYPE_CHECKING:
    from adaptclip.clip import ClipBackbone
    from adaptclip.clip.text import TextTower
    from adaptclip.training.support import Loop, Support
    from adaptclip.types import Batch, Features

POSITIONS = ("end", "middle", "front")
"""Where the class name may stand among the context words."""


@dataclass(frozen=True)
class _Encoded:
    """Text features kept for evaluation, with the context and the autocast they belong to."""

    context: Tensor
    autocast: bool
    features: Tensor


def published_length(shots: int, *, kg_weight: float = 0.0) -> tuple[int, int]:
    """Returns the epochs and the batch size of the papers.

    CoOp: 50 epochs at 1 shot (or for all images, as on ImageNet), 100 up to 4, 200 above, in batches of 32. KgCoOp,
    which a `kg_weight` above 0 is: 100 epochs in batches of 128, whatever the shots.
    """
    if kg_weight:
        return 100, 128
    return (50 if shots in (0, 1) else 100 if shots <= 4 else 200), 32


@dataclass(frozen=True)
class CoOpSchedule(Schedule):
    """How CoOp (Zhou et al. 2022, sec. 4.1) and KgCoOp (Yao et al. 2023, sec. 4) learn.

    By SGD with momentum 0.9 and weight decay 5e-4, a first epoch at 1e-5 and a cosine per epoch.

    Attributes:
        epochs: passes over the training images; for the published ones see `published_length`.
        views: sets of random crops, taken in turn; None makes fresh ones for every epoch, as published.
        lr: peak learning rate.
        batch_size: images per process and step.
    """

    epochs: int = 200
    views: int | None = None
    lr: float = 2e-3
    batch_size: int = 32


def learn_prompts(method: Method, support: Support, features: Features, schedule: Any, loop: Loop) -> dict[str, Any]:
    """Trains prompts as CoOp and CoCoOp do: SGD, a first epoch at 1e-5, a cosine per epoch."""
    training = support.training_by_epochs(method, schedule, features)
    loop(training)
    return {
        "schedule": f"{training.num_steps} steps ({schedule.epochs} epochs) of SGD, learning rate {schedule.lr:g}, "
        f"cosine per epoch, over {len(features.values)} sets of crops"
    }


class CoOp(Method):
    """Context optimisation (Zhou et al. 2022, arXiv:2109.01134, sec. 3.2).

    Only the M context vectors learn, the logit scale is frozen. The prompt of a class is one of

        end     SOS ctx_1 … ctx_M name . EOT
        middle  SOS ctx_1 … ctx_m name ctx_m+1 … ctx_M . EOT, m = floor(M / 2)
        front   SOS name ctx_1 … ctx_M . EOT

    with one context for all classes, or one for each (class-specific, CSC in the paper). What all prompts begin with is
    computed once, by the exact shared-prefix path of the tower where it has one (`adaptclip.clip.text`): all the
    context where it is shared and stands before the name, SOS alone where it differs between classes. In training, the
    classes are shared out over the processes; wrap the module in DistributedDataParallel (Accelerate's `prepare`),
    whose averaged gradient is then that of all classes. In evaluation without gradients, the text features are computed
    once and kept until the context changes.

    Args:
        backbone: frozen CLIP with a text tower whose prompts can be learnt.
        class_names: C names in the order of the label ids.
        n_ctx: M, number of context vectors drawn from N(0, 0.02²); ignored where `ctx_init` gives words.
        ctx_init: words to start from, for example "a photo of a"; M is then their number of tokens.
        class_specific: learns a context of its own for every class, drawn apart or each starting from the same words.
        position: where the class name stands: "end", "middle" or "front".
        templates: prompts of the features that KgCoOp keeps near to.
        kg_weight: weight of KgCoOp's penalty (Yao et al. 2023, eq. 5; the paper uses 8); 0 is plain CoOp.
        objective: "sigmoid" learns a bias for each class beside the context, see `ClassBias`.
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

    name = "coop"
    variants = {
        "coop": Variant(10, ladder=True, search={"lr": (5e-4, 2e-2), "n_ctx": [4, 8, 16]}),
        "kgcoop": Variant(
            11, defaults={"n_ctx": 4, "ctx_init": "a photo of a", "kg_weight": 8.0},
            search={"lr": (5e-4, 2e-2), "kg_weight": (1.0, 32.0)},
        ),
    }  # fmt: skip
    schedule_type = CoOpSchedule
    smoke = {"epochs": 50, "views": 5}
    learns_by_steps = True
    takes_new_names = True

    def __init__(
        self,
        backbone: ClipBackbone,
        class_names: Sequence[str],
        *,
        n_ctx: int = 16,
        ctx_init: str = "",
        class_specific: bool = False,
        position: str = "end",
        templates: Sequence[str] = ("a photo of a {}.",),
        kg_weight: float = 0.0,
        objective: ObjectiveName = "softmax",
        seed: int = 0,
        memory_budget_bytes: int = DEFAULT_MEMORY_BUDGET_BYTES,
        fast: bool = True,
        shard_classes: bool = True,
    ) -> None:
        super().__init__()
        class_names = self._sit_on(backbone, class_names)
        if kg_weight < 0 or memory_budget_bytes <= 0:
            raise ConfigError(
                f"kg_weight must be at least 0 and memory_budget_bytes positive, got {kg_weight}, {memory_budget_bytes}"
            )
        if position not in POSITIONS:
            raise ConfigError(f"unknown position {position!r} of the class name. {did_you_mean(position, POSITIONS)}")
        check_objective(objective)
        tell_of_names(backbone, class_names)
        if kg_weight:
            # The features are computed when training starts; that the prompts fit is better known now.
            class_tokens(backbone, class_names, templates)
        self.ctx_init, self.templates, self.kg_weight, self.seed = ctx_init, tuple(templates), float(kg_weight), seed
        self.class_specific, self.position = class_specific, position
        self.tower = backbone.text
        copies = len(class_names) if class_specific else None
        self.context = nn.Parameter(initial_context(backbone, n_ctx, ctx_init, seed, copies=copies))
        self.n_ctx = self.context.shape[-2]
        self.objective: ObjectiveName = objective
        self.bias = ClassBias(backbone, len(class_names)) if objective == "sigmoid" else None
        self._num_before = {"end": self.n_ctx, "middle": self.n_ctx // 2, "front": 0}[position]
        self._num_shared = 0 if class_specific else self._num_before
        suffixes, self._num_tail = suffix_ids(
            self.tower, class_names, self.n_ctx, apart=position != "end", after="" if position == "front" else "a "
        )
        self._classes = ClassEncoder(
            self.tower, suffixes, prefix_length=len(self.tower.start_ids) + self._num_shared,
            num_inserted=self.n_ctx - self._num_shared, fast=fast, memory_budget_bytes=memory_budget_bytes,
            shard_classes=shard_classes,
        )  # fmt: skip
        self._penalty: Tensor | None = None
        self._anchor: Tensor | None = None
        self._cached: _Encoded | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """JSON-able keyword arguments that build the same adapter again, beside backbone and class names."""
        return {
            "n_ctx": self.n_ctx,
            "ctx_init": self.ctx_init,
            "class_specific": self.class_specific,
            "position": self.position,
            "templates": list(self.templates),
            "kg_weight": self.kg_weight,
            "seed": self.seed,
            **({"objective": self.objective} if self.bias is not None else {}),
        }

    def forward(self, batch: Batch) -> Tensor:
        """Returns (B, C) logits of a batch of image features, and computes what `penalty` returns."""
        features = batch_features(batch, self.backbone.embed_dim)
        self._penalty = None
        bias = None if self.bias is None else self.bias()
        if not self.training and not torch.is_grad_enabled():
            return scaled_logits(features, self.class_weights(), self.backbone.logit_scale, bias)
        self._cached = None
        text = self.text_features()
        if self.kg_weight:
            self._penalty = self.kg_weight * (1 - (text * self._template_features()).sum(-1)).mean()
        return scaled_logits(features, text, self.backbone.logit_scale, bias)

    def class_bias(self) -> Tensor | None:
        """Returns the (C,) bias of the sigmoid objective without gradients; None under softmax."""
        return None if self.bias is None else self.bias().detach()

    def published(self, shots: int, images_per_class: int) -> CoOpSchedule:
        """Returns the papers' lengths for k shots, KgCoOp's where `kg_weight` is above 0."""
        epochs, batch_size = published_length(shots, kg_weight=self.kg_weight)
        return CoOpSchedule(epochs=epochs, batch_size=batch_size)

    def _learn(self, support: Support, schedule: CoOpSchedule, loop: Loop) -> dict[str, Any]:
        features = support.crops(schedule)
        self.begin(features)
        return learn_prompts(self, support, features, schedule, loop)

    def for_classes(self, class_names: Sequence[str], templates: Sequence[str] | None = None) -> CoOp:
        """Returns the learnt context around other names.

        Raises:
            ConfigError: every class has learnt a context of its own, or the objective has a bias for each.
        """
        if self.class_specific or self.bias is not None:
            self._lacks("has learnt a context or a bias for each class, and has none for others")
        moved = CoOp(self.backbone, class_names, **self.settings, shard_classes=False)
        moved.load_adapter_state(self.adapter_state())
        return moved

    def begin(self, features: Features) -> None:
        """Sets where the bias of the sigmoid objective starts, from training images; softmax has nothing to set."""
        if self.bias is not None:
            self.bias.begin(features, self.class_weights(), self.backbone.logit_scale)

    def text_features(self) -> Tensor:
        """Encodes the prompts of all classes with the present context to (C, D) unit-norm float32 features."""
        prefix = self.tower.embed_tokens(
            torch.tensor(self.tower.start_ids, dtype=torch.long, device=self.context.device)
        )
        if self._num_shared:
            prefix = torch.cat([prefix, self.context[: self._num_shared]])
        embed = self._embed_suffixes if self._num_shared < self.n_ctx else None
        # Evaluation may run on one process alone, where waiting for the others would never end.
        return self._classes.encode(prefix, embed=embed, share=self.training)

    def _embed_suffixes(self, classes: Tensor, ids: Tensor) -> Tensor:
        """Puts the context that is not in the prefix around the names: (G,) classes, (G, l) ids to (G, l + …, T)."""
        context = self.context[classes] if self.class_specific else self.context.expand(len(ids), -1, -1)
        tokens, name_end = self.tower.embed_tokens(ids), ids.shape[1] - self._num_tail
        before, after = context[:, self._num_shared : self._num_before], context[:, self._num_before :]
        return torch.cat([before, tokens[:, :name_end], after, tokens[:, name_end:]], dim=1)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Returns the context, and under sigmoid the offset of the bias."""
        return [self.context] if self.bias is None else [self.context, self.bias.offset]

    def adapter_state(self) -> dict[str, Tensor]:
        """Returns the context, (M, T) or (C, M, T) where it is class-specific, and under sigmoid the bias."""
        return {"context": self.context.detach(), **({} if self.bias is None else self.bias.state())}

    def _load_state(self, state: Mapping[str, Tensor]) -> None:
        check_state(state, {name: value.shape for name, value in self.adapter_state().items()}, "CoOp")
        with torch.no_grad():
            self.context.copy_(state["context"])
        if self.bias is not None:
            self.bias.load_state(state)

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

    def _template_features(self) -> Tensor:
        """(C, D) unit-norm features of the fixed templates, computed once, in full precision."""
        if self._anchor is None or self._anchor.device != self.context.device:
            device_type = self.context.device.type
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(device_type=device_type, enabled=False):
                self._anchor = zero_shot_weights(self.backbone, self.class_names, self.templates).detach()
        return self._anchor


def _same(first: Tensor, second: Tensor) -> bool:
    return first.device == second.device and torch.equal(first, second)


def initial_context(
    backbone: ClipBackbone, n_ctx: int, ctx_init: str, seed: int, *, copies: int | None = None
) -> Tensor:
    """Context vectors to start from, float32 on the backbone's device.

    Args:
        backbone: its text tower gives width and token embeddings.
        n_ctx: M, vectors to draw from N(0, 0.02²); not used where `ctx_init` gives words.
        ctx_init: words whose token embeddings are taken instead; underscores count as spaces.
        seed: of the draws, which are made on the CPU.
        copies: contexts to make, each drawn apart; None makes one.

    Returns:
        (M, T), or (copies, M, T).

    Raises:
        ConfigError: `n_ctx` is below 1, or the words have no tokens.
    """
    tower, device = backbone.text, next(backbone.parameters()).device
    if ctx_init.strip():
        (ids,) = tower.word_ids([ctx_init.replace("_", " ").strip()])
        if not ids:
            raise ConfigError(f"ctx_init {ctx_init!r} has no tokens; give words such as 'a photo of a'")
        with torch.no_grad():
            words = tower.embed_tokens(torch.tensor(ids, device=device)).float()
        return (words if copies is None else words.expand(copies, -1, -1)).clone()
    if n_ctx < 1:
        raise ConfigError(f"n_ctx must be at least 1, got {n_ctx}; the paper uses 16 (or 4)")
    shape = (n_ctx, tower.width) if copies is None else (copies, n_ctx, tower.width)
    return torch.empty(shape).normal_(std=0.02, generator=generator(seed, "context")).to(device)


def suffix_ids(
    tower: TextTower, class_names: Sequence[str], n_ctx: int, *, apart: bool = False, after: str = "a "
) -> tuple[list[list[int]], int]:
    """Token ids `name . EOT` of every class, checked to fit together with the context.

    Args:
        tower: text tower whose tokenizer is used.
        class_names: C names, cleaned here.
        n_ctx: M, context vectors that must find room beside them.
        apart: tokenizes the full stop for itself, so that something can stand between it and the name. (Together with
            a name that ends in a full stop, it may become one token.)
        after: what a name stands behind as far as its tokenizer sees: some tokenizers write a first word otherwise than
            a later one. "" where the name comes first.

    Returns:
        C lists of ids, and the number of ids at the end of each that are not the name's (1 + EOT if `apart`).

    Raises:
        ConfigError: a class name does not fit.
        DataError: a class name has no words.
    """
    stop = tower.word_ids(["."], after="a")[0] if apart else []
    words = tower.word_ids([clean_class_name(name) + ("" if apart else ".") for name in class_names], after)
    tail = [*stop, *tower.end_ids]
    suffixes = [[*ids, *tail] for ids in words]
    longest = max(range(len(suffixes)), key=lambda c: len(suffixes[c]))
    room = tower.context_length - len(tower.start_ids) - len(suffixes[longest])
    if room < n_ctx:
        name = textwrap.shorten(class_names[longest], 80, placeholder=" …")
        remedy = f"At most {room} context tokens (n_ctx) would fit; or give" if room > 0 else "Give"
        raise ConfigError(
            f"class {name!r} takes {len(words[longest]) + len(stop)} tokens (with the full stop) and does not fit "
            f"beside {n_ctx} context tokens in a text tower of {tower.context_length} tokens. "
            f"{remedy} the class a shorter name (an alias in the data card)."
        )
    return suffixes, len(tail)
