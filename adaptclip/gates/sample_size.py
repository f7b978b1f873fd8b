# SPDX-License-Identifier: Apache-2.0
"""How many images (and clusters, such as patients) make a rule decide: before any are collected, and after some were.

Both questions are one: what is the chance that the rule's bound lies beyond its limit when there are `factor` times as
many images?

Before collecting (`adaptclip plan`), a truth is assumed and the estimate varies around it: the images are the fewest
with which the bound lies beyond its limit with the stated chance, the *power*, in every group (`Claim.power`). How many
of them are of the kind that the metric counts is left to chance, as in a study. Rates and means of the classes' rates
can be planned: the variance of one image follows from the rate. That of other metrics, and of the largest gap between
groups, depends on probabilities or groups that nobody has seen yet; for these the plan says so instead of a number.

After judging, nobody knows the truth. To take the present estimate for it makes the answer jump with every image: what
is left to the limit enters squared, and an estimate that happens to lie at the limit asks for endless numbers. So the
truth is as uncertain as the present images leave it, and the chance is the *predictive* one, that the present and the
further images together decide, either way (Spiegelhalter, Abrams & Myles 2004, section 6.6).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binom, chi2, norm

from adaptclip.errors import AdaptclipError, DataError, GateError, did_you_mean
from adaptclip.metrics.estimates import MIN_CLUSTERS
from adaptclip.metrics.intervals import PairedSpread, RateSpread, ScaledSpread, Side, Spread
from adaptclip.metrics.judged import Judged, Sampling
from adaptclip.predictions import Predictions
from adaptclip.reports.measuring import ask, group_rows, group_values

if TYPE_CHECKING:
    from pathlib import Path

    from adaptclip.data.card import Card
    from adaptclip.data.dataset import ImageDataset
    from adaptclip.gate_rules import GateRule, Outcome

_Any = TypeVar("_Any", bound=Spread)

POWER = 0.8
"""The chance that is planned for unless another is asked for."""

MOST = 10.0
"""Beyond this many times the present images no number is given."""


@dataclass(frozen=True)
class Claim:
    """A one-sided claim about a number, and how much the images at hand say about it.

    Attributes:
        value: the estimate, or the assumed truth.
        spread: its uncertainty with the images at hand.
        limit: what the number is compared with.
        upwards: whether it should be at least the limit.
        alpha: chance of a wrong "pass".
        family: judgements that share the chance of a wrong "fail".
    """

    value: float
    spread: Spread
    limit: float
    upwards: bool
    alpha: float
    family: int = 1

    def power(self, factor: float = 1.0) -> float:
        """Chance that the rule passes with `factor` times the images, if `value` is the truth."""
        return self._chance(factor, passing=True, share=1 / factor)

    def decided(self, factor: float) -> float:
        """Chance that it passes or fails once there are `factor` times the images, the present ones among them."""
        return sum(self._chance(factor, passing=passing, share=1 - 1 / factor) for passing in (True, False))

    def _chance(self, factor: float, *, passing: bool, share: float) -> float:
        """Chance that the estimate lies beyond the critical one; `share` of its present variance is still to come."""
        up = self.upwards == passing
        side: Side = "low" if up else "high"
        alpha = self.alpha if passing else self.alpha / self.family
        if self._rate is not None:
            spread, limit = self._rate
            known = _larger(spread, factor)
            critical = _critical(known, limit, side, alpha)
            if critical is None:
                return 0.0
            ahead = math.asin(math.sqrt(spread.rate)) - math.asin(math.sqrt(critical))
            error = 0.5 / math.sqrt(min(spread.size, spread.cap))
        else:
            known = _larger(self.spread, factor)
            distance = abs(known.bound(side, alpha, exact=True) - self.value)
            if known is self.spread:
                distance /= math.sqrt(factor)
            ahead = self.value - self.limit - (distance if up else -distance)
            error = abs(self.spread.bound(side, self.alpha) - self.value) / float(norm.isf(self.alpha))
        ahead = ahead if up else -ahead
        spread_left = error * math.sqrt(max(share, 0.0))
        return float(norm.cdf(ahead / spread_left)) if spread_left > 1e-12 else float(ahead >= 0)

    @property
    def _rate(self) -> tuple[RateSpread, float] | None:
        """The uncertainty as that of a rate, and the limit on its scale; None where it is not one."""
        if isinstance(self.spread, RateSpread):
            return self.spread, self.limit
        if isinstance(self.spread, ScaledSpread) and isinstance(self.spread.spread, RateSpread):
            low, high = self.spread.low, self.spread.high
            return self.spread.spread, (self.limit - low) / (high - low)
        return None


def _larger(spread: _Any, factor: float) -> _Any:
    """The same uncertainty with more images; itself where only the root of their number tells."""
    if isinstance(spread, RateSpread | PairedSpread):
        df = None if spread.df is None else spread.df * factor
        return replace(spread, size=spread.size * factor, cap=spread.cap * factor, df=df)
    return spread


def _critical(spread: RateSpread, limit: float, side: Side, alpha: float) -> float | None:
    """The rate at which a bound of this many images lies at the limit; None where no rate has its bound beyond it."""

    def beyond(rate: float) -> float:
        return replace(spread, rate=rate).bound(side, alpha, exact=True) - limit

    sign, worst, best = (1, 0.0, 1.0) if side == "low" else (-1, 1.0, 0.0)
    if sign * beyond(best) < 0:
        return None
    if sign * beyond(worst) >= 0:
        return worst
    return float(brentq(beyond, 0.0, 1.0, xtol=1e-5))  # type: ignore[arg-type]


def smallest_factor(chance: Callable[[float], float], asked: float, most: float = MOST) -> float | None:
    """Returns the smallest multiple of the images, to a hundredth and from 1 to `most`, with a chance as asked.

    Args:
        chance: of a multiple; it does not fall.
        asked: 0 to 1.
        most: None is returned where even this multiple has a smaller chance.
    """
    if chance(1.0) >= asked:
        return 1.0
    if chance(most) < asked:
        return None
    low, high = 1.0, most
    while high - low > 0.01 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if chance(middle) >= asked else (middle, high)
    return high


@dataclass(frozen=True)
class More:
    """How many more images would settle a rule.

    Attributes:
        images: with an even chance of "pass" or "fail"; None where ten times the data would not have it.
        likely: with a chance of POWER; None likewise.
        per_cluster: images of a cluster at present, where images come in clusters.
    """

    images: int | None
    likely: int | None
    per_cluster: float | None = None

    @property
    def clusters(self) -> int | None:
        """`images` as clusters of the present size."""
        return None if self.images is None or self.per_cluster is None else self.clusters_for(self.images)

    def clusters_for(self, images: int) -> int:
        """Clusters of the present size that hold so many images."""
        return math.ceil(images / (self.per_cluster or 1.0))


def more_images(claim: Claim | None, n: int, units: int, missing: int = 0) -> More | None:
    """How many more images would settle what is not decided yet.

    Args:
        claim: what is asked; None where nothing is known of the number's uncertainty.
        n: images at hand.
        units: clusters that they come from; `n` where they are independent.
        missing: images that the rule's min_n still asks for; no fewer are named.

    Returns:
        The numbers; None where there is neither a claim nor an image missing.
    """
    each = n / units if 0 < units < n else None
    if claim is None:
        return More(missing, missing, each) if missing else None
    found = [smallest_factor(claim.decided, chance) for chance in (0.5, POWER)]
    even, likely = (None if f is None else max(math.ceil(n * (f - 1)), missing, 1) for f in found)
    return More(even, likely, each)


_MOST_UNITS = 10_000_000
_CHANCES = (np.arange(25) + 0.5) / 25


@dataclass(frozen=True)
class Assumed:
    """What is assumed of the truth and of the images to come.

    Attributes:
        expect: true value of every rule's metric in every group; a paired rule assumes no change and takes no notice.
        per_patient: images of each patient; 1 for independent images.
        icc: correlation of a patient's images, 0 to 1.
        prevalence: share of positive images (patients, where there are any).
        groups: attribute -> number of equally large groups.
        classes: number of equally frequent classes; needed by means over the classes.
        changed: for paired rules, the share of images whose answer changes, half of them for the better.
        power: chance with which a rule shall pass.
        prevalences: the same as `prevalence` of single outcomes by their name (the class), which goes before it.
    """

    expect: float | None = None
    per_patient: int = 1
    icc: float = 0.3
    prevalence: float | None = None
    groups: Mapping[str, int] = field(default_factory=dict)
    classes: int | None = None
    changed: float = 0.1
    power: float = POWER
    prevalences: Mapping[str, float] = field(default_factory=dict)

    def check(self) -> None:
        """Refuses what cannot be.

        Raises:
            GateError: a number is out of its range.
        """
        inside = {"expect": self.expect, "prevalence": self.prevalence, "changed": self.changed}
        inside |= {f"prevalence of {name}": share for name, share in self.prevalences.items()}
        for name, value in inside.items():
            if value is not None and not 0 < value < 1:
                raise GateError(f"{name} must lie between 0 and 1, got {value:g}; 0.9 is 90 %")
        if not 0.5 <= self.power < 1:
            raise GateError(f"power must be at least 0.5 and below 1, got {self.power:g}; {POWER:g} and 0.9 are usual")
        if not 0 <= self.icc <= 1:
            raise GateError(f"icc must lie within 0 and 1, got {self.icc:g}")
        counts = {"images per patient": self.per_patient, "classes": 2 if self.classes is None else self.classes - 1}
        counts |= {f"groups of {name}": number for name, number in self.groups.items()}
        for name, number in counts.items():
            if number < 1:
                raise GateError(f"the number of {name} is too small")


@dataclass(frozen=True)
class Planned:
    """What one rule needs.

    Attributes:
        title: the rule in words.
        images: images in all; None where the plan has no number.
        patients: the same in patients; None where images are independent.
        groups: number of groups that all have to pass.
        in_group: images of each group.
        counted: of these, images of the kind that the metric counts, on average.
        kind: which kind that is, before "images": "positive ", or "".
        power: chance of a pass with so many.
        words: what is assumed, or why there is no number.
    """

    title: str
    images: int | None
    patients: int | None
    groups: int
    in_group: int | None
    counted: int | None
    kind: str
    power: float | None
    words: str

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-able dict."""
        return asdict(self)


