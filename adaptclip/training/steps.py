# SPDX-License-Identifier: Apache-2.0
"""What a visible training loop gets wrong easily: which images a step sees, and what one step does.

The loop itself stays in the recipe:

    for step, batch in train_steps(loader, cfg.steps, accelerator, start=start, run=run):
        with accelerator.accumulate(adapter):
            loss = mitigation.loss(adapter(batch), batch)
            grad_norm = backward_and_step(accelerator, loss, adapter, optimizer, scheduler, step=step)
        if is_due(step, 50, cfg.steps):
            run.log(step, loss=loss, grad_norm=grad_norm, lr=scheduler.get_last_lr()[0])
        if run.save_is_due(step, cfg.steps):
            save_checkpoint(run.checkpoints, step, adapter, optimizer, scheduler, accelerator, mitigation)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from adaptclip.errors import ConfigError, TrainingError
from adaptclip.progress import progress_bar
from adaptclip.seeding import generator
from adaptclip.training import interruption
from adaptclip.training.mitigation import balanced_order
from adaptclip.types import Batch, Features

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from adaptclip.training.interruption import Pace

BatchT = TypeVar("BatchT", covariant=True)


class Loader(Protocol[BatchT]):
    """Anything that can say which images a micro-step sees, without knowing the steps before it."""

    def batch(self, micro_step: int) -> BatchT:
        """Returns this process's batch of a micro-step, counted from 0."""
        ...


class HasPace(Protocol):
    """A run, as far as a loop is concerned."""

    @property
    def pace(self) -> Pace:
        """Says when to stop."""
        ...


def _order(num_rows: int, *, seed: int, epoch: int) -> Tensor:
    return torch.randperm(num_rows, generator=generator(seed, "order of the images", epoch))


