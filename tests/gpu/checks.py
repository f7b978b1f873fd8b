# SPDX-License-Identifier: Apache-2.0
"""What must hold on a GPU, as functions of a device: the same function everywhere, exact resumption, no float64.

Each check takes the device and returns what it measured, or raises AssertionError. `test_on_gpu.py` and `check.py` run
all of `CHECKS`; on a CPU they run too, where only what a GPU alone can do wrong is not seen.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from test_matrix import PAIRS, make_and_train, pixels, train_two_steps, with_features
from tiny_clip import make_tiny_backbone
from tiny_kinds import make_kind
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adaptclip.clip import ClipBackbone
from adaptclip.data.card import load_card
from adaptclip.data.dataset import DomainData
from adaptclip.data.sources import open_data
from adaptclip.features import FeatureCache
from adaptclip.methods import CoCoOp, ContrastiveTuning, CoOp, LoRA, ZeroShotClassifier
from adaptclip.methods.registry import methods
from adaptclip.seeding import seed_everything
from adaptclip.training.checkpoint import load_checkpoint, save_checkpoint
from adaptclip.training.mitigation import Mitigation
from adaptclip.training.optim import build_optimizer, build_scheduler
from adaptclip.training.steps import FeatureLoader, StepPlan, backward_and_step, train_steps
from adaptclip.training.tracking import make_accelerator
from adaptclip.types import Batch, Features

Check = Callable[[torch.device], dict[str, Any]]

NAMES = ("rose", "blue whale", "lily of the valley", "wombat", "stinging nettle plant", "fox")
PRECISIONS = ("fp32", "bf16", "fp16")
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
SAME = {"fp32": 2e-5, "bf16": 2e-2, "fp16": 3e-3}
"""Precision -> how far cosines (from -1 to 1) of two ways to compute the same may be apart: rounding, at a few ulp."""
SAME_GRADIENT = {"fp32": 1e-3, "bf16": 8e-2, "fp16": 2e-2}
"""The same for gradients, as ‖a - b‖ / ‖b‖."""


@cache
def clip(device: torch.device, precision: str = "fp32") -> ClipBackbone:
    """A tiny random CLIP."""
    return make_tiny_backbone(device=str(device), precision=precision)


def batch_for(backbone: ClipBackbone, count: int = 6, seed: int = 0) -> Batch:
    """Random images, and their features, on the backbone's device."""
    side = backbone.image_size
    images = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))
    labels, index = torch.arange(count) % len(NAMES), torch.arange(count)
    with torch.no_grad():
        features = backbone.encode_image(images)
    return replace(Batch(labels=labels, index=index, images=images).to(backbone.device), features=features)


def judged(adapter: Any, batch: Batch) -> Tensor:
    """Cosines of a batch, on the CPU."""
    adapter.eval()
    pictures = adapter.consumes == "pixels" and batch.images is not None
    own = with_features(adapter.encoder, batch) if pictures else batch
    with torch.no_grad():
        logits = adapter(own)
    assert logits.dtype == torch.float32, f"logits are {logits.dtype}"
    return (logits / adapter.backbone.logit_scale).cpu()


