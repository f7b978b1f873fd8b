# SPDX-License-Identifier: Apache-2.0
"""Optimizers and learning-rate schedules of the published methods."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from adaptclip.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from torch.nn import Parameter


def build_optimizer(
    params: Iterable[Parameter],
    *,
    name: str,
    lr: float,
    weight_decay: float,
    momentum: float = 0.9,
    eps: float = 1e-8,
) -> Optimizer:
    """Builds an optimizer over the trainable parameters.

    Args:
        params: parameters; those that do not require a gradient are left out.
        name: "sgd" or "adamw".
        lr: peak learning rate, above 0.
        weight_decay: 0 or more; L2 for SGD, decoupled for AdamW.
        momentum: of SGD, 0 up to but not including 1; AdamW does not use it.
        eps: added to the denominator of AdamW's step, above 0; SGD does not use it.

    Raises:
        ConfigError: unknown name, a number out of range, or nothing to train.
    """
    trainable = [p for p in params if p.requires_grad]
    if not trainable:
        raise ConfigError("there is nothing to train: the adapter has no parameter that requires a gradient")
    if not (math.isfinite(lr) and lr > 0):
        raise ConfigError(f"lr must be a positive number, got {lr}; published values lie between 1e-5 and 0.1")
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ConfigError(f"weight_decay must be 0 or more, got {weight_decay}")
    if not 0 <= momentum < 1:
        raise ConfigError(f"momentum must be at least 0 and below 1, got {momentum}")
    if not (math.isfinite(eps) and eps > 0):
        raise ConfigError(f"eps must be a positive number, got {eps}; torch's own is 1e-8")
    if name == "sgd":
        return SGD(trainable, lr=lr, momentum=momentum, weight_decay=weight_decay)
    if name == "adamw":
        return AdamW(trainable, lr=lr, weight_decay=weight_decay, eps=eps)
    raise ConfigError(f"unknown optimizer {name!r}. {did_you_mean(name, ('sgd', 'adamw'))}")


def epoch_cosine_lr(epoch: int, *, epochs: int, lr: float, warmup_epochs: int, warmup_lr: float) -> float:
    """Learning rate of one epoch in the schedule of CoOp (Zhou et al. 2022, sec. 4.1).

    The published code puts a constant warm-up before torch's CosineAnnealingLR(T_max=epochs) and moves both once per
    epoch. The cosine's own count starts when the warm-up ends, so with E epochs and w warm-up epochs:

        epoch e < w     warmup_lr
        epoch e >= w    lr · (1 + cos(π · (e − w) / E)) / 2

    That is: one epoch at 1e-5, then the full `lr`, and a last epoch at lr · (1 + cos(π · (E − 2) / E)) / 2, which is
    small (for E = 50, 0.4 % of `lr`) but not 0.

    Args:
        epoch: 0 .. epochs - 1.
        epochs: E, number of epochs, warm-up included.
        lr: peak learning rate.
        warmup_epochs: w.
        warmup_lr: the constant rate of the warm-up.
    """
    if epoch < warmup_epochs:
        return warmup_lr
    return lr * (1 + math.cos(math.pi * (epoch - warmup_epochs) / epochs)) / 2


def step_cosine_lr(step: int, *, total_steps: int, lr: float, final_lr: float, warmup_steps: int = 0) -> float:
    """Learning rate of one step in the cosine schedule that Tip-Adapter-F, CLIP-LoRA and, with a warm-up, FLYP use.

    It is torch's CosineAnnealingLR(T_max=total_steps, eta_min=final_lr), moved once per optimizer step:

        final_lr + (lr - final_lr) · (1 + cos(π · step / total_steps)) / 2

    The first step is taken at `lr`; `final_lr` is what the schedule reaches after the last. With w warm-up steps, step
    s < w is taken at lr · (s + 1) / w, and the cosine goes over the total_steps - w that follow (WiSE-FT, FLYP and
    open_clip's own training).

    Args:
        step: 0 .. total_steps - 1.
        total_steps: optimizer steps of the whole training.
        lr: peak learning rate.
        final_lr: learning rate at the end.
        warmup_steps: w, fewer than `total_steps`.
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    step, total_steps = step - warmup_steps, total_steps - warmup_steps
    return final_lr + (lr - final_lr) * (1 + math.cos(math.pi * step / total_steps)) / 2


def build_scheduler(
    optimizer: Optimizer,
    *,
    total_steps: int,
    steps_per_epoch: int,
    kind: str = "cosine",
    warmup_epochs: int = 1,
    warmup_lr: float = 1e-5,
    final_lr: float = 0.0,
    warmup_steps: int = 0,
) -> LambdaLR:
    """Builds a schedule that is stepped once per optimizer step (`backward_and_step` does it).

    Never pass it to `accelerator.prepare`, which would step it once per process.

    Args:
        optimizer: the optimizer; each of its groups keeps its own peak rate.
        total_steps: optimizer steps of the whole training, 1 or more.
        steps_per_epoch: optimizer steps per epoch, 1 or more (`FeatureLoader.steps_per_epoch`).
        kind: "cosine" is CoOp's, constant within an epoch (see `epoch_cosine_lr`); "constant" is the peak rate after
            the warm-up; "cosine_per_step" changes at every step (see `step_cosine_lr`).
        warmup_epochs: epochs at `warmup_lr` before the schedule starts; 0 for none. "cosine_per_step" does not use it.
        warmup_lr: learning rate of the warm-up.
        final_lr: learning rate that "cosine_per_step" ends with, at most the peak; the other kinds have none.
        warmup_steps: steps over which "cosine_per_step" rises to the peak; the other kinds count epochs.

    Raises:
        ConfigError: unknown kind, a number out of range, or a `final_lr` or `warmup_steps` that the kind does not use.

    Warns:
        UserWarning: the training ends within the warm-up.
    """
    kinds = ("cosine", "constant", "cosine_per_step")
    if kind not in kinds:
        raise ConfigError(f"unknown schedule {kind!r}. {did_you_mean(kind, kinds)}")
    if total_steps < 1 or steps_per_epoch < 1:
        raise ConfigError(f"total_steps and steps_per_epoch must be 1 or more, got {total_steps} and {steps_per_epoch}")
    if warmup_epochs < 0 or warmup_lr < 0:
        raise ConfigError(f"warmup_epochs and warmup_lr must be 0 or more, got {warmup_epochs} and {warmup_lr}")
    if kind == "cosine_per_step":
        return _step_cosine(optimizer, total_steps, final_lr, warmup_steps)
    for name, value in (("final_lr", final_lr), ("warmup_steps", warmup_steps)):
        if value:
            raise ConfigError(f'{name} belongs to the schedule "cosine_per_step", got {value} for {kind!r}')
    epochs = math.ceil(total_steps / steps_per_epoch)
    if warmup_epochs >= epochs:
        warnings.warn(
            f"all {total_steps} steps lie within the warm-up ({warmup_epochs} epochs of {steps_per_epoch} steps), so "
            f"the learning rate stays at {warmup_lr:g}; train longer or set the warm-up to 0 epochs",
            stacklevel=2,
        )

    def factor_of(peak: float) -> Callable[[int], float]:
        def factor(step: int) -> float:
            epoch = step // steps_per_epoch
            if kind == "constant":
                return warmup_lr / peak if epoch < warmup_epochs else 1.0
            rate = epoch_cosine_lr(epoch, epochs=epochs, lr=peak, warmup_epochs=warmup_epochs, warmup_lr=warmup_lr)
            return rate / peak

        return factor

    return LambdaLR(optimizer, [factor_of(group["lr"]) for group in optimizer.param_groups])


def _step_cosine(optimizer: Optimizer, total_steps: int, final_lr: float, warmup_steps: int) -> LambdaLR:
    lowest = min(group["lr"] for group in optimizer.param_groups)
    if not 0 <= final_lr <= lowest:
        raise ConfigError(f"final_lr must lie between 0 and the peak rate {lowest:g}, got {final_lr}")
    if not 0 <= warmup_steps < total_steps:
        raise ConfigError(f"warmup_steps must be 0 or more and fewer than the {total_steps} steps, got {warmup_steps}")
    shape = {"total_steps": total_steps, "final_lr": final_lr, "warmup_steps": warmup_steps}

    def factor_of(peak: float) -> Callable[[int], float]:
        return lambda step: step_cosine_lr(step, lr=peak, **shape) / peak

    return LambdaLR(optimizer, [factor_of(group["lr"]) for group in optimizer.param_groups])
