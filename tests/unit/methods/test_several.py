# SPDX-License-Identifier: Apache-2.0
"""Images that may show several classes: every method with the sigmoid objective learns each class by itself.

The truth is chosen by others: scikit-learn's one-against-rest fits and metrics, sums by hand, autograd.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, roc_auc_score
from torch.nn import functional as F

import adaptclip as ac
from adaptclip.errors import ConfigError, DataError
from adaptclip.methods.base import matching_bias
from adaptclip.methods.choosing import binary_loss, mean_auc
from adaptclip.methods.closed_form import gaussian_discriminant, gaussian_of_each_class
from adaptclip.methods.linear_fits import fit_each_class, sigmoid_gradient
from adaptclip.training.criterion import sigmoid_losses
from adaptclip.types import Features

NAMES = ("crack", "rust", "dent")
WIDTH = 12


@pytest.fixture(scope="module")
def clip() -> ac.FeatureClip:
    """Text features that lean towards those of the images, so that zero-shot is better than chance."""
    rng = np.random.default_rng(8)
    return ac.FeatureClip(centres() + 1.5 * rng.normal(size=(3, WIDTH)), NAMES, logit_scale=20.0)


def centres() -> np.ndarray:
    return np.random.default_rng(3).normal(size=(3, WIDTH))


def world(count: int = 90, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(N, D) features that are sums of what each image shows, and (N, C) what that is; a fifth shows nothing."""
    rng = np.random.default_rng(seed)
    y = (rng.random((count, 3)) < (0.5, 0.35, 0.2)).astype(np.int8)
    y[::5] = 0
    return (y @ centres() + 0.8 * rng.normal(size=(count, WIDTH))).astype(np.float32), y


MAKERS = {
    "zero_shot": lambda clip: ac.ZeroShotClassifier(clip, objective="sigmoid"),
    "logistic": lambda clip: ac.LinearProbe(clip, head="logistic", objective="sigmoid"),
    "text_init": lambda clip: ac.LinearProbe(clip, head="text_init", objective="sigmoid"),
    "clap": lambda clip: ac.LinearProbe(clip, head="clap", objective="sigmoid"),
    "tip_adapter": lambda clip: ac.TipAdapter(clip, objective="sigmoid"),
    "tip_adapter_f": lambda clip: ac.TipAdapter(clip, objective="sigmoid", learn_keys=True),
    "gda": lambda clip: ac.GDA(clip, objective="sigmoid"),
}


def fitted(name, clip, x, y, **how):
    return MAKERS[name](clip).fit(x, y, validation=world(60, seed=1), **how)


@pytest.mark.parametrize("name", MAKERS)
def test_a_method_learns_to_tell_each_class_by_itself(name, clip, tmp_path):
    (x, y), (x_test, y_test) = world(), world(400, seed=2)
    model = fitted(name, clip, x, y)
    probs = model.predict_proba(x_test)
    auc = roc_auc_score(y_test, probs, average="macro")
    zero_shot = roc_auc_score(y_test, fitted("zero_shot", clip, x, y).predict_proba(x_test), average="macro")
    assert auc >= (zero_shot if name == "zero_shot" else max(zero_shot + 0.02, 0.85))
    # Probabilities are of each class by itself, and neither all certain nor all alike.
    assert ((probs > 0.5).sum(axis=1) == 0).any()
    assert ((probs > 0.5).sum(axis=1) >= 2).any()
    assert model.thresholds_ is not None
    answers = model.predict(x_test)
    np.testing.assert_array_equal(answers, probs >= model.thresholds_.values)
    assert model.score(x_test, y_test) == pytest.approx(accuracy_score(y_test, answers))
    # What is saved answers alike, thresholds included.
    model.save(tmp_path / "saved")
    loaded = ac.load(tmp_path / "saved", device="cpu")
    np.testing.assert_allclose(loaded.adapter.predict_proba(x_test), probs, atol=1e-6)
    assert loaded.thresholds is not None
    np.testing.assert_allclose(loaded.thresholds.values, model.thresholds_.values)
    # The fixed head that exports carry gives the same logits.
    head = model.head()
    assert head.sigmoid
    rows = F.normalize(torch.from_numpy(x_test), dim=1)
    np.testing.assert_allclose(torch.sigmoid(head.logits(rows)).detach().numpy(), probs, atol=1e-4)


