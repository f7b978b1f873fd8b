# SPDX-License-Identifier: Apache-2.0
"""A loop of the recipes in miniature, for launchers to start: it is asked to end, or goes on and is compared."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "training"))

from test_interruption import Linear, train  # pyright: ignore[reportMissingImports]

from adaptclip.entrypoint import launch
from adaptclip.files import write_tensors


@dataclass(frozen=True)
class Config:
    """Where it runs."""

    out: Path = Path("run")
    """The run folder."""
    resume: bool = False
    """Go on, and train an undisturbed run beside it; without, every step takes its time."""


def main(cfg: Config) -> int:
    if not cfg.resume:
        forward = Linear.forward

        def slowly(self: Linear, batch: object) -> torch.Tensor:
            (cfg.out.parent / "begun").touch()
            time.sleep(0.15)
            return forward(self, batch)

        Linear.forward = slowly
    weights = {"resumed": train(cfg.out, resume=cfg.resume)[1]}
    if cfg.resume:
        weights["undisturbed"] = train(cfg.out.parent / "undisturbed")[1]
    write_tensors(cfg.out.parent / f"weights-{os.environ.get('RANK', '0')}.safetensors", weights)
    return 0


if __name__ == "__main__":
    launch(main, Config)
