# SPDX-License-Identifier: Apache-2.0
"""Every method on every kind of model trains, its artifact loads equal, predicts and exports; or says why it cannot."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_kinds import KINDS, MORE_KINDS, write_kind
from torch import Tensor, nn
from torch.nn import functional as F

from adaptclip import artifact
from adaptclip.artifact import load, save_artifact
from adaptclip.artifact.export import Kind, export_artifact
from adaptclip.clip import ClipBackbone, load_backbone
from adaptclip.clip.saving import save_open_clip
from adaptclip.data.card import load_card
from adaptclip.data.dataset import DomainData
from adaptclip.data.sources import open_data
from adaptclip.errors import ArtifactError, BackboneError, ConfigError
from adaptclip.methods import ContrastiveTuning, TwoStage
from adaptclip.methods.base import objective_of
from adaptclip.methods.registry import methods
from adaptclip.predictions import Predictions
from adaptclip.reports.full import build_report
from adaptclip.training.mitigation import Mitigation
from adaptclip.training.thresholds import Thresholds
from adaptclip.types import Batch, Features

METHODS = (*methods(), "contrastive")
REFUSED: dict[tuple[str, str], str] = {
    ("ViT-B-16-SigLIP", "prolip"): r"ends in no single projection matrix",
    ("ViT-B-16-SigLIP2-256", "prolip"): r"ends in no single projection matrix",
    **{
        (kind, method): r"prompts in the blocks need"
        for kind in KINDS
        if kind != "ViT-B-16" and "SigLIP" not in kind
        for method in ("maple", "prompt_src")
    },
}
"""Kind and method that do not go together at any settings, and the error that says why at once."""

PAIRS = [(kind, method) for kind in KINDS for method in METHODS if (kind, method) not in REFUSED]
FEWEST_PAIRS = 208
"""12 kinds times 19 methods, without the 20 of REFUSED; a method that is added adds its own."""

SIGMOID_PAIRS = [
    (kind, method)
    for kind in ("ViT-B-16-SigLIP", "ViT-B-16-SigLIP2-256", "ViT-B-16", "BiomedCLIP")
    for method in ("linear_probe", "coop", "lora")
]
"""Kinds with a bias of their own and without, times the methods that have the sigmoid objective."""

SETTINGS: dict[str, dict[str, Any]] = {
    "coop": {"n_ctx": 3},
    "cocoop": {"n_ctx": 2, "ctx_init": ""},
    "lora": {"dropout": 0.1},
    "tip_adapter": {"learn_keys": True},
    "gda": {"alpha": 1e-8},
}
"""Settings of a method that differ from its defaults; a Gaussian of ten images alone has logits up to 1e8."""

IMPOSSIBLE = [
    ("BiomedCLIP", "lora", {"projections": ["q"]}, r"blocks\.0\.attn\.qkv computes k, q, v in one layer"),
    ("ViT-B-16", "lora", {"projections": ["conv"]}, r"image tower has no 1x1 convolutions"),
    ("convnext_base", "lora", {"targets": ["qkv"], "towers": "image"}, r"no layer of the image tower ends in 'qkv'"),
    ("ViT-B-16", "contrastive", {"loss": "siglip"}, r"has no logit bias, which the sigmoid loss needs"),
    ("ViT-B-16-SigLIP", "coop", {"n_ctx": 62}, r"does not fit beside 62 context tokens in a text tower of 64"),
    ("BiomedCLIP", "coop", {"n_ctx": 46}, r"does not fit beside 46 context tokens in a text tower of 48"),
]
"""Kind, method, settings and the error that says at once, before any training, why they do not go together."""

EXPORTS: dict[str, tuple[Kind, ...]] = {
    name: ("classifier", "open_clip") for name, own in methods().items() if own.is_clip
}
"""Method -> its exports here; the others are exported as a classifier. What contrastive tuning saves is one already."""

IMPOSSIBLE_EXPORTS: dict[tuple[str, Kind], str] = {
    ("cocoop", "classifier"): r"its text features are made anew for every image",
    ("clip_adapter", "classifier"): r"pass through a network of its own",
    ("maple", "classifier"): r"carries prompts in its blocks",
    ("prompt_src", "classifier"): r"carries prompts in its blocks",
    ("coop", "open_clip"): r"is a head on image features, not a CLIP",
}
"""Method, export and the error that says why there is none, on every kind."""

RAN: set[tuple[str, str]] = set()
EXPORTED: set[tuple[str, str, str]] = set()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits() -> DomainData:
    return open_data(load_card("digits"), check=False)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, ClipBackbone]:
    """Every kind, loaded when it is first asked for; its bundle stays for reloading."""

    class Models(dict):
        def __missing__(self, name: str) -> ClipBackbone:
            folder = tmp_path_factory.mktemp("kinds") / "model"
            self[name] = load_backbone(f"local-dir:{write_kind(folder, {**KINDS, **MORE_KINDS}[name])}")
            return self[name]

    return Models()


@pytest.fixture
def known_backbones(monkeypatch, models) -> None:
    """Loading an artifact takes a model that was loaded before; that bundles load the same is tested by themselves."""
    by_name = {backbone.name: backbone for backbone in models.values()}
    monkeypatch.setattr(artifact, "load_backbone", lambda name, *_, **__: by_name[name])


def pixels(backbone: ClipBackbone, data: DomainData, count: int = 10) -> Batch:
    images = torch.stack([backbone.transform(data.test.image(i)) for i in range(count)])
    return Batch(labels=torch.from_numpy(data.test.labels[:count]), index=torch.arange(count), images=images)


def with_features(encoder: ClipBackbone, batch: Batch) -> Batch:
    assert batch.images is not None
    with torch.no_grad():
        return Batch(labels=batch.labels, index=batch.index, features=encoder.encode_image(batch.images))


def train_two_steps(adapter: Any, batch: Batch, loss_of: Any) -> None:
    """Two steps, after which every tensor that learns has had a gradient that is finite and not zero."""
    parameters = adapter.trainable_parameters()
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    before = [p.detach().clone() for p in parameters]
    adapter.train()
    seen = [0.0] * len(parameters)
    for step in range(2):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss_of(adapter, batch).backward()
        for i, parameter in enumerate(parameters):
            assert parameter.grad is not None, f"parameter {i} of shape {tuple(parameter.shape)} has no gradient"
            assert torch.isfinite(parameter.grad).all()
            seen[i] += float(parameter.grad.abs().sum())
        optimizer.step()
    names = {id(p): name for name, p in adapter.named_parameters()} if isinstance(adapter, nn.Module) else {}
    missed = [names.get(id(p), i) for i, (p, total) in enumerate(zip(parameters, seen, strict=True)) if not total]
    assert not missed, f"no gradient reaches {missed}"
    assert all(not torch.equal(old, new) for old, new in zip(before, parameters, strict=True))
    adapter.eval()


def classification_loss(adapter: Any, batch: Batch) -> Tensor:
    return Mitigation(objective=objective_of(adapter)).loss(adapter(batch), batch) + adapter.penalty()


def make_and_train(method: str, backbone: ClipBackbone, data: DomainData, images: Batch, **settings: Any) -> Any:
    """An adapter trained the way its recipe does."""
    made: Any = methods()[method](backbone, data.prompt_names, **SETTINGS.get(method, {}), **settings)
    adapter: Any = made.to(backbone.device)
    if isinstance(adapter, TwoStage):
        train_two_steps(adapter.first.requires_grad_(True), images, classification_loss)
        trained = adapter.first
        trained.requires_grad_(False)
        adapter = TwoStage(backbone, data.prompt_names, first=trained).to(backbone.device)
    batch = images if adapter.consumes == "pixels" else with_features(adapter.encoder, images)
    if hasattr(adapter, "fit_features"):
        assert batch.features is not None
        ids = tuple(map(str, range(len(batch.labels))))
        # As `FeatureCache` gives them, on the CPU.
        features = Features(batch.features[None].cpu(), batch.labels.cpu(), ids, weights=backbone.image_digest)
        adapter.fit_features(features, **({"c": 1.0} if method == "linear_probe" and not settings else {}))
    if any(p.requires_grad for p in adapter.trainable_parameters()):
        train_two_steps(adapter, batch, classification_loss)
    return adapter.eval()


@pytest.mark.parametrize(("kind", "method"), PAIRS, ids=lambda value: value)
def test_a_method_on_a_kind(kind, method, models, digits, tmp_path, request):
    backbone = models[kind]
    images = pixels(backbone, digits)
    if method == "contrastive":
        check_contrastive(backbone, images, tmp_path)
    else:
        adapter = make_and_train(method, backbone, digits, images)
        request.getfixturevalue("known_backbones")
        check_artifact(method, adapter, backbone, digits, images, tmp_path / "artifact")
        check_exports(kind, method, tmp_path, [digits.test.image(i) for i in range(3)])
    RAN.add((kind, method))


@pytest.mark.parametrize(("kind", "method"), REFUSED, ids=lambda value: value)
def test_a_method_that_a_kind_cannot_have_says_so_at_once(kind, method, models, digits):
    with pytest.raises(BackboneError, match=REFUSED[kind, method]):
        methods()[method](models[kind], digits.prompt_names)


@pytest.mark.parametrize(("kind", "method"), SIGMOID_PAIRS, ids=lambda value: value)
def test_the_sigmoid_objective(kind, method, models, digits, tmp_path, request):
    backbone = models[kind]
    images = pixels(backbone, digits)
    head = {"head": "clap"} if method == "linear_probe" else {}
    adapter = make_and_train(method, backbone, digits, images, objective="sigmoid", **head)
    own = backbone.logit_bias
    assert (own is not None) == ("SigLIP" in kind)
    if own is not None and method != "linear_probe":
        assert torch.equal(adapter.bias.start, own.expand(10))
    assert adapter.class_bias().unique().numel() > 1
    request.getfixturevalue("known_backbones")
    check_artifact(method, adapter, backbone, digits, images, tmp_path / "artifact", thresholds=np.linspace(0, 1, 10))
    check_exports(kind, method, tmp_path, [digits.test.image(i) for i in range(3)])


def check_exports(kind: str, method: str, folder: Path, pictures: list[Any]) -> None:
    """Each way out is the same function, which export itself checks; or says why there is none."""
    plain: tuple[Kind, ...] = ("classifier",)
    refused: list[Kind] = [to for name, to in IMPOSSIBLE_EXPORTS if name == method]
    ways: set[Kind] = {*EXPORTS.get(method, plain), *refused}
    for to in ways:
        message = IMPOSSIBLE_EXPORTS.get((method, to))
        if message is not None:
            with pytest.raises(ArtifactError, match=message):
                export_artifact(folder / "artifact", to, folder / to, pictures=pictures)
            assert not (folder / to).exists()
        else:
            found = export_artifact(folder / "artifact", to, folder / to, pictures=pictures)
            assert found.probabilities < 1e-5
            EXPORTED.add((kind, method, to))


def check_artifact(
    method: str,
    adapter: Any,
    backbone: ClipBackbone,
    data: DomainData,
    images: Batch,
    folder: Path,
    *,
    thresholds: np.ndarray | None = None,
) -> None:
    """What is saved loads equal and predicts the same from images."""
    probs = np.full((20, 10), 0.1, np.float32)
    predictions = Predictions(tuple(map(str, range(20))), np.arange(20) % 10, probs, data.class_names)
    report = build_report(predictions)
    chosen = None if thresholds is None else Thresholds("f1", thresholds, 20, np.full(10, 2))
    save_artifact(folder, adapter, backbone, data, None, method=method, report=report, verdicts=[], thresholds=chosen)
    loaded = load(folder)
    state, again = adapter.adapter_state(), loaded.adapter.adapter_state()
    assert state
    assert state.keys() == again.keys()
    assert all(torch.equal(state[name].cpu(), again[name].cpu()) for name in state)
    with torch.no_grad():
        logits = adapter(with_features(adapter.encoder, images))
    expected = logits.softmax(dim=1) if thresholds is None else logits.sigmoid()
    pictures = [data.test.image(i) for i in range(4)]
    torch.testing.assert_close(loaded.probabilities(pictures), expected[:4], atol=1e-5, rtol=0)
    found = loaded.predict(pictures)
    assert [p.label for p in found] == [data.class_names[i] for i in expected[:4].argmax(dim=1).tolist()]
    if thresholds is None:
        assert all(p.labels == (p.label,) for p in found)
    else:
        named = [{data.class_names[c] for c in np.flatnonzero(row.numpy() >= thresholds)} for row in expected[:4]]
        assert [set(p.labels) for p in found] == named


def check_contrastive(backbone: ClipBackbone, images: Batch, folder: Path) -> None:
    """LoRA on both towers by pairs; what is saved is a stock checkpoint that loads equal."""
    texts = [f"a photo of a {name}." for name in ("rose", "blue whale", "fox", "lily", "wombat")] * 2
    batch = Batch(labels=images.labels, index=images.index, images=images.images, tokens=backbone.tokenize(texts))
    tuning = ContrastiveTuning(backbone, how="lora")
    train_two_steps(tuning, batch, lambda adapter, own: adapter(own))
    save_open_clip(folder / "tuned", tuning.tuned_state(), backbone)
    loaded = load_backbone(f"local-dir:{folder / 'tuned'}")
    assert batch.images is not None
    assert batch.tokens is not None
    with torch.no_grad():
        expected = F.normalize(tuning.model.encode_image(batch.images), dim=-1)
        torch.testing.assert_close(loaded.encode_image(batch.images), expected, atol=1e-5, rtol=0)
        expected = F.normalize(tuning.model.encode_text(batch.tokens), dim=-1)
        torch.testing.assert_close(loaded.encode_text(batch.tokens), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["coca_ViT-B-32", "BiomedCLIP", "MobileCLIP-S1", "RN50"])
def test_full_tuning_reaches_every_tensor(kind, models, digits):
    backbone = models[kind]
    images = pixels(backbone, digits)
    tokens = backbone.tokenize([f"a photo of a {name}." for name in ("rose", "whale", "fox", "lily", "wombat")] * 2)
    batch = Batch(labels=images.labels, index=images.index, images=images.images, tokens=tokens)
    tuning = ContrastiveTuning(backbone, how="full")
    assert len(tuning.trainable_parameters()) > 40
    for _ in range(2):
        tuning(batch).backward()
    missed = [name for name in tuning.learned if dict(tuning.model.named_parameters())[name].grad is None]
    assert not missed


@pytest.mark.parametrize(("kind", "method", "settings", "message"), IMPOSSIBLE)
def test_what_does_not_go_together_says_so_at_once(kind, method, settings, message, models, digits):
    names = () if method == "contrastive" else (digits.prompt_names,)
    make = ContrastiveTuning if method == "contrastive" else methods()[method]
    with pytest.raises((BackboneError, ConfigError), match=message):
        make(models[kind], *names, **settings)


def test_every_pair_ran(request, capsys):
    chosen = {item.callspec.id for item in request.session.items if item.originalname == "test_a_method_on_a_kind"}
    if len(chosen) != len(PAIRS):
        pytest.skip(f"only {len(chosen)} of {len(PAIRS)} pairs were chosen")
    info = f"matrix: {len(RAN)} pairs of {len(KINDS)} kinds and {len(METHODS)} methods ran"
    with capsys.disabled():
        info += f"; {len(EXPORTED)} exports of {len({pair[:2] for pair in EXPORTED})} of them were checked"
        sys.stdout.write(f"\n{info}; {len(REFUSED)} pairs and {len(IMPOSSIBLE)} settings were refused\n")
    assert len(RAN) == len(PAIRS) >= FEWEST_PAIRS
    ways = {(method, to) for method in methods() for to in EXPORTS.get(method, ("classifier",))} - set(
        IMPOSSIBLE_EXPORTS
    )
    assert len(EXPORTED) == sum(method == own for _, method in PAIRS for own, _ in ways)
