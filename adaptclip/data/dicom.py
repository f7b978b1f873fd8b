# SPDX-License-Identifier: Apache-2.0
"""Columns from the headers of DICOM files: who belongs together, and groups.

Identifiers become short digests before anything else sees them: no report, table, log or message can hold them. The
digest has no salt, so that a patient is the same in two sets and runs; who can guess an identifier can find it again.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, BinaryIO

from adaptclip.data.read_dicom import header_texts
from adaptclip.data.read_image import kind_of
from adaptclip.data.read_values import needs
from adaptclip.data.transforms import worded
from adaptclip.errors import CardError, DataError, ResourceError, did_you_mean
from adaptclip.files import digest
from adaptclip.progress import progress_bar

if TYPE_CHECKING:
    from adaptclip.data.file_rules import DicomRule
    from adaptclip.data.readers import RawRows

_IDENTIFYING = re.compile(
    r"(ID|IDs|UID|Number|Numbers|Address|Identification)$|Birth|Telephone|Comments|History|Insurance"
)
_IDENTIFYING_VRS = {"PN", "UI", "DA", "DT", "TM", "SQ", "OB", "OW", "UN", "UR", "LT", "UT"}
_YEARS = {"D": 1 / 365.25, "W": 7 / 365.25, "M": 1 / 12, "Y": 1.0}


def dicom_columns(raw: RawRows, rule: DicomRule, opened: Callable[[int], BinaryIO]) -> RawRows:
    """Adds the columns that a card takes from DICOM headers; rows that are other files have none of them.

    Args:
        raw: the rows.
        rule: the card's.
        opened: row -> its file.

    Raises:
        CardError: an attribute does not exist, or would show who a patient is.
        ResourceError: pydicom is not installed.
    """
    keywords = [*([rule.cluster] if rule.cluster else []), *rule.groups.values()]
    _check_keywords(rule)
    values: dict[str, list[Any]] = {keyword: [] for keyword in keywords}
    for row in progress_bar(range(len(raw)), desc="reading DICOM headers", unit="image", leave=False):
        header = _header(opened, row, keywords)
        for keyword in values:
            values[keyword].append(_cell(header.get(keyword, ""), hidden=keyword == rule.cluster))
    names = {keyword: f"dicom:{keyword}" for keyword in values}
    update: dict[str, Any] = {
        "groups": raw.columns.groups | {name: names[keyword] for name, keyword in rule.groups.items()}
    }
    if rule.cluster:
        update["cluster"] = names[rule.cluster]
    return replace(
        raw,
        values={**raw.values, **{names[keyword]: cells for keyword, cells in values.items()}},
        columns=raw.columns.model_copy(update=update),
    )


def _header(opened: Callable[[int], BinaryIO], row: int, keywords: list[str]) -> dict[str, str]:
    """The attributes that a file has; none where it is no DICOM file or a damaged one, which decoding it says."""
    try:
        with opened(row) as file:
            start = file.read(2**20)
            if kind_of(start[:132]) != "DICOM":
                return {}
            file.seek(0)
            return worded("", lambda: header_texts(file, start, keywords))
    except (DataError, OSError):
        return {}


def _check_keywords(rule: DicomRule) -> None:
    try:
        from pydicom.datadict import dictionary_VR, keyword_dict
    except ImportError as error:
        raise ResourceError(needs("pydicom", "dicom", "a card's `dicom:`")) from error

    for keyword in (*([rule.cluster] if rule.cluster else []), *rule.groups.values()):
        if keyword not in keyword_dict:
            raise CardError(
                f"dicom: {keyword!r} is no attribute. {did_you_mean(keyword, [k for k in keyword_dict if k])}"
            )
    for name, keyword in rule.groups.items():
        vr = dictionary_VR(keyword)
        if (
            keyword == rule.cluster
            or _IDENTIFYING.search(keyword)
            or any(v in _IDENTIFYING_VRS for v in vr.split(" or "))
        ):
            raise CardError(
                f"dicom.groups.{name}: {keyword} can tell who a patient is, and the values of a group are printed. As "
                "`dicom: {cluster: " + keyword + "}` it is used as a digest only"
            )


def _cell(text: str, *, hidden: bool) -> str | None:
    """A header's value as a cell: a digest, a number of years where it is an age, or text; None where there is none."""
    if not text:
        return None
    if hidden:
        return f"dicom:{digest('dicom', text)[:16]}"
    age = re.fullmatch(r"(\d{3})([DWMY])", text)
    return str(round(int(age[1]) * _YEARS[age[2]], 3)) if age else text
