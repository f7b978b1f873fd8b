# SPDX-License-Identifier: Apache-2.0
"""Seeds. Every random choice has a generator of its own, so that adding one never shifts another."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np

from adaptclip.files import digest

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Returns a seed in 0..2**63-1 for one purpose, independent of every other purpose; the same on every machine."""
    return int(digest([str(seed), *map(str, purpose)])[:16], 16) >> 1


def seed_everything(seed: int) -> None:
    """Seeds the global generators of random, numpy and torch (0 is a seed like any other).

    Library code draws from `generator(...)` and never from these; they are for what third parties draw.
    """
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """Returns a CPU torch generator for one purpose, for example `generator(cfg.seed, "context")`."""
    import torch

    return torch.Generator().manual_seed(derive_seed(seed, *purpose))


def numpy_generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """Returns a numpy generator for one purpose."""
    return np.random.default_rng(derive_seed(seed, *purpose))
