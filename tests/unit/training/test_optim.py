# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR

from adaptclip.errors import ConfigError
from adaptclip.training.optim import build_optimizer, build_scheduler, epoch_cosine_lr


def _param():
    return nn.Parameter(torch.ones(2))


def _rates(total_steps, steps_per_epoch, lr=0.002, **options):
    """The learning rate that every optimizer step is taken with."""
    optimizer = SGD([_param()], lr=lr)
    scheduler = build_scheduler(optimizer, total_steps=total_steps, steps_per_epoch=steps_per_epoch, **options)
    rates = []
    for _ in range(total_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_coop_schedule_known_values():
    # By hand for 4 epochs of 2 steps: 1e-5, then 0.002 times (1 + cos 0°)/2, (1 + cos 45°)/2, (1 + cos 90°)/2.
    expected = [1e-5, 0.002, 0.001 * (1 + math.sqrt(0.5)), 0.001]
    assert _rates(8, 2) == pytest.approx([rate for rate in expected for _ in range(2)], rel=1e-12)


@pytest.mark.parametrize("epochs", [2, 50, 200])
@pytest.mark.parametrize("warmup_epochs", [0, 1, 3])
def test_coop_schedule_is_constant_warmup_before_torchs_cosine(epochs, warmup_epochs):
    # Independent table: torch's own annealing with T_max = epochs, asked for the first time when the warm-up is over.
    optimizer = SGD([_param()], lr=0.002)
    cosine = CosineAnnealingLR(optimizer, T_max=epochs)
    expected = []
    for epoch in range(epochs):
        expected.append(1e-5 if epoch < warmup_epochs else optimizer.param_groups[0]["lr"])
        if epoch >= warmup_epochs:
            optimizer.step()
            cosine.step()
    got = [
        epoch_cosine_lr(epoch, epochs=epochs, lr=0.002, warmup_epochs=warmup_epochs, warmup_lr=1e-5)
        for epoch in range(epochs)
    ]
    assert got == pytest.approx(expected, rel=1e-9)


@given(st.integers(1, 7), st.integers(2, 40))
def test_rate_changes_only_between_epochs(steps_per_epoch, epochs):
    rates = _rates(epochs * steps_per_epoch, steps_per_epoch)
    assert len(set(rates)) == epochs
    assert all(rates[i] == rates[i - i % steps_per_epoch] for i in range(len(rates)))
    assert rates[0] == pytest.approx(1e-5)
    assert max(rates) == pytest.approx(0.002)


def test_half_an_epoch_at_the_end_counts_as_an_epoch():
    assert _rates(5, 2) == _rates(6, 2)[:5]


def test_every_group_keeps_its_own_peak():
    optimizer = SGD([{"params": [_param()], "lr": 0.1}, {"params": [_param()], "lr": 0.2}], lr=1.0)
    scheduler = build_scheduler(optimizer, total_steps=4, steps_per_epoch=1)
    assert scheduler.get_last_lr() == pytest.approx([1e-5, 1e-5])
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([0.1, 0.2])


def test_constant_schedule():
    assert _rates(6, 2, kind="constant") == pytest.approx([1e-5] * 2 + [0.002] * 4)


def test_cosine_per_step_known_values():
    # By hand for 4 steps from 0.002 to 0: cos 0°, 45°, 90°, 135°; epochs and warm-up play no part.
    half = math.sqrt(0.5)
    expected = [0.002, 0.001 * (1 + half), 0.001, 0.001 * (1 - half)]
    assert _rates(4, 2, kind="cosine_per_step") == pytest.approx(expected, rel=1e-12)
    assert _rates(4, 1, kind="cosine_per_step", warmup_epochs=3) == _rates(4, 4, kind="cosine_per_step")


@pytest.mark.parametrize(("total_steps", "final_lr"), [(1, 0.0), (20, 0.0), (500, 1e-6)])
def test_cosine_per_step_is_torchs_cosine(total_steps, final_lr):
    optimizer = SGD([_param()], lr=2e-4)
    cosine = CosineAnnealingLR(optimizer, T_max=total_steps, eta_min=final_lr)
    expected = []
    for _ in range(total_steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(final_lr, abs=1e-12)
    rates = _rates(total_steps, 7, lr=2e-4, kind="cosine_per_step", final_lr=final_lr)
    assert rates == pytest.approx(expected, rel=1e-9)
    assert rates[0] == 2e-4


def test_cosine_per_step_ends_every_group_at_the_final_rate():
    optimizer = SGD([{"params": [_param()], "lr": 0.1}, {"params": [_param()], "lr": 0.2}], lr=1.0)
    scheduler = build_scheduler(optimizer, total_steps=2, steps_per_epoch=1, kind="cosine_per_step", final_lr=0.05)
    seen = [scheduler.get_last_lr()]
    for _ in range(2):
        optimizer.step()
        scheduler.step()
        seen.append(scheduler.get_last_lr())
    assert seen == [pytest.approx(rates) for rates in ([0.1, 0.2], [0.075, 0.125], [0.05, 0.05])]


def test_training_within_the_warmup_warns():
    with pytest.warns(UserWarning, match="all 3 steps lie within the warm-up"):
        rates = _rates(3, 5)
    assert rates == pytest.approx([1e-5] * 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "cosin"}, 'Did you mean "cosine"'),
        ({"total_steps": 0}, "must be 1 or more, got 0"),
        ({"warmup_epochs": -1}, "must be 0 or more, got -1"),
        ({"kind": "cosine_per_stp"}, 'Did you mean "cosine_per_step"'),
        ({"kind": "cosine_per_step", "final_lr": -1.0}, "between 0 and the peak rate 0.1, got -1.0"),
        ({"kind": "cosine_per_step", "final_lr": 0.2}, "between 0 and the peak rate 0.1, got 0.2"),
        ({"kind": "cosine_per_step", "final_lr": float("nan")}, "got nan"),
        ({"final_lr": 1e-6}, "belongs to the schedule \"cosine_per_step\", got 1e-06 for 'cosine'"),
    ],
)
def test_bad_schedules(options, message):
    with pytest.raises(ConfigError, match=message):
        build_scheduler(SGD([_param()], lr=0.1), **({"total_steps": 4, "steps_per_epoch": 2} | options))


