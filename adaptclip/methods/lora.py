# SPDX-License-Identifier: Apache-2.0
"""LoRA on the towers of a CLIP, by PEFT: CLIP-LoRA by default, any tower, projection, block, rank or DoRA.

The model given is never changed: the layers go into a copy that shares its frozen weights.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptclip.clip.attention import fuse_attention, share_weights, split_attention
from adaptclip.clip.image_blocks import encode_image
from adaptclip.clip.lora_targets import Towers, find_targets
from adaptclip.clip.low_rank import QuickDropout
from adaptclip.errors import BackboneError, ConfigError, DataError
from adaptclip.files import read_tensors, write_tensors
from adaptclip.methods.base import ClassBias, batch_features, check_state, scaled_logits
from adaptclip.methods.class_encoder import DEFAULT_MEMORY_BUDGET_BYTES, ClassPrompts
from adaptclip.methods.method import Method, Variant
from adaptclip.methods.tuned_towers import Snapshot, TowerSchedule, take_snapshot, tune_towers
from adaptclip.methods.zero_shot import ZeroShotClassifier
from adaptclip.seeding import derive_seed
from adaptclip.training.criterion import ObjectiveName, check_objective

if TYPE_CHECKING:
    from adaptclip.clip import ClipBackbone
    from adaptclip.training.support import Loop, Support
    from adaptclip.types import Batch

ADAPTER = "default"
"""PEFT's name for the one adapter that a model carries here."""

_PEFT_PREFIX = "base_model.model."


def inject_lora(
    model: nn.Module,
    towers: Towers = "both",
    *,
    rank: int = 2,
    alpha: float = 1.0,
    dropout: float = 0.25,
    projections: Sequence[str] = ("q", "k", "v"),
    blocks: str = "all",
    targets: Sequence[str] = (),
    rslora: bool = True,
    dora: bool = False,
    seed: int = 0,
) -> nn.Module:
    """Returns a copy of a model with LoRA layers (Hu et al. 2021, arXiv:2106.09685), which alone require gradients.

    The defaults are CLIP-LoRA's (Zanella and Ben Ayed 2024, arXiv:2405.18541): rank 2 on the query, key and value
    projections of every block of both towers, alpha 1 with the scaling alpha / sqrt(rank), A Kaiming uniform and B
    zero, so that the copy starts as the same function. Its attention is split; its frozen weights are those of `model`.

    Args:
        model: an open_clip model, not changed.
        towers: which towers get layers.
        rank: r, 1 or more.
        alpha: above 0; the update is B A times alpha / sqrt(r), or alpha / r without `rslora`.
        dropout: share of the layers' inputs that is dropped in training, from 0 to below 1.
        projections: see `find_targets`.
        blocks: see `find_targets`.
        targets: see `find_targets`.
        rslora: rank-stabilised scaling (Kalajdzievski 2023, arXiv:2312.03732).
        dora: learns the length of each weight row apart from its direction (Liu et al. 2024, arXiv:2402.09353).
        seed: of A.

    Raises:
        ConfigError: a number out of range, or layers that do not exist.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"the rank of LoRA must be a whole number from 1 up, got {rank!r}; the paper uses 2")
    if not alpha > 0 or not 0 <= dropout < 1:
        raise ConfigError(f"alpha must be above 0 and dropout at least 0 and below 1, got {alpha} and {dropout}")
    from peft import LoraConfig, inject_adapter_in_model  # type: ignore[attr-defined]

    copied = share_weights(model)
    split_attention(copied)
    names = find_targets(copied, towers, projections=projections, blocks=blocks, targets=targets)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, use_rslora=rslora, use_dora=dora, bias="none",  # type: ignore[arg-type]
        # A list would be matched by endings, and a text layer's name is the ending of an image layer's.
        target_modules="|".join(re.escape(name) for name in names),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "lora"))
        inject_adapter_in_model(config, copied, ADAPTER)
    device = next(model.parameters()).device
    got = [name for name, _ in lora_layers(copied)]
    if sorted(got) != sorted(names):
        raise BackboneError(
            f"PEFT put adapters on {len(got)} layers instead of {len(names)}: {sorted({*got} ^ {*names})}"
        )
    for _, layer in lora_layers(copied):
        if isinstance(layer.lora_dropout[ADAPTER], nn.Dropout):
            layer.lora_dropout[ADAPTER] = QuickDropout(dropout)
    for parameter in lora_parameters(copied).values():
        parameter.data = parameter.data.float().to(device)
    return copied


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields name and module of every layer with an adapter."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of everything that LoRA learns: A, B and, with DoRA, magnitudes."""
    return {name: p for name, p in model.named_parameters() if ".lora_" in name}


