"""What gates conclude, and the exit code of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Conclusion = Literal["pass", "fail", "inconclusive"]

SEVERITY: dict[str, int] = {"fail": 0, "inconclusive": 1, "pass": 2}
"""Conclusion -> rank, worst first."""


@dataclass(frozen=True)
class Verdict:
    """What the data say about one rule.

    Attributes:
        title: the rule in words.
        metric: name of the metric.
        attribute: the group attribute the rule is about, or None; an intersection reads "sex × age_group".
        group: the group that decides the verdict (the worst one), or None.
        verdict: "pass", "fail" or "inconclusive".
        value: the estimate: a rate, the paired change against a reference, or the gap (see `kind`); None where there is
            none.
        low: one-sided lower bound, or None.
        high: one-sided upper bound, or None.
        n: images behind the value.
        confidence: level of the rule.
        reason: the verdict's grounds in plain words.
        groups: the verdict on every group, worst first; empty for a rule on all images or on a gap.
        kind: what `value`, `low` and `high` are.
        limit: what the value is compared with: the declared limit, minus the margin for a change.
        more_images: about how many more images (of `group`) would settle an inconclusive rule, either way, with an
            even chance; None where it is settled, or ten times the images would not do.
        excluded: groups left out by declaration, each {"group", "n"}.
        more_clusters: `more_images` as clusters (patients) of the present size; None where images are independent.
        images: digest of the judged images (`gates.belonging`), to which the verdict belongs.
        gates: digest of the set of gates that it is part of.
        asks_little: a model that gives every image the same answer would keep the limit too (`gates.doubts`).
    """

    title: str
    metric: str
    attribute: str | None
    group: str | None
    verdict: Conclusion
    value: float | None
    low: float | None
    high: float | None
    n: int
    confidence: float
    reason: str
    groups: tuple[Verdict, ...] = ()
    kind: Literal["level", "change", "gap"] = "level"
    limit: float | None = None
    more_images: int | None = None
    excluded: tuple[dict[str, Any], ...] = ()
    more_clusters: int | None = None
    images: str = ""
    gates: str = ""
    asks_little: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-able dict."""
        return asdict(self)


def overall_verdict(verdicts: Sequence[Verdict]) -> Literal["pass", "fail", "inconclusive", "none"]:
    """Returns the worst verdict, or "none" when there were no rules."""
    if not verdicts:
        return "none"
    return min((v.verdict for v in verdicts), key=lambda verdict: SEVERITY[verdict])


def exit_code(verdicts: Sequence[Verdict]) -> int:
    """Returns 0 when every rule passes, 2 when one fails, else 3 (inconclusive, or no rules: nothing was shown)."""
    return {"pass": 0, "fail": 2, "inconclusive": 3, "none": 3}[overall_verdict(verdicts)]
