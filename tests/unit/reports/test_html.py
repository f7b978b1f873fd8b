# SPDX-License-Identifier: Apache-2.0
"""The page: nothing of a user's is markup, nothing is fetched, every drawing has words, each time it is the same."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from adaptclip.gate_rules import Outcome
from adaptclip.predictions import Predictions
from adaptclip.reports.full import full_report
from adaptclip.reports.headline import three_numbers, worries
from adaptclip.reports.plots import SIDE, confusion_matrix, thumbnail, thumbnails
from adaptclip.reports.probe import probe_report
from adaptclip.reports.render import to_html, to_markdown

HOSTILE = (
    "</script><script>alert(1)</script>",
    '"><img src=https://evil.example/x onerror=alert(1)>',
    "'; DROP TABLE -- $x^2$ `code` **bold** [link](https://evil.example) | cell",
    "{{ 7 * 7 }}{% raw %}\x1b[31m\nline",
    "</style></title></svg><b>",
)
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words, self.open = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


class Verdict:
    def __init__(self, title, verdict, reason):
        self.title, self.verdict, self.reason = title, verdict, reason


def predictions(names, attribute, seed=0, n=300):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % len(names)
    logits = rng.normal(size=(n, len(names)))
    logits[np.arange(n), labels] += 1
    odds = np.exp(logits)
    probs = (odds / odds.sum(1, keepdims=True)).astype(np.float32)
    groups = {attribute: tuple(names[i % 3] for i in range(n))}
    levels = {attribute: tuple(names[i // 2] for i in range(len(names)))}
    return Predictions(tuple(f"{names[0]}{i}" for i in range(n)), labels, probs, tuple(names), groups, None, levels)


@pytest.fixture(scope="module")
def hostile():
    p = predictions(HOSTILE, HOSTILE[0])
    report = full_report(p, predictions(HOSTILE, HOSTILE[0], seed=1), hard_pairs=[HOSTILE[:2]])
    report["data"] = {
        "name": HOSTILE[1], "pretty_name": HOSTILE[0], "license": HOSTILE[2], "source": "embedded", "digest": "d",
        "images": {"test": 300}, "known_issues": list(HOSTILE), "allowed": list(HOSTILE), "skipped": [],
    }  # fmt: skip
    report["training"] = {HOSTILE[0]: HOSTILE[1]}
    scores = np.random.default_rng(0).normal(size=(300, len(HOSTILE) + 2))
    words = {HOSTILE[1]: [f"{HOSTILE[0]}!"], HOSTILE[2]: [f"{HOSTILE[4]}!"]}
    report["text_probe"] = probe_report(p, words, scores, -scores) | {"card": HOSTILE[0]}
    verdicts = [Verdict(name, "fail", name) for name in HOSTILE]
    return report, verdicts


def test_nothing_of_a_users_is_markup(hostile):
    report, verdicts = hostile
    text = to_html(report, verdicts, pictures={})
    page = Page(text)
    assert not {"script", "b", "iframe", "link", "object", "form"} & set(page.tags)
    assert "img" not in page.tags  # none was given, and none was smuggled in
    assert not [a for a in page.attributes if a[1].startswith("on")]
    assert "\x1b" not in text
    shown = " ".join(page.words)
    for name in HOSTILE[:3]:
        assert name in shown
    assert "{{ 7 * 7 }}" in shown
    assert f"{HOSTILE[4]}!" in shown  # a word of the probe
    assert text.count("<style>") == text.count("</style>") == 1


def test_nothing_is_fetched(hostile):
    report, verdicts = hostile
    page = Page(to_html(report, verdicts, pictures={}))
    fetched = [
        a for a in page.attributes if a[1] in ("src", "href", "xlink:href", "action", "data", "poster", "srcset")
    ]
    assert len(fetched) >= 10
    assert all(value.startswith(("#", "data:")) for _, _, value in fetched)
    policy = next(
        value for tag, name, value in page.attributes if (tag, name) == ("meta", "content") and "src" in value
    )
    assert "default-src 'none'" in policy
    plain = full_report(predictions(("a", "b", "c", "d"), "site"))
    assert "http" not in to_html(plain, []).replace("http-equiv", "")
    assert "url(" not in re.sub(r"url\(#", "", to_html(plain, []))


def test_plots_and_pictures_have_words_and_links_lead_somewhere():
    p = predictions(tuple(f"class {i}" for i in range(14)), "site", n=700)
    report = full_report(p)
    ids = [e["id"] for c in report["fine_grained"]["confusions"] for e in c["examples"]]
    uri = thumbnail(Image.new("RGB", (300, 200), "red"))
    page = Page(to_html(report, [], pictures=dict.fromkeys(ids[:5], uri)))
    labelled = [value for tag, name, value in page.attributes if name == "aria-label" and tag == "div"]
    assert sum(len(value) > 40 for value in labelled) >= 4  # classes, confusion matrix, reliability, coverage
    assert page.tags.count("img") == len(set(ids[:5]))
    alts = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    assert all("taken for" in alt for alt in alts)
    names = [value for _, name, value in page.attributes if name == "id"]
    assert len(names) == len(set(names))
    targets = [value[1:] for _, name, value in page.attributes if name in ("href", "xlink:href")]
    assert len(targets) >= 10
    assert set(targets) <= set(names)


def test_a_page_is_the_same_each_time():
    report = full_report(predictions(("a", "b", "c", "d"), "site"))
    assert to_html(report, []) == to_html(report, [])


def test_the_summary_comes_first():
    report = full_report(predictions(("a", "b", "c", "d"), "site"))
    for kind, word in (("pass", "pass"), ("fail", "not for release"), ("inconclusive", "cannot decide")):
        page = " ".join(Page(to_html(report, [Verdict("rule", kind, "because.")])).words)
        assert word in page[: page.index("Declared conditions")]
    empty = " ".join(Page(to_html(report, [])).words)
    assert "not judged" in empty
    assert "which is not a pass" in empty
    assert not re.search(r"\bfair|unbiased", empty + to_markdown(report, []), re.IGNORECASE)


def test_worries_are_corrected_for_the_number_of_gaps():
    report = full_report(predictions(("a", "b", "c", "d"), "site"))
    table = report["groups"]["site"]
    report["groups"] = {f"group {i}": {**table, "gap": {**table["gap"], "p_value": 0.03}} for i in range(4)}
    assert not [worry for worry in worries(report, None) if "more than chance" in worry]
    report["groups"]["group 2"]["gap"]["p_value"] = 0.01
    (found,) = [worry for worry in worries(report, None) if "more than chance" in worry]
    assert "Accuracy differs by group 2" in found


def test_a_declared_outcome_is_one_of_the_three_numbers():
    p = predictions(("a", "b", "c", "d"), "site")
    plain = three_numbers(full_report(p))
    assert plain[2][0] == "Confidence minus accuracy"
    report = full_report(replace(p, outcomes=(Outcome(positive=("a", "b")),)))
    name, value, about = three_numbers(report)[2]
    of = p.labels < 2
    sensitivity = 100 * (p.probs[of].argmax(axis=1) < 2).mean()
    assert (name, value.partition(" ")[0]) == ("Sensitivity", f"{sensitivity:.1f}")
    assert "a or b: the share of its 150 images that is found" in about
    assert "the lowest of 3 groups, which may partly be chance" in plain[1][2]


def test_the_lowest_group_is_one_that_is_large_enough():
    p = predictions(("a", "b", "c", "d"), "site")
    wrong = p.pred != p.labels
    few = np.flatnonzero(wrong)[:20]
    groups = np.where(np.isin(np.arange(300), few), "tiny", np.where(np.arange(300) % 2, "left", "right"))
    report = full_report(replace(p, groups={"site": tuple(groups)}))
    name, value, about = three_numbers(report)[1]
    lowest = min(100 * (~wrong)[groups == g].mean() for g in ("left", "right"))
    assert (name, value.partition(" ")[0]) == ("Lowest accuracy of a group", f"{lowest:.1f}")
    assert "the lowest of 2 groups, which may partly be chance; 1 group of fewer than 30 images left out" in about
    many = replace(p, groups={"site": tuple(str(i % 12) for i in range(300))})
    report = full_report(many)
    assert report["groups"]["site"]["worst_group"] is None
    report["fine_grained"] = None
    assert three_numbers(report)[1][1:] == ("–", "12 groups of fewer than 30 images left out")


@pytest.mark.parametrize(("names", "shown"), [(("a", "b"), False), (("a", "b", "c"), False), (tuple("abcdef"), True)])
def test_the_top_five_of_a_few_classes_have_no_row(names, shown):
    labels = np.arange(60) % len(names)
    probs = np.full((60, len(names)), 0.1 / (len(names) - 1), np.float32)
    probs[np.arange(60), np.roll(labels, 1)] = 0.9
    report = full_report(Predictions(tuple(map(str, range(60))), labels, probs, names))
    for page in (to_markdown(report, []), to_html(report, [])):
        assert ("top-5" in page) == shown
    assert "top-3" not in to_markdown(report, []) or len(names) > 3


def test_plots_take_any_name():
    counts = np.arange(25).reshape(5, 5)
    drawn = confusion_matrix(counts, [*HOSTILE[:4], "漢字 🙂"])
    assert "<script" not in drawn
    assert "<img" not in drawn
    assert "漢字" in drawn
    assert drawn == confusion_matrix(counts, [*HOSTILE[:4], "漢字 🙂"])


def test_thumbnails_are_small_and_carry_no_metadata():
    import base64
    import io

    exif = Image.Exif()
    exif[0x010F] = "camera of somebody"
    buffer = io.BytesIO()
    Image.effect_noise((640, 480), 80).convert("RGB").save(buffer, "JPEG", exif=exif)
    with Image.open(buffer) as picture:
        uri = thumbnail(picture)
    head, _, body = uri.partition(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(body))) as small:
        assert small.size == (SIDE, SIDE * 3 // 4)
        assert not small.getexif()
    asked = []
    found = thumbnails(
        ["a", "b", "a"], lambda row: asked.append(row) or (None if row == "b" else Image.new("L", (9, 9)))
    )
    assert asked == ["a", "b"]
    assert list(found) == ["a"]
