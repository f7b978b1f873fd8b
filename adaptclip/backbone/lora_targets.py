"""Which layers of a model an adapter is put on: towers, projections and blocks by name, whatever the architecture.

One table for all kinds of tower. A layer's kind is read off the last parts of its dotted name:

    open_clip ViT and text (split)    attn.q_proj attn.k_proj attn.v_proj attn.out_proj mlp.c_fc mlp.c_proj
    timm ViT                          attn.qkv (q, k and v in one layer) attn.proj mlp.fc1 mlp.fc2
    EVA02                             attn.q_proj attn.k_proj attn.v_proj attn.proj mlp.fc1_g mlp.fc1_x mlp.fc2
    BERT, RoBERTa                     attention.self.query .key .value attention.output.dense intermediate.dense
                                      output.dense
    ModifiedResNet                    attnpool.q_proj .k_proj .v_proj .c_proj, and 1x1 convolutions
    EfficientNet, ConvNeXt, FastViT   1x1 convolutions and Linear layers
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from torch import nn

from adaptclip.errors import ConfigError, did_you_mean

Towers = Literal["image", "text", "both"]

KINDS = ("q", "k", "v", "out", "mlp", "conv")
"""What `projections` may name; `conv` is every 1x1 convolution and Linear layer of a convolutional tower."""

_KIND_OF_NAME: tuple[tuple[str, frozenset[str]], ...] = (
    (r"qkv", frozenset("qkv")),
    (r"kv", frozenset("kv")),
    (r"q_proj|query|q", frozenset("q")),
    (r"k_proj|key|k", frozenset("k")),
    (r"v_proj|value|v", frozenset("v")),
    (r"out_proj|attn\.proj|token_mixer\.proj|attnpool\.c_proj|attention\.output\.dense|o", frozenset({"out"})),
    (r"c_fc|mlp\.c_proj|fc[12](?:_[gx])?|w[12i](?:_[01])?|wo|intermediate\.dense|output\.dense", frozenset({"mlp"})),
)
_BLOCK = re.compile(r"(?:^|\.)(?:resblocks|blocks|layers?|stages|layer\d)\.?[\d.]*(?:blocks\.\d+)?")


def find_targets(
    model: nn.Module,
    towers: Towers = "both",
    *,
    projections: Sequence[str] = ("q", "k", "v"),
    blocks: str = "all",
    targets: Sequence[str] = (),
) -> list[str]:
    """Returns the dotted names of the layers to adapt, those of the image tower first.

    A tower without any attention has no q, k, v or out: there, all its 1x1 convolutions and Linear layers are taken.

    Args:
        model: an open_clip model whose attention is split (`split_attention`).
        towers: image, text or both.
        projections: any of KINDS.
        blocks: "all", "top-N" (the last N blocks of each tower) or numbers such as "0,5,11", counted from the input.
        targets: endings of layer names to take instead of `projections`, for example "mlp.c_fc".

    Raises:
        ConfigError: an unknown name, or nothing in one of the chosen towers matches; with the nearest names.
    """
    if towers not in ("image", "text", "both"):
        raise ConfigError(f"unknown towers {towers!r}. {did_you_mean(str(towers), ('image', 'text', 'both'))}")
    for kind in projections:
        if kind not in KINDS:
            raise ConfigError(f"unknown projection {kind!r}. {did_you_mean(kind, KINDS)}")
    found = []
    for tower in ("image", "text"):
        if towers in (tower, "both"):
            layers = _layers(model, tower)
            chosen = _named(layers, targets, tower) if targets else _of_kinds(layers, set(projections), tower)
            found += _in_blocks(list(layers), chosen, blocks, tower)
    return found


def count_blocks(model: nn.Module, tower: str) -> int:
    """Returns how many blocks `blocks` of `find_targets` can name in a tower: "image" or "text"."""
    return len(_block_names(list(_layers(model, tower))))


def _block_names(layers: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(m.group() for name in layers if (m := _BLOCK.search(name))))


def _layers(model: nn.Module, tower: str) -> dict[str, nn.Module]:
    """Name -> module of every layer of a tower that can carry an adapter."""
    layers: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and _is_pointwise(module))
    }
    prefixes = ("visual.",) if tower == "image" else ("transformer.", "text.")
    own = {name: module for name, module in layers.items() if name.startswith(prefixes)}
    if not own:
        raise ConfigError(f"the {tower} tower of this model has no Linear layer or 1x1 convolution to adapt")
    return own


def _is_pointwise(module: nn.Conv2d) -> bool:
    return module.kernel_size == (1, 1) and module.groups == 1


def _kinds(name: str) -> frozenset[str]:
    for pattern, kinds in _KIND_OF_NAME:
        if re.search(rf"(?:^|\.)(?:{pattern})$", name):
            return kinds
    return frozenset()


def _of_kinds(layers: dict[str, nn.Module], wanted: set[str], tower: str) -> list[str]:
    has_attention = any(_kinds(name) & set("qkv") for name in layers)
    if "conv" in wanted or not has_attention:
        convolutional = not has_attention or any(isinstance(module, nn.Conv2d) for module in layers.values())
        if not convolutional:
            raise ConfigError(
                f"the {tower} tower has no 1x1 convolutions; name {', '.join(KINDS[:-1])} instead of conv"
            )
        if not has_attention:
            return list(layers)
    chosen = []
    for name, module in layers.items():
        kinds = _kinds(name)
        if kinds & wanted and not kinds <= wanted:
            raise ConfigError(
                f"{name} computes {', '.join(sorted(kinds))} in one layer, so they can only be adapted together; "
                f"got projections {sorted(wanted)}"
            )
        if kinds & wanted or ("conv" in wanted and isinstance(module, nn.Conv2d)):
            chosen.append(name)
    if not chosen:
        raise ConfigError(f"no layer of the {tower} tower is one of {sorted(wanted)}; {_examples(layers)}")
    return chosen


def _named(layers: dict[str, nn.Module], targets: Sequence[str], tower: str) -> list[str]:
    chosen = [name for name in layers if any(name == t or name.endswith(f".{t}") for t in targets)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            endings = {".".join(name.split(".")[-k:]) for name in layers for k in (1, 2)} | set(layers)
            raise ConfigError(
                f"no layer of the {tower} tower ends in {target!r}. {did_you_mean(target, sorted(endings), limit=12)}"
            )
    return chosen


def _in_blocks(layers: list[str], chosen: list[str], blocks: str, tower: str) -> list[str]:
    """Keeps the layers of the wanted blocks; what stands before the first or after the last counts with it."""
    if blocks == "all":
        return chosen
    names = _block_names(layers)
    number, last = {}, 0
    for name in layers:
        match = _BLOCK.search(name)
        last = names.index(match.group()) if match else last
        number[name] = last
    count = max(len(names), 1)
    if re.fullmatch(r"top-[1-9]\d*", blocks):
        wanted = set(range(max(0, count - int(blocks[4:])), count))
    elif re.fullmatch(r"\d+(,\d+)*", blocks):
        wanted = {int(i) for i in blocks.split(",")}
    else:
        raise ConfigError(f'blocks should be "all", "top-4" or numbers such as "0,5,11", got {blocks!r}')
    kept = [name for name in chosen if number[name] in wanted]
    if not kept or max(wanted) >= count:
        raise ConfigError(f"blocks {blocks!r} do not exist in the {tower} tower: it has {count}, numbered from 0")
    return kept


def _examples(layers: dict[str, nn.Module]) -> str:
    endings = dict.fromkeys(".".join(name.split(".")[-2:]) for name in layers)
    return f"its layers end in {', '.join(list(endings)[:12])}"
