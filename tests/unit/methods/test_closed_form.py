# SPDX-License-Identifier: Apache-2.0
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import multivariate_normal
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from tiny_clip import make_tiny_backbone
from torch.nn import functional as F

from adaptclip.errors import ArtifactError, ConfigError, DataError
from adaptclip.methods import GDA, SSText, ZeroShotClassifier
from adaptclip.methods.closed_form import GDA_ALPHAS, gaussian_discriminant, text_anchored
from adaptclip.methods.registry import methods
from adaptclip.seeding import generator
from adaptclip.types import Batch, Features

NAMES = ("rose", "lily_of the valley", "dog", "cat")
TEMPLATES = ("a photo of a {}.", "art of the {}.")


@pytest.fixture(scope="module")
def backbone():
    return make_tiny_backbone()


def make_features(backbone, labels, *, views=1, purpose="train", spread=0.6) -> Features:
    """Unit-norm features around one direction per class, as CLIP's are."""
    labels = torch.tensor(labels)
    centres = torch.randn(len(NAMES), backbone.embed_dim, generator=generator(0, "centres"))
    noise = torch.randn(views, len(labels), backbone.embed_dim, generator=generator(0, purpose))
    values = F.normalize(centres[labels] + spread * noise, dim=-1)
    return Features(values, labels, tuple(f"{purpose}-{i}" for i in range(len(labels))), backbone.image_digest)


@pytest.fixture
def support(backbone):
    return make_features(backbone, [0, 0, 1, 2, 2, 2, 3, 3], views=3)


@pytest.fixture
def batch(backbone):
    features = make_features(backbone, [0, 1, 2, 3, 0, 2], purpose="test")
    return Batch(labels=features.labels, index=torch.arange(6), features=features.values[0])


def rows_and_labels(num_rows, width, num_classes, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(num_rows) % num_classes
    rows = rng.normal(size=(num_classes, width))[labels] + rng.normal(size=(num_rows, width)) @ np.diag(
        rng.uniform(0.1, 1, width)
    )
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), labels


def ridge_covariance(rows, labels):
    """Independent: the estimator's inverse with numpy's covariance of the rows less their classes' means."""
    centred = rows.copy()
    for c in np.unique(labels):
        centred[labels == c] -= rows[labels == c].mean(axis=0)
    sigma = np.cov(centred.T)
    return ((len(rows) - 1) * sigma + np.trace(sigma) * np.eye(rows.shape[1])) / rows.shape[1]


class Given:
    """A covariance estimator for scikit-learn that returns what it is given."""

    def __init__(self, covariance):
        self.covariance_ = covariance

    def fit(self, rows):
        return self


@pytest.mark.parametrize(("num_rows", "width"), [(60, 7), (12, 30)])
def test_gda_is_scikit_learns_discriminant_with_the_ridge_covariance(num_rows, width):
    rows, labels = rows_and_labels(num_rows, width, 3)
    model = LinearDiscriminantAnalysis(
        solver="lsqr", priors=[1 / 3] * 3, covariance_estimator=Given(ridge_covariance(rows, labels))
    ).fit(rows, labels)
    weights, biases = gaussian_discriminant(torch.from_numpy(rows), torch.from_numpy(labels), 3)
    scores = torch.from_numpy(rows) @ weights.T + biases
    np.testing.assert_allclose(scores.numpy(), model.decision_function(rows), rtol=1e-8, atol=1e-8)
    assert scores.dtype == torch.float64
    assert not np.allclose(model.coef_[0], model.coef_[1])


def test_gda_differences_are_those_of_gaussian_log_densities():
    rows, labels = rows_and_labels(40, 6, 4)
    covariance = ridge_covariance(rows, labels)
    densities = np.stack(
        [multivariate_normal(rows[labels == c].mean(axis=0), covariance).logpdf(rows) for c in range(4)], axis=1
    ) + math.log(1 / 4)
    weights, biases = gaussian_discriminant(torch.from_numpy(rows), torch.from_numpy(labels), 4)
    scores = (torch.from_numpy(rows) @ weights.T + biases).numpy()
    np.testing.assert_allclose(scores - scores[:, :1], densities - densities[:, :1], rtol=1e-9, atol=1e-9)


