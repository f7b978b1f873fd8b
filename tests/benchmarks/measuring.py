# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of single training steps share: class names, a backbone without weights, clock and memory."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path

import open_clip
import torch
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

from adaptclip.clip import ClipBackbone

GIB = 2**30


def class_names(count: int) -> list[str]:
    """Returns `count` realistic names: those of ImageNet in order, beyond 1,000 with a colour or size before them."""
    colours = ["red", "blue", "green", "black", "white", "brown", "golden", "small", "large"]
    names = [*IMAGENET_CLASSNAMES, *(f"{colour} {name}" for colour in colours for name in IMAGENET_CLASSNAMES)]
    return names[:count]


def untrained(name: str, precision: str = "fp32") -> ClipBackbone:
    """Returns a model of open_clip's with random weights, drawn from torch's global generator, and not hashed."""
    model = open_clip.create_model(name, pretrained=None, precision=precision)
    return ClipBackbone(model, open_clip.get_tokenizer(name), name=name, precision=precision, digest="untrained")


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Returns the context of a forward pass: autocast to `dtype`, or none."""
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def wait_for(device: torch.device) -> None:
    """Returns when all work that was given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(step: Callable[[], object], device: torch.device | None = None) -> float:
    """Returns the seconds of one call, with the work that it gave to a device."""
    start = time.perf_counter()
    step()
    if device is not None:
        wait_for(device)
    return time.perf_counter() - start


class PeakMemory:
    """Highest resident memory of this process while the block runs, sampled every 5 ms, in bytes."""

    def __enter__(self) -> PeakMemory:
        self.bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        page = resource.getpagesize()
        while not self._stop.is_set():
            self.bytes = max(self.bytes, int(Path("/proc/self/statm").read_text().split()[1]) * page)
            time.sleep(0.005)


def available_bytes() -> int:
    """Returns the memory that can be had without swapping."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024
