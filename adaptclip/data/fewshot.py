"""Few-shot splits: which images are learnt from, drawn by a named rule and written down as a manifest.

Rules:
    nested: each class's images are put into one random order and the first k are taken, so that 1 ⊂ 2 ⊂ 4 ⊂ 8 ⊂ 16.
        Images of different clusters come first.
    coop: a fresh uniform draw without replacement for every k, training images before validation images (Zhou et al.,
        "Learning to Prompt for Vision-Language Models", IJCV 2022). The published code draws from Python's global
        generator after whatever used it before, so its very images cannot be reproduced.
Under both, a class with fewer than k images gives all it has.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from adaptclip.data.dataset import DomainData, ImageDataset
from adaptclip.errors import SplitError, did_you_mean
from adaptclip.seeding import numpy_generator
from adaptclip.storage import digest, read_json, write_json

Rule = Literal["nested", "coop"]
MAX_VAL_SHOTS = 4
_FORMAT = "adaptclip few-shot split 1"


@dataclass(frozen=True)
class FewShotSplit:
    """A drawn split, by row ids.

    Attributes:
        card: name of the card.
        data_digest: digest of the training and validation images that it was drawn from.
        shots: images per class asked for; 0 is all.
        val_shots: validation images per class asked for; None is all of the validation part.
        seed: seed of the draw.
        rule: how it was drawn.
        train: ids to learn from, class by class.
        validation: ids to choose settings with.
        short_classes: classes that have fewer training images than asked for -> how many they have.
    """

    card: str
    data_digest: str
    shots: int
    val_shots: int | None
    seed: int
    rule: Rule
    train: tuple[str, ...]
    validation: tuple[str, ...]
    short_classes: dict[str, int]

    @property
    def digest(self) -> str:
        """SHA-256 of all fields."""
        return digest(json.dumps(asdict(self), sort_keys=True, ensure_ascii=False))

    def save(self, path: Path | str) -> None:
        """Writes the manifest as JSON, atomically. Raises StorageError when it cannot be written."""
        write_json(Path(path), {"format": _FORMAT, **asdict(self), "digest": self.digest})

    @classmethod
    def load(cls, path: Path | str) -> FewShotSplit:
        """Reads what `save` wrote.

        Raises:
            StorageError: the file is missing or damaged.
            SplitError: it is no few-shot manifest, or was changed by hand.
        """
        content = read_json(Path(path))
        if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
            raise SplitError(f"{path} is not a few-shot manifest of this version ({_FORMAT!r}); draw the split again")
        stated = content.pop("digest", None)
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in content.items()}
        try:
            split = cls(**fields)
        except TypeError as error:
            raise SplitError(f"{path} is not a whole few-shot manifest ({error}); draw the split again") from error
        if split.digest != stated:
            raise SplitError(f"{path} was changed after it was written (its digest does not fit); draw the split again")
        return split

    def check(self, data: DomainData) -> None:
        """Raises SplitError unless the split was drawn from exactly these images."""
        if self.data_digest != _data_digest(data):
            known = {*data.train.ids, *data.validation.ids}
            lost = [row for row in (*self.train, *self.validation) if row not in known]
            detail = f"{len(lost)} of its images are not there" if lost else "labels, images or groups changed"
            raise SplitError(
                f"the few-shot split of card {self.card!r} was drawn from other data than card {data.card.name!r} now "
                f"gives ({detail}). Use the data it was drawn from, or draw a new split"
            )

    def select(self, data: DomainData) -> tuple[ImageDataset, ImageDataset]:
        """Returns the training and the validation images of the split.

        Raises:
            SplitError: it was drawn from other data.
        """
        self.check(data)
        row_of = {row: i for i, row in enumerate(data.train.ids)}
        train = data.train.select([row_of[row] for row in self.train])
        if all(row in row_of for row in self.validation):
            return train, data.train.select([row_of[row] for row in self.validation])
        row_of = {row: i for i, row in enumerate(data.validation.ids)}
        return train, data.validation.select([row_of[row] for row in self.validation])


def sample_few_shot(
    data: DomainData, *, shots: int, seed: int, rule: Rule = "nested", val_shots: int | None = None
) -> FewShotSplit:
    """Draws images to learn from and images to choose settings with; the test part is not touched.

    No cluster and no copy of a picture is in both. The draw depends on the ids, not on the order of rows.

    Args:
        data: the data set.
        shots: training images per class; 0 takes all.
        seed: 0 is a seed like any other.
        rule: see the head of this module.
        val_shots: validation images per class; by default min(shots, 4), or the whole validation part for shots 0.
            They come from the validation part, or else from the training images that are left over.

    Raises:
        SplitError: a number or the rule is not valid, or there are no training images.
    """
    if rule not in get_args(Rule):
        raise SplitError(f"no few-shot rule {rule!r}. {did_you_mean(str(rule), get_args(Rule))}")
    for name, value in (("shots", shots), ("val_shots", val_shots)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise SplitError(f"{name} must be a whole number from 0 up, got {value!r}")
    if val_shots is None and shots > 0:
        val_shots = min(shots, MAX_VAL_SHOTS)
    rng = _Draws(rule, seed, shots)
    train = rng.draw(data.train, range(len(data.train)), shots or None, "train")
    source = data.validation if len(data.validation) else data.train
    left = range(len(source)) if source is data.validation else _left_over(source, train)
    validation = rng.draw(source, left, val_shots, "validation") if val_shots != 0 else []
    if not train:
        raise SplitError(f"card {data.card.name}: there are no training images to draw from")
    counts = data.train.class_counts()
    return FewShotSplit(
        card=data.card.name,
        data_digest=_data_digest(data),
        shots=shots,
        val_shots=val_shots,
        seed=seed,
        rule=rule,
        train=tuple(data.train.ids[i] for i in train),
        validation=tuple(source.ids[i] for i in validation),
        short_classes={data.class_names[c]: int(n) for c, n in enumerate(counts) if n < shots},
    )


def _data_digest(data: DomainData) -> str:
    return digest(data.train.digest, data.validation.digest)


@dataclass(frozen=True)
class _Draws:
    rule: Rule
    seed: int
    shots: int

    def draw(self, images: ImageDataset, rows: Sequence[int], count: int | None, part: str) -> list[int]:
        """Returns `count` (None: all) of `rows` per class, class by class, each class in the order of the draw."""
        by_class: defaultdict[int, list[int]] = defaultdict(list)
        for row in sorted(rows, key=lambda row: images.ids[row]):
            by_class[int(images.labels[row])].append(row)
        chosen: list[int] = []
        for label in sorted(by_class):
            # A generator per class: a class that gains an image does not change what is drawn of the others.
            purpose = [part, images.class_names[label], *([self.shots] if self.rule == "coop" else [])]
            order = numpy_generator(self.seed, "few-shot", self.rule, *purpose).permutation(by_class[label]).tolist()
            if self.rule == "nested" and images.clusters is not None:
                order = _clusters_first(order, images.clusters)
            chosen += order[:count]
        return chosen


def _clusters_first(order: list[int], clusters: Sequence[str]) -> list[int]:
    """Reorders rows: the first of each cluster, then the second of each, and so on."""
    seen: defaultdict[str, int] = defaultdict(int)
    turn = []
    for row in order:
        turn.append(seen[clusters[row]])
        seen[clusters[row]] += 1
    return [order[i] for i in np.argsort(turn, kind="stable")]


def _left_over(images: ImageDataset, taken: Sequence[int]) -> list[int]:
    """Returns the rows that share neither picture nor cluster with `taken`."""
    columns = [images.contents] if images.clusters is None else [images.contents, images.clusters]
    used = [{column[row] for row in taken} for column in columns]
    taken_rows = set(taken)
    return [
        row
        for row in range(len(images))
        if row not in taken_rows and not any(column[row] in seen for column, seen in zip(columns, used, strict=True))
    ]
