# SPDX-License-Identifier: Apache-2.0
"""A tiny checkpoint on disk, and an architecture of open_clip whose tag points at it."""

from __future__ import annotations

from pathlib import Path

import pytest
from open_clip import factory
from open_clip import pretrained as tag_table
from tiny_clip import ARCHITECTURE, OTHER_PREPROCESS, tiny_config, write_tiny_checkpoint


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture
def weights(folder) -> Path:
    return folder / "open_clip_model.safetensors"


@pytest.fixture
def architecture(monkeypatch, weights):
    """An architecture that open_clip knows, with a tag of another activation and transform than its default."""
    monkeypatch.setitem(factory._MODEL_CONFIGS, ARCHITECTURE, tiny_config())
    tags = {"openai": {"file": str(weights), "quick_gelu": True, **OTHER_PREPROCESS}}
    monkeypatch.setitem(tag_table._PRETRAINED, ARCHITECTURE, tags)
    return tags