def plan(rules: Sequence[GateRule], assumed: Assumed) -> list[Planned]:
    """Plans every rule by itself; a release that asks for all of them needs the largest number, and somewhat more.

    A rule that can never pass for certain with these assumptions has no number and says why; the others have theirs.

    Raises:
        GateError: an assumption is out of range or missing (all that are missing are named), or the only rule can never
            pass.
    """
    assumed.check()
    used = {rule.attribute for rule in rules if rule.attribute is not None}
    for name in assumed.groups:
        if name not in used:
            has = did_you_mean(name, used, lead="They are about") if used else "No gate has a group."
            raise GateError(f"no gate is about groups of {name!r}. {has}")
    outcomes = {rule.outcome.name for rule in rules if rule.outcome is not None}
    for name in assumed.prevalences:
        if name not in outcomes:
            raise GateError(f"no gate is about {name!r}. {did_you_mean(name, outcomes)}")
    missing = missing_for(rules, assumed)
    if missing:
        raise GateError("; ".join(missing.values()))
    return [_plan(rules[0], assumed)] if len(rules) == 1 else [_plan_or_say_why(rule, assumed) for rule in rules]


def _plan_or_say_why(rule: GateRule, assumed: Assumed) -> Planned:
    try:
        return _plan(rule, assumed)
    except GateError as error:
        number = assumed.groups.get(rule.attribute or "", 1)
        return Planned(rule.title, None, None, number, None, None, rule.measure.about, None, f"{error}.")


