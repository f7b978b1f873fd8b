# SPDX-License-Identifier: Apache-2.0
"""Methods beside the published code, run on the same features of a real CLIP (`tests/data/peers.json`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import real_features
import torch
from real_features import NAMES
from torch.nn import functional as F

from adaptclip.methods import LinearProbe, SSText, TipAdapter
from adaptclip.types import Batch, Features

PEERS = json.loads((Path(__file__).parents[2] / "data" / "peers.json").read_text(encoding="utf-8"))
TEMPLATES = ("{}",)


@pytest.fixture(scope="module")
def real():
    return real_features.load()


def uneven(real: Any) -> Features:
    """1 to 8 images of a class."""
    train, _ = real.draw(8, 1)
    labels = train.labels.numpy()
    kept = np.concatenate([np.flatnonzero(labels == c)[: 1 + (3 * c) % 8] for c in range(19)])
    return Features(train.values[:, kept], train.labels[kept], tuple(train.ids[i] for i in kept), train.weights)


def linear(real: Any, name: str) -> Any:
    head, rest = name.split(", ")
    train, validation = real.draw(int(rest.split()[0]), 1)
    probe = LinearProbe(real.clip, NAMES, head=head, templates=TEMPLATES)  # pyright: ignore[reportArgumentType]
    probe.fit_features(train, validation)
    return probe


def ss_text(real: Any, name: str) -> Any:
    method, rest = name.split(", ")
    adapter = SSText(real.clip, NAMES, templates=TEMPLATES, mode="plus" if method == "ss_text+" else "plain")
    adapter.fit_features(uneven(real) if rest == "uneven" else real.draw(int(rest.split()[0]), 1)[0])
    return adapter


def tip_f(real: Any, name: str) -> Any:
    """Trains on whole batches, so that their order does not count."""
    _, shots, alpha = name.split(", ")
    train, _ = real.draw(int(shots.split()[0]), 1)
    adapter = TipAdapter(
        real.clip, NAMES, templates=TEMPLATES, learn_keys=True, alpha=float(alpha.split()[1]), beta=1.0
    )
    adapter.fit_features(train)
    optimizer = torch.optim.AdamW(adapter.trainable_parameters(), lr=1e-3, eps=1e-4, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    batch = Batch(labels=train.labels, index=train.labels, features=train.values[0])
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(adapter(batch), batch.labels).backward()
        optimizer.step()
        scheduler.step()
    return adapter


FITS = {
    "text_init": linear,
    "clap": linear,
    "lp_plus_plus": linear,
    "ss_text": ss_text,
    "ss_text+": ss_text,
    "tip_adapter_f": tip_f,
}


@pytest.mark.parametrize("name", PEERS["expected"])
def test_a_method_gives_what_the_published_code_gives(real, name):
    expected = PEERS["expected"][name]
    method = name.split(", ")[0]
    adapter = FITS[method](real, name)
    test = real.test
    with torch.no_grad():
        logits = adapter(Batch(labels=test.labels, index=test.labels, features=test.values[0])).double()
    image = 100 / len(test)
    if "first" in expected:
        assert logits[0, :5].tolist() == pytest.approx(expected["first"], abs=5e-3)
        assert float(F.cross_entropy(logits, test.labels)) == pytest.approx(expected["loss"], abs=1e-4)
    # LP++'s code has a bias of its own start, and tells nothing but accuracy.
    assert real.accuracy(adapter) == pytest.approx(expected["accuracy"], abs=1.01 * image)


def test_every_method_has_its_source():
    assert {name.split(", ")[0] for name in PEERS["expected"]} == set(FITS) == set(PEERS["sources"])
    assert all(len(source["commit"]) == 40 and "/" in source["repository"] for source in PEERS["sources"].values())