def test_sgd_step_follows_its_definition():
    param = nn.Parameter(torch.tensor([1.0]))
    optimizer = build_optimizer([param], name="sgd", lr=0.1, weight_decay=0.5, momentum=0.9)
    for _ in range(2):
        param.grad = torch.tensor([2.0])
        optimizer.step()
    # v1 = 2 + 0.5·1 = 2.5, w1 = 0.75; v2 = 0.9·2.5 + 2 + 0.5·0.75 = 4.625, w2 = 0.2875
    assert param.item() == pytest.approx(0.2875)


def test_adamw_decay_is_decoupled():
    param = nn.Parameter(torch.tensor([1.0]))
    optimizer = build_optimizer([param], name="adamw", lr=0.1, weight_decay=0.5)
    param.grad = torch.tensor([0.0])
    optimizer.step()
    assert param.item() == pytest.approx(0.95)


@pytest.mark.parametrize(("options", "eps"), [({}, 1e-8), ({"eps": 0.5}, 0.5)])
def test_adamw_step_follows_its_definition(options, eps):
    # First step, no decay: the bias-corrected moments are g and g², so the step is lr · g / (|g| + eps).
    param = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = build_optimizer([param], name="adamw", lr=0.1, weight_decay=0.0, **options)
    param.grad = torch.tensor([2.0], dtype=torch.float64)
    optimizer.step()
    assert param.item() == pytest.approx(1 - 0.1 * 2 / (2 + eps), abs=1e-12)


def test_frozen_parameters_are_left_out():
    frozen = _param()
    frozen.requires_grad_(False)
    optimizer = build_optimizer([frozen, _param()], name="sgd", lr=0.1, weight_decay=0.0)
    assert len(optimizer.param_groups[0]["params"]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "sdg"}, "unknown optimizer 'sdg'. Did you mean \"sgd\""),
        ({"lr": 0.0}, "lr must be a positive number, got 0.0"),
        ({"lr": float("nan")}, "lr must be a positive number, got nan"),
        ({"weight_decay": -1.0}, "weight_decay must be 0 or more, got -1.0"),
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1, got 1.0"),
        ({"eps": 0.0}, "eps must be a positive number, got 0.0"),
        ({"params": []}, "nothing to train"),
    ],
)
def test_bad_optimizers(options, message):
    arguments = {"params": [_param()], "name": "sgd", "lr": 0.1, "weight_decay": 0.0} | options
    with pytest.raises(ConfigError, match=message):
        build_optimizer(arguments.pop("params"), **arguments)


def test_cosine_per_step_with_a_warm_up():
    optimizer = SGD([_param()], lr=0.4)
    scheduler = build_scheduler(optimizer, total_steps=10, steps_per_epoch=5, kind="cosine_per_step", warmup_steps=4)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    # Linear to the peak in 4 steps, then half a cosine over the other 6.
    expected = [0.1, 0.2, 0.3, 0.4] + [0.2 * (1 + math.cos(math.pi * s / 6)) for s in range(6)]
    assert rates == pytest.approx(expected)
    for options in ({"kind": "cosine_per_step", "warmup_steps": 10}, {"kind": "cosine", "warmup_steps": 3}):
        with pytest.raises(ConfigError, match="warmup_steps"):
            build_scheduler(optimizer, total_steps=10, steps_per_epoch=5, **options)  # type: ignore[arg-type]