def missing_for(rules: Sequence[GateRule], assumed: Assumed) -> dict[str, str]:
    """Returns what nobody has said and the rules need to be planned: the flag -> the question, all of them at once."""
    missing: dict[str, str] = {}
    for rule in rules:
        if _no_formula(rule):
            continue
        where, name = f'gate "{rule.title}"', rule.attribute
        if name is not None and name not in assumed.groups:
            missing.setdefault(
                f"groups {name}", f'{where}: how many groups of {name} are there? Say --groups "{name}=2"'
            )
        if rule.measure.over_classes and assumed.classes is None:
            missing.setdefault("classes", f"{where} is a mean over the classes: how many are there? Say --num-classes")
        if len(rule.measure.sides) == 1 and _prevalence(rule, assumed) is None:
            missing.setdefault("prevalence", f"{where} counts {rule.measure.about}images only: say --prevalence")
        if not rule.no_worse_than and assumed.expect is None:
            missing.setdefault("expect", f"{where}: which value do you expect? Say --expect")
    return missing


def _no_formula(rule: GateRule) -> str:
    """Why a rule has no planned number; "" where it has one."""
    metric = rule.measure
    if rule.gap_at_most is not None:
        return "The largest gap between groups depends on how they differ; no formula plans it. Simulate it."
    if metric.of_labels:
        return f"How {metric.words} varies depends on which classes come together; plan each class by itself."
    if not metric.decides or not (metric.over_classes or metric.values is not None):
        return f"How much {metric.words} varies from image to image is not known before there are predictions."
    return ""


