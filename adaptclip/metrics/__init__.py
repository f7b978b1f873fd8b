# SPDX-License-Identifier: Apache-2.0
"""Metrics, one object each, and the statistics under them. Nothing here knows of cards, runs or reports.

A metric of your own is made with `Metric.of` (any function of true classes and probabilities) or `Metric` (with its own
influence), and passed wherever a metric's name is: `GateRule(metric=mine, at_least=0.8)`.
"""

from __future__ import annotations

from adaptclip.errors import DataError, did_you_mean
from adaptclip.metrics.calibration import BRIER, ECE, OUTCOME_BRIER, OUTCOME_ECE
from adaptclip.metrics.metric import Metric as Metric
from adaptclip.metrics.outcome_metrics import NET_BENEFIT, NPV, PPV
from adaptclip.metrics.ranking import AUC, AVERAGE_PRECISION, MACRO_AUC
from adaptclip.metrics.rates import ACCURACY, MACRO_F1, MEAN_PER_CLASS, OUTCOME_RATES, TOP5
from adaptclip.metrics.several_labels import SEVERAL_LABELS
from adaptclip.metrics.worst_decile import WORST_DECILE

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        ACCURACY,
        MEAN_PER_CLASS,
        TOP5,
        ECE,
        BRIER,
        MACRO_AUC,
        MACRO_F1,
        WORST_DECILE,
        *OUTCOME_RATES,
        AUC,
        AVERAGE_PRECISION,
        OUTCOME_BRIER,
        OUTCOME_ECE,
        *SEVERAL_LABELS,
        PPV,
        NPV,
        NET_BENEFIT,
    )
}
"""Name -> metric, of all that come with the package."""

GENERAL_METRICS = tuple(
    name for name, metric in METRICS.items() if metric.is_general and not (metric.of_outcome or metric.of_labels)
)
"""Metrics of any classifier that every report shows."""

LABELS_METRICS = tuple(name for name, metric in METRICS.items() if metric.of_labels)
"""Those of images that may have several classes, or none, in their place."""

GROUP_METRICS = tuple(name for name, metric in METRICS.items() if metric.in_groups and not metric.of_outcome)
"""Those that are shown of every group."""

OUTCOME_METRICS = tuple(name for name, metric in METRICS.items() if metric.is_general and metric.of_outcome)
"""Metrics of a declared outcome that every report shows."""

OUTCOME_GROUP_METRICS = tuple(name for name, metric in METRICS.items() if metric.in_groups and metric.of_outcome)
"""Those that are shown of every group."""


def find_metric(metric: Metric | str) -> Metric:
    """Returns the metric of that name; a metric is returned as it is.

    Raises:
        DataError: there is none; the message holds the nearest name.
    """
    if isinstance(metric, Metric):
        return metric
    if metric not in METRICS:
        raise DataError(f"unknown metric {metric!r}. {did_you_mean(metric, METRICS)}")
    return METRICS[metric]
