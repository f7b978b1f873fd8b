# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
import re
from dataclasses import dataclass

import numpy as np
import pytest
from rich.console import Console

from adaptclip.predictions import Predictions
from adaptclip.reports.blocks import MAX_SCREEN_ROWS
from adaptclip.reports.full import build_report, full_report
from adaptclip.reports.headline import worries
from adaptclip.reports.render import print_report, to_markdown

NASTY = "[bold]a|b\nc[/bold] <script>alert(1)</script> \x1b[31m*x*_y_`z`\\"


@dataclass(frozen=True)
class Judged:
    title: str
    verdict: str
    reason: str


def predictions(*, class_names=("a", "b", "c"), sites=("x", "y"), attribute="site", n=240, skill=1.5, seed=1):
    labels = np.arange(n) % len(class_names)
    scores = np.random.default_rng(seed).normal(size=(n, len(class_names)))
    scores[np.arange(n), labels] += skill
    odds = np.exp(scores)
    probs = (odds / odds.sum(1, keepdims=True)).astype(np.float32)
    groups = {attribute: tuple(sites[(i // 7) % len(sites)] for i in range(n))}
    return Predictions(tuple(map(str, range(n))), labels, probs, tuple(class_names), groups)


def terminal(report, verdicts=None, width=100):
    out = io.StringIO()
    print_report(report, verdicts, console=Console(file=out, width=width, force_terminal=False))
    return out.getvalue()


def tables(markdown):
    """Yields each Markdown table as rows of cells, splitting at unescaped bars only."""
    rows = []
    for line in [*markdown.splitlines(), ""]:
        if line.startswith("|"):
            rows.append(re.split(r"(?<!\\)\|", line)[1:-1])
        elif rows:
            yield rows
            rows = []


def test_markdown_shows_per_cent_with_interval_and_n():
    report = build_report(predictions(), predictions(skill=0.5))
    markdown = to_markdown(report, [Judged("accuracy ≥ 0.5", "pass", "because")])
    cell = report["overall"]["accuracy"]["model"]
    assert f"{100 * cell['value']:.1f} % [{100 * cell['low']:.1f}, {100 * cell['high']:.1f}]" in markdown
    change = report["overall"]["accuracy"]["change"]
    assert f"{100 * change['value']:+.1f} [" in markdown
    assert "| **pass** | accuracy ≥ 0.5 | because |" in markdown
    for heading in ("## Gates", "## Overall", "## Groups: site", "## Classes"):
        assert heading in markdown
    assert "Gap (max-min over the groups)" in markdown


def test_markdown_without_baseline_has_no_empty_columns():
    markdown = to_markdown(build_report(predictions()))
    assert "zero-shot" not in markdown
    assert "change" not in markdown.replace("changes are paired", "")
    assert "## Gates" not in markdown


def test_names_from_users_cannot_break_markdown_tables():
    report = build_report(predictions(class_names=(NASTY, "b"), sites=(NASTY, "y"), attribute=NASTY))
    markdown = to_markdown(report, [Judged(NASTY, "fail", NASTY)])
    assert "<script>" not in markdown
    assert "\x1b" not in markdown
    found = list(tables(markdown))
    assert len(found) == 6
    for table in found:
        assert {len(row) for row in table} == {len(table[0])}
    assert r"\[bold\]a\|b c\[/bold\] &lt;script&gt;" in markdown


def test_names_from_users_are_shown_as_they_are_on_the_terminal():
    report = build_report(predictions(class_names=("a", "b"), sites=(NASTY, "[/red]", "[link=x]y"), attribute="[bold]"))
    shown = terminal(report, [Judged("[bold]t", "pass", "[/nothing]")], width=300)
    assert "[bold]a|b c[/bold] <script>alert(1)</script>" in shown
    assert "\x1b" not in shown
    for text in ("[/red]", "[link=x]y", "by [bold]", "[bold]t", "[/nothing]"):
        assert text in shown


def test_terminal_shows_headline_groups_and_verdicts():
    report = build_report(predictions(), predictions(skill=0.5))
    shown = terminal(report, [Judged("accuracy ≥ 0.9", "inconclusive", "too few images")])
    cell = report["overall"]["accuracy"]["zero_shot"]
    assert f"{100 * cell['value']:.1f} [{100 * cell['low']:.1f}, {100 * cell['high']:.1f}]" in shown
    assert "240 images, 3 classes" in shown
    assert re.search(r"^ x +\d+ ", shown, re.MULTILINE)
    assert re.search(r"inconclusive +accuracy ≥ 0.9 +too few images", shown)
    assert len(shown.splitlines()) < 40


def test_many_groups_show_the_worst_ones_first():
    sites = tuple(f"site{i:02}" for i in range(15))
    report = build_report(predictions(sites=sites, n=600))
    shown = terminal(report, width=120)
    order = sorted(report["groups"]["site"]["rows"], key=lambda row: row["accuracy"]["model"]["value"])
    assert re.findall(r"^ (site\d\d)", shown, re.MULTILINE) == [r["group"] for r in order[:MAX_SCREEN_ROWS]]
    assert "7 more groups" in shown
    assert all(site in to_markdown(report) for site in sites)


@pytest.mark.parametrize("render", [to_markdown, terminal])
def test_no_gates_are_not_a_pass(render):
    assert "nothing was judged, which is not a pass" in " ".join(render(build_report(predictions()), []).split())


def test_a_run_without_groups_says_so():
    plain = predictions()
    report = build_report(Predictions(plain.ids, plain.labels, plain.probs, plain.class_names))
    for text in (to_markdown(report), terminal(report)):
        assert "without group columns" in " ".join(text.split())


def test_nothing_is_called_fair():
    text = to_markdown(build_report(predictions(), predictions(seed=2)), []) + terminal(build_report(predictions()), [])
    assert not re.search(r"\bfair|unbiased", text, re.IGNORECASE)


def test_what_puts_the_data_in_doubt_is_one_line_under_what_to_worry_about():
    leak = "3 of 240 test images look the same as a train image: a = b (allowed by the card: similar_images)"
    report = full_report(predictions())
    report["data"] = {
        "name": "n", "source": "manifest", "images": {"test": 240}, "known_issues": [], "allowed": [leak],
        "worries": [leak, "another", "a third"], "skipped": [f"left out {i}.png: cannot be decoded" for i in range(12)],
    }  # fmt: skip
    first, second = worries(report, None)[:2]
    assert first == "Accuracy differs by site more than chance explains: 13.7 points, lowest for y."
    assert second == f"{leak} (2 more findings of this kind: see Data)."
    markdown = to_markdown(report, None)
    assert markdown.index("worry about") < markdown.index(leak.replace("_", "\\_")) < markdown.index("Overall")
    assert "left out 9.png: cannot be decoded" in markdown
    assert "left out 10.png" not in markdown
    assert "And 2 more" in markdown or "and 2 more" in markdown