def _plan(rule: GateRule, assumed: Assumed) -> Planned:
    metric, number = rule.measure, assumed.groups.get(rule.attribute or "", 1)
    unknown = _no_formula(rule)
    if unknown:
        return Planned(rule.title, None, None, number, None, None, metric.about, None, unknown)
    _claim(rule, assumed, 2)  # says what can never pass
    share = _share(rule, assumed)
    units = _fewest(rule, assumed, share, number)
    if units is None:
        words = f"No realistic number: even {_MOST_UNITS:,} in each group would not be enough."
        return Planned(rule.title, None, None, number, None, None, metric.about, None, words)
    each = units * assumed.per_patient
    patients = units * number if assumed.per_patient > 1 else None
    return Planned(
        rule.title, each * number, patients, number, each, round(each * share), metric.about,
        _power(rule, assumed, units, share) ** number, _words(rule, assumed, number),
    )  # fmt: skip


def _share(rule: GateRule, assumed: Assumed) -> float:
    """Share of the images that the metric counts."""
    if len(rule.measure.sides) != 1:
        return 1.0
    prevalence = _prevalence(rule, assumed)
    assert prevalence is not None
    return prevalence if rule.measure.sides[0] == 1 else 1 - prevalence


def _prevalence(rule: GateRule, assumed: Assumed) -> float | None:
    name = rule.outcome.name if rule.outcome is not None else ""
    return assumed.prevalences.get(name, assumed.prevalence)


def _claim(rule: GateRule, assumed: Assumed, units: int) -> Claim:
    """The rule's claim with so many units of which every image counts."""
    images, alpha = units * assumed.per_patient, 1 - rule.confidence
    size = images / (1 + (assumed.per_patient - 1) * assumed.icc)
    df = float(max(units - 1, 1)) if assumed.per_patient > 1 else None
    if rule.measure.over_classes:
        df = float(max(units - (assumed.classes or 1), 1))
    if rule.no_worse_than:
        if rule.margin == 0:
            raise GateError(
                f'gate "{rule.title}" has no margin: a model that is as good as its reference passes in '
                f"{100 * alpha:g} % of cases however many images there are. Give it a margin"
            )
        half, upwards = assumed.changed / 2, not rule.measure.lower_is_better
        spread = PairedSpread(half, half, size, images, df)
        return Claim(0.0, spread, -rule.margin if upwards else rule.margin, upwards, alpha)
    limit, upwards = (rule.at_least, True) if rule.at_least is not None else (rule.at_most, False)
    assert limit is not None
    assert assumed.expect is not None
    if (assumed.expect <= limit) if upwards else (assumed.expect >= limit):
        raise GateError(
            f'gate "{rule.title}" can never pass with a power of {assumed.power:g} if the truth is '
            f"{assumed.expect:g}: expect {'more' if upwards else 'less'} than {limit:g}"
        )
    return Claim(assumed.expect, RateSpread(assumed.expect, size, images, df), limit, upwards, alpha)


def _enough(rule: GateRule, assumed: Assumed, units: int) -> float:
    """Chance that there is enough of what the metric rests on, with so many units of which every image counts."""
    if assumed.per_patient > 1 and units < MIN_CLUSTERS:
        return 0.0
    images, classes = units * assumed.per_patient, (rule.measure.over_classes and assumed.classes) or 2
    labels = np.arange(classes * 10) % classes
    pattern = Judged(labels, np.full((len(labels), classes), 1 / classes, np.float32), Sampling.of(len(labels)))
    chance = 1.0
    for support in rule.measure.support(pattern):
        least, part = support.least(rule.min_n), support.count / len(labels)
        if rule.measure.over_classes and part == 1:
            # A random mix of classes is worth less than an even one, by about a chi-squared number of patients.
            chance *= float(chi2.cdf((images - least) / assumed.per_patient, classes - 1))
        elif part == 1:
            chance *= images >= least
        else:
            asked = math.ceil(least / assumed.per_patient)
            chance *= max(1 - classes * float(binom.cdf(asked - 1, units, part)), 0.0)
    return chance


def _power(rule: GateRule, assumed: Assumed, units: int, share: float) -> float:
    """Chance that one group of so many units passes, over how many of them count."""
    counts = [units] if share == 1 else [int(k) for k in binom.ppf(_CHANCES, units, share)]
    found = {k: _enough(rule, assumed, k) * _claim(rule, assumed, k).power() if k > 1 else 0.0 for k in set(counts)}
    return sum(found[k] for k in counts) / len(counts)


def _fewest(rule: GateRule, assumed: Assumed, share: float, number: int) -> int | None:
    asked, high = assumed.power ** (1 / number), 2
    while _power(rule, assumed, high, share) < asked:
        high *= 2
        if high > _MOST_UNITS:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _power(rule, assumed, middle, share) >= asked else (middle, high)
    return high