@pytest.mark.parametrize("name", MAKERS)
def test_what_nobody_knows_changes_nothing_of_the_class(name, clip):
    """A row that is not known of a class counts for that class as if the row were not there."""
    x, y = world(60)
    hidden = y.copy()
    hidden[:20, 0] = -1
    flipped = hidden.copy()
    flipped[flipped < 0] = -1
    model = fitted(name, clip, x, hidden)
    again = fitted(name, clip, x, np.where(hidden < 0, np.nan, hidden))
    np.testing.assert_array_equal(model.predict_proba(x), again.predict_proba(x))
    assert np.isfinite(model.predict_proba(x)).all()
    if name == "logistic":
        rows = x / np.linalg.norm(x, axis=1, keepdims=True)
        own = LogisticRegression(C=model.info_["chosen"]["C"], max_iter=1000).fit(rows[20:], y[20:, 0])
        np.testing.assert_allclose(model.predict_proba(x)[:, 0], own.predict_proba(rows)[:, 1], atol=2e-3)


def test_labels_are_taken_as_names_as_a_matrix_and_as_a_frame(clip):
    x, y = world(40)
    lists = [[NAMES[c] for c in np.flatnonzero(row)] for row in y]
    expected = ac.GDA(clip, objective="sigmoid").fit(x, y).predict_proba(x)
    for given in (
        lists,
        [set(names) for names in lists],
        y.tolist(),
        torch.from_numpy(y),
        y.astype(bool),
        y.astype(float),
    ):
        np.testing.assert_allclose(
            ac.GDA(clip, objective="sigmoid").fit(x, given).predict_proba(x), expected, atol=1e-6
        )
    brought = Features(
        F.normalize(torch.from_numpy(x), dim=1)[None], torch.zeros(40, dtype=torch.int64), tuple(map(str, range(40))),
        multi_hot=torch.from_numpy(y),
    )  # fmt: skip
    np.testing.assert_allclose(ac.GDA(clip, objective="sigmoid").fit(brought).predict_proba(x), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        ([["crak"]] * 40, "label 'crak', which is no class. Did you mean \"crack\""),
        (np.zeros((40, 2)), r"\(40, 3\) matrix of 0 and 1.*got shape \(40, 2\)"),
        (np.full((40, 3), 0.5), r"with 0\.5 and its like"),
        (np.zeros((39, 3)), "39"),
    ],
)
def test_labels_that_do_not_fit_are_refused(clip, y, message):
    with pytest.raises(DataError, match=message):
        ac.GDA(clip, objective="sigmoid").fit(world(40)[0], y)


def test_a_method_that_names_one_class_refuses_to_learn_from_several(clip):
    x, y = world(40)
    with pytest.raises(DataError, match=r'argmax of each row if they are one-hot.*objective="sigmoid"'):
        ac.GDA(clip).fit(x, y)
    with pytest.raises(DataError, match="one label for each image"):
        ac.SSText(clip).fit(x, y)
    with pytest.raises(ConfigError, match="has a bias for each class"):
        ac.ZeroShotClassifier(clip, objective="sigmoid").fit(x, y).for_classes(["hole", "scratch"])


