# SPDX-License-Identifier: Apache-2.0
"""CoCoOp: the context words move with the image, by a small network on its features; CLIP stays frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from adaptclip.methods.base import batch_features, check_state
from adaptclip.methods.class_encoder import DEFAULT_MEMORY_BUDGET_BYTES, ClassEncoder
from adaptclip.methods.coop import initial_context, learn_prompts, suffix_ids
from adaptclip.methods.method import Method, Schedule, Variant
from adaptclip.prompts import tell_of_names
from adaptclip.seeding import generator

if TYPE_CHECKING:
    from adaptclip.clip import ClipBackbone
    from adaptclip.training.support import Loop, Support
    from adaptclip.types import Batch

REDUCTION = 16
"""The hidden layer of the meta-net has D / 16 units."""

HELD_FEATURES = 65536
"""Most text features (images times classes) held at once where no gradients are asked for."""


@dataclass(frozen=True)
class CoCoOpSchedule(Schedule):
    """How CoCoOp learns (sec. 4): SGD with momentum 0.9 and weight decay 5e-4, a cosine per epoch, image by image.

    Attributes:
        epochs: passes over the training images.
        views: sets of random crops, taken in turn; None makes fresh ones for every epoch, as published.
        lr: peak learning rate.
        batch_size: images per process and step; every image encodes all class prompts anew.
    """

    epochs: int = 10
    views: int | None = None
    lr: float = 2e-3
    batch_size: int = 1


class CoCoOp(Method):
    """Conditional context optimisation (Zhou et al. 2022, arXiv:2203.05557, sec. 3.2).

    The prompt of class c for an image with the unit-norm feature f is

        SOS (v_1 + h(f)) … (v_M + h(f)) name_c . EOT,    h(f) = W2 · relu(W1 · f + b1) + b2

    where the context v and the meta-net h (D to D / 16 to T) learn. Every image has text features of its own: one
    image costs as much as a whole batch of CoOp, in training and in use. All classes of an image share its
    prefix, which is encoded once by the exact path of the tower where it has one (`adaptclip.clip.text`). Several
    processes take different images.

    Args:
        backbone: frozen CLIP with a text tower whose prompts can be learnt.
        class_names: C names in the order of the label ids.
        n_ctx: M, number of context vectors drawn from N(0, 0.02²); ignored where `ctx_init` gives words.
        ctx_init: words to start from; M is then their number of tokens (4 for the paper's).
        seed: chooses the initial meta-net, and the context where it is drawn.
        memory_budget_bytes: most bytes of activations kept for the backward pass by all images of a batch together;
            beyond it, prompts are encoded a second time during the backward pass. The gradients are the same.
        fast: takes the shared-prefix path where the tower has it; False always encodes whole prompts.

    Raises:
        ConfigError: a class name does not fit behind the context, or a setting is out of range.
        DataError: a class name has no words.
        BackboneError: the backbone's text tower is of a kind whose prompts cannot be learnt.
    """

    name = "cocoop"
    variants = {"cocoop": Variant(11.5, search={"lr": (5e-4, 2e-2)})}
    schedule_type = CoCoOpSchedule
    learns_by_steps = True
    takes_new_names = True

    def __init__(
        self,
        backbone: ClipBackbone,
        class_names: Sequence[str],
        *,
        n_ctx: int = 4,
        ctx_init: str = "a photo of a",
        seed: int = 0,
        memory_budget_bytes: int = DEFAULT_MEMORY_BUDGET_BYTES,
        fast: bool = True,
    ) -> None:
        super().__init__()
        class_names = self._sit_on(backbone, class_names)
        tell_of_names(backbone, class_names)
        self.ctx_init, self.seed = ctx_init, seed
        self.tower = backbone.text
        self.context = nn.Parameter(initial_context(backbone, n_ctx, ctx_init, seed))
        self.meta_net = _meta_net(backbone.embed_dim, self.tower.width, seed).to(self.context.device)
        suffixes, _ = suffix_ids(self.tower, class_names, len(self.context))
        self._classes = ClassEncoder(
            self.tower, suffixes, prefix_length=len(self.tower.start_ids) + len(self.context), fast=fast,
            memory_budget_bytes=memory_budget_bytes,
        )  # fmt: skip

    @property
    def settings(self) -> dict[str, Any]:
        """JSON-able keyword arguments that build the same adapter again, beside backbone and class names."""
        return {"n_ctx": len(self.context), "ctx_init": self.ctx_init, "seed": self.seed}

    def forward(self, batch: Batch) -> Tensor:
        """Returns (B, C) logits of a batch of image features, each compared with its own text features."""
        features = batch_features(batch, self.backbone.embed_dim)
        if torch.is_grad_enabled():
            return self._logits(features)
        at_once = max(1, HELD_FEATURES // len(self.class_names))
        return torch.cat([self._logits(part) for part in features.split(at_once)])

    def text_features(self, features: Tensor) -> Tensor:
        """Encodes the prompts of all classes for each of (B, D) image features to (B, C, D), unit norm, float32."""
        # Under autocast the meta-net answers in half precision; the context stays in full.
        shift = self.meta_net(features).float()
        return self._classes.encode_each(self._prefixes(self.context + shift[:, None]))

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Returns the context and the meta-net's weights."""
        return [self.context, *self.meta_net.parameters()]

    def adapter_state(self) -> dict[str, Tensor]:
        """Returns the (M, T) context and the meta-net's weights."""
        net = {f"meta_net.{name}": tensor.detach() for name, tensor in self.meta_net.named_parameters()}
        return {"context": self.context.detach(), **net}

    def _load_state(self, state: Mapping[str, Tensor]) -> None:
        own = self.adapter_state()
        check_state(state, {name: tensor.shape for name, tensor in own.items()}, "CoCoOp")
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def _learn(self, support: Support, schedule: CoCoOpSchedule, loop: Loop) -> dict[str, Any]:
        return learn_prompts(self, support, support.crops(schedule), schedule, loop)

    def for_classes(self, class_names: Sequence[str], templates: Sequence[str] | None = None) -> CoCoOp:
        """Returns the learnt context and meta-net around other names."""
        moved = CoCoOp(self.backbone, class_names, **self.settings)
        moved.load_adapter_state(self.adapter_state())
        return moved

    def head(self) -> NoReturn:
        """Raises ConfigError: there are no fixed class weights."""
        self._lacks(
            "has no fixed head: its text features are made anew for every image by the text tower, so there are no "
            "fixed class weights"
        )

    @torch.no_grad()
    def class_weights(self) -> Tensor:
        """Returns (C, D) unit-norm text features of the context alone, not moved by any image.

        The logits do not come from them: each image has its own, `text_features(features)`.
        """
        return self._classes.encode(self._prefixes(self.context[None])[0])

    def _logits(self, features: Tensor) -> Tensor:
        text = self.text_features(features)
        # As in `scaled_logits`, half precision would round them too coarsely.
        with torch.autocast(device_type=features.device.type, enabled=False):
            cosines = (text @ features.float().unsqueeze(-1)).squeeze(-1)
            return self.backbone.logit_scale * cosines

    def _prefixes(self, contexts: Tensor) -> Tensor:
        """SOS and context: (B, M, T) to (B, P, T)."""
        ids = torch.tensor(self.tower.start_ids, dtype=torch.long, device=contexts.device)
        return torch.cat([self.tower.embed_tokens(ids).expand(len(contexts), -1, -1), contexts], dim=1)


def _meta_net(embed_dim: int, width: int, seed: int) -> nn.Sequential:
    """The paper's two-layer bottleneck, (B, D) to (B, T), with torch's usual initial values drawn from the seed."""
    hidden = max(1, embed_dim // REDUCTION)
    # Made without values: torch's own draws would come from the global generator.
    layers = [nn.Linear(*size, device="meta").to_empty(device="cpu") for size in ((embed_dim, hidden), (hidden, width))]
    draws = generator(seed, "meta-net")
    with torch.no_grad():
        for layer in layers:
            bound = layer.in_features**-0.5
            layer.weight.uniform_(-bound, bound, generator=draws)
            layer.bias.uniform_(-bound, bound, generator=draws)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1])
