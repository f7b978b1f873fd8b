# SPDX-License-Identifier: Apache-2.0
"""Settings that the recipes share; each recipe's Config adds its own, and its paper's defaults."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from adaptclip.errors import ConfigError

MUST_EXIST = "must exist"
"""Marks the type of a flag or argument whose file or folder is read; what is not there is refused at the door."""

ExistingPath = Annotated[Path, MUST_EXIST]

_COUNTS = (
    "batch_size", "accumulate", "epochs", "steps", "views", "save_every", "image_size", "shots", "seed", "seeds",
    "threads", "search_trials", "rank", "n_ctx", "top_k", "min_n", "classes", "num_classes", "patients_with",
)  # fmt: skip
_RATES = ("lr", "head_lr", "memory_gib", "search_seconds")
_OR_NONE = ("save_every", "views", "shots", "seed", "seeds")
"""Counts of which 0 is one: no checkpoints by steps, the evaluation transform, all images."""


@dataclass(frozen=True)
class DataSettings:
    """What is judged, with which model, and where everything goes."""

    card: str = "digits"
    """Name in data_cards/, path of a card, or a folder of images with one folder per class."""
    data_root: ExistingPath | None = None
    """Folder that holds the card's files; the card's own folder if not given."""
    backbone: str = "starter"
    """open_clip architecture, hf-hub:ORG/NAME, local-dir:FOLDER, or starter (comes with the package)."""
    pretrained: str | None = None
    """open_clip weights tag or checkpoint file; not for the other spellings."""
    image_size: int = 0
    """Side of the images in pixels; 0 is the model's own, another resizes its position embeddings and says so."""
    on_bad_image: Literal["error", "skip"] = "error"
    """What an unreadable image does; what was skipped is listed."""
    gates: str = "card"
    """card, a YAML file of gates, or report (judge by the card's gates, but do not let them decide the exit code)."""
    cache: Path = Path(".cache/features")
    """Image features of the frozen tower, shared by all recipes, shots and seeds."""
    out: Path = Path("runs/run")
    """Run folder: settings, metrics, predictions, report, artifact."""
    overwrite: bool = False
    """Replace the run in `out`."""


@dataclass(frozen=True)
class RunSettings(DataSettings):
    """The same for what learns from images. A setting that is not given (None) takes the preset's value."""

    shots: int = 16
    """Labelled training images per class; 0 means all."""
    rule: Literal["nested", "coop"] = "nested"
    """How the images are drawn: 1 shot is part of 2 and so on (nested), or as the published code does (coop)."""
    seed: int = 1
    """Chooses the few-shot images, what the method draws at first, and the order of images."""
    preset: Literal["auto", "smoke", "paper"] = "auto"
    """Where settings come from that are not given: the paper, or a short smoke test; auto: smoke for the default."""
    mitigate: str = ""
    """Balance of groups or classes, such as group-sampling:sex, class-weights or group-dro:sex; empty for none."""
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    """Autocast of the towers while training; auto does what accelerate launch was told."""
    accumulate: int = 0
    """Micro-batches per optimizer step; 0 does what accelerate launch was told, or 1."""
    save_every: int = 100
    """Optimizer steps between checkpoints; one is also written every five minutes."""
    trackers: str = ""
    """Accelerate's trackers, separated by commas; metrics.jsonl is always written."""
    resume: bool = False
    """Go on with the run in `out`; a finished one is judged again."""


def refuse_settings(config: Any, why: str, *names: str) -> None:
    """Refuses settings that are given and have nothing to change.

    Args:
        config: of a recipe.
        why: they have nothing to change, as the start of a sentence.
        *names: of fields; "auto", 1 and "no" count as not given, like the default.

    Raises:
        ConfigError: one of them is given.
    """
    usual = {field.name: field.default for field in fields(config)}
    for name in names:
        value = getattr(config, name)
        if value not in (usual[name], *_NOT_GIVEN.get(name, ())):
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{why}, so {flag} (got {value}) has nothing to change; leave it out")


_NOT_GIVEN: dict[str, tuple[Any, ...]] = {"mixed_precision": ("no",), "accumulate": (1,)}


def check_numbers(settings: Any) -> None:
    """Refuses lengths, batch sizes and rates that no training can have, before anything is read or made.

    Args:
        settings: of a recipe, or the schedule of a method. A 0 is allowed where it is the default, and there has a
            meaning of its own; None is not given.

    Raises:
        ConfigError: a number is out of range.
    """
    for field in fields(settings):
        default = None if field.default is MISSING else field.default
        check_number(field.name, getattr(settings, field.name), default, "; leave it out for the paper's")


def check_number(name: str, value: Any, default: Any = None, without: str = "") -> None:
    """Refuses a number that cannot be meant, by its name; one for every flag, setting and argument of that name.

    Args:
        name: of the setting, such as batch_size; one of which nothing is known is taken as it is.
        value: the number, or several; None is not given.
        default: what it is where it is not given; 0 has a meaning of its own where it is the default.
        without: what to say where the default is None.

    Raises:
        ConfigError: it is out of range.
    """
    zero = default == 0 or name in _OR_NONE
    known = f"; the default is {default}" if default is not None and not isinstance(default, tuple) else without
    said = "; 0 has a meaning of its own, see --help" if zero and name not in ("seed", "seeds") else known
    for number in value if isinstance(value, tuple | list) else (value,):
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        if name == "min_scale" and not 0 < number <= 1:
            raise ConfigError(f"min_scale must be a share of the area, above 0 and up to 1, got {number}")
        if name in _COUNTS and number < (0 if zero else 1):
            raise ConfigError(
                f"{name} must be {'a whole number from 0 up' if zero else '1 or more'}, got {number}{said}"
            )
        if name in _RATES and not (math.isfinite(number) and (number > 0 or (zero and number == 0))):
            raise ConfigError(f"{name} must be a positive number, got {number}{said}")
