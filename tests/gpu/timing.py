# SPDX-License-Identifier: Apache-2.0
"""Seconds and memory of training steps and of feature extraction on a device, beside the published way in turns.

Each function yields rows for the table, one at a time, so that what was measured is kept when the time is up.
"""

from __future__ import annotations

import gc
import io
import os
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from accelerate import Accelerator
from benchmarks.coop_step import BATCH, N_CTX
from benchmarks.coop_step import our_step as our_coop_step
from benchmarks.coop_step import published_step as published_coop_step
from benchmarks.lora_step import TEMPLATE, compare, drawn_update, image_step, published_model, published_parameters
from benchmarks.lora_step import our_step as our_lora_step
from benchmarks.lora_step import published_step as published_lora_step
from benchmarks.measuring import GIB, autocast, class_names, timed, untrained, wait_for
from checks import AUTOCAST, accelerator_for
from PIL import Image
from tiny_clip import make_tiny_backbone
from torch import Tensor
from torch.nn import functional as F

from adaptclip.clip import ClipBackbone, packed
from adaptclip.data.dataset import ImageDataset, MemoryStore
from adaptclip.features import FeatureCache
from adaptclip.methods import CoOp, LoRA, class_encoder
from adaptclip.training.optim import build_optimizer, build_scheduler
from adaptclip.training.steps import backward_and_step
from adaptclip.types import Batch

Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        device: where.
        tiny: a random model of 32 px and a handful of everything, to see that it runs.
        seconds: for the turns of one row.
    """

    device: torch.device
    tiny: bool = False
    seconds: float = 4.0

    def backbone(self, name: str, precision: str = "fp32") -> ClipBackbone:
        """A model with random weights on the device."""
        torch.manual_seed(0)
        if self.tiny:
            return make_tiny_backbone(device=str(self.device), precision=precision)
        return untrained(name, precision).to(self.device)

    def counts(self, *counts: int) -> list[int]:
        """Numbers of classes."""
        return [6] if self.tiny else list(counts)


# -- clocks ------------------------------------------------------------------------------------------------------------


def peak_bytes(step: Callable[[], object], device: torch.device) -> int | None:
    """Most memory of a GPU that one call takes on top of what is there before it."""
    if device.type != "cuda":
        step()
        return None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def in_turns(steps: dict[str, Callable[[], object]], sizes: Sizes) -> dict[str, float]:
    """Median seconds of each, after two calls to warm up; they take turns, 3 times at least and 40 at most."""
    for step in steps.values():
        for _ in range(0 if sizes.tiny else 2):
            timed(step, sizes.device)
    taken: dict[str, list[float]] = {name: [] for name in steps}
    started = time.perf_counter()
    for turn in range(1 if sizes.tiny else 40):
        if turn >= 3 and time.perf_counter() - started > sizes.seconds:
            break
        for name, step in steps.items():
            wait_for(sizes.device)
            taken[name].append(timed(step, sizes.device))
    return {name: statistics.median(values) for name, values in taken.items()}


def largest_that_fits(make: Callable[[int], Callable[[], object]], count: int) -> tuple[int, Callable[[], object]]:
    """The step on `count` classes, or on the half of them, a quarter, … that the memory suffices for."""
    while True:
        step = make(count)
        try:
            step()
            return count, step
        except torch.OutOfMemoryError:
            if count < 2:
                raise
        del step
        gc.collect()
        torch.cuda.empty_cache()
        count //= 2


def against_published(
    ours: Callable[[], object],
    make_published: Callable[[int], Callable[[], object]],
    image: Callable[[], object],
    count: int,
    sizes: Sizes,
) -> Row:
    """Seconds and memory of both steps. A published step that does not fit runs on fewer classes and is scaled up."""
    our_peak = peak_bytes(ours, sizes.device)
    run_on, published = largest_that_fits(make_published, count)
    peak = peak_bytes(published, sizes.device)
    found = in_turns({"ours": ours, "published": published, "image": image}, sizes)
    whole = found["published"]
    if run_on < count:
        whole = found["image"] + (whole - found["image"]) * count / run_on
    return {
        "ours_s": found["ours"],
        "published_s": whole,
        "published_image_s": found["image"],
        "published_run_on_classes": run_on,
        "ratio": whole / found["ours"],
        "ours_peak_bytes": our_peak,
        "published_peak_bytes": peak if run_on == count else None,
    }


# -- training steps ----------------------------------------------------------------------------------------------------


def coop_steps(sizes: Sizes, model: str = "ViT-B-16") -> Iterator[Row]:
    """One CoOp step at 100, 1,000 and 10,000 classes; beyond its budget of 4 GiB, with a larger one too."""
    backbone = sizes.backbone(model)
    side = backbone.image_size
    images = torch.randn(BATCH, 3, side, side, device=sizes.device)
    labels = torch.randint(0, 6, (BATCH,), device=sizes.device)
    with torch.no_grad():
        features = backbone.encode_image(images)
    for count in sizes.counts(1000, 100, 10_000):
        names = class_names(count)
        for precision in ("fp32", "bf16"):
            for budget in (4, 40) if count >= 10_000 else (4,):
                coop = CoOp(backbone, names, n_ctx=N_CTX, memory_budget_bytes=budget * GIB).train()
                plan = coop._classes.plan(0, 1, sizes.device)
                found = coop_against_published(coop, images, features, labels, AUTOCAST.get(precision), sizes)
                yield {
                    "what": "CoOp step", "model": model, "classes": count, "precision": precision,
                    "budget_gib": budget, "planned_bytes": sum(plan.costs_bytes), "chunks": len(plan.chunks), **found,
                }  # fmt: skip


def coop_against_published(
    coop: CoOp, images: Tensor, features: Tensor, labels: Tensor, dtype: torch.dtype | None, sizes: Sizes
) -> Row:
    """One step of a CoOp beside the published one."""
    backbone, names, context = coop.backbone, list(coop.class_names), coop.context.detach()

    def published(count: int) -> Callable[[], object]:
        return published_coop_step(backbone, names[:count], images, labels, context, dtype)

    def image() -> object:
        with torch.no_grad(), autocast(sizes.device, dtype):
            return backbone.encode_image(images)

    return against_published(our_coop_step(coop, features, labels, dtype), published, image, len(names), sizes)


def lora_steps(sizes: Sizes, model: str) -> Iterator[Row]:
    """One CLIP-LoRA step (dropout 0.25) at 100 and 1,000 classes; at 100 the gradients without dropout are compared."""
    backbone = sizes.backbone(model)
    side, scale = backbone.image_size, backbone.logit_scale
    images = torch.randn(BATCH, 3, side, side, device=sizes.device)
    labels = torch.randint(0, 6, (BATCH,), device=sizes.device)
    for count in sizes.counts(100, 1000):
        names = class_names(count)
        tokens = backbone.tokenize([TEMPLATE.format(name) for name in names]).to(sizes.device)
        adapter = LoRA(backbone, names).to(sizes.device)
        drawn = drawn_update(adapter)
        adapter.load_adapter_state(drawn)
        learnt = published_parameters(adapter.train())
        plain = published_model(backbone, learnt, 0.25, False).train()
        compared = {}
        if count <= 100:
            exact = LoRA(backbone, names, dropout=0.0).to(sizes.device).train()
            exact.load_adapter_state(drawn)
            without = published_model(backbone, learnt, 0.0, False).train()
            expected = published_lora_step(without, learnt, tokens, images, labels, scale)
            compared = compare(our_lora_step(exact, images, labels), expected)
        for precision in ("bf16", "fp32"):
            dtype = AUTOCAST.get(precision)

            def published(
                count: int, dtype: Any = dtype, plain: Any = plain, learnt: Any = learnt, tokens: Tensor = tokens
            ) -> Callable[[], object]:
                return published_lora_step(plain, learnt, tokens[:count], images, labels, scale, dtype)

            ours, image = our_lora_step(adapter, images, labels, dtype), image_step(plain, learnt, images, dtype)
            yield {
                "what": "LoRA step", "model": model, "classes": count, "precision": precision, "budget_gib": 4,
                **against_published(ours, published, image, count, sizes), **(compared if dtype is None else {}),
            }  # fmt: skip


# -- feature extraction ------------------------------------------------------------------------------------------------


def photographs(count: int, side: int) -> ImageDataset:
    """JPEGs of coloured noise that is smooth, of about the size in bytes that photographs have."""
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(min(count, 16)):
        small = Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
        file = io.BytesIO()
        small.resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        encoded.append(file.getvalue())
    rows, names = np.arange(count), [str(i) for i in range(count)]
    # Few files, each with as many names as are asked for: the cache encodes what has a name of its own.
    store = MemoryStore([encoded[i % len(encoded)] for i in range(count)], names)
    return ImageDataset(store, rows, ("a", "b"), tuple(names), rows % 2, tuple(f"{i:064x}" for i in range(count)))


def feature_speeds(sizes: Sizes, model: str = "ViT-B-16") -> Iterator[Row]:
    """Images per second: the bare encoder, decoding alone, and `FeatureCache` with 4, 8 and all threads."""
    cores = len(os.sched_getaffinity(0))
    count, batch, picture = (8, 4, 64) if sizes.tiny else (2048, 256, 500)
    data = photographs(count, picture)
    for precision in ("fp32", "bf16"):
        backbone = sizes.backbone(model, precision)
        side = backbone.image_size
        images = torch.randn(batch, 3, side, side, device=sizes.device)

        def bare(backbone: ClipBackbone = backbone, images: Tensor = images) -> None:
            with torch.inference_mode():
                backbone.encode_image(images)

        def decoded(threads: int, backbone: ClipBackbone = backbone) -> None:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda i: backbone.transform(data.image(i)), range(count // 2)))

        def cached(threads: int, backbone: ClipBackbone = backbone) -> None:
            FeatureCache(None).get(backbone, data, batch_size=batch, workers=threads)

        head = {"what": "features", "model": model, "precision": precision}
        yield {**head, "way": "bare encoder", "images_per_s": batch / in_turns({"bare": bare}, sizes)["bare"]}
        for threads in (4,) if sizes.tiny else sorted({4, 8, cores}):
            way = f"FeatureCache, {threads} threads"
            yield {**head, "way": way, "images_per_s": count / timed(partial(cached, threads), sizes.device)}
        for threads in sorted({4, cores}) if precision == "fp32" else ():
            way = f"decoding of {picture} px alone, {threads} threads"
            yield {**head, "way": way, "images_per_s": count // 2 / timed(partial(decoded, threads))}


# -- what a step waits for ---------------------------------------------------------------------------------------------


def waits(sizes: Sizes) -> Iterator[Row]:
    """How often one step of a recipe's loop waits for the GPU, and where; the loop's seconds per step beside them."""
    backbone = sizes.backbone("ViT-B-16")
    side = backbone.image_size
    names = class_names(6 if sizes.tiny else 100)
    images, labels = torch.randn(BATCH, 3, side, side), torch.arange(BATCH) % 6
    with torch.no_grad():
        features = backbone.encode_image(images).cpu()
    for method, make in {"coop": CoOp, "lora": LoRA}.items():
        with accelerator_for(sizes.device, mixed_precision="bf16") as accelerator:
            adapter: Any = make(backbone, names).to(sizes.device)
            own = {"features": features} if adapter.consumes == "features" else {"images": images}
            batch = Batch(labels=labels, index=labels, **own)
            optimizer = build_optimizer(adapter.trainable_parameters(), name="adamw", lr=1e-3, weight_decay=0.01)
            scheduler = build_scheduler(optimizer, total_steps=1000, steps_per_epoch=10)
            model, optimizer = accelerator.prepare(adapter, optimizer)
            model.train()

            step = partial(one_step, batch, accelerator, model, optimizer, scheduler)
            for _ in range(1 if sizes.tiny else 3):
                step()
            seconds = in_turns({"step": step}, sizes)["step"]
            yield {"what": "loop", "method": method, "seconds": seconds, "waits": waits_of(step, sizes.device)}


def one_step(batch: Batch, accelerator: Accelerator, model: Any, optimizer: Any, scheduler: Any) -> None:
    """A step as the recipes' loop takes it, from a batch on the CPU."""
    moved = batch.to(accelerator.device)
    with accelerator.accumulate(model):
        loss = F.cross_entropy(model(moved), moved.labels)
        backward_and_step(accelerator, loss, model, optimizer, scheduler, step=1)


