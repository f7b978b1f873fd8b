"""LoRA layers in an open_clip model, by PEFT: put in, turned down, merged, written and read.

The model given is never changed: the layers go into a copy that shares its frozen weights.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaptclip.backbone.attention import fuse_attention, share_weights, split_attention
from adaptclip.backbone.lora_targets import Towers, find_targets
from adaptclip.backbone.low_rank import QuickDropout
from adaptclip.errors import BackboneError, ConfigError
from adaptclip.seeding import derive_seed
from adaptclip.storage import read_tensors, write_tensors

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