def test_one_class_each_is_a_case_of_several(clip):
    """Under sigmoid, class ids and their one-hot rows are the same labels."""
    x, _ = world(60)
    ids = np.arange(60) % 3
    for name in ("logistic", "clap", "gda", "tip_adapter"):
        one = MAKERS[name](clip).fit(x, ids, **({"c": 1.0} if name == "logistic" else {}))
        rows = MAKERS[name](clip).fit(x, np.eye(3, dtype=int)[ids], **({"c": 1.0} if name == "logistic" else {}))
        np.testing.assert_allclose(one.predict_proba(x), rows.predict_proba(x), atol=1e-6, err_msg=name)


# --- the pieces ---


def test_losses_and_gradients_leave_out_what_nobody_knows():
    rng = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(6, 5, generator=rng), dim=1).double()
    weight = torch.randn(3, 5, generator=rng).double().requires_grad_()
    bias = torch.randn(3, generator=rng).double().requires_grad_()
    marks = torch.tensor([[1, 1, 0], [0, 0, 0], [-1, 1, 0], [1, -1, -1], [0, 1, 1], [-1, -1, -1]], dtype=torch.int8)
    labels = torch.zeros(6, dtype=torch.int64)
    logits = 7.0 * features @ F.normalize(weight, dim=1).T + bias
    by_hand = torch.zeros(6, dtype=torch.float64)
    for i in range(6):
        for c in range(3):
            if marks[i, c] >= 0:
                p = torch.sigmoid(logits[i, c])
                by_hand[i] -= torch.log(p if marks[i, c] == 1 else 1 - p)
    torch.testing.assert_close(sigmoid_losses(logits, labels, marks), by_hand)
    by_hand.mean().backward()
    found = sigmoid_gradient(features, labels, weight.detach(), bias.detach(), 7.0, None, marks)
    torch.testing.assert_close(found[0], weight.grad)
    torch.testing.assert_close(found[1], bias.grad)


def test_the_bias_matches_the_share_of_what_is_known():
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(3 * rng.normal(size=(50, 4)))
    positive = torch.from_numpy(rng.random((50, 4)) < 0.3)
    known = torch.from_numpy(rng.random((50, 4)) < 0.6)
    bias = matching_bias(logits, positive, known)
    for c in range(4):
        rows = known[:, c]
        share = positive[rows, c].double().mean()
        assert torch.sigmoid(logits[rows, c] + bias[c]).mean().item() == pytest.approx(share.item(), abs=1e-9)


def test_the_area_and_the_loss_are_those_of_scikit_learn():
    rng = np.random.default_rng(1)
    logits = np.round(rng.normal(size=(80, 3)), 1)  # with ties
    positive, known = rng.random((80, 3)) < 0.3, rng.random((80, 3)) < 0.8
    areas = [roc_auc_score(positive[known[:, c], c], logits[known[:, c], c]) for c in range(3)]
    tensors = torch.from_numpy(logits), torch.from_numpy(positive), torch.from_numpy(known)
    assert mean_auc(*tensors) == pytest.approx(np.mean(areas))
    probs = 1 / (1 + np.exp(-logits))
    own = -np.log(np.where(positive, probs, 1 - probs))[known].mean()
    assert binary_loss(*tensors) == pytest.approx(own)


def test_each_class_is_scikit_learns_one_against_the_rest():
    x, y = world(80)
    fit = fit_each_class(x, y == 1, None, c=2.0)
    for c in range(3):
        own = LogisticRegression(C=2.0, max_iter=1000).fit(x, y[:, c])
        np.testing.assert_allclose(fit.weight[c], own.coef_[0], atol=1e-6)
        assert fit.bias[c] == pytest.approx(own.intercept_[0], abs=1e-6)
    nobody = fit_each_class(x, np.zeros((80, 1), bool), None, c=2.0)
    assert (nobody.weight == 0).all()
    assert 1 / (1 + np.exp(-nobody.bias[0])) == pytest.approx(0.5 / 80)


