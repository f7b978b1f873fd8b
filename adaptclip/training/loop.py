"""The one gradient loop of the package: the lines of the recipes, without what a job of minutes does not need."""

from __future__ import annotations

from accelerate import Accelerator

from adaptclip.training.steps import backward_and_step, train_steps
from adaptclip.training.support import Training


def train_by_steps(training: Training, accelerator: Accelerator) -> None:
    """Takes all steps of a stage and leaves its adapter in evaluation mode.

    There are no metrics and no checkpoints: a job that was interrupted is done again from its start.

    Raises:
        TrainingError: a loss or gradient is not finite.
    """
    adapter, loader, optimizer, scheduler, num_steps, mitigation, _ = training
    model, optimizer = accelerator.prepare(adapter, optimizer)
    # --- loop: the same lines in every recipe ---
    model.train()
    for step, batch in train_steps(loader, num_steps, accelerator):
        with accelerator.accumulate(model):
            logits = model(batch)  # (B, C), already scaled by logit_scale.exp()
            loss = mitigation.loss(logits, batch) + adapter.penalty()
            backward_and_step(accelerator, loss, model, optimizer, scheduler, step=step)
    # --- end of loop ---
    accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()
    accelerator.free_memory()  # a hundred jobs share the process, and Accelerate remembers what it prepared
