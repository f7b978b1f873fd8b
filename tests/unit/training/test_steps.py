# SPDX-License-Identifier: Apache-2.0
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from adaptclip.errors import ConfigError, TrainingError
from adaptclip.training.steps import FeatureLoader, backward_and_step, is_due, train_steps
from adaptclip.training.tracking import make_accelerator
from adaptclip.types import Batch, Features

NUM_CLASSES, WIDTH = 3, 5


def _features(num_rows=20, views=1):
    generator = torch.Generator().manual_seed(0)
    values = F.normalize(torch.randn(views, num_rows, WIDTH, generator=generator), dim=-1)
    labels = torch.randint(NUM_CLASSES, (num_rows,), generator=generator)
    return Features(values, labels, tuple(f"row-{i}" for i in range(num_rows)))


def _processes(count, accumulate=1) -> list[Any]:
    """What FeatureLoader asks of the accelerators of `count` processes."""
    return [
        SimpleNamespace(
            device="cpu",
            process_index=rank,
            num_processes=count,
            gradient_accumulation_steps=accumulate,
            is_main_process=rank == 0,
        )
        for rank in range(count)
    ]


def _images_of_steps(features, num_steps, *, batch_size, processes=1, accumulate=1, seed=0):
    """For every optimizer step, the sorted positions that all processes and micro-batches see together."""
    loaders = [
        FeatureLoader(features, batch_size=batch_size, seed=seed, accelerator=accelerator)
        for accelerator in _processes(processes, accumulate)
    ]
    steps = []
    for step in range(num_steps):
        micro_steps = range(step * accumulate, (step + 1) * accumulate)
        parts = [loader.batch(m).index for loader, m in itertools.product(loaders, micro_steps)]
        assert len({len(part) for part in parts}) == 1, "unequal parts would weigh images unequally"
        steps.append(sorted(torch.cat(parts).tolist()))
    return steps


def test_an_epoch_sees_every_image_once_but_for_the_incomplete_step():
    features = _features(20)
    loader = FeatureLoader(features, batch_size=6, seed=0, accelerator=_processes(1)[0])
    assert loader.steps_per_epoch == 3
    epoch = list(itertools.chain(*_images_of_steps(features, 3, batch_size=6)))
    assert len(epoch) == len(set(epoch)) == 18


def test_epochs_and_seeds_differ_and_repeat():
    features = _features(20)
    steps = _images_of_steps(features, 6, batch_size=6)
    assert steps[:3] != steps[3:]
    assert steps == _images_of_steps(features, 6, batch_size=6)
    assert steps != _images_of_steps(features, 6, batch_size=6, seed=1)


@pytest.mark.parametrize(("processes", "accumulate", "batch_size"), [(2, 1, 4), (1, 2, 4), (2, 2, 2), (4, 1, 2)])
def test_the_division_of_a_step_does_not_change_its_images(processes, accumulate, batch_size):
    features = _features(20)
    expected = _images_of_steps(features, 5, batch_size=8)
    got = _images_of_steps(features, 5, batch_size=batch_size, processes=processes, accumulate=accumulate)
    assert got == expected


def test_a_split_smaller_than_a_step_is_one_step():
    features = _features(10)
    loader = FeatureLoader(features, batch_size=32, seed=0, accelerator=_processes(1)[0])
    assert loader.steps_per_epoch == 1
    assert sorted(loader.batch(7).index.tolist()) == list(range(10))
    assert [len(step) for step in _images_of_steps(features, 3, batch_size=32, processes=3)] == [9] * 3


def test_batch_holds_the_rows_it_names_in_the_epochs_view():
    features = _features(8, views=3)
    loader = FeatureLoader(features, batch_size=4, seed=0, accelerator=_processes(1)[0])
    for micro_step in range(8):
        batch = loader.batch(micro_step)
        view = micro_step // 2 % 3
        assert batch.features is not None
        assert torch.equal(batch.features, features.values[view][batch.index])
        assert torch.equal(batch.labels, features.labels[batch.index])


def test_bad_loaders():
    with pytest.raises(ConfigError, match="2 training images cannot be divided among 3 processes × 1"):
        FeatureLoader(_features(2), batch_size=1, seed=0, accelerator=_processes(3)[0])
    with pytest.raises(ConfigError, match="batch_size must be 1 or more, got 0"):
        FeatureLoader(_features(2), batch_size=0, seed=0, accelerator=_processes(1)[0])


def test_is_due():
    assert [step for step in range(1, 11) if is_due(step, 4, 10)] == [4, 8, 10]
    assert [step for step in range(1, 11) if is_due(step, 0, 10)] == [10]


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(NUM_CLASSES, WIDTH))

    def forward(self, batch: Batch):
        assert batch.features is not None
        return 10 * batch.features @ self.weight.T


