"""What `accelerate launch` and `accelerate config` ask for: honoured where a recipe's flag says nothing.

Both reach a recipe as environment variables, which an `Accelerator` that is told a value ignores without a word. The
launcher writes "no" and 1 when it was asked for nothing, so these never contradict a flag.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

from accelerate import Accelerator

from adaptclip.errors import ConfigError, did_you_mean

MixedPrecision = Literal["auto", "no", "fp16", "bf16"]
"""A recipe's `--mixed-precision`; "auto" is what the launcher asks for, and no autocast where it asks for nothing."""

_PRECISIONS = ("auto", "no", "fp16", "bf16")

_OTHER_WAYS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration (tensor, context or sharded parallelism)",
}
"""Ways to split a model over processes. A frozen CLIP with few learnt numbers fits on each of them."""

_HOW = "`accelerate launch --mixed_precision no`, or answer so in `accelerate config`"


def launched_precision(wanted: str) -> str:
    """Returns the mixed precision of a run: "no", "fp16" or "bf16".

    Args:
        wanted: the flag, one of `MixedPrecision`.

    Raises:
        ConfigError: an unknown value, the launcher asks for one that the recipes cannot compute in (fp8), or for
            another one than the flag.
    """
    if wanted not in _PRECISIONS:
        raise ConfigError(f"unknown mixed_precision {wanted!r}. {did_you_mean(wanted, _PRECISIONS)}")
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower() or "no"
    if asked not in _PRECISIONS[1:]:
        raise ConfigError(
            f"the launcher asks for mixed precision {asked!r} (ACCELERATE_MIXED_PRECISION), which the recipes do not "
            f"compute in; allowed: no, fp16, bf16. Take {_HOW}"
        )
    if asked != "no" and wanted not in ("auto", asked):
        raise ConfigError(
            f"the launcher asks for mixed precision {asked!r} (accelerate launch or accelerate config), but this run "
            f"is to use {wanted!r} (--mixed-precision, or the only one of this recipe). Give both the same, leave the "
            f"flag out, or take {_HOW}"
        )
    return asked if wanted == "auto" else wanted


def launched_accumulation(wanted: int) -> int:
    """Returns the micro-batches per optimizer step, 1 or more.

    Args:
        wanted: the flag; 0 takes what the launcher asks for, and 1 where it asks for nothing.

    Raises:
        ConfigError: a number below 0, or the launcher asks for another one, or for no number.
    """
    if wanted < 0:
        raise ConfigError(f"accumulate must be 1 or more, or 0 for what the launcher asks for; got {wanted}")
    text = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "") or "1"
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(
            f"the launcher asks for {text!r} gradient accumulation steps (ACCELERATE_GRADIENT_ACCUMULATION_STEPS); it "
            "must be a whole number from 1 up"
        )
    asked = int(text)
    if asked != 1 and wanted not in (0, asked):
        raise ConfigError(
            f"the launcher asks for {asked} gradient accumulation steps (ACCELERATE_GRADIENT_ACCUMULATION_STEPS) and "
            f"--accumulate for {wanted}; give both the same, or leave one out"
        )
    return asked if wanted == 0 else wanted


def check_launcher() -> None:
    """Refuses what the launcher may ask for and the recipes do not do.

    Raises:
        ConfigError: it asks for DeepSpeed, FSDP, Megatron-LM or another way to split a model, or for torch.compile.
    """
    for variable, name in _OTHER_WAYS.items():
        if os.environ.get(variable, "").lower() in ("true", "1", "yes"):
            raise ConfigError(
                f"the launcher asks for {name} ({variable}), which the recipes do not use: the frozen model fits on "
                "each device, and data are shared out over processes. Launch without it, or run `accelerate config` "
                "again"
            )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "").lower() or "no"
    if backend != "no":
        raise ConfigError(
            f"the launcher asks for torch.compile with {backend!r} (ACCELERATE_DYNAMO_BACKEND), which would compile "
            "whole methods; launch without --dynamo_backend. lora.py compiles its image tower by --compute compile"
        )


def settled(config: Mapping[str, Any], accelerator: Accelerator) -> dict[str, Any]:
    """Returns a recipe's settings with what the launcher decided in place of "auto" and 0, for the run's record."""
    decided: dict[str, Any] = {}
    if config.get("mixed_precision") == "auto":
        decided["mixed_precision"] = accelerator.mixed_precision
    if config.get("accumulate") == 0:
        decided["accumulate"] = accelerator.gradient_accumulation_steps
    return {**config, **decided}