def gradients(adapter: Any, batch: Batch, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Cosines in training, and all gradients of the loss in one row, on the CPU."""
    adapter.train()
    torch.manual_seed(0)
    with torch.autocast(batch.labels.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        logits = adapter(batch)
    assert logits.dtype == torch.float32, f"logits are {logits.dtype} under autocast"
    found = torch.autograd.grad(F.cross_entropy(logits, batch.labels), adapter.trainable_parameters())
    cosines = (logits / adapter.backbone.logit_scale).detach().cpu()
    return cosines, torch.cat([gradient.float().flatten() for gradient in found]).cpu()


def near(got: Tensor, expected: Tensor, at_most: float, what: str) -> float:
    """Asserts the largest difference, and returns it."""
    difference = float((got - expected).abs().max())
    assert difference <= at_most, f"{what}: differs by {difference:.2e}, at most {at_most:.0e} is rounding"
    return difference


def same_direction(got: Tensor, expected: Tensor, at_most: float, what: str) -> float:
    """Asserts ‖got - expected‖ / ‖expected‖, and returns it."""
    assert expected.norm() > 0, f"{what}: there is no gradient"
    difference = float((got - expected).norm() / expected.norm())
    assert difference <= at_most, (
        f"{what}: differs by {difference:.2e} of its length, at most {at_most:.0e} is rounding"
    )
    return difference


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Convolutions of a GPU in float32 and not in TF32, which is torch's default for them alone."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


class NoFloat64(TorchDispatchMode):
    """Remembers the operations that made float64 on a kind of device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.found, self.operations = device, set[str](), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        own = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.device.type == self.device.type]
        self.operations += bool(own)
        if any(x.dtype == torch.float64 for x in own):
            self.found.add(str(func))
        return out

    def check(self) -> None:
        """Raises AssertionError for float64 on a GPU; on a CPU it is allowed."""
        assert self.operations > 0
        assert self.device.type == "cpu" or not self.found, f"float64 on {self.device}: {sorted(self.found)}"


# -- identities --------------------------------------------------------------------------------------------------------


def starts_as_zero_shot(device: torch.device, precision: str) -> dict[str, Any]:
    """An adapter before training is zero-shot classification."""
    backbone = clip(device, precision)
    batch = batch_for(backbone)
    expected = judged(ZeroShotClassifier(backbone, NAMES).to(device), batch)
    made = {
        "lora": LoRA(backbone, NAMES),
        "lora, dora": LoRA(backbone, NAMES, dora=True),
        "coop, words": CoOp(backbone, NAMES, ctx_init="a photo of a"),
        "coop, plain": CoOp(backbone, NAMES, ctx_init="a photo of a", fast=False),
    }
    return {
        name: near(judged(adapter.to(device), batch), expected, SAME[precision], name) for name, adapter in made.items()
    }


def merged_is_unmerged(device: torch.device, precision: str, dora: bool) -> dict[str, Any]:
    """LoRA after two steps, merged into the weights, is the same function; turned down to 0, zero-shot."""
    backbone = clip(device, precision)
    batch, adapter = batch_for(backbone), LoRA(backbone, NAMES, dora=dora).to(device)
    zero_shot = judged(ZeroShotClassifier(backbone, NAMES).to(device), batch)
    train_two_steps(adapter, batch, lambda own, given: F.cross_entropy(own(given), given.labels))
    trained = judged(adapter, batch)
    moved = float((trained - zero_shot).abs().max())
    assert moved > SAME[precision], f"two steps moved the cosines by {moved:.1e} only"
    merged = ClipBackbone(adapter.merged_model(), backbone.tokenizer, name="merged", precision=precision)
    again = ZeroShotClassifier(merged, NAMES).to(device)
    found = near(judged(again, with_features(merged, batch)), trained, SAME[precision], "merged")
    adapter.set_scale(0)
    return {"moved": moved, "merged": found, "scale 0": near(judged(adapter, batch), zero_shot, SAME[precision], "0")}


