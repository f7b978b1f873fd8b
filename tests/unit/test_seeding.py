# SPDX-License-Identifier: Apache-2.0
"""Every purpose has its own stream, and seed 0 is a seed."""

from __future__ import annotations

import random

import numpy as np
import torch

from adaptclip.seeding import derive_seed, generator, numpy_generator, seed_everything


def test_derived_seeds_are_fixed_and_all_different():
    assert derive_seed(1, "context") == derive_seed(1, "context") == 815263702543690516
    seeds = {derive_seed(s, *p) for s in range(50) for p in ((), ("a",), ("a", 1), ("a", "1", "b"), ("ab",))}
    assert len(seeds) == 250
    assert all(0 <= s < 2**63 for s in seeds)


def test_streams_do_not_depend_on_each_other():
    alone = torch.rand(3, generator=generator(0, "order"))
    torch.rand(5, generator=generator(0, "context"))
    assert torch.equal(alone, torch.rand(3, generator=generator(0, "order")))
    assert not np.array_equal(numpy_generator(0, "a").random(3), numpy_generator(0, "b").random(3))


def test_seed_zero_seeds_everything():
    draws = []
    for _ in range(2):
        seed_everything(0)
        draws.append((random.random(), np.random.rand(), torch.rand(()).item()))
    seed_everything(1)
    assert draws[0] == draws[1] != (random.random(), np.random.rand(), torch.rand(()).item())
