"""The filled prompts of classes, encoded by the text tower of any copy of their model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptclip.backbone import ClipBackbone
from adaptclip.backbone.text import make_text_tower
from adaptclip.methods.class_encoder import DEFAULT_MEMORY_BUDGET_BYTES, ClassEncoder
from adaptclip.prompts import fill, zero_shot_weights


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
        backbone.tokenize(self._prompts)  # a prompt that is too long is better known now
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