def fast_is_plain(device: torch.device, precision: str, autocast: bool) -> dict[str, Any]:
    """Packed prompts behind a shared prefix, and in chunks, are whole prompts: cosines and gradients.

    With `autocast` the weights are float32 and the forward pass is under autocast, otherwise they are `precision`.
    """
    backbone = clip(device, "fp32" if autocast else precision)
    batch, dtype = batch_for(backbone), AUTOCAST[precision] if autocast else None
    makers: dict[str, Callable[..., Any]] = {
        "coop": partial(CoOp, n_ctx=5),
        "coop, middle": partial(CoOp, n_ctx=5, position="middle"),
        "coop, class-specific": partial(CoOp, n_ctx=5, class_specific=True),
        "cocoop": partial(CoCoOp, n_ctx=3, ctx_init=""),
        "lora": partial(LoRA, dropout=0.0),
        "lora, text": partial(LoRA, dropout=0.0, towers="text"),
    }
    info = {}
    for name, make in makers.items():
        plain = make(backbone, NAMES, fast=False).to(device)
        if isinstance(plain, LoRA):  # where B is zero, half of the gradients are zero
            torch.manual_seed(1)
            state = {n: p if ".lora_A" in n else torch.randn_like(p) * 0.02 for n, p in plain.adapter_state().items()}
            plain.load_adapter_state(state)
        expected, gradient = gradients(plain, batch, dtype)
        for way, budget in {"packed": 2**30, "in chunks": 2**17}.items():
            fast = make(backbone, NAMES, memory_budget_bytes=budget).to(device)
            fast.load_adapter_state(plain.adapter_state())
            got, own = gradients(fast, batch, dtype)
            info[f"{name}, {way}"] = [
                near(got, expected, SAME[precision], f"{name}, {way}"),
                same_direction(own, gradient, SAME_GRADIENT[precision], f"gradient of {name}, {way}"),
            ]
    return info


def device_is_cpu(device: torch.device) -> dict[str, Any]:
    """The float32 gradients on the device are those on the CPU."""
    info = {}
    for name, make in {"coop": partial(CoOp, n_ctx=5), "lora": partial(LoRA, dropout=0.0)}.items():
        here, there = (make(clip(where), NAMES).to(where) for where in (torch.device("cpu"), device))
        batch = batch_for(clip(torch.device("cpu")))
        expected, gradient = gradients(here, batch)
        got, own = gradients(there, batch.to(device))
        info[name] = [
            near(got, expected, SAME["fp32"], name),
            same_direction(own, gradient, SAME_GRADIENT["fp32"], f"gradient of {name}"),
        ]
    return info


def features_are_the_cpus(device: torch.device) -> dict[str, Any]:
    """`FeatureCache` gives float32 features on the CPU, whichever device made them."""
    data = digits()
    here, there = clip(torch.device("cpu")), clip(device)
    found = [FeatureCache(None).get(own, data.test.select(range(12)), batch_size=5) for own in (here, there)]
    assert all(f.values.device.type == "cpu" and f.values.dtype == torch.float32 for f in found)
    assert found[0].weights == found[1].weights, "the digest of the weights depends on the device"
    info = {"features": near(found[1].values, found[0].values, SAME["fp32"], "features")}
    torch.backends.cudnn.allow_tf32 = True
    by_default = FeatureCache(None).get(there, data.test.select(range(12)), batch_size=5)
    return {**info, "with TF32 convolutions": float((by_default.values - found[0].values).abs().max())}


# -- the matrix --------------------------------------------------------------------------------------------------------


@cache
def digits() -> DomainData:
    """The digits of scikit-learn, which need no file."""
    return open_data(load_card("digits"), check=False)


def a_method_on_a_kind(device: torch.device, kind: str, method: str) -> dict[str, Any]:
    """It trains on the device without float64 there, and what it learnt is the same function on the CPU."""
    here = backbone_of(kind)
    there, images = on(here, device), pixels(here, digits())
    with NoFloat64(device) as mode:
        if method == "contrastive":
            tokens = here.tokenize([f"a photo of a {name}." for name in NAMES[:5]] * 2)
            tuning = ContrastiveTuning(there, how="lora").to(device)
            batch = replace(images, tokens=tokens)
            train_two_steps(tuning, batch.to(device), lambda adapter, own: adapter(own))
            mode.check()
            return {"operations": mode.operations}
        adapter = make_and_train(method, there, digits(), images.to(device))
        got = judged(adapter, with_features(adapter.encoder, images.to(device)))
    mode.check()
    again: Any = methods()[method](here, digits().prompt_names, **adapter.settings)
    again.load_adapter_state({name: value.cpu() for name, value in adapter.adapter_state().items()})
    expected = judged(again, with_features(again.encoder, images))
    # Heads are not cosines: what they give is compared with its own size.
    size = max(1.0, float(expected.abs().max()))
    return {"operations": mode.operations, "cosines": near(got / size, expected / size, 1e-4, f"{method} on {kind}")}


