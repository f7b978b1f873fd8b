# SPDX-License-Identifier: Apache-2.0
"""Group DRO against the paper's equations computed by hand, in numpy and with autograd."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from adaptclip.training.mitigation import GroupDRO

PLACE = torch.tensor([0, 1, 1, 2, 0, 1, 2, 2, 2, -1, -1, 1])
COUNTS = np.array([2, 4, 4])


def test_one_image_at_a_time_is_the_papers_algorithm():
    """q'_g = q_g exp(eta loss) for the drawn group, q = q' / sum q', step on q_g loss (Sagawa et al., algorithm 1)."""
    place = PLACE[PLACE >= 0]
    dro = GroupDRO(place, step=0.3)
    rng = np.random.default_rng(0)
    q = np.full(3, 1 / 3)
    for _ in range(50):
        row, loss = int(rng.integers(len(place))), float(rng.exponential())
        group = int(place[row])
        q[group] *= math.exp(0.3 * loss)
        q /= q.sum()
        weight = dro.weigh(torch.tensor([loss]), torch.tensor([row]))
        assert weight.item() == pytest.approx(q[group], rel=1e-6)
        assert dro.shares.numpy() == pytest.approx(q, rel=1e-6)


def test_two_groups_by_hand():
    """Equal weights, losses 1 and 3, step ln 2: q' = (1/2 · 2, 1/2 · 8), so q = (1/5, 4/5)."""
    dro = GroupDRO(torch.tensor([0, 1]), step=math.log(2))
    weights = dro.weigh(torch.tensor([1.0, 3.0]), torch.tensor([0, 1]))
    assert dro.shares.tolist() == pytest.approx([0.2, 0.8])
    assert (weights * torch.tensor([1.0, 3.0])).mean().item() == pytest.approx(0.2 * 1 + 0.8 * 3)


@pytest.mark.parametrize("adjust", [0.0, 1.5])
def test_a_batch_moves_all_its_groups_and_the_loss_is_their_weighted_mean(adjust):
    dro = GroupDRO(PLACE, step=0.2, adjust=adjust)
    generator = torch.Generator().manual_seed(0)
    q = np.full(3, 1 / 3)
    for rows in ([0, 1, 2, 3, 9], [1, 5, 11, 4], [3, 6, 7, 8, 0, 10, 9], [9, 10]):
        losses = torch.rand(len(rows), generator=generator) * 4
        place = PLACE[rows].numpy()
        means = [losses.numpy()[place == g].mean() if (place == g).any() else None for g in range(3)]
        for g, mean in enumerate(means):
            if mean is not None:
                q[g] *= np.exp(0.2 * (mean + adjust / np.sqrt(COUNTS[g])))
        q /= q.sum()
        weights = dro.weigh(losses, torch.tensor(rows))
        assert dro.shares.numpy() == pytest.approx(q, rel=1e-6)
        unknown = losses.numpy()[place == -1]
        expected = 10 / 12 * sum(q[g] * mean for g, mean in enumerate(means) if mean is not None)
        expected += 2 / 12 * unknown.mean() if len(unknown) else 0
        assert (weights * losses).mean().item() == pytest.approx(expected, rel=1e-5)


def test_the_gradient_is_that_of_the_weighted_group_losses():
    generator = torch.Generator().manual_seed(1)
    features, labels = torch.randn(10, 4, generator=generator), torch.randint(3, (10,), generator=generator)
    rows = torch.arange(10)[PLACE[:10] >= 0]
    weight = torch.zeros(3, 4, requires_grad=True)
    dro = GroupDRO(PLACE[PLACE >= 0], step=1.0)
    losses = F.cross_entropy(features[: len(rows)] @ weight.T, labels[: len(rows)], reduction="none")
    (dro.weigh(losses.detach(), torch.arange(len(rows))) * losses).mean().backward()
    expected = torch.zeros(3, 4)
    for g in range(3):
        own = torch.nonzero(PLACE[PLACE >= 0][: len(rows)] == g).flatten()
        apart = torch.zeros(3, 4, requires_grad=True)
        F.cross_entropy(features[own] @ apart.T, labels[own]).backward()
        assert apart.grad is not None
        expected += float(dro.shares[g]) * apart.grad
    torch.testing.assert_close(weight.grad, expected)


def test_large_losses_do_not_drown_the_weights():
    dro = GroupDRO(torch.tensor([0, 1]), step=1.0)
    for _ in range(200):
        dro.weigh(torch.tensor([100.0, 0.0]), torch.tensor([0, 1]))
    assert dro.shares.tolist() == pytest.approx([1, 0])
    for _ in range(200):  # in plain arithmetic q of the second group would be stuck at 0
        dro.weigh(torch.tensor([0.0, 101.0]), torch.tensor([0, 1]))
    assert dro.shares.tolist() == pytest.approx([0, 1])


def test_a_planted_minority_is_served():
    """Two groups that want opposite answers, 95 to 5: plain training serves the majority, group DRO both alike."""
    x = torch.cat([torch.ones(95, 1), torch.ones(5, 1)])
    y = torch.cat([torch.zeros(95), torch.ones(5)])
    place = y.long()

    def worst_loss(dro: GroupDRO | None) -> float:
        bias = torch.zeros(1, requires_grad=True)
        optimizer = torch.optim.SGD([bias], lr=0.5)
        for _ in range(400):
            losses = F.binary_cross_entropy_with_logits(x[:, 0] * bias, y, reduction="none")
            weights = torch.ones(100) if dro is None else dro.weigh(losses.detach(), torch.arange(100))
            optimizer.zero_grad()
            (weights * losses).mean().backward()
            optimizer.step()
        losses = F.binary_cross_entropy_with_logits(x[:, 0] * bias, y, reduction="none")
        return max(losses[place == g].mean().item() for g in (0, 1))

    assert worst_loss(None) == pytest.approx(-math.log(0.05), abs=0.1)
    assert worst_loss(GroupDRO(place, step=0.1)) == pytest.approx(math.log(2), abs=0.05)
