# SPDX-License-Identifier: Apache-2.0
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
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import open_clip
from open_clip.hf_model import HFTextEncoder
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer, VisionTransformer
from torch import nn

from adaptclip.clip.text_towers import first_size
from adaptclip.errors import BackboneError, ConfigError, did_you_mean

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
_ATTENTION = re.compile("att(entio)?n", re.IGNORECASE)


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
    Where it has some, as many of q, k and v must be found as the architecture says (`count_attention`): a library that
    writes its attention in another way must not be adapted elsewhere without a word.

    Args:
        model: an open_clip model whose attention is split (`split_attention`).
        towers: image, text or both.
        projections: any of KINDS.
        blocks: "all", "top-N" (the last N blocks of each tower) or numbers such as "0,5,11", counted from the input.
        targets: endings of layer names to take instead of `projections`, for example "mlp.c_fc".

    Raises:
        ConfigError: an unknown name, or nothing in one of the chosen towers matches; with the nearest names.
        BackboneError: a tower is of an unknown kind, or its attention is, so that an adapter would miss some of it.
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
            chosen = _named(layers, targets, tower) if targets else _of_kinds(model, layers, set(projections), tower)
            found += _in_blocks(list(layers), chosen, blocks, tower)
    return found


def count_blocks(model: nn.Module, tower: str) -> int:
    """Returns how many blocks `blocks` of `find_targets` can name in a tower: "image" or "text"."""
    return len(_block_names(list(_layers(model, tower))))


def count_attention(model: Any, tower: str) -> int:
    """Returns how many attentions a tower must have, by what its architecture states and not by its layers' names.

    Attention pools count. The towers of timm state no number: there, the modules of a class that is called attention
    count, those inside of which there is no other.

    Args:
        model: an open_clip model.
        tower: "image" or "text".

    Raises:
        BackboneError: the tower is of a kind that is not known.
    """
    part = model.visual if tower == "image" else getattr(model, "text", model)
    if isinstance(part, HFTextEncoder):
        return first_size(part.config, "num_hidden_layers", "num_layers", "encoder_layers")
    if isinstance(part, open_clip.CLIP | TextTransformer):
        return int(part.transformer.layers)
    if isinstance(part, VisionTransformer):
        pools = (part.attn_pool, getattr(part, "attn_pool_contrastive", None))
        return int(part.transformer.layers) + sum(pool is not None for pool in pools)
    if isinstance(part, ModifiedResNet):
        return 1
    # The embedded starter has timm's own module for its image tower.
    if isinstance(part, TimmModel) or type(part).__module__.startswith("timm."):
        return len(_innermost_attention(dict(part.named_modules())))
    raise BackboneError(
        f"the {tower} tower of this model is a {type(part).__name__}, which LoRA does not know; known are open_clip's "
        "own towers, those of timm and Hugging Face encoders"
    )


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


def kinds_of(name: str) -> frozenset[str]:
    """Returns what a layer computes by its dotted name: some of `KINDS`, several where it is a fused one; or none."""
    for pattern, kinds in _KIND_OF_NAME:
        if re.search(rf"(?:^|\.)(?:{pattern})$", name):
            return kinds
    return frozenset()


def _of_kinds(model: nn.Module, layers: dict[str, nn.Module], wanted: set[str], tower: str) -> list[str]:
    has_attention = _check_attention(model, list(layers), tower) > 0
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
        kinds = kinds_of(name)
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


def _innermost_attention(modules: Mapping[str, nn.Module]) -> list[str]:
    """Names of the modules whose class is called attention and inside of which there is no other."""
    named = [name for name, module in modules.items() if _ATTENTION.search(type(module).__name__)]
    return [name for name in named if not any(other.startswith(f"{name}.") for other in named)]


def _check_attention(model: nn.Module, layers: Sequence[str], tower: str) -> int:
    """Returns the number of attentions of a tower, each of which has its q, k and v among the layers.

    Raises:
        BackboneError: some have not, or more layers look like projections than there are; with the kinds of module.
    """
    wanted = count_attention(model, tower)
    found = {kind: [name for name in layers if kind in kinds_of(name)] for kind in "qkv"}
    if all(len(names) == wanted for names in found.values()):
        return wanted
    prefixes = {name.rpartition(".")[0] for names in found.values() for name in names}
    start = "visual." if tower == "image" else ("transformer.", "text.")
    part = {name: module for name, module in model.named_modules() if name.startswith(start)}
    missed = {
        type(part[name]).__name__
        for name in _innermost_attention(part)
        if not any(f"{prefix}.".startswith(f"{name}.") for prefix in prefixes)
    }
    unknown = f", and none in its {', '.join(sorted(missed))}" if missed else ""
    raise BackboneError(
        f"the {tower} tower has {wanted} attentions by its architecture, but "
        f"{', '.join(f'{len(names)} {kind}' for kind, names in found.items())} projections were found in it"
        f"{unknown}. LoRA would adapt something else; "
        "this version of open_clip or timm writes its attention in a way that is not known. Install the versions that "
        "adaptclip asks for, or name the layers (`targets`)."
    )


def _named(layers: dict[str, nn.Module], targets: Sequence[str], tower: str) -> list[str]:
    chosen = [name for name in layers if any(name == t or name.endswith(f".{t}") for t in targets)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            endings = {".".join(name.split(".")[-k:]) for name in layers for k in (1, 2)} | set(layers)
            has = did_you_mean(target, endings, limit=12, lead="They end in")
            raise ConfigError(f"no layer of the {tower} tower ends in {target!r}. {has}")
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
