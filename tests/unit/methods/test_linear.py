# SPDX-License-Identifier: Apache-2.0
"""Linear heads against scikit-learn called directly, numpy in float64, and autograd."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from tiny_clip import make_tiny_backbone
from torch.nn import functional as F

from adaptclip.errors import ArtifactError, ConfigError, DataError, TrainingError
from adaptclip.methods import LinearProbe, ZeroShotClassifier
from adaptclip.methods.linear_fits import (
    cosine_gradient,
    epoch_rate,
    fit_from_text,
    fit_logistic,
    fit_lp_plus_plus,
    initial_weights,
    search_exponent,
    start_norm_of,
    step_sizes,
    zero_shot_confidence,
)
from adaptclip.methods.registry import methods
from adaptclip.training.optim import epoch_cosine_lr
from adaptclip.types import Batch, Features

NAMES = ("rose", "lily of the valley", "dog", "handwritten digit")
TEMPLATES = ("a photo of a {}.", "art of the {}.")
HEADS = ("logistic", "text_init", "clap", "lp_plus_plus")
QUICK = {"logistic": {"c": 1.0}, "text_init": {"epochs": 8}, "clap": {"epochs": 8}, "lp_plus_plus": {"epochs": 25}}
D = 48


@pytest.fixture(scope="module")
def backbone():
    return make_tiny_backbone()


def make_features(
    counts=(6, 6, 6, 6), *, views=1, width=D, weights="", seed=0, noise=1.2, label_offset=0
) -> Features:  # fmt: skip
    """Images scattered around one centre per class; the same centres for every seed."""
    centres = torch.randn(len(counts), width, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    draw = torch.Generator().manual_seed(seed)
    values = centres[labels] + noise * torch.randn(views, len(labels), width, generator=draw)
    ids = tuple(f"{seed}-{i}" for i in range(len(labels)))
    return Features(F.normalize(values, dim=-1), labels + label_offset, ids, weights)


def batch_of(features: Features) -> Batch:
    return Batch(labels=features.labels, index=torch.arange(len(features)), features=features.values[0])


def numpy64(*tensors: torch.Tensor) -> tuple[np.ndarray, ...]:
    return tuple(t.detach().double().numpy() for t in tensors)


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


# --- logistic ---


def test_logistic_is_scikit_learn(backbone):
    train, test = make_features(), make_features(seed=5)
    probe = LinearProbe(backbone, NAMES)
    info = probe.fit_features(train, c=3.0)
    direct = LogisticRegression(C=3.0, max_iter=1000).fit(train.values[0].numpy(), train.labels.numpy())
    assert np.array_equal(probe.learnt["weight"].numpy(), direct.coef_)
    assert np.array_equal(probe.learnt["bias"].numpy(), direct.intercept_)
    logits = probe(batch_of(test))
    assert np.array_equal(logits.argmax(1).numpy(), direct.predict(test.values[0].numpy()))
    assert logits.softmax(1).numpy() == pytest.approx(direct.predict_proba(test.values[0].numpy()), abs=1e-5)
    assert info["chosen"] == {"C": 3.0, "iterations": int(direct.n_iter_[0]), "converged": True}
    assert info["validation_used_for"] == "nothing"


def test_two_classes_become_two_columns(backbone):
    train = make_features((5, 7))
    probe = LinearProbe(backbone, NAMES[:2])
    probe.fit_features(train, c=2.0)
    direct = LogisticRegression(C=2.0, max_iter=1000).fit(train.values[0].numpy(), train.labels.numpy())
    logits = probe(batch_of(train))
    assert logits.shape == (12, 2)
    assert logits.softmax(1).numpy() == pytest.approx(direct.predict_proba(train.values[0].numpy()), abs=1e-5)


@pytest.mark.parametrize("counts", [(6, 0, 6, 6), (6, 0, 6, 0)])
def test_logistic_never_predicts_a_class_without_images(backbone, counts):
    train = make_features(counts)
    probe = LinearProbe(backbone, NAMES)
    have = "1 of 4 classes has" if counts.count(0) == 1 else "2 of 4 classes have"
    with pytest.warns(UserWarning, match=rf"{have} no training image \(lily of the valley"):
        probe.fit_features(train, c=1e6)
    direct = LogisticRegression(C=1e6, max_iter=1000).fit(train.values[0].numpy(), train.labels.numpy())
    everywhere = F.normalize(torch.randn(500, D, generator=torch.Generator().manual_seed(1)), dim=-1)
    index = torch.arange(500)
    probs = probe(Batch(labels=index, index=index, features=everywhere)).softmax(1)
    unseen = [c for c, n in enumerate(counts) if n == 0]
    assert (probs[:, unseen] == 0).all()
    seen = [c for c, n in enumerate(counts) if n]
    assert probs[:, seen].numpy() == pytest.approx(direct.predict_proba(everywhere.numpy()), abs=1e-5)


def test_the_search_ends_at_the_peak():
    asked: list[float] = []

    def peak(exponent: float) -> tuple[float, float]:
        asked.append(exponent)
        return 1 - abs(exponent - 1.3) / 10, 0.0

    best, tried = search_exponent(peak)
    assert best == 1.25  # the nearest of 8 steps per decade
    assert asked == list(tried) == [-6, -4, -2, 0, 2, 4, 6, 1, 3, 0.5, 1.5, 1.25, 1.75, 1.125, 1.375]
    assert search_exponent(lambda e: (e / 10, 0.0))[0] == 6
    assert max(search_exponent(lambda e: (e / 10, 0.0))[1]) == 6


def test_ties_go_to_the_lower_loss_then_to_the_stronger_penalty():
    assert search_exponent(lambda e: (0.5, abs(e - 3)))[0] == 3
    assert search_exponent(lambda e: (0.5, 0.25))[0] == -6


def test_c_by_validation_is_an_exhaustive_choice_over_what_was_tried(backbone):
    train, validation = make_features(noise=2.0), make_features((4, 4, 4, 4), seed=7, noise=2.0)
    probe = LinearProbe(backbone, NAMES)
    info = probe.fit_features(train, validation)
    x, y, u, v = (t.numpy() for t in (train.values[0], train.labels, validation.values[0], validation.labels))
    scores = {}
    for entry in info["chosen"]["tried"]:
        model = LogisticRegression(C=entry["C"], max_iter=1000)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(x, y)
        loss = -np.log(model.predict_proba(u.astype(np.float64))[np.arange(len(v)), v]).mean()
        scores[entry["C"]] = (-model.score(u, v), loss)
        assert entry["accuracy"] == pytest.approx(model.score(u, v))
        assert entry["loss"] == pytest.approx(loss, rel=1e-4)
    assert {1e-6, 1e-4, 1e-2, 1.0, 1e2, 1e4, 1e6} <= set(scores)
    assert len(scores) > 10
    assert info["chosen"]["C"] == min(scores, key=lambda c: scores[c])
    assert info["validation_used_for"] == "choosing C"
    refit = LogisticRegression(C=info["chosen"]["C"], max_iter=1000).fit(x, y)
    assert np.array_equal(probe.learnt["weight"].numpy(), refit.coef_)


def test_no_validation_images_names_the_way_out(backbone):
    empty = Features(torch.zeros(1, 0, D), torch.zeros(0, dtype=torch.long), ())
    for validation in (None, empty):
        with pytest.raises(ConfigError, match=r"there are none\. Give it \(--C"):
            LinearProbe(backbone, NAMES).fit_features(make_features(), validation)


def test_one_class_alone_is_refused_by_logistic(backbone):
    with pytest.raises(DataError, match="at least two classes"):
        fit_logistic(np.eye(3, D, dtype=np.float32), np.zeros(3, dtype=np.int64), 4, c=1.0)


# --- text_init and CLAP ---


def test_before_the_fit_the_heads_with_words_are_zero_shot(backbone):
    batch = batch_of(make_features())
    expected = ZeroShotClassifier(backbone, NAMES, TEMPLATES)(batch)
    for head in ("text_init", "clap"):
        assert torch.equal(LinearProbe(backbone, NAMES, head=head, templates=TEMPLATES)(batch), expected)
    lp = LinearProbe(backbone, NAMES, head="lp_plus_plus", templates=TEMPLATES)(batch)
    torch.testing.assert_close(lp, expected, atol=1e-4, rtol=0)


def test_the_closed_form_gradient_is_autograds():
    features = make_features().values[0].double()
    labels = make_features().labels
    weight = torch.randn(4, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64, requires_grad=True)
    loss = F.cross_entropy(100 * F.cosine_similarity(features[:, None], weight[None], dim=-1), labels)
    (expected,) = torch.autograd.grad(loss, weight)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(cosine_gradient(features, labels, weight.detach(), 100.0), expected)


@pytest.mark.parametrize("penalised", [False, True])
@pytest.mark.parametrize(
    ("images", "views", "size", "per_epoch"), [(20, 3, 8, [8, 8]), (8, 4, 16, [16]), (4, 2, 16, [8])]
)
def test_the_descent_is_torchs_sgd_on_the_loss_in_words(penalised, images, views, size, per_epoch):
    """Steps of an epoch: as many as the images fill (2, 1, 1), each of rows from all views mixed."""
    train = make_features((images // 4,) * 4, views=views)
    text = F.normalize(torch.randn(4, D, generator=torch.Generator().manual_seed(3)), dim=-1)
    penalty = torch.tensor([0.2, 0.9, 0.4, 3.0]) if penalised else None
    seen: list[torch.Tensor] = []
    epochs, norm = 7, 2.5
    fitted = fit_from_text(
        train.values, train.labels, text, 20.0, start_norm=norm, penalty=penalty, lr=0.4, epochs=epochs,
        batch_size=size, seed=4,
    )  # fmt: skip
    from adaptclip.seeding import generator

    rows, labels = train.values.flatten(0, 1), train.labels.repeat(views)
    weight = torch.nn.Parameter(norm * text)
    sgd = torch.optim.SGD([weight], lr=1.0, momentum=0.9)
    for epoch in range(epochs):
        order = torch.randperm(images * views, generator=generator(4, "order of the linear head", epoch))
        seen.append(order)
        rate = epoch_cosine_lr(epoch, epochs=epochs, lr=0.4, warmup_epochs=1, warmup_lr=1e-5)
        sgd.param_groups[0]["lr"] = rate
        for batch in order[: sum(per_epoch)].split(size):
            loss = F.cross_entropy(20 * rows[batch] @ F.normalize(weight, dim=1).T, labels[batch])
            if penalty is not None:
                loss = loss + (penalty * (weight - norm * text).square().sum(1)).mean()
            sgd.zero_grad()
            loss.backward()
            sgd.step()
    torch.testing.assert_close(fitted, weight.detach(), atol=2e-5, rtol=1e-4)
    assert (fitted - norm * text).abs().max() > 0.01
    assert len({tuple(order.tolist()) for order in seen}) == epochs


def test_a_start_of_another_norm_is_another_rate_and_another_pull():
    """The logits see directions alone: from norm s, a rate s² as large and a pull as weak by s² turn alike."""
    train = make_features((5, 5, 5, 5))
    text = F.normalize(torch.randn(4, D, generator=torch.Generator().manual_seed(3)), dim=-1)

    def fitted(norm: float, lr: float, pull: float) -> torch.Tensor:
        weight = fit_from_text(
            train.values, train.labels, text, 20.0, start_norm=norm, penalty=torch.full((4,), pull), lr=lr, epochs=9,
            batch_size=20, seed=1,
        )  # fmt: skip
        return F.normalize(weight, dim=1)

    assert epoch_rate(0, epochs=9, lr=1.0) < 1e-4  # the first epoch hardly counts: its rate is not scaled
    torch.testing.assert_close(fitted(3.0, 0.09, 0.5 / 9), fitted(1.0, 0.01, 0.5), atol=1e-4, rtol=0)
    assert (fitted(3.0, 0.01, 0.5) - fitted(1.0, 0.01, 0.5)).abs().max() > 0.01


def test_the_start_norm_is_the_root_of_the_logit_scale_unless_given(backbone):
    scale = float(backbone.logit_scale)
    assert LinearProbe(backbone, NAMES, head="clap").start_norm == pytest.approx(scale**0.5)
    assert start_norm_of(100.0) == 10.0  # OpenAI's models: the raw norm that the published code starts at
    probe = LinearProbe(backbone, NAMES, head="text_init", start_norm=3.0)
    assert probe.settings["start_norm"] == 3.0
    info = probe.fit_features(make_features(), epochs=2)
    assert info["chosen"]["start_norm"] == 3.0
    assert "from weights of norm 3;" in info["schedule"]
    for head, settings, message in (
        ("lp_plus_plus", {"start_norm": 1.0}, "text_init and clap start; got 1 for lp"),
        ("clap", {"start_norm": 0.0}, "a number above 0.*got 0"),
        ("clap", {"reading": "paper"}, "'clap' has no reading"),
        ("lp_plus_plus", {"reading": "papers"}, 'Did you mean "paper"'),
    ):
        with pytest.raises(ConfigError, match=message):
            LinearProbe(backbone, NAMES, head=head, **settings)  # pyright: ignore[reportArgumentType]


def test_the_schedule_is_coops():
    rates = [epoch_rate(e, epochs=300, lr=0.1) for e in range(300)]
    assert rates == [epoch_cosine_lr(e, epochs=300, lr=0.1, warmup_epochs=1, warmup_lr=1e-5) for e in range(300)]
    assert rates[:2] == [1e-5, 0.1]


def test_claps_weights_are_the_mean_zero_shot_probability_of_the_own_class():
    train = make_features((6, 1, 0, 5), views=2)
    text = F.normalize(torch.randn(4, D, generator=torch.Generator().manual_seed(3)), dim=-1)
    values, t = numpy64(train.values, text)
    y = train.labels.numpy()
    probs = np.stack([softmax(15 * view @ t.T) for view in values])
    expected = [probs[:, y == c, c].mean() if (y == c).any() else 1.0 for c in range(4)]
    got = zero_shot_confidence(train.values, torch.nn.functional.one_hot(train.labels, len(text)), text, 15.0).numpy()
    assert got == pytest.approx(np.array(expected), rel=1e-5)
    assert got[2] == 1
    assert 0 < got.min() < got[[0, 1, 3]].max() < 1


def test_clap_with_weight_0_is_text_init_and_more_weight_stays_nearer(backbone):
    train = make_features(views=2)

    def fitted(head, **settings):
        probe = LinearProbe(backbone, NAMES, head=head)
        probe.fit_features(train, epochs=20, seed=3, **settings)
        return probe

    free = fitted("text_init")
    assert torch.equal(fitted("clap", clap_weight=0.0).learnt["weight"], free.learnt["weight"])
    distance = [
        (fitted("clap", clap_weight=w).learnt["weight"] - free.text).norm().item() for w in (0.0, 1.0, 10.0, 100.0)
    ]
    assert distance == sorted(distance, reverse=True)
    assert distance[0] > 2 * distance[-1] > 0


def test_fewer_images_than_a_batch_and_other_seeds(backbone):
    heads = {}
    for seed in (0, 1):
        probe = LinearProbe(backbone, NAMES, head="text_init")
        probe.fit_features(make_features((90, 90, 90, 90)), epochs=3, seed=seed)
        heads[seed] = probe.learnt["weight"].clone()
    assert not torch.equal(heads[0], heads[1])  # 360 images: a batch of 256, drawn differently
    probe = LinearProbe(backbone, NAMES, head="text_init")
    probe.fit_features(make_features((1, 1, 1, 1)), epochs=50)
    assert (probe(batch_of(make_features((1, 1, 1, 1)))).argmax(1) == torch.arange(4)).all()


# --- LP++ ---


@pytest.mark.parametrize("counts", [(30, 30, 30, 30), (3, 3, 3, 3)])  # N above and below D
def test_step_sizes_and_start_follow_the_formulas(counts):
    train = make_features(counts)
    text = F.normalize(torch.randn(4, D, generator=torch.Generator().manual_seed(3)), dim=-1)
    f, t = numpy64(train.values[0], text)
    y, n, k = train.labels.numpy(), len(train), counts[0]
    lr_w, lr_alpha = step_sizes(train.values[0], text)
    assert lr_w == pytest.approx(4 * n / np.linalg.eigvalsh(f.T @ f).max(), rel=1e-10)
    assert lr_alpha == pytest.approx(n / (4 * ((f @ t.T) ** 2).sum(axis=0).max()), rel=1e-10)
    weight, alpha = initial_weights(train.values[0], train.labels, text)
    sums = np.stack([f[y == c].sum(axis=0) for c in range(4)])
    assert weight.numpy() == pytest.approx(sums, abs=1e-5)
    expected = 250 / k * np.mean([(f[y == c] @ t[c]).sum() for c in range(4)])
    assert alpha.numpy() == pytest.approx(np.full(4, expected), rel=1e-4)


def test_start_of_lp_plus_plus_with_unequal_and_empty_classes():
    train = make_features((4, 1, 0, 3))
    text = F.normalize(torch.randn(4, D, generator=torch.Generator().manual_seed(3)), dim=-1)
    f, t = numpy64(train.values[0], text)
    y = train.labels.numpy()
    weight, alpha = initial_weights(train.values[0], train.labels, text)
    assert (weight[2] == 0).all()
    expected = 250 * np.mean([(f[y == c] @ t[c]).mean() for c in (0, 1, 3)])
    assert alpha.numpy() == pytest.approx(np.full(4, expected), rel=1e-4)


@pytest.mark.parametrize("reading", ["code", "paper"])
def test_lp_plus_plus_is_the_descent_of_the_formulas(reading):
    train = make_features()
    text = F.normalize(torch.randn(4, D, generator=torch.Generator().manual_seed(3)), dim=-1)
    f, t = numpy64(train.values[0], text)
    y, n = train.labels.numpy(), len(train)
    lr_w, lr_alpha = step_sizes(train.values[0], text)
    w = np.stack([f[y == c].sum(axis=0) for c in range(4)])
    a = np.full(4, 250 * np.mean([(f[y == c] @ t[c]).mean() for c in range(4)]))
    b, uphill, drift = np.zeros(4), np.zeros(4), np.zeros(4)
    velocity, losses = np.zeros_like(w), []
    for epoch in range(1, 36):
        probs = softmax(f @ w.T + (f @ t.T) * a + b)
        losses.append(-np.log(probs[np.arange(n), y]).mean())
        error = probs - np.eye(4)[y]
        slope = (error * (f @ t.T)).sum(axis=0) / n
        uphill = uphill + slope if reading == "code" else slope
        if epoch % 10 == 0:
            a = a - lr_alpha * uphill
        velocity = 0.9 * velocity + error.T @ f / n
        w = w - lr_w * velocity
        if reading == "code":
            drift = 0.9 * drift + error.mean(axis=0)
            b = b - lr_w * drift
    fitted = fit_lp_plus_plus(
        train.values[0], train.labels, text, lr_w=lr_w, lr_alpha=lr_alpha, epochs=35, reading=reading
    )
    assert fitted.weight.numpy() == pytest.approx(w, abs=1e-3)
    assert fitted.alpha.numpy() == pytest.approx(a, rel=1e-4)
    assert fitted.bias.numpy() == pytest.approx(b, abs=1e-3)
    assert fitted.epoch == 35
    assert losses[-1] < 0.5 * losses[0]
    assert (np.abs(b).max() > 0.01) == (reading == "code")


def test_lp_plus_plus_keeps_the_last_of_the_epochs_that_are_best_on_validation():
    train, validation = make_features(noise=1.6), make_features((5, 5, 5, 5), seed=3, noise=2.5)
    text = F.normalize(torch.randn(4, D, generator=torch.Generator().manual_seed(3)), dim=-1)
    lr_w, lr_alpha = step_sizes(train.values[0], text)

    def fit(epochs: int, **how):
        return fit_lp_plus_plus(train.values[0], train.labels, text, lr_w=lr_w, lr_alpha=lr_alpha, epochs=epochs, **how)

    judged = validation.values[0], validation.labels
    hits = []
    for epoch in range(1, 31):
        fitted = fit(epoch)
        logits = judged[0] @ (fitted.weight + fitted.alpha[:, None] * text).T + fitted.bias
        hits.append(int((logits.argmax(1) == judged[1]).sum()))
    expected = max(range(30), key=lambda i: (hits[i], i)) + 1
    assert 1 < expected < 30
    kept = fit(30, validation=judged)
    assert kept.epoch == expected
    assert torch.equal(kept.weight, fit(expected).weight)
    assert fit(30, validation=judged, reading="paper").epoch == 30


# --- all heads ---


@pytest.mark.parametrize("head", HEADS)
def test_equal_input_gives_equal_bits_and_an_artifact_gives_equal_logits(backbone, head):
    train, test = make_features(views=2, weights=backbone.image_digest), batch_of(make_features(seed=5))
    probes = [LinearProbe(backbone, NAMES, head=head, templates=TEMPLATES) for _ in range(2)]
    info = [probe.fit_features(train, **QUICK[head], seed=1) for probe in probes]
    assert info[0]["chosen"] == info[1]["chosen"]
    live = probes[0](test)
    assert torch.equal(live, probes[1](test))
    assert not live.requires_grad
    assert json.loads(json.dumps(info[0])) == info[0]
    assert info[0]["seconds"] > 0
    settings = json.loads(json.dumps(probes[0].settings))
    again = methods()["linear_probe"](backbone, NAMES, **settings)
    again.load_adapter_state({name: tensor.clone() for name, tensor in probes[0].adapter_state().items()})
    assert torch.equal(again(test), live)
    weights = again.class_weights()
    torch.testing.assert_close(weights.norm(dim=1), torch.ones(4))
    assert again.penalty() == 0
    with pytest.raises(ArtifactError, match=r"linear probe .* has shape \(3, 48\), expected \(4, 48\)"):
        again.load_adapter_state({**probes[0].adapter_state(), "weight": torch.zeros(3, D)})
    with pytest.raises(ArtifactError, match="should hold"):
        again.load_adapter_state({"weights": torch.zeros(4, D)})


@pytest.mark.parametrize("head", HEADS)
def test_what_learns_is_counted(backbone, head):
    probe = LinearProbe(backbone, NAMES, head=head)
    before = {name: tensor.clone() for name, tensor in probe.adapter_state().items()}
    probe.fit_features(make_features(), **QUICK[head])
    expected = 4 * D + {"logistic": 4, "lp_plus_plus": 8}.get(head, 0)
    assert sum(p.numel() for p in probe.trainable_parameters()) == expected
    changed = {name for name, tensor in probe.adapter_state().items() if not torch.equal(tensor, before[name])}
    assert changed == {"logistic": {"weight", "bias"}, "lp_plus_plus": {"weight", "alpha", "bias"}}.get(
        head, {"weight"}
    )


@pytest.mark.parametrize("head", HEADS)
def test_one_image_per_class_learns_it(backbone, head):
    train = make_features((1, 1, 1, 1))
    probe = LinearProbe(backbone, NAMES, head=head)
    probe.fit_features(train, **{**QUICK[head], **({} if head == "logistic" else {"epochs": 100})})
    assert (probe(batch_of(train)).argmax(1) == train.labels).all()


@pytest.mark.parametrize("head", HEADS[1:])
def test_a_class_without_images_keeps_its_words(backbone, head):
    train = make_features((6, 0, 6, 6))
    probe = LinearProbe(backbone, NAMES, head=head)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probe.fit_features(train, **QUICK[head])
    index = torch.tensor([1])
    logits = probe(Batch(labels=index, index=index, features=probe.text[1:2]))
    assert logits.argmax() == 1


def test_views_of_logistic_and_lp_plus_plus_are_that_many_images(backbone):
    train = make_features(views=3)
    flat = Features(
        train.values.flatten(0, 1)[None], train.labels.repeat(3), tuple(map(str, range(3 * len(train))))
    )  # fmt: skip
    for head in ("logistic", "lp_plus_plus"):
        one, other = (LinearProbe(backbone, NAMES, head=head) for _ in range(2))
        one.fit_features(train, **QUICK[head])
        other.fit_features(flat, **QUICK[head])
        assert torch.equal(one.learnt["weight"], other.learnt["weight"])


@pytest.mark.parametrize("head", HEADS)
def test_half_precision_does_not_round_the_logits(backbone, head):
    probe = LinearProbe(backbone, NAMES, head=head)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        probe.fit_features(make_features(), **QUICK[head])
        logits = probe(batch_of(make_features()))
    plain = LinearProbe(backbone, NAMES, head=head)
    plain.fit_features(make_features(), **QUICK[head])
    assert torch.equal(logits, plain(batch_of(make_features())))


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (make_features(width=32), "should be 48 wide"),
        (make_features(weights="0" * 64), "come from another backbone"),
        (make_features(label_offset=1), r"label ids 1\.\.4; this head has 4 classes"),
        (Features(torch.zeros(1, 0, D), torch.zeros(0, dtype=torch.long), ()), "no training images"),
    ],
)
@pytest.mark.parametrize("head", HEADS)
def test_features_that_do_not_fit(backbone, head, features, message):
    probe = LinearProbe(backbone, NAMES, head=head)
    with pytest.raises(DataError, match=message):
        probe.fit_features(features, **QUICK[head])


def test_validation_features_of_another_backbone(backbone):
    with pytest.raises(DataError, match="come from another backbone"):
        LinearProbe(backbone, NAMES).fit_features(make_features(), make_features(weights="0" * 64))


@pytest.mark.parametrize(
    ("head", "settings", "message"),
    [
        ("logistic", {"lr": 0.1}, r"'logistic' has no setting --lr \(got 0.1\): it belongs to text_init and clap"),
        ("logistic", {"epochs": 3}, "it belongs to text_init and clap and lp"),
        ("text_init", {"c": 1.0}, "has no setting --C"),
        ("text_init", {"clap_weight": 1.0}, "has no setting --clap-weight"),
        ("lp_plus_plus", {"lr": 0.1}, "has no setting --lr"),
        ("logistic", {"c": -1.0}, "--C must be a number above 0, got -1"),
        ("clap", {"clap_weight": -1.0}, "--clap-weight must be a number 0 or more"),
        ("clap", {"lr": float("nan")}, "--lr must be a number above 0"),
        ("lp_plus_plus", {"epochs": 0}, "--epochs must be a number 1 or more"),
    ],
)
def test_settings_that_the_head_does_not_have(backbone, head, settings, message):
    with pytest.raises(ConfigError, match=message):
        LinearProbe(backbone, NAMES, head=head).fit_features(make_features(), **settings)


def test_a_wrong_head_and_no_names(backbone):
    with pytest.raises(ConfigError, match='Did you mean "logistic"'):
        LinearProbe(backbone, NAMES, head="logistics")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="at least one class"):
        LinearProbe(backbone, ())
    with pytest.raises(DataError, match="the batch has none"):
        LinearProbe(backbone, NAMES)(Batch(labels=torch.zeros(2), index=torch.zeros(2)))


def test_a_fit_that_is_not_finite_is_not_kept(backbone):
    train = make_features()
    probe = LinearProbe(backbone, NAMES, head="text_init")
    with pytest.raises(TrainingError, match="not finite"):
        probe.fit_features(train, lr=1e38)
    broken = replace(train, values=torch.full_like(train.values, float("nan")))
    with pytest.raises(TrainingError, match="not finite"):
        LinearProbe(backbone, NAMES, head="clap").fit_features(broken, epochs=2)
    assert torch.equal(probe.learnt["weight"], probe.text)