def waits_of(step: Callable[[], object], device: torch.device) -> dict[str, int] | None:
    """Place in adaptclip (or in what it calls) -> how often one call waits there; None without a GPU."""
    if device.type != "cuda":
        step()
        return None
    places: dict[str, int] = {}

    def remember(message: Any, *_: Any, **__: Any) -> None:
        if "called a synchronizing" not in str(message):
            return
        frames = traceback.extract_stack()
        own = [f for f in frames if "/adaptclip/" in f.filename] or frames[:-1]
        inner = frames[-2]
        place = f"{own[-1].filename.rpartition('/adaptclip/')[2]}:{own[-1].lineno} {own[-1].line}"
        place += "" if inner is own[-1] else f" (in {inner.filename.rpartition('site-packages/')[2]}:{inner.lineno})"
        places[place] = places.get(place, 0) + 1

    with warnings.catch_warnings(), patch.object(warnings, "showwarning", remember):
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return dict(sorted(places.items(), key=lambda item: -item[1]))


def knobs(sizes: Sizes) -> Iterator[Row]:
    """CoOp and LoRA's text side at 1,000 classes with other sizes of chunks and of runs that are attended together."""
    backbone = sizes.backbone("ViT-B-16")
    labels = torch.arange(BATCH, device=sizes.device) % 6
    features = F.normalize(torch.randn(BATCH, backbone.embed_dim, device=sizes.device), dim=-1)
    for count in sizes.counts(100, 1000):
        names = class_names(count)
        for joined in (512,) if sizes.tiny else (512, 4096, 32_768):
            for chunk in (8192,) if sizes.tiny else (8192, 32_768, 131_072):
                with patch.dict(packed.MAX_JOINED_TOKENS, {sizes.device.type: joined}), forgotten_plans(chunk):
                    coop = CoOp(backbone, names, n_ctx=N_CTX).train()
                    lora = LoRA(backbone, names, towers="text").to(sizes.device).train()
                    lora_batch = Batch(labels=labels, index=labels, features=features)
                    steps: dict[str, Callable[[], object]] = {
                        "coop_s": our_coop_step(coop, features, labels, torch.bfloat16),
                        "coop_fp32_s": our_coop_step(coop, features, labels),
                        "lora_text_s": lambda a=lora, b=lora_batch: text_step(a, b),
                    }
                    found = in_turns(steps, Sizes(sizes.device, sizes.tiny, min(1.0, sizes.seconds)))
                yield {"what": "knobs", "classes": count, "joined": joined, "chunk_tokens": chunk, **found}


def text_step(adapter: LoRA, batch: Batch) -> object:
    """Forward and backward of LoRA on the text tower alone, under autocast."""
    with autocast(batch.labels.device, torch.bfloat16):
        loss = F.cross_entropy(adapter(batch), batch.labels)
    return torch.autograd.grad(loss, adapter.trainable_parameters())


def forgotten_plans(chunk: int) -> Any:
    """Chunks of another size on every device; runs that were planned with other settings are planned anew."""
    packed._plan_runs.cache_clear()
    return patch.dict(class_encoder.CHUNK_TOKENS, {"cpu": chunk, "cuda": chunk})
