# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the recipes' tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """A feature cache that the tests of one file share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate remembers its settings for as long as a process lives; a user's process runs one recipe."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