def _train(num_steps, *, batch_size, accumulate=1, max_grad_norm=None, spoil_at=None):
    """Runs the loop of the recipes; returns the weights, the gradient norms and the steps that were due."""
    accelerator = make_accelerator(accumulate=accumulate, cpu=True)
    model = Linear()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    loader = FeatureLoader(_features(), batch_size=batch_size, seed=0, accelerator=accelerator)
    model, optimizer = accelerator.prepare(model, optimizer)
    norms, due = [], []
    for step, batch in train_steps(loader, num_steps, accelerator):
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(batch), batch.labels)
            if step == spoil_at:
                loss = loss * float("nan")
            norm = backward_and_step(
                accelerator, loss, model, optimizer, scheduler, step=step, max_grad_norm=max_grad_norm
            )
        if is_due(step, 2, num_steps):
            due.append(step)
            norms.append(norm)
    assert scheduler.last_epoch == num_steps
    return accelerator.unwrap_model(model).weight.detach(), norms, due


def test_loop_is_plain_sgd():
    weight, norms, due = _train(5, batch_size=8)
    model = Linear()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    features = _features()
    expected_norms = []
    for step, rows in enumerate(_images_of_steps(features, 5, batch_size=8), start=1):
        optimizer.param_groups[0]["lr"] = 0.1 / step
        batch = Batch(features.labels[rows], torch.tensor(rows), features.values[0, rows])
        optimizer.zero_grad()
        F.cross_entropy(model(batch), batch.labels).backward()
        assert model.weight.grad is not None
        expected_norms.append(model.weight.grad.norm().item())
        optimizer.step()
    torch.testing.assert_close(weight, model.weight.detach(), atol=1e-6, rtol=1e-5)
    assert due == [2, 4, 5]
    assert norms == pytest.approx([expected_norms[i - 1] for i in due], rel=1e-4)


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_accumulated_steps_equal_whole_steps(max_grad_norm):
    whole, norms, due = _train(6, batch_size=8, max_grad_norm=max_grad_norm)
    parts, part_norms, part_due = _train(6, batch_size=2, accumulate=4, max_grad_norm=max_grad_norm)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)
    assert part_due == due == [2, 4, 6]
    assert part_norms == pytest.approx(norms, rel=1e-4)


def test_clipping_changes_the_steps():
    assert not torch.allclose(_train(3, batch_size=8)[0], _train(3, batch_size=8, max_grad_norm=0.5)[0])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_loss_that_is_not_finite_stops_and_names_the_step(accumulate):
    with pytest.raises(TrainingError, match=r"the loss of step 3 is not finite \(here: nan\)"):
        _train(5, batch_size=4, accumulate=accumulate, spoil_at=3)
    # A loop that was left in the middle of an accumulated step must not shift the next one.
    assert _train(4, batch_size=4, accumulate=2)[2] == [2, 4]


def _one_step(accelerator, loss, model):
    optimizer = SGD(model.parameters(), lr=0.1)
    scheduler = LambdaLR(optimizer, lambda step: 1.0)
    backward_and_step(accelerator, loss, model, optimizer, scheduler, step=9)
    return scheduler.last_epoch


def test_gradient_that_is_not_finite_stops_before_the_weights_are_lost():
    model = Linear()
    loss = model.weight.sum().sqrt()  # 0, with an infinite slope
    with pytest.raises(TrainingError, match="the gradient of step 9 is not finite"):
        _one_step(make_accelerator(cpu=True), loss, model)
    assert torch.equal(model.weight.detach(), torch.zeros(NUM_CLASSES, WIDTH))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_loss_that_is_not_finite_stops_before_the_weights_are_lost(accumulate):
    model = Linear()
    with pytest.raises(TrainingError, match=r"the loss of step 9 is not finite \(here: inf\)"):
        _one_step(make_accelerator(accumulate=accumulate, cpu=True), (model.weight.sum() + 1) / 0, model)
    assert torch.equal(model.weight.detach(), torch.zeros(NUM_CLASSES, WIDTH))


class _Fp16Accelerator:
    """Answers like an accelerator whose loss scaler found an overflow, or none."""

    num_processes = 1
    sync_gradients = True
    scaler = object()

    def __init__(self, skipped):
        self.optimizer_step_was_skipped = skipped

    def backward(self, loss):
        loss.backward()

    def unscale_gradients(self, optimizer):
        pass


@pytest.mark.parametrize("skipped", [False, True])
def test_schedule_waits_for_a_step_that_fp16_skipped(skipped):
    model = Linear()
    assert _one_step(_Fp16Accelerator(skipped), model.weight.sum(), model) == (0 if skipped else 1)


def test_prepared_scheduler_is_refused():
    accelerator = make_accelerator(cpu=True)
    model = Linear()
    optimizer = SGD(model.parameters(), lr=0.1)
    scheduler = accelerator.prepare(LambdaLR(optimizer, lambda step: 1.0))
    with pytest.raises(TrainingError, match=r"leave the scheduler out of accelerator\.prepare"):
        backward_and_step(accelerator, model.weight.sum(), model, optimizer, scheduler, step=1)


def test_a_resumed_loop_yields_the_rest():
    accelerator = Accelerator(cpu=True)
    loader = FeatureLoader(_features(), batch_size=8, seed=0, accelerator=accelerator)
    everything = [(step, batch.index.tolist()) for step, batch in train_steps(loader, 7, accelerator)]
    rest = [(step, batch.index.tolist()) for step, batch in train_steps(loader, 7, accelerator, start=4)]
    assert rest == everything[4:]
    assert [step for step, _ in everything] == list(range(1, 8))
    assert list(train_steps(loader, 7, accelerator, start=7)) == []
