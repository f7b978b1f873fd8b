"""The one gradient loop of the package: the lines of the recipes, without what a job of minutes does not need."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from accelerate import Accelerator
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from adaptclip.training.steps import Loader, backward_and_step, train_steps
from adaptclip.types import Batch, Learner


def train_by_steps(
    adapter: Learner,
    loader: Loader[Batch],
    num_steps: int,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    accelerator: Accelerator,
) -> None:
    """Trains an adapter for a number of steps and leaves it in evaluation mode.

    There are no metrics and no checkpoints: a job that was interrupted is done again from its start.

    Raises:
        TrainingError: a loss or gradient is not finite.
    """
    module: Any = adapter
    model, optimizer = accelerator.prepare(module, optimizer)
    # --- loop: the same lines in every recipe ---
    model.train()
    for step, batch in train_steps(loader, num_steps, accelerator):
        with accelerator.accumulate(model):
            logits = model(batch)  # (B, C), already scaled by logit_scale.exp()
            loss = F.cross_entropy(logits, batch.labels) + adapter.penalty()
            backward_and_step(accelerator, loss, model, optimizer, scheduler, step=step)
    # --- end of loop ---
    accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()
    accelerator.free_memory()  # a hundred jobs share the process, and Accelerate remembers what it prepared