def check_scale(scale: float) -> None:
    """Raises ConfigError unless the scale is from 0 to 1."""
    if not 0 <= scale <= 1:
        raise ConfigError(f"the scale of LoRA goes from 0 (zero-shot) to 1 (as trained), got {scale}")


def set_lora_scale(model: nn.Module, scale: float, start: Mapping[str, Tensor]) -> None:
    """Turns the adapter down: 0 is the model as it was before training, 1 as it was trained.

    This is WiSE-FT's straight line between the two (Wortsman et al. 2022, arXiv:2109.01903, eq. 1), taken on the update
    B A, and with DoRA also on the magnitudes.

    Args:
        model: with LoRA layers; its magnitudes are overwritten, so keep the trained ones.
        scale: from 0 to 1.
        start: magnitudes before training by the layer's name (`magnitudes`); empty without DoRA.
    """
    check_scale(scale)
    for name, layer in lora_layers(model):
        layer.set_scale(ADAPTER, scale)
        if layer.lora_magnitude_vector:
            weight = layer.lora_magnitude_vector[ADAPTER].weight
            weight.data = torch.lerp(start[name].to(weight.device), weight.data, scale)


def magnitudes(model: nn.Module) -> dict[str, Tensor]:
    """Returns the magnitudes of DoRA by layer name, copied; none without DoRA."""
    return {
        name: layer.lora_magnitude_vector[ADAPTER].weight.detach().clone()
        for name, layer in lora_layers(model)
        if layer.lora_magnitude_vector
    }


def merge_lora(model: nn.Module) -> nn.Module:
    """Returns a stock open_clip model with the adapter added to its weights; the given model is not changed.

    Raises:
        BackboneError: a merged weight is not finite.
    """
    merged = copy.deepcopy(model)
    for name, layer in list(lora_layers(merged)):
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise BackboneError(f"the adapter of {name} cannot be merged: {error}") from error
        parent, _, child = name.rpartition(".")
        setattr(merged.get_submodule(parent), child, layer.get_base_layer())
    fuse_attention(merged)
    vars(merged).pop("peft_config", None)
    return merged.requires_grad_(False)


def save_peft(model: Any, folder: Path, *, base: str) -> list[Path]:
    """Writes the adapter as PEFT does: adapter_config.json and adapter_model.safetensors.

    `peft.PeftModel.from_pretrained` reads it onto a model whose attention was split with `split_attention`.

    Args:
        model: with LoRA layers.
        folder: made where it is missing.
        base: name of the base model, for people.

    Returns:
        The written files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.copy(model.peft_config[ADAPTER])
    config.inference_mode, config.base_model_name_or_path = True, base
    config.save_pretrained(str(folder))
    weights = folder / "adapter_model.safetensors"
    write_tensors(weights, {_file_name(name): p.detach() for name, p in lora_parameters(model).items()})
    return [folder / "adapter_config.json", weights]


def read_peft(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """Returns what `save_peft` wrote, by the names of `lora_parameters`; tensors the model lacks keep the file's name.

    Raises:
        StorageError: the file cannot be read.
    """
    name_of = {_file_name(name): name for name in lora_parameters(model)}
    return {name_of.get(key, key): value for key, value in read_tensors(folder / "adapter_model.safetensors").items()}


def _file_name(name: str) -> str:
    """The name of a parameter in PEFT's files: without the adapter's name, and of a magnitude without `.weight`."""
    return _PEFT_PREFIX + name.replace(f"lora_magnitude_vector.{ADAPTER}.weight", "lora_magnitude_vector").replace(
        f".{ADAPTER}", ""
    )


BIAS_FILE = "class_bias.safetensors"
"""What the sigmoid objective learns beside PEFT's own files."""