def test_gda_with_single_images_among_others():
    rows, labels = rows_and_labels(20, 9, 3)
    labels[:] = 0
    labels[-1], labels[-2] = 1, 2
    weights, biases = gaussian_discriminant(torch.from_numpy(rows), torch.from_numpy(labels), 3)
    precision = np.linalg.inv(ridge_covariance(rows, labels))
    np.testing.assert_allclose(weights[1].numpy(), precision @ rows[-1], rtol=1e-8)
    assert biases[1].item() == pytest.approx(math.log(1 / 3) - rows[-1] @ precision @ rows[-1] / 2)


def test_gda_with_one_image_of_each_class_takes_the_spread_of_all():
    rows, _ = rows_and_labels(3, 9, 3)
    labels = np.array([2, 0, 1])
    weights, biases = gaussian_discriminant(torch.from_numpy(rows), torch.from_numpy(labels), 3)
    precision = np.linalg.inv(ridge_covariance(rows, np.zeros(3)))  # as if all were of one class
    np.testing.assert_allclose(weights[labels].numpy(), rows @ precision, rtol=1e-8)
    scores = torch.from_numpy(rows) @ weights.T + biases
    assert torch.isfinite(scores).all()
    assert scores.argmax(dim=1).tolist() == labels.tolist()


@pytest.mark.parametrize("num_rows", [1, 4])
def test_gda_of_equal_images_compares_with_the_means(num_rows):
    row = F.normalize(torch.arange(1.0, 6.0, dtype=torch.float64), dim=0)
    labels = torch.arange(num_rows) % 2
    weights, biases = gaussian_discriminant(row.expand(num_rows, -1), labels, 2)
    torch.testing.assert_close(weights, row.expand(2, -1))
    torch.testing.assert_close(biases, torch.full((2,), math.log(0.5) - 0.5, dtype=torch.float64))


def test_gda_copies_of_an_image_that_differ_by_rounding_have_no_spread():
    row = F.normalize(torch.randn(48, generator=generator(0, "row"), dtype=torch.float64), dim=0)
    other = F.normalize(torch.randn(48, generator=generator(0, "other"), dtype=torch.float64), dim=0)
    rows, labels = torch.stack([row, other]), torch.tensor([0, 1])
    noisy = torch.cat([rows, rows + 1e-8])
    weights, biases = gaussian_discriminant(noisy, labels.repeat(2), 2)
    assert weights.abs().max() < 1e4  # and not 1 / 1e-16
    assert (noisy @ weights.T + biases).argmax(dim=1).tolist() == [0, 1, 0, 1]


def test_gda_class_without_images_has_the_mean_score():
    rows, labels = rows_and_labels(30, 8, 3)
    labels[labels == 2] = 3
    weights, biases = gaussian_discriminant(torch.from_numpy(rows), torch.from_numpy(labels), 4)
    scores = torch.from_numpy(rows) @ weights.T + biases
    torch.testing.assert_close(scores[:, 2], scores[:, [0, 1, 3]].mean(dim=1))


def test_gda_adds_to_the_zero_shot_logits(backbone, support, batch):
    adapter = GDA(backbone, NAMES, templates=TEMPLATES, alpha=0.3)
    zero_shot = ZeroShotClassifier(backbone, NAMES, TEMPLATES)(batch)
    assert torch.equal(adapter(batch), zero_shot)  # not fitted yet
    adapter.fit_features(support)
    # Every view is a row of its own.
    rows, labels = support.values.double().flatten(0, 1), support.labels.repeat(3)
    precision = np.linalg.inv(ridge_covariance(rows.numpy(), labels.numpy()))
    means = np.stack([rows[labels == c].numpy().mean(axis=0) for c in range(4)])
    gaussian = batch.features.double().numpy() @ (means @ precision).T + math.log(1 / 4)
    gaussian -= np.einsum("cd,de,ce->c", means, precision, means) / 2
    np.testing.assert_allclose(adapter(batch).numpy(), zero_shot.numpy() + 0.3 * gaussian, atol=2e-3, rtol=0)
    adapter.alpha = 0.0
    assert torch.equal(adapter(batch), zero_shot)


def test_gda_chooses_by_accuracy_then_cross_entropy(backbone, support):
    adapter = GDA(backbone, NAMES, templates=TEMPLATES)
    adapter.fit_features(support)
    validation = make_features(backbone, [0, 1, 2, 3] * 6, purpose="validation", spread=2.0)
    table = {}
    for alpha in GDA_ALPHAS:
        adapter.alpha = alpha
        logits = adapter(Batch(validation.labels, validation.labels, validation.values[0])).double()
        right = (logits.argmax(dim=1) == validation.labels).double().mean().item()
        table[alpha] = (-right, F.cross_entropy(logits, validation.labels).item())
    best = min(table, key=lambda alpha: table[alpha])
    choice = adapter.choose(validation)
    assert choice.values == {"alpha": best} == {"alpha": adapter.alpha}
    assert choice.loss == pytest.approx(table[best][1], rel=1e-4)
    assert len({right for right, _ in table.values()}) > 1
    assert choice.grid == {"alpha": (1e-4, 100.0, 7)}


