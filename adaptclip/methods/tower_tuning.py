# SPDX-License-Identifier: Apache-2.0
"""Tuning a few of the towers' own numbers: the scales and shifts of their norms, or their biases (BitFit)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import Tensor, nn

from adaptclip.clip.attention import share_weights
from adaptclip.clip.lora_targets import Towers
from adaptclip.errors import ConfigError, did_you_mean
from adaptclip.methods.base import check_state
from adaptclip.methods.method import Variant
from adaptclip.methods.tuned_towers import TowerSchedule, TunedTowers, check_full_precision

if TYPE_CHECKING:
    from adaptclip.clip import ClipBackbone

Tune = Literal["layernorm", "bitfit"]

_TOWERS = {"image": ("visual.",), "text": ("transformer.", "ln_final.", "text.")}
"""Tower -> how the names of its parts begin; CoCa's decoder of captions is in neither."""


_NORMS: tuple[Callable[[nn.Module], bool], ...] = (
    lambda module: isinstance(module, nn.LayerNorm),
    lambda module: type(module).__name__.endswith(("LayerNorm", "RMSNorm")),
    lambda module: isinstance(module, nn.modules.batchnorm._BatchNorm),
)
"""Kinds of norms in the order of choice: a tower's own LayerNorms, root-mean-square ones as T5 has, BatchNorms."""


def tuned_names(model: nn.Module, tune: Tune, towers: Towers) -> list[str]:
    """Returns the parameters of a model that are tuned, by name.

    - "layernorm": weights and biases of every LayerNorm (2SFS, Farina et al. 2025, arXiv:2503.11609). A tower without
      any, which the published code refuses, has its root-mean-square norms tuned (T5), or its BatchNorms (ResNets),
      whose statistics stay.
    - "bitfit": every parameter named `bias` (BitFit, Ben Zaken et al. 2022, arXiv:2106.10199). As in 2SFS's code that
      leaves out the fused `in_proj_bias` of queries, keys and values.

    Raises:
        ConfigError: an unknown kind or tower, or one tower has nothing of the kind.
    """
    if tune not in get_args(Tune):
        raise ConfigError(f"no kind of tuning {tune!r}. {did_you_mean(str(tune), get_args(Tune))}")
    if towers not in get_args(Towers):
        raise ConfigError(f"no towers {towers!r}. {did_you_mean(str(towers), get_args(Towers))}")
    names: list[str] = []
    for tower, prefixes in _TOWERS.items():
        if towers not in (tower, "both"):
            continue
        found = _of_kind(model, tune, prefixes)
        if not found:
            raise ConfigError(f"the {tower} tower has nothing for {tune} to tune; tune the other tower, or take LoRA")
        names += found
    return names


def _of_kind(model: nn.Module, tune: Tune, prefixes: tuple[str, ...]) -> list[str]:
    if tune == "bitfit":
        names = [name for name, _ in model.named_parameters() if name.endswith(".bias")]
        return [name for name in names if name.startswith(prefixes)]
    own = {name: module for name, module in model.named_modules() if f"{name}.".startswith(prefixes)}
    for is_norm in _NORMS:
        norms = {name: module for name, module in own.items() if is_norm(module)}
        if norms:
            return [f"{name}.{part}" for name, norm in norms.items() for part, _ in norm.named_parameters()]
    return []


class TowerTuning(TunedTowers):
    """A CLIP whose norms or biases are tuned in place, everything else frozen.

    LayerNorm tuning is the first stage of 2SFS (Farina et al. 2025, arXiv:2503.11609), BitFit is Ben Zaken et al. 2022
    (arXiv:2106.10199) in that paper's ablation; by themselves both learn for the 300 steps per shot of both stages.

    The prompts stay the card's own; what is compared with the images are the text features of the tuned text tower.
    Where the image tower is tuned the method trains on pixels, otherwise on cached features. Before training it is the
    zero-shot classifier.

    Args:
        backbone: frozen CLIP in fp32, not changed.
        class_names: C names in the order of the label ids.
        tune: "layernorm" or "bitfit", see `tuned_names`.
        towers: which towers are tuned: image, text or both.
        templates: prompts with one `{}` for the class name; their unit-norm features are averaged.

    Raises:
        ConfigError: see `tuned_names`, or the backbone is in half precision.
        BackboneError: a prompt is too long, or a tower is of a kind that cannot be adapted.
    """

    name = "tower_tuning"
    variants = {
        "layernorm": Variant(11.7, {"tune": "layernorm"}, search={"lr": (1e-4, 2e-2)}),
        "bitfit": Variant(11.8, {"tune": "bitfit"}, search={"lr": (1e-4, 2e-2)}),
    }
    smoke = {"steps": 60, "lr": 1e-2}

    def __init__(
        self,
        backbone: ClipBackbone,
        class_names: Sequence[str],
        *,
        tune: Tune = "layernorm",
        towers: Towers = "both",
        templates: Sequence[str] = ("a photo of a {}.",),
    ) -> None:
        super().__init__()
        class_names = self._sit_on(backbone, class_names)
        names = tuned_names(backbone.model, tune, towers)
        check_full_precision(backbone, tune)
        model: Any = share_weights(backbone.model)
        for name in names:
            parent, _, part = name.rpartition(".")
            tuned = nn.Parameter(backbone.model.get_parameter(name).detach().clone())
            setattr(model.get_submodule(parent), part, tuned)
        self.tune, self._names = tune, tuple(names)
        self._take_towers(backbone, class_names, templates, towers, model)

    @property
    def settings(self) -> dict[str, Any]:
        """JSON-able keyword arguments that build the same adapter again, beside backbone and class names."""
        return {"tune": self.tune, "towers": self.towers, "templates": list(self.templates)}

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Returns the tuned norms or biases."""
        return [self.model.get_parameter(name) for name in self._names]

    def adapter_state(self) -> dict[str, Tensor]:
        """Returns what is tuned, whole, by its name in the model."""
        return {name: self.model.get_parameter(name).detach() for name in self._names}

    def _load_state(self, state: Mapping[str, Tensor]) -> None:
        own = self.adapter_state()
        check_state(state, {name: value.shape for name, value in own.items()}, f"towers tuned by {self.tune}")
        for name, value in own.items():
            value.copy_(state[name])

    def published(self, shots: int, images_per_class: int) -> TowerSchedule:
        """Returns 2SFS's 300 steps per shot, all of them here."""
        return TowerSchedule(steps=300 * (shots or images_per_class))

    @property
    def _made_with(self) -> str:
        return self.tune

    @property
    def _decides(self) -> str:
        return f"{self.tune} {self.towers}"

    def merged_model(self) -> nn.Module:
        """Returns a stock open_clip model with the tuned numbers in their places."""
        return share_weights(self.model, also_trainable=False).requires_grad_(False)
