# SPDX-License-Identifier: Apache-2.0
"""What two processes do, started by torchrun; `main` called in a test does the same with one."""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

from adaptclip.errors import TrainingError
from adaptclip.features import FeatureCache
from adaptclip.files import write_json, write_tensors
from adaptclip.training.checkpoint import load_checkpoint, save_checkpoint
from adaptclip.training.mitigation import GroupDRO, Mitigation
from adaptclip.training.optim import build_scheduler
from adaptclip.training.steps import FeatureLoader, backward_and_step, is_due, train_steps
from adaptclip.training.tracking import make_accelerator, start_run
from adaptclip.types import Features

GLOBAL_BATCH, NUM_STEPS = 8, 12


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((3, 6), 0.1))

    def forward(self, batch):
        return 10 * batch.features @ self.weight.T

    def adapter_state(self):
        return {"weight": self.weight}

    def load_adapter_state(self, state):
        self.load_state_dict(state)


class Backbone(nn.Module):
    """The part of ClipBackbone that a feature cache uses."""

    embed_dim, name, image_digest, device = 6, "fake", "fake", torch.device("cpu")
    transform_spec: dict = {}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.batches = []

    def transform(self, image):
        return torch.from_numpy(image)

    def encode_image(self, images):
        self.batches.append(len(images))
        return F.normalize(images, dim=-1)


class Dataset:
    """The part of ImageDataset that a feature cache uses; an "image" is a vector."""

    window = frames = multi_hot = None
    has_pixels = True

    def __init__(self, num_images):
        self.vectors = np.random.default_rng(0).normal(size=(num_images, 6)).astype(np.float32)
        self.contents = self.ids = tuple(f"image-{i}" for i in range(num_images))
        self.labels = np.arange(num_images) % 3

    def image(self, index):
        return self.vectors[index]


def train(features, accelerator, run, spoil=None, mitigation=None):
    """The loop of the recipes; `spoil` is (step, rank) of a loss that is not finite."""
    mitigation = mitigation or Mitigation()
    adapter = Linear()
    optimizer = SGD(adapter.parameters(), lr=0.1, momentum=0.9)
    loader = FeatureLoader(
        features,
        batch_size=GLOBAL_BATCH // accelerator.num_processes,
        seed=0,
        accelerator=accelerator,
        strata=mitigation.strata,
    )
    scheduler = build_scheduler(optimizer, total_steps=NUM_STEPS, steps_per_epoch=loader.steps_per_epoch)
    adapter, optimizer = accelerator.prepare(adapter, optimizer)
    start = load_checkpoint(run.checkpoints, adapter, optimizer, scheduler, accelerator, mitigation)
    for step, batch in train_steps(loader, NUM_STEPS, accelerator, start=start):
        with accelerator.accumulate(adapter):
            loss = mitigation.loss(adapter(batch), batch)
            if spoil == (step, accelerator.process_index):
                loss = loss * float("inf")
            grad_norm = backward_and_step(
                accelerator, loss, adapter, optimizer, scheduler, step=step, max_grad_norm=1.0
            )
        if is_due(step, 1, NUM_STEPS):
            run.log(step, loss=loss, grad_norm=grad_norm, lr=scheduler.get_last_lr()[0])
        if is_due(step, 4, NUM_STEPS):
            save_checkpoint(run.checkpoints, step, adapter, optimizer, scheduler, accelerator, mitigation)
            # Loaded at once: must find what all processes wrote.
            assert load_checkpoint(run.checkpoints, adapter, optimizer, scheduler, accelerator, mitigation) == step
    return accelerator.unwrap_model(adapter).weight.detach()


def main(folder: Path) -> None:
    accelerator = make_accelerator(cpu=True)
    rank = accelerator.process_index
    backbone = Backbone()
    encoded: dict[str, Features] = {}
    for name, root in {"cached": folder / "cache", "again": folder / "cache", "uncached": None}.items():
        encoded[name] = FeatureCache(root).get(backbone, Dataset(600), batch_size=32, accelerator=accelerator)  # type: ignore[arg-type]
    features = FeatureCache(None).get(backbone, Dataset(29), accelerator=accelerator)  # type: ignore[arg-type]

    run = start_run(folder / "run", config={}, accelerator=accelerator)
    weight = train(features, accelerator, run)
    place = torch.tensor([-1, 0, 0, 0, 0, 1, 2, 2]).repeat(4)[: len(features)]
    dro = GroupDRO(place, step=0.3, accelerator=accelerator)
    mitigated = train(
        features,
        accelerator,
        start_run(folder / "mitigated", config={}, accelerator=accelerator),
        mitigation=Mitigation(place=place, dro=dro),
    )
    message = ""
    try:
        train(
            features,
            accelerator,
            start_run(folder / "spoilt", config={}, accelerator=accelerator),
            spoil=(3, accelerator.num_processes - 1),
        )
    except TrainingError as error:
        message = str(error)
    write_tensors(
        folder / f"rank-{rank}.safetensors",
        {
            "weight": weight,
            "mitigated": mitigated,
            "log_weights": dro.log_weights,
            **{name: value.values for name, value in encoded.items()},
        },
    )
    write_json(
        folder / f"rank-{rank}.json",
        {"num_processes": accelerator.num_processes, "batches": backbone.batches, "message": message},
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
