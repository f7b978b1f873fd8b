# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from tiny_clip import make_tiny_backbone
from torch.nn import functional as F

from adaptclip.errors import DataError
from adaptclip.metrics.estimates import mean_of
from adaptclip.metrics.intervals import wilson
from adaptclip.retrieval.recall import Recall, encode_captions, retrieval


def features(count, seed, width=8):
    made = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return F.normalize(made, dim=-1)


def brute_force(similarity, right):
    """Ranks by sorting each query's candidates, wrong ones first among equals."""
    ranks = []
    for row, good in zip(similarity, right, strict=True):
        order = sorted(range(len(row)), key=lambda c: (-row[c], good[c]))
        ranks.append(next(place for place, c in enumerate(order, start=1) if good[c]))
    return np.array(ranks)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_brute_force_with_several_captions_per_image(chunk):
    counts = [1, 5, 2, 3, 1, 4, 6, 1, 2, 5]
    owner = torch.arange(10).repeat_interleave(torch.tensor(counts))[
        torch.randperm(30, generator=torch.Generator().manual_seed(3))
    ]
    images = features(10, 0)
    texts = F.normalize(0.4 * images[owner] + features(30, 1), dim=-1)
    found = retrieval(images, texts, owner, ks=(1, 3, 5, 100), chunk=chunk)
    similarity = images.double().numpy() @ texts.double().numpy().T
    right = np.arange(10)[:, None] == owner.numpy()[None]
    for name, ranks, candidates in (
        ("image_to_text", brute_force(similarity, right), 30),
        ("text_to_image", brute_force(similarity.T, right.T), 10),
    ):
        direction = found[name]
        assert len(set(ranks)) > 3, "the case is not trivial"
        assert direction.median_rank == np.median(ranks)
        assert (direction.num_queries, direction.num_candidates) == (len(ranks), candidates)
        for recall in direction.recall:
            assert recall.correct == (ranks <= recall.k).sum()
            assert recall.n == len(ranks)
            assert recall.value == pytest.approx((ranks <= recall.k).mean())
            assert recall.low is None or (recall.high is not None and recall.low <= recall.value <= recall.high)
        assert direction.recall[-1].value == 1.0, "k beyond the candidates"
    assert [(r.low, r.high) for r in found["image_to_text"].recall] == [
        pytest.approx(wilson(r.correct, 10)) for r in found["image_to_text"].recall
    ]


def test_ties_count_against_the_model():
    # Axes and exact halves, so that equal similarities are equal to the last bit.
    images = torch.eye(4)
    texts = torch.eye(4)[[0, 0, 1, 3]]
    owner = torch.tensor([0, 1, 2, 3])
    found = retrieval(images, texts, owner, ks=(1, 2, 4))
    # Image 0: texts 0 and 1 are both at 1: rank 2. Image 1: its text is at 0, as are 2 of the others, and text 2 at 1:
    # rank 4. Image 2: its text at 0 and all others too: rank 4. Image 3: rank 1.
    assert found["image_to_text"].median_rank == 3
    assert [r.correct for r in found["image_to_text"].recall] == [1, 2, 4]
    # Texts: 0 finds image 0 (1); 1 is at 0 with images 2 and 3, behind image 0 (4); 2 likewise behind 1 (4); 3 (1).
    assert [r.correct for r in found["text_to_image"].recall] == [2, 2, 4]
    order = torch.tensor([2, 0, 3, 1])
    again = retrieval(images[order], texts, torch.argsort(order)[owner], ks=(1, 2, 4))
    assert again == found
    constant = retrieval(torch.ones(5, 1), torch.ones(5, 1), torch.arange(5), ks=(1, 5))
    assert [r.value for r in constant["image_to_text"].recall] == [0, 1], "features without content find nothing"


def test_captions_of_one_image_are_no_independent_queries():
    """The interval is that of every other share: five captions of an image that are alike count once."""
    clusters = np.repeat(np.arange(40), 5)
    rng = np.random.default_rng(0)
    same, alone = np.repeat(rng.random(40) < 0.4, 5), rng.random(200) < 0.4

    def found(right: np.ndarray) -> Recall:
        texts = torch.eye(40)[torch.from_numpy(np.where(right, clusters, (clusters + 1) % 40))]
        return retrieval(torch.eye(40), texts, torch.from_numpy(clusters), ks=(1,))["text_to_image"].recall[0]

    def width(recall: Recall) -> float:
        assert recall.low is not None
        assert recall.high is not None
        return recall.high - recall.low

    for right in (same, alone):
        assert found(right).n == 200
        assert (found(right).low, found(right).high) == mean_of(right, clusters).interval(0.95)
    low, high = wilson(int(same.sum()) // 5, 40)
    assert width(found(same)) == pytest.approx(high - low, rel=0.1)
    low, high = wilson(int(alone.sum()), 200)
    assert width(found(alone)) == pytest.approx(high - low, rel=0.3)


def test_captions_of_a_handful_of_images_have_no_interval():
    owner = torch.arange(4).repeat_interleave(3)
    recall = retrieval(torch.eye(4), torch.eye(4)[owner], owner, ks=(1,))["text_to_image"].recall[0]
    assert (recall.value, recall.low, recall.high, recall.n) == (1.0, None, None, 12)


def test_to_dict_names_the_recalls():
    found = retrieval(torch.eye(3), torch.eye(3), torch.arange(3))["image_to_text"].to_dict()
    assert set(found) == {"num_queries", "num_candidates", "median_rank", "R@1", "R@5", "R@10"}
    assert found["R@1"] == {"value": 1.0, "low": pytest.approx(0.4385, abs=1e-4), "high": 1.0, "correct": 3, "n": 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": torch.ones(3, 5)}, r"got \(3, 3\), \(3, 5\) and \(3,\)"),
        ({"owner": torch.arange(2)}, "and the image of each text"),
        ({"owner": torch.tensor([0, 1, 3])}, "owners of texts are 0 to 3; allowed 0 to 2"),
        ({"owner": torch.tensor([0, 1, 1])}, "1 of 3 images has no text"),
        ({"images": torch.full((3, 3), float("nan"))}, "not finite"),
        ({"images": torch.ones(0, 3)}, "got 0 images"),
        ({"ks": (0, 1)}, r"ks \[0, 1\]"),
        ({"chunk": 0}, "chunk 0"),
    ],
)
def test_bad_input(change, message):
    given = {"images": torch.eye(3), "texts": torch.eye(3), "owner": torch.arange(3)} | change
    with pytest.raises(DataError, match=message):
        retrieval(given.pop("images"), given.pop("texts"), given.pop("owner"), **given)


@pytest.mark.parametrize("kind", ["clip", "custom_text"])
def test_captions_are_encoded_as_open_clip_does(kind):
    backbone = make_tiny_backbone(kind)
    texts = ["a dog", "two dogs run over a green field after a red ball", "", "a cat", "very " * 90]
    tokens = backbone.tokenizer(texts)
    expected = backbone.encode_text(tokens)
    for batch_size in (2, 100):
        torch.testing.assert_close(
            encode_captions(backbone, tokens, batch_size=batch_size), expected, atol=1e-5, rtol=0
        )