class LoRA(Method):
    """Low-rank adapters on a frozen CLIP (CLIP-LoRA, Zanella and Ben Ayed 2024, arXiv:2405.18541).

    The prompts stay the card's own; what is compared with the images are the text features of the adapted text tower.
    Where the image tower is adapted the method trains on pixels, otherwise on cached features. In training, prompts end
    at their EOT and the classes are shared out over the processes; without dropout in the text tower they also share
    the tokens they have in common, which is exact. Where dropout is active they do not: each class then has its own.

    Args:
        backbone: frozen CLIP, not changed.
        class_names: C names in the order of the label ids.
        towers: which towers are adapted: image, text or both.
        rank: see `inject_lora`, as for the next ones up to `seed`.
        alpha: numerator of the update's scale.
        dropout: of the layers' inputs, in training.
        projections: which projections, any of q, k, v, out, mlp, conv.
        blocks: "all", "top-N" or numbers such as "0,5,11".
        targets: endings of layer names, instead of `projections`.
        rslora: scale by the root of the rank.
        dora: learn magnitudes apart from directions.
        seed: of the initial A.
        templates: prompts with one `{}` for the class name; their unit-norm features are averaged.
        scale: how much of the trained update is used, from 0 (zero-shot) to 1; below 1 only for evaluation.
        objective: "sigmoid" learns a bias for each class beside the update, see `ClassBias`.
        memory_budget_bytes: most bytes of the text tower's activations kept for the backward pass.
        checkpointing: computes the image tower's blocks a second time in the backward pass instead of keeping them.
        fast: False encodes whole prompts up to their EOT.

    Raises:
        ConfigError: a setting is out of range, or names layers that do not exist.
        BackboneError: a prompt is too long, or a tower is of a kind that cannot be adapted.
    """

    name = "lora"
    variants = {"lora": Variant(12, ladder=True, search={"lr": (1e-4, 2e-2), "rank": [2, 4, 8]})}
    schedule_type = TowerSchedule
    smoke = {"steps": 60, "lr": 1e-2}
    learns_by_steps = True
    takes_new_names = True
    is_clip = True

    def __init__(
        self,
        backbone: ClipBackbone,
        class_names: Sequence[str],
        *,
        towers: Towers = "both",
        rank: int = 2,
        alpha: float = 1.0,
        dropout: float = 0.25,
        projections: Sequence[str] = ("q", "k", "v"),
        blocks: str = "all",
        targets: Sequence[str] = (),
        rslora: bool = True,
        dora: bool = False,
        seed: int = 0,
        templates: Sequence[str] = ("a photo of a {}.",),
        scale: float = 1.0,
        objective: ObjectiveName = "softmax",
        memory_budget_bytes: int = DEFAULT_MEMORY_BUDGET_BYTES,
        checkpointing: bool = False,
        fast: bool = True,
    ) -> None:
        super().__init__()
        class_names = self._sit_on(backbone, class_names)
        check_objective(objective)
        self._prompts = ClassPrompts(
            backbone, class_names, templates, memory_budget_bytes=memory_budget_bytes, fast=fast
        )
        self._layers: dict[str, Any] = {
            "towers": towers, "rank": rank, "alpha": float(alpha), "dropout": float(dropout), "blocks": blocks,
            "projections": list(projections), "targets": list(targets), "rslora": rslora, "dora": dora, "seed": seed,
        }  # fmt: skip
        check_scale(scale)
        self.templates, self.scale = tuple(templates), float(scale)
        self.objective: ObjectiveName = objective
        self.bias = ClassBias(backbone, len(class_names)) if objective == "sigmoid" else None
        self.model: Any = inject_lora(backbone.model, **self._layers)
        self.adapts_text, self.adapts_image = towers != "image", towers != "text"
        self.consumes: Literal["features", "pixels"] = "pixels" if self.adapts_image else "features"
        self._start_magnitudes = magnitudes(self.model)
        self._encode_image: Callable[[nn.Module, Tensor], Tensor] = encode_image
        self._snapshot: Snapshot | None = None
        if self.adapts_text:
            self._whole = self._prompts.encoder(self.model, share_prefix=False)
            self._shared = self._prompts.encoder(self.model)
        if checkpointing and self.adapts_image:
            _checkpoint_image_tower(self.model)
        self.train(False)

    @property
    def settings(self) -> dict[str, Any]:
        """JSON-able keyword arguments that build the same adapter again, beside backbone and class names."""
        objective = {} if self.bias is None else {"objective": self.objective}
        return {**self._layers, "templates": list(self.templates), "scale": self.scale, **objective}

    def train(self, mode: bool = True) -> LoRA:
        """Wakes up LoRA's own dropout and magnitudes; the towers stay in evaluation mode, batch statistics included."""
        super().train(False)
        self.training = mode
        for _, layer in lora_layers(self.model):
            layer.lora_dropout.train(mode)
            layer.lora_magnitude_vector.train(mode)
        return self

    def forward(self, batch: Batch) -> Tensor:
        """Returns (B, C) logits of images, or outside of training of features that `encoder` made.

        Raises:
            DataError: the batch has what the method does not learn from.
        """
        if not self.training and not torch.is_grad_enabled():
            snapshot = self._take_snapshot()
            return scaled_logits(
                snapshot.features(batch), snapshot.class_weights, self.backbone.logit_scale, self.class_bias()
            )
        if self.adapts_image and batch.images is None:
            raise DataError(
                "LoRA on the image tower learns from pixels, but the batch has none; take PixelLoader, or adapt the "
                'text tower alone (towers="text")'
            )
        if self.adapts_image:
            assert batch.images is not None
            dtype = open_clip.get_input_dtype(self.backbone.precision) or torch.float32
            features = F.normalize(self._encode_image(self.model, batch.images.to(dtype)).float(), dim=-1)
        else:
            features = batch_features(batch, self.backbone.embed_dim)
        bias = None if self.bias is None else self.bias()
        return scaled_logits(features, self.text_features(), self.backbone.logit_scale, bias)

    def class_bias(self) -> Tensor | None:
        """Returns the (C,) bias of the sigmoid objective at the present scale; None under softmax."""
        return None if self.bias is None else self.bias(self.scale).detach()

    def published(self, shots: int, images_per_class: int) -> TowerSchedule:
        """Returns the paper's 500 steps per shot (sec. 4)."""
        return TowerSchedule(steps=500 * (shots or images_per_class))

    def _learn(self, support: Support, schedule: TowerSchedule, loop: Loop) -> dict[str, Any]:
        if self.bias is not None and not self.bias.from_model:
            self.bias.begin(support.features(), self.class_weights(), self.backbone.logit_scale)
        return tune_towers(self, support, schedule, schedule.steps, loop)

    def for_classes(self, class_names: Sequence[str], templates: Sequence[str] | None = None) -> ZeroShotClassifier:
        """Returns a classifier of other classes by the adapted towers."""
        return ZeroShotClassifier(self.encoder, class_names, self.templates if templates is None else templates)

    def text_features(self) -> Tensor:
        """Returns (C, D) unit-norm float32 features of the classes by the text tower as it is, with gradients."""
        if not self.adapts_text:
            return self._prompts.frozen()
        # With dropout, what the prompts have in common would also share its random draws.
        dropped = self.training and self._layers["dropout"] > 0
        encoder = self._whole if dropped else self._shared
        return self._prompts.features(encoder, self.backbone.device, share=self.training, preserve_rng_state=dropped)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Returns A and B of every layer, with DoRA the magnitudes, and under sigmoid the offset of the bias."""
        return [*lora_parameters(self.model).values(), *([] if self.bias is None else [self.bias.offset])]

    def adapter_state(self) -> dict[str, Tensor]:
        """Returns A and B of every adapted layer, with DoRA the magnitudes, by name, and under sigmoid the bias."""
        return {**self._update(), **({} if self.bias is None else self.bias.state())}

    def _update(self) -> dict[str, Tensor]:
        """What changes the towers."""
        return {name: parameter.detach() for name, parameter in lora_parameters(self.model).items()}

    def _load_state(self, state: Mapping[str, Tensor]) -> None:
        check_state(state, {name: value.shape for name, value in self.adapter_state().items()}, "LoRA")
        with torch.no_grad():
            for name, parameter in lora_parameters(self.model).items():
                parameter.copy_(state[name])
        if self.bias is not None:
            self.bias.load_state(state)

    def save_adapter(self, folder: Path) -> list[Path]:
        """Writes a PEFT folder: adapter_config.json and adapter_model.safetensors. Returns the written files.

        Under sigmoid the bias is a file beside them, which PEFT does not read.
        """
        files = save_peft(self.model, folder, base=self.backbone.name)
        if self.bias is not None:
            write_tensors(folder / BIAS_FILE, self.bias.state())
            files.append(folder / BIAS_FILE)
        return files

    def load_adapter(self, folder: Path) -> None:
        """Reads what `save_adapter` wrote. Raises StorageError or ArtifactError when it is damaged or does not fit."""
        bias = {} if self.bias is None else read_tensors(folder / BIAS_FILE)
        self.load_adapter_state({**read_peft(folder, self.model), **bias})

    def compile_image_tower(self) -> None:
        """Builds the image tower's forward and backward in training with torch.compile, when it is first called.

        Raises:
            BackboneError: the image tower is not adapted, or there is no C++ compiler on a machine without GPU.
        """
        if not self.adapts_image:
            raise BackboneError('there is no image tower to compile: towers="text" trains on cached features')
        names = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
        if self.backbone.device.type == "cpu" and not any(name and shutil.which(name) for name in names):
            raise BackboneError(
                "torch.compile needs a C++ compiler on a CPU, and none was found (CXX, c++, g++, clang++); install "
                "one, or leave compilation off"
            )
        self._encode_image = torch.compile(encode_image)

    @property
    def encoder(self) -> ClipBackbone:
        """The adapted towers at the present scale, frozen as they are now: makes features that `forward` takes."""
        return self._take_snapshot().encoder

    def class_weights(self) -> Tensor:
        """Returns (C, D) unit-norm text features of the adapted text tower, without gradients."""
        return self._take_snapshot().class_weights

    def set_scale(self, scale: float) -> None:
        """Turns the trained update down, for evaluation: 0 is zero-shot, 1 as trained (see `set_lora_scale`).

        Raises:
            ConfigError: the scale is not from 0 to 1.
        """
        check_scale(scale)
        self.scale, self._snapshot = float(scale), None

    def merged_model(self) -> nn.Module:
        """Returns a stock open_clip model with the update, at the present scale, added to its weights."""
        return merge_lora(self._scaled_copy())

    def _scaled_copy(self) -> nn.Module:
        """The adapted model at the present scale: frozen weights shared, adapters copied."""
        copied = share_weights(self.model, also_trainable=False)
        set_lora_scale(copied, self.scale, self._start_magnitudes)
        return copied

    @torch.inference_mode(False)
    def _take_snapshot(self) -> Snapshot:
        """Returns the snapshot of the present parameters, made anew only when one of them changed."""
        state = self._update()
        if self._snapshot is None or not self._snapshot.is_of(state, self.backbone.device):
            self._snapshot = take_snapshot(
                state, self.backbone, made_with="LoRA", settings=f"{self.scale} {self._layers}",
                model=self._scaled_copy, prompts=self._prompts, adapts_text=self.adapts_text,
                adapts_image=self.adapts_image,
            )  # fmt: skip
        return self._snapshot


def _checkpoint_image_tower(model: Any) -> None:
    """Switches on gradient checkpointing of the image tower. Raises BackboneError where it has none."""
    try:
        model.visual.set_grad_checkpointing(True)
    except Exception as error:
        raise BackboneError(
            f"this image tower has no gradient checkpointing ({error}); leave checkpointing off"
        ) from error