@cache
def backbone_of(kind: str) -> ClipBackbone:
    """A tiny random model of a kind, on the CPU."""
    return make_kind(kind)


@cache
def on(backbone: ClipBackbone, device: torch.device) -> ClipBackbone:
    """The same model on a device."""
    return copy.deepcopy(backbone).to(device)


# -- training ----------------------------------------------------------------------------------------------------------


@contextmanager
def accelerator_for(device: torch.device, **launched: str) -> Iterator[Accelerator]:
    """An Accelerator as a recipe makes it, under what a launcher would put into the environment."""
    for state in (AcceleratorState, GradientState):
        state._reset_state()
    asked = {f"ACCELERATE_{name.upper()}": value for name, value in launched.items()}
    with patch.dict(os.environ, asked):
        accelerator = make_accelerator(cpu=device.type == "cpu")
        assert accelerator.device.type == device.type, f"Accelerate works on {accelerator.device}, not on {device}"
        yield accelerator
    for state in (AcceleratorState, GradientState):
        state._reset_state()


class FixedPixels:
    """A loader of given images in the order of `StepPlan`."""

    def __init__(self, batch: Batch, accelerator: Accelerator) -> None:
        self._batch = batch
        self._plan = StepPlan(len(batch.labels), batch_size=3, seed=0, accelerator=accelerator)
        self.steps_per_epoch = self._plan.steps_per_epoch

    def batch(self, micro_step: int) -> Batch:
        """The rows of a micro-step."""
        _, rows = self._plan.rows(micro_step)
        own = {name: value[rows.to(value.device)] for name, value in vars(self._batch).items() if value is not None}
        return Batch(**own)


def trained(
    device: torch.device, method: str, accelerator: Accelerator, folder: Path, *, first: int, last: int
) -> dict[str, Tensor]:
    """The state after the steps `first` + 1 to `last`, by the pieces of a recipe; from step 0 it starts anew."""
    seed_everything(7 if first == 0 else 8)  # what is resumed brings its generators along
    backbone, batch = clip(device), batch_for(clip(device))
    adapter: Any = (CoOp(backbone, NAMES, n_ctx=4) if method == "coop" else LoRA(backbone, NAMES)).to(device)
    loader: Any = FixedPixels(batch, accelerator)
    if adapter.consumes == "features":
        assert batch.features is not None
        features = Features(batch.features[None].cpu(), batch.labels.cpu(), tuple("abcdef"), backbone.image_digest)
        loader = FeatureLoader(features, batch_size=3, seed=0, accelerator=accelerator)
    optimizer = build_optimizer(adapter.trainable_parameters(), name="adamw", lr=1e-2, weight_decay=0.01)
    scheduler = build_scheduler(optimizer, total_steps=6, steps_per_epoch=loader.steps_per_epoch)
    model, optimizer = accelerator.prepare(adapter, optimizer)
    start = load_checkpoint(folder, adapter, optimizer, scheduler, accelerator) if first else 0
    assert start == first
    model.train()
    for step, own in train_steps(loader, last, accelerator, start=start):
        with accelerator.accumulate(model):
            loss = Mitigation().loss(model(own), own) + adapter.penalty()
            backward_and_step(accelerator, loss, model, optimizer, scheduler, step=step)
    save_checkpoint(folder, last, adapter, optimizer, scheduler, accelerator)
    return {name: value.detach().cpu().clone() for name, value in adapter.adapter_state().items()}