class StepPlan:
    """Which images each micro-step sees: a pure function of (seed, step), so that there is nothing to save or skip.

    One optimizer step sees `batch_size` × processes × accumulated micro-batches images. Which images, and in which
    epoch, depends only on the seed and on that product, so one process with batches of 32, two with batches of 16, and
    one that accumulates two batches of 16 take the same steps.

    An epoch visits the images in a fresh order and leaves out the last, incomplete step, except when the whole split
    is smaller than one step: then a step is the whole split, less what cannot be divided equally (equal parts are what
    makes the mean of the parts' losses the loss of the whole).

    With strata an epoch is as long, and shows each of them equally often instead of every image once.

    Attributes:
        steps_per_epoch: optimizer steps per epoch, 1 or more.
    """

    def __init__(
        self, num_rows: int, *, batch_size: int, seed: int, accelerator: Accelerator, strata: Tensor | None = None
    ) -> None:
        """Divides the images into steps.

        Args:
            num_rows: N, images of the training split.
            batch_size: images per process and micro-step.
            seed: of the order.
            accelerator: tells the number of processes and of accumulated micro-batches.
            strata: (N,) what is shown equally often (`balanced_order`); None shows every image once.

        Raises:
            ConfigError: `batch_size` is not positive, or there are fewer images than parts of a step.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size must be 1 or more, got {batch_size}")
        order = partial(_order, num_rows) if strata is None else partial(balanced_order, strata)
        self._order = lru_cache(maxsize=2)(lambda epoch: order(seed=seed, epoch=epoch))
        self._rank, self._processes = accelerator.process_index, accelerator.num_processes
        self._accumulate = accelerator.gradient_accumulation_steps
        parts = self._processes * self._accumulate
        if num_rows < parts:
            raise ConfigError(
                f"{num_rows} training images cannot be divided among {self._processes} processes × "
                f"{self._accumulate} accumulated batches; use fewer of them or more images"
            )
        self._part = min(batch_size, num_rows // parts)
        self.steps_per_epoch = max(1, num_rows // (batch_size * parts))

    def rows(self, micro_step: int) -> tuple[int, Tensor]:
        """Returns the epoch and this process's rows (B,) of a micro-step.

        Args:
            micro_step: 0, 1, 2, …; there are `accumulate` of them per optimizer step.
        """
        step, turn = divmod(micro_step, self._accumulate)
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        part = (step_in_epoch * self._accumulate + turn) * self._processes + self._rank
        order = self._order(epoch)
        return epoch, order[part * self._part : (part + 1) * self._part].clone()


class FeatureLoader:
    """Batches of cached features, divided into steps by `StepPlan`.

    Attributes:
        steps_per_epoch: optimizer steps per epoch, 1 or more.
    """

    def __init__(
        self,
        features: Features,
        *,
        batch_size: int,
        seed: int,
        accelerator: Accelerator,
        strata: Tensor | None = None,
    ) -> None:
        """Divides the images into steps.

        Args:
            features: of the training split, (V, N, D); epoch e reads view e mod V.
            batch_size: images per process and micro-step.
            seed: of the order.
            accelerator: tells the number of processes and of accumulated micro-batches, and the device.
            strata: (N,) what is shown equally often (`Mitigation.strata`); None shows every image once per epoch.

        Raises:
            ConfigError: `batch_size` is not positive, or there are fewer images than parts of a step.
        """
        self._features, self._device = features, accelerator.device
        self._plan = StepPlan(len(features), batch_size=batch_size, seed=seed, accelerator=accelerator, strata=strata)
        self.steps_per_epoch = self._plan.steps_per_epoch

    def batch(self, micro_step: int) -> Batch:
        """Returns this process's part of a micro-step, on the accelerator's device.

        Args:
            micro_step: 0, 1, 2, …; there are `accumulate` of them per optimizer step.

        Returns:
            features (B, D), labels (B,) and index (B,), the positions in the split.
        """
        epoch, index = self._plan.rows(micro_step)
        features = self._features.values[epoch % len(self._features.values), index]
        marks = self._features.multi_hot
        return Batch(
            labels=self._features.labels[index], index=index, features=features,
            multi_hot=None if marks is None else marks[index],
        ).to(self._device)  # fmt: skip


def train_steps(
    loader: Loader[BatchT], num_steps: int, accelerator: Accelerator, start: int = 0, run: HasPace | None = None
) -> Iterator[tuple[int, BatchT]]:
    """Yields the batches of optimizer steps `start` + 1 to `num_steps`, with a progress bar or lines of progress.

    Args:
        loader: gives the batch of each micro-step.
        num_steps: optimizer steps of the whole training.
        accelerator: tells how many micro-batches make a step.
        start: steps taken before (the answer of `load_checkpoint`).
        run: with it, SIGTERM and SIGINT wait until the step is finished and saved (`Run.save_is_due`); without, they do
            what they do elsewhere.

    Yields:
        (step, batch); the micro-batches of one optimizer step carry the same number.

    Raises:
        Stopped: a signal came to this or another process, and the step is finished.
    """
    # A loop that was left in the middle of a step must not shift the steps of the next one.
    accelerator.step = 0
    accumulate = accelerator.gradient_accumulation_steps
    shown = accelerator.is_main_process
    _last_loss.clear()
    listening = nullcontext() if run is None else run.pace.listening()
    with (
        listening,
        progress_bar(
            desc="training", unit="step", total=num_steps, initial=start, show=shown, more=_loss_in_words
        ) as bar,
    ):
        for step in range(start + 1, num_steps + 1):
            for turn in range(accumulate):
                yield step, loader.batch((step - 1) * accumulate + turn)
            bar.update()
            if run is not None:
                run.pace.stop_if_asked()


_last_loss: list[Tensor] = []
"""The loss of this process's last batch, read only when a line is said: to read it is to wait for a GPU."""


def _loss_in_words() -> str:
    return f"loss {_last_loss[0].item():.4g}" if _last_loss else ""