def _words(rule: GateRule, assumed: Assumed, number: int) -> str:
    truth = f"a true {rule.measure.words} of {assumed.expect or 0:g}"
    if rule.no_worse_than:
        truth = f"no true change, and {assumed.changed:.0%} of the answers changing"
    said = [truth]
    if number > 1:
        said.append(f"{number} equally large, independent groups of which every one has to pass")
    if assumed.per_patient > 1:
        said.append(f"patients with {assumed.per_patient} images whose correlation is {assumed.icc:g}")
        said.append("a patient's images being of one class" if rule.measure.about or rule.measure.over_classes else "")
    else:
        said.append("independent images")
    if len(rule.measure.sides) == 1:
        said.append(f"a prevalence of {_prevalence(rule, assumed):g}")
    if rule.measure.over_classes:
        said.append(f"{assumed.classes} equally frequent and equally well recognised classes")
    return f"Assumes {'; '.join(filter(None, said))}."


def completed(assumed: Assumed, rules: Sequence[GateRule], card: Card, data_root: Path | None) -> tuple[Assumed, str]:
    """Takes what is missing of classes and groups from a card, and from its images where they are there.

    Returns:
        The assumptions, and in words what was taken.
    """
    if assumed.classes is None and card.class_names:
        assumed = replace(assumed, classes=len(card.class_names))
    asked = [name.partition(" ")[2] for name in missing_for(rules, assumed) if name.startswith("groups ")]
    if not asked and "classes" not in missing_for(rules, assumed):
        return assumed, ""
    from adaptclip.data.sources import open_data

    try:
        data = open_data(card, data_root=data_root, check=False)
    except AdaptclipError:  # they are planned before there are any images
        return assumed, ""
    groups = dict(assumed.groups)
    for name in asked:
        left_out = {group for rule in rules if rule.attribute == name for group in rule.exclude}
        try:
            groups[name] = len(set(group_values(data.test, name)[0]) - left_out)
        except DataError:  # the card has no such attribute: it is asked for
            continue
    classes = len(data.class_names) if assumed.classes is None else assumed.classes
    taken = [f"{groups[name]} groups of {name}" for name in asked if name in groups]
    taken += [f"{classes} classes"] if assumed.classes is None else []
    return replace(assumed, groups={n: g for n, g in groups.items() if g}, classes=classes), ", ".join(taken)


def too_few(rules: Sequence[GateRule], images: ImageDataset, outcomes: Sequence[Outcome] = ()) -> list[str]:
    """Says of each gate that cannot be decided on these images, whatever the model, which images it lacks.

    Args:
        rules: the gates.
        images: those that will be judged.
        outcomes: two-sided questions of the card.
    """
    shape, marks = (len(images), len(images.class_names)), images.multi_hot
    anything = Predictions(
        ids=images.ids, labels=images.labels, class_names=images.class_names, groups=dict(images.groups),
        probs=np.broadcast_to(np.float32(1 / shape[1]), shape), clusters=images.clusters, levels=dict(images.levels),
        outcomes=tuple(outcomes), fixed_classes=images.fixed_classes, cluster_name=images.cluster_name,
        sigmoid=None if marks is None else np.broadcast_to(np.float32(0.5), shape),
        positive=None if marks is None else marks == 1, known=None if marks is None else marks >= 0,
    )  # fmt: skip
    said = []
    for rule in rules:
        found = _too_few(rule, anything)
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            said.append(
                f'gate "{rule.title}" cannot pass, as the test images are too few: {"; ".join(found[:3])}{more}. '
                "Collect more, or set the gate's min_n if fewer will do"
            )
    return said


def _too_few(rule: GateRule, images: Predictions) -> list[str]:
    """What a rule lacks, of all images or of each group."""
    question = ask(rule.metric, images, None, rule.level, rule.outcome_among(images.outcomes))
    everything = {} if rule.attribute is None else group_rows(images, rule.attribute)
    parts: dict[str, Any] = {f" for {rule.attribute} = {g}": r for g, r in everything.items() if g not in rule.exclude}
    found = []
    for of, rows in (parts or {"": None}).items():
        lacking, units = rule.lacking(question.supports(rows)), question.units(rows)
        if lacking is not None:
            found.append(f"{lacking.count:,} of {lacking.least(rule.min_n):,} {lacking.what}{of}")
        elif images.clusters is not None and units < MIN_CLUSTERS:
            called = f"clusters ({images.cluster_name})" if images.cluster_name else "clusters"
            found.append(f"{units:,} of {MIN_CLUSTERS} {called}{of}")
    return found