@pytest.mark.parametrize("mode", ["plain", "adaptive"])
def test_ss_text_minimises_its_objective(mode):
    rows, labels = rows_and_labels(9, 5, 2)
    rng = np.random.default_rng(1)
    text = rng.normal(size=(3, 5))  # the third class has no image
    counts = np.bincount(labels, minlength=3)
    scale = 7.0
    strength = [1 / 9] * 3 if mode == "plain" else [1 / n if n else 1.0 for n in counts]

    def objective(flat):
        weights = flat.reshape(3, 5)
        linear = -scale * np.mean([row @ weights[label] for row, label in zip(rows, labels, strict=True)])
        anchor = sum(s / 2 * np.sum((w - t) ** 2) for s, w, t in zip(strength, weights, text, strict=True))
        return linear + anchor

    found = minimize(objective, np.zeros(15), method="BFGS", options={"gtol": 1e-8})
    weights = text_anchored(torch.from_numpy(rows), torch.from_numpy(labels), torch.from_numpy(text), scale, mode)
    np.testing.assert_allclose(weights.numpy(), found.x.reshape(3, 5), atol=1e-5)
    assert objective(weights.numpy().ravel()) <= found.fun + 1e-9
    assert np.array_equal(weights[2].numpy(), text[2])
    assert not np.allclose(weights[0].numpy(), text[0])


def test_the_modes_of_ss_text_differ_in_lambda_and_in_the_move():
    rows, _ = rows_and_labels(1, 5, 1)
    text = torch.eye(2, 5, dtype=torch.float64)
    images, labels = torch.from_numpy(rows.repeat(4, axis=0)), torch.tensor([0, 0, 0, 1])
    # scale · (1 / lambda) / N · sum, with 1 / lambda the images of the class, 3/4 · 3 and 1/4 · 1 times the image …
    adaptive = text_anchored(images, labels, text, 1.0, "adaptive")
    torch.testing.assert_close(adaptive - text, torch.from_numpy(np.outer([9 / 4, 1 / 4], rows[0])))
    # … or N.
    plain = text_anchored(images, labels, text, 1.0, "plain")
    torch.testing.assert_close(plain - text, torch.from_numpy(np.outer([3.0, 1.0], rows[0])))
    moved = text_anchored(images, labels, text, 1.0, "plus").numpy()
    away = 2 * adaptive.numpy() - adaptive.numpy().mean(axis=0)
    np.testing.assert_allclose(moved, adaptive.numpy() - away / np.linalg.norm(away, axis=1, keepdims=True))


def test_lambda_of_the_published_modes_is_at_least_a_thousandth():
    image = torch.eye(1, 3, dtype=torch.float64)
    rows, labels, text = image.repeat(2000, 1), torch.zeros(2000, dtype=torch.long), torch.zeros(1, 3).double()
    assert text_anchored(rows, labels, text, 1.0, "plain")[0, 0].item() == pytest.approx(1000)
    assert text_anchored(rows, labels, text, 1.0, "adaptive")[0, 0].item() == pytest.approx(2000)


def test_ss_text_compares_with_the_directions_of_its_weights(backbone, batch):
    support = make_features(backbone, [0, 0, 1, 3], views=2)
    adapter = SSText(backbone, NAMES, templates=TEMPLATES, mode="plain")
    with pytest.raises(ConfigError, match='Did you mean "plain"'):
        SSText(backbone, NAMES, mode="plane")  # pyright: ignore[reportArgumentType]
    zero_shot = ZeroShotClassifier(backbone, NAMES, TEMPLATES)
    assert torch.equal(adapter(batch), zero_shot(batch))  # not fitted yet
    adapter.fit_features(support)
    scale = math.exp(backbone.model.logit_scale.item())
    means = support.values.double().mean(dim=0)
    weights = text_anchored(means, support.labels, zero_shot.weights.double(), scale, "plain")
    expected = scale * F.cosine_similarity(batch.features.double()[:, None], weights[None], dim=-1)
    torch.testing.assert_close(adapter(batch).double(), expected, atol=1e-4, rtol=0)
    assert torch.equal(adapter.class_weights()[2], zero_shot.weights[2])
    torch.testing.assert_close(adapter.class_weights().norm(dim=-1), torch.ones(4))


