# SPDX-License-Identifier: Apache-2.0
"""Balanced epochs and class weights, against counts and formulas computed apart."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from adaptclip.training.mitigation import balanced_order, effective_number_weights, inverse_frequency

SIZES = {0: 3, 1: 40, 2: 17, -1: 5}


def _strata(sizes=SIZES) -> torch.Tensor:
    rows = torch.cat([torch.full((size,), place) for place, size in sizes.items()])
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


def test_an_epoch_shows_strata_alike_and_is_as_long_as_the_split():
    strata = _strata()
    for epoch in range(6):
        order = balanced_order(strata, seed=0, epoch=epoch)
        assert len(order) == len(strata) == 65
        shown = Counter(strata[order].tolist())
        assert shown == {0: 20, 1: 20, 2: 20, -1: 5}
        times = Counter(order.tolist())
        for place, (least, most) in {0: (6, 7), 1: (0, 1), 2: (1, 2), -1: (1, 1)}.items():
            own = [times[row] for row in torch.nonzero(strata == place).flatten().tolist()]
            assert (min(own), max(own)) == (least, most), f"stratum {place}"


def test_shares_that_are_no_whole_number_take_turns():
    strata = _strata({0: 4, 1: 9, 2: 7})
    shown = [Counter(strata[balanced_order(strata, seed=3, epoch=e)].tolist()) for e in range(3)]
    assert all(sorted(counts.values()) == [6, 7, 7] for counts in shown)
    assert sum(shown, Counter()) == {0: 20, 1: 20, 2: 20}


def test_the_order_depends_on_seed_and_epoch_alone():
    strata = _strata()
    one = balanced_order(strata, seed=1, epoch=4)
    torch.manual_seed(7)
    assert torch.equal(one, balanced_order(strata.clone(), seed=1, epoch=4))
    assert not torch.equal(one, balanced_order(strata, seed=2, epoch=4))
    assert not torch.equal(one, balanced_order(strata, seed=1, epoch=5))


def test_every_image_of_a_large_stratum_comes_equally_often_over_the_epochs():
    strata, epochs = _strata(), 400
    orders = torch.cat([balanced_order(strata, seed=0, epoch=e) for e in range(epochs)])
    times = torch.bincount(orders, minlength=len(strata))[strata == 1].numpy()
    # Each of the 40 images is in a random half of the epochs: mean 200, standard deviation 10.
    assert times.sum() == 20 * epochs
    assert abs(times - 200).max() < 45
    assert 5 < times.std() < 15
    # The batches are mixed: a stratum's positions are spread over the epoch.
    places = torch.nonzero(strata[balanced_order(strata, seed=0, epoch=0)] == 1).flatten().double()
    assert 20 < places.mean() < 45
    assert places.std() > 10


def test_inverse_frequency_is_scikit_learns_balanced_weight():
    labels = np.repeat([0, 1, 2], [50, 7, 300])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert inverse_frequency(np.bincount(labels)) == pytest.approx(expected)
    assert inverse_frequency(np.array([4, 0, 12])).tolist() == pytest.approx([2, 0, 2 / 3])


@pytest.mark.parametrize("beta", [0.9, 0.99, 0.999, 0.9999])
def test_effective_numbers_follow_the_paper(beta):
    counts = [5, 50, 500, 5000]
    # The effective number is the geometric series 1 + beta + ... + beta^(n-1) (the paper's proposition).
    effective = np.array([sum(beta**k for k in range(n)) for n in counts])
    weights = effective_number_weights(np.array(counts), beta)
    assert weights / weights[0] == pytest.approx(effective[0] / effective)
    assert (weights * counts).sum() / sum(counts) == pytest.approx(1)


def test_effective_numbers_at_their_ends():
    counts = np.array([3, 0, 30, 300])
    assert effective_number_weights(counts, 0.0).tolist() == pytest.approx([1, 0, 1, 1])
    nearly = effective_number_weights(counts, 1 - 1e-12)
    assert nearly == pytest.approx(inverse_frequency(counts), rel=1e-6)
    assert effective_number_weights(np.array([8, 8]), 0.99).tolist() == pytest.approx([1, 1])
