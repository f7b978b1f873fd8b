# SPDX-License-Identifier: Apache-2.0
"""A method in a notebook: fit, predict_proba, score, save, other names; scikit-learn's conventions; other packages."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import real_features
import torch
from PIL import Image
from sklearn.base import clone, is_classifier
from sklearn.model_selection import GridSearchCV, cross_val_score
from tiny_clip import make_tiny_backbone

import adaptclip as ac
from adaptclip.errors import BackboneError, ConfigError, DataError, StorageError
from adaptclip.methods import registry
from adaptclip.methods.registry import method_of, named
from adaptclip.training.support import Training

NAMES = ("cat", "dog", "owl")


@pytest.fixture(scope="module")
def clip() -> ac.FeatureClip:
    return ac.FeatureClip(centres(16), NAMES, logit_scale=20.0)


@pytest.fixture(scope="module")
def tower() -> Any:
    return make_tiny_backbone()


def centres(width: int) -> np.ndarray:
    return np.random.default_rng(3).normal(size=(3, width))


def rows(count: int = 12, width: int = 16, views: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng, y = np.random.default_rng(4), np.arange(count) % 3
    shape = (views, count, width) if views else (count, width)
    return (centres(width)[y] + 0.7 * rng.normal(size=shape)).astype(np.float32), y


def pictures(count: int = 6) -> tuple[list[Image.Image], list[str]]:
    rng = np.random.default_rng(1)
    images, labels = [], []
    for i in range(count):
        pixels = rng.integers(0, 90, (24, 24, 3), dtype=np.uint8)
        pixels[..., i % 3] += 150
        images.append(Image.fromarray(pixels))
        labels.append(NAMES[i % 3])
    return images, labels


FEATURE_METHODS = ("ss_text", "logistic", "lp_plus_plus", "tip_adapter", "gda", "tip_adapter_f", "text_init", "clap")


@pytest.mark.parametrize("name", FEATURE_METHODS)
@pytest.mark.filterwarnings("ignore:C of the logistic head")
def test_a_method_on_features_learns_and_answers(name, clip):
    x, y = rows()
    model = named()[name].build(clip, NAMES, ("{}",), seed=1)
    assert model.fit(x, y) is model
    found = model.predict_proba(x)
    assert found.shape == (12, 3)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)
    assert np.array_equal(model.predict(x), found.argmax(axis=1))
    assert model.score(x, y) == pytest.approx((model.predict(x) == y).mean())
    assert model.score(x, y) > 0.9
    assert model.info_["seconds"] >= 0
    again: Any = clone(model)
    by_name = again.fit(torch.from_numpy(x), [NAMES[i] for i in y])
    assert by_name.predict(x).tolist() == [NAMES[i] for i in y]
    np.testing.assert_array_equal(by_name.predict_proba(x), found)
    # Fitting again starts anew, and any norm is the same direction.
    np.testing.assert_array_equal(model.fit(x, y).predict_proba(x), found)
    np.testing.assert_allclose(model.fit(3 * x, y).predict_proba(x), found, atol=1e-4)
    head = model.head()
    unit = torch.nn.functional.normalize(torch.from_numpy(x), dim=-1)
    found = model.predict_proba(x)
    np.testing.assert_allclose(head.logits(unit).softmax(dim=1).detach().numpy(), found, atol=1e-5)


@pytest.mark.parametrize("name", ["gda", "text_init", "tip_adapter", "ss_text"])
def test_views_are_all_learnt_from(name, clip):
    x, y = rows(views=4)
    model = named()[name].build(clip, NAMES, ("{}",), seed=1)
    of_all = model.fit(x, y).predict_proba(x)
    assert of_all.shape == (12, 3)
    assert not np.array_equal(of_all, model.fit(x[:2], y).predict_proba(x))
    np.testing.assert_array_equal(model.fit(x[0], y).predict_proba(x), model.predict_proba(x[0]))


@pytest.mark.parametrize("name", ["coop", "cocoop", "lora", "two_stage", "layernorm", "gda", "zero_shot"])
def test_a_method_on_images_learns_saves_and_loads(name, tower, tmp_path):
    images, labels = pictures()
    model = named()[name].build(tower, NAMES, ("a photo of a {}.",), seed=1)
    short = {"epochs": 2} if "epochs" in named()[name].settings() else {"steps": 3}
    settings: dict[str, Any] = short if short.keys() <= named()[name].settings().keys() else {}
    model.fit(images, labels, **settings)
    paths = []
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
        paths.append(tmp_path / f"{i}.png")
    found = model.predict_proba(images)
    for same in (paths, [str(path) for path in paths], [np.asarray(image) for image in images],
                 [path.read_bytes() for path in paths]):  # fmt: skip
        np.testing.assert_array_equal(model.predict_proba(same), found)
    model.save(tmp_path / "model")
    with pytest.raises(StorageError, match="already"):
        model.save(tmp_path / "model")
    loaded = ac.load(tmp_path / "model", backbone=tower)
    np.testing.assert_allclose(loaded.probabilities(images).numpy(), found, atol=1e-5)
    assert [p.label for p in loaded.predict(paths)] == model.predict(paths).tolist() or name == "zero_shot"
    assert "no gate was declared" in (tmp_path / "model" / "README.md").read_text()


def test_other_names_are_answered_where_there_is_a_tower_to_ask(tower):
    images, labels = pictures()
    other = ("fox", "hen")
    for name in ("coop", "lora", "zero_shot"):
        model = named()[name].build(tower, NAMES, ("{}",), seed=1)
        settings: dict[str, Any] = {"coop": {"epochs": 1}, "lora": {"steps": 1}}.get(name, {})
        moved = model.fit(images, labels, **settings).for_classes(other)
        assert moved.class_names == other
        assert moved.predict_proba(images).shape == (6, 2)
    gda = ac.GDA(tower, NAMES).fit(images, labels)
    with pytest.raises(ConfigError, match="GDA has a weight for each class it learnt"):
        gda.for_classes(other)


def test_tables_and_lists_are_arrays_too(clip, tmp_path):
    x, y = rows()
    found = ac.GDA(clip).fit(x, y).predict_proba(x)
    frame = pandas.DataFrame(x)
    np.testing.assert_allclose(ac.GDA(clip).fit(frame, pandas.Series(y)).predict_proba(frame), found, rtol=1e-3)
    np.testing.assert_allclose(ac.GDA(clip).fit(x.tolist(), y.tolist()).predict_proba(x.tolist()), found, rtol=1e-3)
    assert ac.GDA(clip).fit(x[None].tolist(), y).predict_proba(x[None].tolist()).shape == found.shape


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (rows(width=8)[0], rows()[1], r"8 wide, and this CLIP has 16"),
        (rows()[0], rows()[1][:5], r"12 images and 5 labels"),
        (rows()[0], [3] * 12, r"class ids 3 to 3; with 3 classes 0 to 2"),
        (rows()[0], ["cow"] * 12, r"label 'cow', which is no class.*cat"),
        (rows()[0], np.eye(12)[:, :3], r"one label for each image, got shape \(12, 3\); take the argmax"),
        (rows()[0], [0.5] * 12, r"class ids or class names"),
        (np.zeros((12, 16), np.float32), rows()[1], r"all zero"),
        (np.full((12, 16), np.nan, np.float32), rows()[1], r"not finite"),
        (np.zeros((0, 16), np.float32), [], r"\(N, D\)"),
        ([], [], "empty"),
        ("folder", ["cat"], "there is no file folder"),
        ({"a": 1}, ["cat"], "X is a dict with a; give one column"),
        (None, ["cat"], "X should be one image or a list of them, got None"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(x, y, message, clip):
    with pytest.raises(DataError, match=message):
        ac.GDA(clip).fit(x, y)


def test_what_cannot_be_is_refused_in_words(clip, tower):
    x, y = rows()
    images, labels = pictures()
    with pytest.raises(ConfigError, match="y is missing"):
        ac.GDA(clip).fit(x)
    with pytest.raises(ConfigError, match=r"GDA has no setting 'view'\. Did you mean \"views\""):
        ac.GDA(clip).fit(x, y, view=3)
    with pytest.raises(ConfigError, match="has not learnt anything yet"):
        ac.GDA(clip).predict_proba(x)
    with pytest.raises(ConfigError, match="has not learnt anything yet"):
        ac.GDA(clip).save("nowhere")
    with pytest.raises(ConfigError, match="without an image tower; give features"):
        ac.GDA(clip).fit(images, labels)
    with pytest.raises(ConfigError, match="learns from images and not features"):
        ac.LoRA(tower, NAMES).fit(rows(width=tower.embed_dim)[0], y)
    with pytest.raises(ConfigError, match="at least one class name"):
        ac.GDA(tower)
    with pytest.raises(DataError, match="class_names should be a list"):
        ac.CoOp(tower, "cat")
    with pytest.raises(DataError, match="transformed pixels are not taken"):
        ac.GDA(tower, NAMES).fit([np.full((3, 24, 24), -1.8, np.float32)], [0])
    assert not Path("nowhere").exists()
    # Features of the same tower serve a method that learns from features.
    with torch.no_grad():
        own = tower.encode_image(torch.stack([tower.transform(image) for image in images]))
    head = ac.SSText(tower, NAMES).fit(own, labels)
    np.testing.assert_allclose(
        head.predict_proba(own), ac.SSText(tower, NAMES).fit(images, labels).predict_proba(own), atol=1e-5
    )


def test_the_conventions_of_scikit_learn():
    real = real_features.load()
    x, y = real.images.numpy(), real.labels.numpy()
    some = np.random.default_rng(0).permutation(len(y))[:300]
    model = ac.GDA(real.clip)
    assert is_classifier(model)
    assert {"alpha", "views", "choose"} <= set(model.get_params())
    scores = cross_val_score(model, x[some], y[some], cv=3)
    assert scores.shape == (3,)
    assert scores.min() > 0.9
    search = GridSearchCV(ac.LinearProbe(real.clip, head="text_init"), {"epochs": [1, 30], "start_norm": [10.0]}, cv=2)
    search.fit(x[some], y[some])
    assert search.best_params_ == {"epochs": 30, "start_norm": 10.0}
    other: Any = clone(ac.TipAdapter(real.clip, alpha=2.0).set_params(views=3))
    assert (other.get_params()["alpha"], other.get_params()["views"]) == (2.0, 3)
    assert other.set_params(alpha=4.0).alpha == 4.0
    with pytest.raises(ConfigError, match=r"no setting 'alfa'\. Did you mean \"alpha\""):
        other.set_params(alfa=1)


def test_fit_leaves_the_generators_of_others_alone(clip):
    x, y = rows()
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(5)
    np.random.seed(5)
    ac.TipAdapter(clip, learn_keys=True).fit(x, y, epochs=2)
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])


PACKAGE = '''
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adaptclip.methods.base import batch_features, check_state, scaled_logits
from adaptclip.methods.method import Method, Variant
from adaptclip.prompts import zero_shot_weights


@dataclass(frozen=True)
class ShiftSchedule:
    steps: int = 20
    lr: float = 1e-2
    views: int = 1


class Shift(Method):
    """Moves every image by one learnt vector."""

    name = "shift"
    variants = {"shift": Variant(3.5, ladder=True), "shift-long": Variant(3.6, defaults={"start": 0.1})}
    schedule_type = ShiftSchedule
    learns_by_steps = True

    def __init__(self, backbone: Any, class_names: Any = None, *, templates: Any = ("{}",), start: float = 0.0) -> None:
        super().__init__()
        names = self._sit_on(backbone, class_names)
        self.templates, self.start = tuple(templates), start
        self.register_buffer("text", zero_shot_weights(backbone, names, self.templates), persistent=False)
        self.move = nn.Parameter(torch.full((backbone.embed_dim,), float(start)))

    @property
    def settings(self) -> dict[str, Any]:
        return {"templates": list(self.templates), "start": self.start}

    def forward(self, batch: Any) -> Tensor:
        features = batch_features(batch, self.text.shape[1]) + self.move
        return scaled_logits(nn.functional.normalize(features, dim=-1), self.text, self.backbone.logit_scale)

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [self.move]

    def adapter_state(self) -> dict[str, Tensor]:
        return {"move": self.move.detach()}

    def _load_state(self, state: Mapping[str, Tensor]) -> None:
        check_state(state, {"move": self.move.shape}, "Shift")
        with torch.no_grad():
            self.move.copy_(state["move"])

    def _learn(self, support: Any, schedule: ShiftSchedule, loop: Any) -> dict[str, Any]:
        loader = support.loader(support.features(schedule.views), batch_size=32)
        loop(support.training(self, loader, schedule.steps, optimizer="adamw", lr=schedule.lr, weight_decay=0.0,
                              schedule="cosine_per_step"))
        return {"schedule": f"{schedule.steps} steps"}

    def class_weights(self) -> Tensor:
        return self.text
'''


@pytest.fixture
def other_package(tmp_path, monkeypatch):
    """A package beside ours that brings a method by an entry point, installed as pip would."""
    (tmp_path / "shifty.py").write_text(PACKAGE)
    info = tmp_path / "shifty-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shifty\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[adaptclip.methods]\nshift = shifty:Shift\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    registry.methods.cache_clear()
    registry.named.cache_clear()
    yield tmp_path
    sys.modules.pop("shifty", None)
    registry.methods.cache_clear()
    registry.named.cache_clear()


def test_another_package_brings_a_method(other_package, clip, tower, tmp_path):
    assert method_of("shift").__module__ == "shifty"
    assert {"shift", "shift-long"} <= set(named())
    assert named()["shift-long"].settings()["start"] == 0.1
    x, y = rows()
    model: Any = named()["shift"].build(clip, NAMES, ("{}",), seed=1).fit(x, y, steps=50)
    assert float(model.move.detach().abs().min()) > 0
    assert model.info_["trainable_parameters"] == 16
    images, labels = pictures()
    again: Any = named()["shift"].build(tower, NAMES, ("{}",), seed=1).fit(images, labels)
    again.save(tmp_path / "model")
    loaded = ac.load(tmp_path / "model", backbone=tower)
    found: Any = loaded.adapter
    assert torch.equal(found.move, again.move)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("gone:Thing", "cannot be used: No module named 'gone'"),
        ("json:JSONDecoder", "is no subclass of adaptclip.Method"),
        ("shifty:Shift", None),
    ],
)
def test_a_broken_method_of_another_package_costs_only_itself(entry, message, other_package):
    (other_package / "shifty-1.0.dist-info" / "entry_points.txt").write_text(f"[adaptclip.methods]\nother = {entry}\n")
    registry.methods.cache_clear()
    if message is None:
        assert "shift" in registry.methods()
        return
    with pytest.warns(UserWarning, match=message):
        found = registry.methods()
    assert "gda" in found
    assert "shift" not in found


def test_unknown_methods_are_named():
    with pytest.raises(ConfigError, match=r"no method 'tip_adaptor'\. Did you mean \"tip_adapter\""):
        method_of("tip_adaptor")
    assert not hasattr(ac, "TipAdaptor")


def test_a_stage_says_what_a_loop_needs():
    assert Training._fields == ("adapter", "loader", "optimizer", "scheduler", "num_steps", "mitigation", "name")


def test_every_method_says_where_it_comes_from():
    looked_at = 0
    for own in registry.methods().values():
        looked_at += 1
        assert re.search(r"\d{4}|arXiv", own.__doc__ or ""), own
        assert own.schedule_type.__doc__
        assert own.variants
    assert looked_at >= 10


def test_features_alone_are_taken_by_the_methods_that_the_others_name(clip):
    """Every method, with and without class names: built, or refused with the list of those that can be built."""
    able, refused = set(), []
    for method in registry.methods().values():
        for given in ((clip,), (clip, NAMES)):
            if method.sits_on_features():
                assert method(*given).class_names == NAMES
                able.add(method.__name__)
                continue
            with pytest.raises(BackboneError) as caught:
                method(*given)
            refused.append((method.__name__, str(caught.value)))
    assert len(able) >= 6, able
    assert len(refused) >= 20, refused
    for name, said in refused:
        assert said.startswith(f"{name} needs a model with its towers (load_clip, wrap_clip) and images"), said
        assert said.endswith(f"On features alone work {', '.join(sorted(able))}"), said


def test_a_method_without_names_says_what_it_needs(tower):
    for method in (ac.CoOp, ac.LoRA, ac.MaPLe):
        with pytest.raises(ConfigError, match=rf"^{method.__name__} needs at least one class name, got none"):
            method(tower)  # pyright: ignore[reportCallIssue]


def test_what_a_notebook_shows_is_one_short_line(clip, tower):
    x, y = rows()
    head = ac.SSText(clip)
    assert repr(head) == "<SSText on FeatureClip of 3 classes (cat, dog, owl), 16 wide, without towers; 3 classes " + (
        "(cat, dog, owl); has not learnt yet>"
    )
    fitted = repr(ac.LinearProbe(clip, head="text_init").fit(x, y, epochs=2))
    assert "head='text_init'" in fitted
    assert "has not learnt" not in fitted
    digits = ac.open_data(ac.load_card("digits"))
    for shown in (
        head, fitted, ac.CoOp(tower, NAMES, n_ctx=2), tower, clip, digits, digits.test, digits.card, digits.test.store,
        ac.Features(torch.zeros(1, 900, 16), torch.zeros(900), tuple(map(str, range(900)))),
        ac.ZeroShotClassifier(tower, tuple(f"class {i}" for i in range(500))),
    ):  # fmt: skip
        for text in (repr(shown), f"{shown}"):
            assert len(text) < 420, text[:600]
            assert "\n" not in text, text
    assert (
        repr(digits)
        == "<DomainData digits: images train 898, validation 179, test 720; 10 classes (zero, one, two, …)>"
    )