def test_two_classes_that_exclude_each_other_are_the_papers_gaussians():
    """With as many images of each, w of "first against the rest" is the difference of the paper's two."""
    rng = np.random.default_rng(4)
    labels = torch.arange(40) % 2
    rows = torch.from_numpy(centres()[:2][labels.numpy()] + rng.normal(size=(40, WIDTH)))
    own, biases = gaussian_of_each_class(rows, F.one_hot(labels, 2).bool(), None)
    paper, _ = gaussian_discriminant(rows, labels, 2)
    torch.testing.assert_close(own[0], paper[0] - paper[1])
    torch.testing.assert_close(own[1], -own[0])
    middle = (rows[labels == 0].mean(dim=0) + rows[labels == 1].mean(dim=0)) / 2
    assert (middle @ own[0] + biases[0]).item() == pytest.approx(0, abs=1e-9)


def test_tip_adapters_votes_are_those_of_all_classes_of_a_key(clip):
    x, y = world(30)
    model = ac.TipAdapter(clip, objective="sigmoid", alpha=2.0, beta=3.0).fit(x, y)
    rows = x / np.linalg.norm(x, axis=1, keepdims=True)
    text = np.asarray(model.text)
    votes = np.exp(-3.0 * (1 - rows @ rows.T))
    logits = 20.0 * rows @ text.T + 2.0 * votes @ y + np.asarray(model.class_bias())
    np.testing.assert_allclose(model.predict_proba(x), 1 / (1 + np.exp(-logits)), atol=1e-4)
    np.fill_diagonal(votes, 0)  # the bias fits the training images without their own keys
    without = 20.0 * rows @ text.T + 2.0 * votes @ y + np.asarray(model.class_bias())
    np.testing.assert_allclose((1 / (1 + np.exp(-without))).mean(axis=0), y.mean(axis=0), atol=1e-4)


# --- what is known of a class only in part, or not at all ---


@pytest.mark.parametrize("name", ["zero_shot", "logistic", "tip_adapter", "gda"])
def test_a_class_of_which_nothing_is_known_is_not_named_everywhere(name, clip):
    x, y = world(60)
    y = y.astype(float)
    y[:, 2] = np.nan
    settings = {"c": 1.0} if name == "logistic" else {}
    if name == "logistic":
        with pytest.warns(UserWarning, match="1 of 3 classes have no training images both with and without them"):
            model = MAKERS[name](clip).fit(x, y, **settings)
    else:
        model = MAKERS[name](clip).fit(x, y, **settings)
    assert np.isfinite(model.predict_proba(x)).all()
    assert model.predict(x)[:, 2].mean() < 0.5


def test_an_image_of_which_nothing_is_known_is_neither_right_nor_wrong(clip):
    x, y = world(60)
    model = fitted("gda", clip, x, y)
    hidden = y.copy()
    hidden[::2] = -1
    assert model.score(x, hidden) == pytest.approx(model.score(x[1::2], y[1::2]))


def test_zero_shot_is_compared_at_thresholds_of_its_own(clip):
    x, y = world(60)
    model = fitted("zero_shot", clip, x, y)
    assert model.thresholds_ is not None
    assert model.thresholds_.num_images == 60
    images = ac.GDA(clip, objective="sigmoid")
    assert images.thresholds_ is None


def test_one_image_of_each_class_gives_no_certain_gaussian(clip):
    """Nothing is left within the classes, so the scatter around the mean of all stands in for it."""
    x, _ = world(2)
    model = ac.GDA(clip, objective="sigmoid").fit(x, [["crack"], ["rust", "dent"]])
    assert np.abs(model.weights.numpy()).max() < 1e4
    assert (np.abs(model.predict_proba(world(40)[0]) - 0.5) < 0.4999).any()


@pytest.mark.parametrize("y", [[[0, 2], [1]] * 20, [["crack"], None] * 20, 3])
def test_rows_of_another_kind_are_refused_in_words(clip, y):
    with pytest.raises(DataError):
        ac.GDA(clip, objective="sigmoid").fit(world(40)[0], y)