def resumes_bit_for_bit(device: torch.device, method: str, precision: str) -> dict[str, Any]:
    """Six steps, and three, a checkpoint and three more, end with the same bits.

    Where two undisturbed runs already differ (some kernels of a GPU add in no fixed order), deterministic algorithms
    are asked for; `repeatable` is false where that was needed.
    """

    def runs(accelerator: Accelerator, times: int) -> list[dict[str, Tensor]]:
        done = []
        for _ in range(times):
            with tempfile.TemporaryDirectory() as folder:
                done.append(trained(device, method, accelerator, Path(folder), first=0, last=6))
        with tempfile.TemporaryDirectory() as folder:
            trained(device, method, accelerator, Path(folder), first=0, last=3)
            return [*done, trained(device, method, accelerator, Path(folder), first=3, last=6)]

    with accelerator_for(device, mixed_precision=precision) as accelerator:
        whole, again, resumed = runs(accelerator, 2)
        repeatable = equal(whole, again)
        if not repeatable:
            torch.use_deterministic_algorithms(True)
            try:
                whole, again, resumed = runs(accelerator, 2)
            finally:
                torch.use_deterministic_algorithms(False)
            assert equal(whole, again), "not repeatable, with deterministic algorithms neither"
    assert equal(whole, resumed), "resumed training ends elsewhere than undisturbed training"
    return {"repeatable": repeatable}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two states have the same bits."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def autocast_as_launched(device: torch.device, precision: str) -> dict[str, Any]:
    """A recipe that is told nothing computes in what the launcher asks for, and nothing of it stays behind."""
    with accelerator_for(device, mixed_precision=precision) as accelerator:
        assert accelerator.mixed_precision == precision
        adapter = CoOp(clip(device), NAMES, n_ctx=4).to(device)
        seen: list[torch.dtype] = []
        layer = adapter.backbone.model.transformer.resblocks[0].mlp.c_fc
        hook = layer.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
        try:
            model = accelerator.prepare(adapter).train()
            logits = model(batch_for(clip(device)))
        finally:
            hook.remove()
        scaler = accelerator.scaler is not None
        kept = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    wanted = AUTOCAST.get(precision, torch.float32)
    assert seen
    assert set(seen) == {wanted}, f"{precision}: the text tower computed in {set(seen)}"
    assert logits.dtype == torch.float32
    assert scaler == (precision == "fp16")
    with torch.no_grad():
        weights = kept.eval().class_weights()
    assert weights.dtype == torch.float32
    return {"computed in": str(wanted)}


def _checks() -> Iterator[tuple[str, str, Check]]:
    """Group, name and function of every check."""
    for precision in PRECISIONS:
        yield "identities", f"starts as zero-shot, {precision}", partial(starts_as_zero_shot, precision=precision)
        yield "identities", f"fast is plain, {precision}", partial(fast_is_plain, precision=precision, autocast=False)
        for dora in (False, True):
            named = f"merged is unmerged{', DoRA' * dora}, {precision}"
            yield "identities", named, partial(merged_is_unmerged, precision=precision, dora=dora)
    for precision in AUTOCAST:
        named = f"fast is plain, autocast to {precision}"
        yield "identities", named, partial(fast_is_plain, precision=precision, autocast=True)
    yield "identities", "the device is the CPU", device_is_cpu
    yield "identities", "features are the CPU's", features_are_the_cpus
    for precision in ("no", "bf16", "fp16"):
        yield "training", f"autocast as launched, {precision}", partial(autocast_as_launched, precision=precision)
        for method in ("coop", "lora"):
            named = f"{method} resumes bit for bit, {precision}"
            yield "training", named, partial(resumes_bit_for_bit, method=method, precision=precision)
    for kind, method in PAIRS:
        yield f"matrix, {kind}", f"{method} on {kind}", partial(a_method_on_a_kind, kind=kind, method=method)


def run_check(name: str, device: torch.device) -> dict[str, Any]:
    """Runs one of `CHECKS`. Raises AssertionError, or whatever went wrong."""
    with exact_convolutions():
        return CHECKS[name][1](device)


CHECKS: dict[str, tuple[str, Check]] = {name: (group, check) for group, name, check in _checks()}
"""Name -> group and check."""

GPU_ONLY = {name for name in CHECKS if name.endswith(", fp16") and CHECKS[name][0] == "training"}
"""fp16 needs a loss scaler, which there is on a GPU alone."""
