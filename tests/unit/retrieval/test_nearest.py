# SPDX-License-Identifier: Apache-2.0
"""The nearest vectors are those that a full sort finds, ties included, whatever the blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptclip.errors import ConfigError, DataError
from adaptclip.retrieval.index import nearest


def by_sorting(queries: torch.Tensor, vectors: torch.Tensor, k: int) -> np.ndarray:
    """Rows by falling score, then by rising row, in numpy."""
    scores = queries.double().numpy() @ vectors.double().numpy().T
    return np.stack([np.lexsort((np.arange(len(row)), -row))[:k] for row in scores])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000), rows=st.integers(1, 60), queries=st.integers(1, 5), k=st.integers(1, 70),
    block=st.integers(1, 17), values=st.integers(1, 3),
)  # fmt: skip
def test_it_is_a_full_sort(seed, rows, queries, k, block, values):
    # Small whole numbers multiply without rounding, and tie often.
    draw = torch.Generator().manual_seed(seed)
    vectors = torch.randint(-values, values + 1, (rows, 4), generator=draw).float()
    asked = torch.randint(-values, values + 1, (queries, 4), generator=draw).float()
    module = __import__("adaptclip.retrieval.index", fromlist=["MOST_ROWS"])
    before, module.MOST_ROWS = module.MOST_ROWS, block
    try:
        scores, found = nearest(asked, vectors, k)
    finally:
        module.MOST_ROWS = before
    expected = by_sorting(asked, vectors, k)
    assert found.tolist() == expected.tolist()
    assert torch.equal(scores, (asked @ vectors.T).gather(1, found))


def test_faiss_finds_the_same():
    pytest.importorskip("faiss")
    draw = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(500, 16, generator=draw), dim=-1)
    own, theirs = (nearest(vectors[:7], vectors, 5, engine=engine) for engine in ("exact", "faiss"))
    assert torch.equal(own[1], theirs[1])
    torch.testing.assert_close(own[0], theirs[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("queries", "vectors", "k", "engine", "error", "message"),
    [
        (torch.zeros(1, 3), torch.zeros(5, 4), 1, "exact", DataError, "queries should be"),
        (torch.zeros(3), torch.zeros(5, 3), 1, "exact", DataError, "queries should be"),
        (torch.zeros(1, 3), torch.zeros(0, 3), 1, "exact", DataError, "N above 0"),
        (torch.zeros(1, 3), torch.zeros(5, 3), 0, "exact", ConfigError, "1 or more, got 0"),
        (torch.zeros(1, 3), torch.zeros(5, 3), 1, "fais", ConfigError, 'Did you mean "faiss"'),
    ],
)
def test_bad_requests(queries, vectors, k, engine, error, message):
    with pytest.raises(error, match=message):
        nearest(queries, vectors, k, engine=engine)
