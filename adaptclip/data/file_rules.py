# SPDX-License-Identifier: Apache-2.0
"""What a card says of files that hold more than one image, or words about it: clips, DICOM, WebDataset shards."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class VideoRule(BaseModel):
    """Which frames of a video file are images; its clip is their cluster.

    Attributes:
        every_seconds: time between two of them, from 0 on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    every_seconds: float = Field(gt=0, allow_inf_nan=False)


class DicomRule(BaseModel):
    """What of the header of DICOM files is used, by the standard's keywords; identifiers only as digests.

    Attributes:
        cluster: the attribute that says what must never be in two parts, for example PatientID or StudyInstanceUID.
        groups: name of a reported attribute -> keyword, or a list of keywords; none that names a person.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    cluster: str | None = Field(default=None, min_length=1)
    groups: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _lists_name_themselves(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("groups"), list | tuple):
            return {**values, "groups": {str(name): name for name in values["groups"]}}
        return values


class WebDatasetSource(BaseModel):
    """WebDataset shards; `.cls`, `.txt` and the keys of `.json` are columns.

    Attributes:
        files: a glob or a range such as "shards/{000..010}.tar", a list of them, or split name -> them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["webdataset"]
    files: str | tuple[str, ...] | dict[str, str | tuple[str, ...]]
