# SPDX-License-Identifier: Apache-2.0
"""What two processes compare, started by torchrun: the gradient of shared-out pairs against one process's."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from tiny_clip import make_tiny_backbone
from torch import nn
from torch.nn import functional as F

from adaptclip.methods.contrastive import ContrastiveTuning
from adaptclip.types import Batch

TEXTS = ("a dog", "a red ball on the grass", "two cats", "a photo of a very old house", "rain", "a man rides a horse")


def with_bias(backbone):
    """Gives a CLIP the logit bias that SigLIP models have."""
    backbone.model.logit_bias = nn.Parameter(torch.tensor(-2.0), requires_grad=False)
    return backbone


def pairs(backbone):
    generator = torch.Generator().manual_seed(0)
    return Batch(
        labels=torch.zeros(6, dtype=torch.long),
        index=torch.arange(6),
        features=F.normalize(torch.randn(6, backbone.embed_dim, generator=generator), dim=-1),
        images=torch.randn(6, 3, 32, 32, generator=generator),
        tokens=backbone.tokenize(TEXTS),
    )


def rows(batch, part):
    return Batch(**{name: value[part] for name, value in vars(batch).items() if value is not None})


def compare(accelerator, backbone, **settings):
    """Losses, and the largest differences of the gradients relative to the largest gradient."""
    whole, world = pairs(backbone), accelerator.num_processes
    alone = ContrastiveTuning(backbone, **settings)
    expected_loss = alone(whole)
    expected_loss.backward()
    size = 6 // world
    mine = slice(accelerator.process_index * size, (accelerator.process_index + 1) * size)
    shared = ContrastiveTuning(backbone, process_index=accelerator.process_index, num_processes=world, **settings)
    prepared = accelerator.prepare(shared)
    loss = prepared(rows(whole, mine))
    accelerator.backward(loss)
    differences, sizes = {}, {}
    for name, value in alone.model.named_parameters():
        if value.requires_grad:
            got = dict(shared.model.named_parameters())[name].grad
            differences[name] = float("inf") if got is None else (got - value.grad).abs().max().item()
            sizes[name] = value.grad.abs().max().item()
    return {
        "loss": accelerator.reduce(loss.detach(), reduction="mean").item(),
        "expected_loss": expected_loss.item(),
        "gradient": max(differences.values()),
        "scale_gradient": differences["logit_scale"],
        "size": max(sizes.values()),
        "smallest_size": min(sizes.values()),
        "tensors": len(sizes),
    }


def main(out):
    accelerator = Accelerator(cpu=True)
    plain, biased = make_tiny_backbone(), with_bias(make_tiny_backbone())
    report = {
        "num_processes": accelerator.num_processes,
        "clip": compare(accelerator, plain),
        "clip_text": compare(accelerator, plain, train="text"),
        "siglip": compare(accelerator, biased, loss="siglip"),
    }
    (out / f"rank-{accelerator.process_index}.json").write_text(json.dumps(report))
    accelerator.wait_for_everyone()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