@pytest.mark.parametrize(("key", "kind"), [("gda", GDA), ("ss_text", SSText)])
def test_state_and_settings_rebuild_it(backbone, support, batch, key, kind):
    adapter = kind(backbone, NAMES, templates=TEMPLATES)
    adapter.fit_features(support)
    if key == "gda":
        adapter.choose(make_features(backbone, [0, 1, 2, 3], purpose="validation"))
    again = methods()[key](backbone, NAMES, **json.loads(json.dumps(adapter.settings)))
    assert not torch.equal(again(batch), adapter(batch))
    again.load_adapter_state({name: tensor.clone() for name, tensor in adapter.adapter_state().items()})
    assert torch.equal(again(batch), adapter(batch))
    assert again.settings == adapter.settings
    twice = kind(backbone, NAMES, templates=TEMPLATES)
    twice.fit_features(support)
    assert all(torch.equal(twice.adapter_state()[name], t) for name, t in adapter.adapter_state().items())
    for name, tensor in adapter.adapter_state().items():
        with pytest.raises(ArtifactError, match=f"'{name}' .* has shape"):
            again.load_adapter_state({**adapter.adapter_state(), name: tensor[:3]})
        with pytest.raises(ArtifactError, match="not finite"):
            again.load_adapter_state({**adapter.adapter_state(), name: tensor / 0})
    with pytest.raises(ArtifactError, match="should hold"):
        again.load_adapter_state({})


@pytest.mark.parametrize("kind", [GDA, SSText])
def test_nothing_learns(backbone, support, batch, kind):
    adapter = kind(backbone, NAMES, templates=TEMPLATES)
    adapter.fit_features(support)
    assert adapter.trainable_parameters() == []
    assert not any(p.requires_grad for p in adapter.parameters())
    assert adapter.penalty().item() == 0
    torch.testing.assert_close(adapter.class_weights().norm(dim=-1), torch.ones(4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = adapter(batch)
    assert torch.equal(logits, adapter(batch))


@pytest.mark.parametrize("kind", [GDA, SSText])
def test_bad_features(backbone, support, batch, kind):
    adapter = kind(backbone, NAMES, templates=TEMPLATES)
    empty = Features(support.values[:, :0], support.labels[:0], (), backbone.image_digest)
    for features, message in (
        (replace(support, weights="0" * 64), "another backbone"),
        (replace(support, values=support.values[..., :40]), "48 wide .* got 40"),
        (replace(support, labels=support.labels + 1), r"run from 1 to 4; .*0\.\.3"),
        (replace(support, labels=support.labels - 1), r"run from -1 to 2"),
        (empty, "no training images"),
    ):
        with pytest.raises(DataError, match=message):
            adapter.fit_features(features)
    assert torch.equal(adapter(batch), ZeroShotClassifier(backbone, NAMES, TEMPLATES)(batch))
    with pytest.raises(DataError, match="the batch has none"):
        adapter(Batch(labels=batch.labels, index=batch.index))


def test_bad_choices(backbone, support):
    adapter = GDA(backbone, NAMES)
    validation = make_features(backbone, [0, 1])
    empty = Features(validation.values[:, :0], validation.labels[:0], (), backbone.image_digest)
    with pytest.raises(DataError, match=r"no validation images.*fixed values"):
        adapter.choose(empty)
    with pytest.raises(DataError, match="one view per image; got 3"):
        adapter.choose(support)
    with pytest.raises(ConfigError, match="alpha must be"):
        adapter.choose(validation, alphas=(1.0, -1.0))
    with pytest.raises(ConfigError, match="alpha must be"):
        GDA(backbone, NAMES, alpha=float("inf"))
    assert adapter.alpha == 1.0


def test_no_rows():
    empty = torch.empty(0, 3, dtype=torch.float64)
    with pytest.raises(DataError, match="at least one image"):
        gaussian_discriminant(empty, torch.empty(0, dtype=torch.long), 2)
    with pytest.raises(DataError, match="at least one image"):
        text_anchored(empty, torch.empty(0, dtype=torch.long), torch.eye(2, 3, dtype=torch.float64), 100.0)