def backward_and_step(
    accelerator: Accelerator,
    loss: Tensor,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    *,
    step: int,
    max_grad_norm: float | None = None,
) -> float | None:
    """Takes the backward pass and, when the step's last micro-batch is done, the optimizer step.

    Call it inside `accelerator.accumulate(model)`. Accelerate divides the loss by the number of micro-batches.
    Gradients are clipped, the optimizer and the schedule moved, and gradients cleared only on the last micro-batch;
    the schedule moves by one however many processes there are, and stays where fp16 loss scaling skipped the step.

    Args:
        accelerator: the one that prepared model and optimizer.
        loss: scalar, the mean over this process's micro-batch.
        model: the adapter as `accelerator.prepare` returned it.
        optimizer: as `accelerator.prepare` returned it.
        scheduler: not prepared.
        step: number of the optimizer step, for the error.
        max_grad_norm: longest gradient (L2 norm over all parameters); None does not clip.

    Returns:
        L2 norm of the whole gradient before clipping, or None when more micro-batches of this step are to come. Under
        fp16 it may be infinite: that step is skipped and the loss scale lowered.

    Raises:
        TrainingError: the loss, or outside fp16 the gradient, is not finite (on every process alike), or the
            scheduler was passed to `accelerator.prepare`.
    """
    from accelerate.scheduler import AcceleratedScheduler

    if isinstance(scheduler, AcceleratedScheduler):
        raise TrainingError("leave the scheduler out of accelerator.prepare: it would be stepped once per process")
    _last_loss[:] = [loss.detach()]
    accelerator.backward(loss)
    if not accelerator.sync_gradients:
        _stop_unless_finite(accelerator, loss, step)
        return None
    accelerator.unscale_gradients(optimizer)
    params = [p for p in model.parameters() if p.grad is not None]
    norm = get_total_norm([p.grad for p in params if p.grad is not None])
    # To read a number is to wait for a GPU, so both are read here, where it has been given all work before the step.
    _stop_unless_finite(accelerator, loss, step)
    length = norm.item()
    if accelerator.scaler is None and not math.isfinite(length):
        # All processes hold the same reduced gradient, so all of them arrive here.
        raise TrainingError(_not_finite("gradient", length, step))
    if max_grad_norm is not None:
        nn.utils.clip_grads_with_norm_(params, max_grad_norm, norm)
    optimizer.step()
    if not accelerator.optimizer_step_was_skipped:
        scheduler.step()
    optimizer.zero_grad()
    return length


def _stop_unless_finite(accelerator: Accelerator, loss: Tensor, step: int) -> None:
    """Raises on every process when the loss of any of them is not finite; one that went on alone would wait forever.

    The same sum tells every process whether another one was asked to stop, or the main one's clock to save.
    """
    num_bad: Any = (~torch.isfinite(loss.detach())).long()
    if accelerator.num_processes > 1:
        num_bad = accelerator.reduce(num_bad + interruption.wishes(), reduction="sum")
        num_bad = interruption.take(num_bad.item())
    if num_bad > 0:
        raise TrainingError(_not_finite("loss", loss.item(), step))


def _not_finite(what: str, value: float, step: int) -> str:
    return (
        f"the {what} of step {step} is not finite (here: {value}), so training stopped before that step. "
        "metrics.jsonl and the newest checkpoint are kept. Usual causes: a learning rate that is too high (try a "
        "tenth), fp16 (try bf16 or no mixed precision), or features that are not finite."
    )


def is_due(step: int, every: int, total: int) -> bool:
    """Says whether something done every `every` steps is due after step `step`, and always after the last.

    It is False between the micro-batches of an accumulated step, so that a loop never logs or saves a step that has
    not been taken yet.

    Args:
        step: number of the optimizer step, from 1.
        every: period in steps; 0 means only after the last step.
        total: number of the last step.
    """
    from accelerate.state import GradientState

    if not GradientState().sync_gradients:
        return False
    return step == total or (every > 0 and step % every == 0)
