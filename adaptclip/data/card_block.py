# SPDX-License-Identifier: Apache-2.0
"""What the `adaptclip:` block of a data card may say: pydantic models that allow no unknown key."""

from __future__ import annotations

import math
import unicodedata
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from adaptclip.data.declared import check_declared
from adaptclip.data.file_rules import DicomRule, VideoRule, WebDatasetSource
from adaptclip.errors import did_you_mean
from adaptclip.gate_rules import Expected, GateRule, Outcome

PARTS = ("train", "validation", "test")
"""The parts of a data set, in the order in which they are used."""

ALLOWABLE = (
    "duplicate_images",
    "similar_images",
    "shared_clusters",
    "missing_classes",
    "unreadable_images",
    "empty_groups",
    "label_conflicts",
    "shared_values",
    "unused_folds",
)
"""Names of the checks that a card may allow to fail; see `adaptclip.data.checks`. Those of BY_COLUMN are allowed column
by column, as "shared_values.age"."""

_EARLIER = {"duplicate_pictures": "duplicate_images", "similar_pictures": "similar_images"}


def _current_checks(allow: Any) -> Any:
    """Checks by the names of version 0.1 are taken for what they are now."""
    given = allow if isinstance(allow, list | tuple) else None
    return allow if given is None else [_EARLIER.get(str(name), name) for name in given]


BY_COLUMN = ("shared_values", "unused_folds")


def normalise_text(value: Any) -> Any:
    """Returns text in Unicode form NFC without outer blanks, so that the same name from any file system is equal."""
    return unicodedata.normalize("NFC", value).strip() if isinstance(value, str) else value


Name = Annotated[str, BeforeValidator(normalise_text), Field(min_length=1)]
"""A class, column or split name."""

_STRICT = ConfigDict(extra="forbid", frozen=True, strict=False)


class HubSource(BaseModel):
    """A data set of the Hugging Face hub.

    Attributes:
        id: for example "timm/oxford-iiit-pet".
        config: the configuration, where the data set has several.
        revision: a commit (best, as it never changes), tag or branch.
    """

    model_config = _STRICT
    kind: Literal["hub"]
    id: str
    config: str | None = None
    revision: str | None = None


class Join(BaseModel):
    """A second table whose columns are joined to the images by a key, such as a taxonomy or a list of patients.

    Attributes:
        file: the table, relative to the data root.
        by: the column of the key, or the source's own column -> this table's; classes of an image folder are `label`.
        sheet: of an Excel file that has several.
    """

    model_config = _STRICT
    file: str
    by: Name | Annotated[dict[Name, Name], Field(min_length=1, max_length=1)]
    sheet: Name | None = None

    @property
    def keys(self) -> tuple[str, str]:
        """The source's own column, and the one of this table."""
        return (self.by, self.by) if isinstance(self.by, str) else next(iter(self.by.items()))


class _Grown(BaseModel):
    """A part of the block that has grown: keys that came later leave the digests of cards without them as they were."""

    later: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _without_what_is_not_used(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        usual = {key: type(self).model_fields[key].get_default(call_default_factory=True) for key in self.later
                 if key in type(self).model_fields}  # fmt: skip
        unused = {key for key, value in usual.items() if getattr(self, key) == value}
        return {key: value for key, value in serialise(self).items() if key not in unused}


class _Joining(_Grown):
    """What tables may be joined to.

    Attributes:
        join: tables that are joined.
    """

    model_config = _STRICT
    later = ("join", "sheet", "levels")
    join: tuple[Join, ...] = ()


class ParquetSource(_Joining):
    """Parquet (or Arrow) files with the encoded images in a column.

    Attributes:
        files: a glob, a list of globs, or split name -> glob(s); relative to the data root.
    """

    kind: Literal["parquet"]
    files: str | tuple[str, ...] | dict[Name, str | tuple[str, ...]]


class ImageFolderSource(_Joining):
    """A folder of class folders, or of split folders that hold class folders.

    Attributes:
        path: the folder, relative to the data root.
        levels: names of the taxonomy levels that the folders above the class folders are, coarse to fine.
    """

    kind: Literal["image_folder"]
    path: str
    levels: tuple[Name, ...] = ()


class ManifestSource(_Joining):
    """Tables (CSV, TSV, JSONL, Excel, Parquet) with a column of image paths, relative to the folder of their own table.

    Attributes:
        files: a glob, a list of globs, or split name -> glob(s); relative to the data root.
        sheet: of an Excel file that has several.
    """

    kind: Literal["manifest"]
    files: str | tuple[str, ...] | dict[Name, str | tuple[str, ...]]
    sheet: Name | None = None


class EmbeddedSource(BaseModel):
    """A data set that comes with the package.

    Attributes:
        name: a key of `adaptclip.datasets.embedded.EMBEDDED`.
        options: keyword arguments of its function.
    """

    model_config = _STRICT
    kind: Literal["embedded"]
    name: str
    options: dict[str, Any] = Field(default_factory=dict)


class FeaturesSource(BaseModel):
    """Image and text features that a CLIP made elsewhere, in the place of images.

    Besides these arrays, the file's one-dimensional arrays of N values are columns (groups, cluster, id, split), and so
    are those of the table. The card must list `class_names`, in the order of the text features.

    Attributes:
        file: safetensors, .npz or .npy (the image features alone), relative to the data root.
        image: key of the image features, (N, D), or (V, N, D) where view 0 is the evaluation transform and the others
            are crops to learn from.
        label: key of the labels, (N,) class ids or names; not read where the table has the card's label column.
        text: key of the text features, (C, D), or (C, P, D) for P prompts of each class; for .npy the name of another
            .npy file beside it.
        table: CSV, TSV or JSONL with a row for each image, in the same order; None for no table.
        logit_scale: exp() of the model's own temperature; 100 is OpenAI's.
        logit_bias: what the model adds to its logits (SigLIP), or None.
    """

    model_config = _STRICT
    kind: Literal["features"]
    file: str
    image: Name = "image"
    label: Name = "label"
    text: Name = "text"
    table: str | None = None
    logit_scale: float = Field(default=100.0, gt=0, allow_inf_nan=False)
    logit_bias: float | None = Field(default=None, allow_inf_nan=False)


Source = (
    HubSource | ParquetSource | ImageFolderSource | ManifestSource | WebDatasetSource | EmbeddedSource | FeaturesSource
)
SOURCE_KINDS: dict[str, type[BaseModel]] = {
    get_args(model.model_fields["kind"].annotation)[0]: model for model in get_args(Source)
}


class Splits(BaseModel):
    """Which images play which part: named by the source, or drawn here by `fractions`.

    Attributes:
        train: the source's name of the training split, or several values of `column`, as of folds; a card that names
            only `test` is for evaluation alone.
        validation: the source's name of the validation split, if any.
        test: the source's name of the test split.
        column: column that holds those names, where rows carry their split.
        fractions: part -> share of the images (0 to 1, summing to 1) for a split made here: stratified by class, with
            clusters and copies of an image kept together, the same on every machine.
        seed: seed of a split made here.
    """

    model_config = _STRICT
    train: Name | tuple[Name, ...] | None = None
    validation: Name | tuple[Name, ...] | None = None
    test: Name | tuple[Name, ...] | None = None
    column: Name | None = None
    fractions: dict[Literal["train", "validation", "test"], float] | None = None
    seed: int = 0

    @model_validator(mode="after")
    def _check(self) -> Splits:
        named = [part for part in PARTS if getattr(self, part) is not None]
        if self.fractions is not None:
            if named or self.column:
                raise ValueError(f"has both fractions and {', '.join(named) or 'column'}; give one or the other")
            shares = self.fractions
            if shares.get("train", 0) <= 0 or shares.get("test", 0) <= 0 or min(shares.values()) < 0:
                raise ValueError(f"fractions need train and test above 0 and none below; got {shares}")
            if not math.isclose(sum(shares.values()), 1.0, abs_tol=1e-6):
                raise ValueError(f"fractions must sum to 1; got {sum(shares.values()):g} from {shares}")
        elif () in (getattr(self, part) for part in named):
            raise ValueError("lists no name at all for a part; leave the part out, or name its values")
        elif named and not (self.test and (self.train or named == ["test"])):
            got = ", ".join(named)
            raise ValueError(f"needs both train and test; got only {got} (test alone would do for evaluation)")
        elif self.column is None and any(isinstance(getattr(self, part), tuple) for part in named):
            raise ValueError("lists several names for a part, which only the values of a `column` can be")
        elif len(self.parts) < sum(map(len, self._values.values())):
            raise ValueError("uses one source split for two parts; each part needs its own")
        return self

    @property
    def _values(self) -> dict[str, tuple[str, ...]]:
        given = {part: getattr(self, part) for part in PARTS if getattr(self, part) is not None}
        given = given or dict(zip(PARTS, PARTS, strict=True))
        return {part: (names,) if isinstance(names, str) else names for part, names in given.items()}

    @property
    def names(self) -> dict[str, str]:
        """Part -> name in the source, with commas between several; the parts' own names where none are given."""
        return {part: ", ".join(names) for part, names in self._values.items()}

    @property
    def parts(self) -> dict[str, str]:
        """Name in the source -> part."""
        return {name: part for part, names in self._values.items() for name in names}

    @property
    def is_test_only(self) -> bool:
        """Whether the card has images to judge a model with and none to train it."""
        return self.fractions is None and self.test is not None and self.train is None


class Columns(_Grown):
    """Which column of the source means what.

    Attributes:
        image: encoded image (Parquet, hub) or its path (manifest).
        label: class, as an integer id or as its name; None (the default where there are captions) for images that
            have captions and no classes. With `several_labels` a cell may name several.
        labels: in the place of `label`, a column of 0 and 1 for each class, by whose name it is called.
        captions: a caption, or a list of captions, in words.
        id: stable name of a row; by default the first 16 digits of the SHA-256 of the encoded image.
        cluster: what must never be in two splits and is the unit of resampling (patient, lesion, site, video).
        groups: name of a reported attribute -> column.
        levels: name of a taxonomy level -> column, coarse to fine; each must be a function of the class.
    """

    model_config = _STRICT
    later = ("labels",)
    image: Name = "image"
    label: Name | None = "label"
    labels: tuple[Name, ...] = ()
    captions: Name | None = None
    id: Name | None = None
    cluster: Name | None = None
    groups: dict[Name, Name] = Field(default_factory=dict)
    levels: dict[Name, Name] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _captions_stand_for_labels(cls, values: Any) -> Any:
        if isinstance(values, dict) and "label" not in values and (values.get("captions") or values.get("labels")):
            return {**values, "label": None}
        return values

    @model_validator(mode="after")
    def _check(self) -> Columns:
        if self.label is not None and self.labels:
            raise ValueError("has both label, one column that names the class, and labels, a column for each class")
        if len(self.labels) == 1 or len(set(self.labels)) < len(self.labels):
            raise ValueError("labels lists two columns or more, each once; for one, take label and two class_names")
        if not self.has_classes and self.captions is None:
            raise ValueError("needs a label column, or a captions column for images without classes")
        if not self.has_classes and self.levels:
            raise ValueError("levels are coarse names of classes, and without a label column there are none")
        return self

    @property
    def has_classes(self) -> bool:
        """Whether there are labels, in one column or in a column for each class."""
        return self.label is not None or bool(self.labels)


class Augmentation(BaseModel):
    """Training crops.

    Attributes:
        scale: smallest and largest share of the image's area in a crop, each above 0 and at most 1.
        horizontal_flip: whether half of the crops are mirrored; wrong where left and right matter.
    """

    model_config = _STRICT
    scale: tuple[float, float] = (0.08, 1.0)
    horizontal_flip: bool = True

    @model_validator(mode="after")
    def _check(self) -> Augmentation:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must be [low, high] with 0 < low <= high <= 1; got {list(self.scale)}")
        return self


class GroupBins(BaseModel):
    """Bins that turn a number (age, size) into a group.

    Attributes:
        bins: rising lower edges; bin i holds bins[i] <= value < bins[i + 1], the last has no upper edge.
        labels: one name per bin; made from the edges when left out.
    """

    model_config = _STRICT
    bins: tuple[float, ...] = Field(min_length=1)
    labels: tuple[Name, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> GroupBins:
        if any(not math.isfinite(edge) for edge in self.bins) or list(self.bins) != sorted(set(self.bins)):
            raise ValueError(f"bins must be rising numbers; got {list(self.bins)}")
        if self.labels and len(self.labels) != len(self.bins):
            raise ValueError(
                f"has {len(self.labels)} labels for {len(self.bins)} bins; each lower edge needs one, "
                "the last bin has no upper edge"
            )
        if len(set(self.labels)) < len(self.labels):
            raise ValueError(f"labels are not all different: {list(self.labels)}")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """One name per bin, for example ("0 to <40", "40 to <60", "60 and above")."""
        if self.labels:
            return self.labels
        pairs = zip(self.bins, self.bins[1:], strict=False)
        return (*(f"{low:g} to <{high:g}" for low, high in pairs), f"{self.bins[-1]:g} and above")


class SeveralLabels(BaseModel):
    """How it is written down that an image shows several classes, or none of them, which is a state and no class.

    Attributes:
        separator: what stands between the names in a cell of `columns.label`, such as ";"; None where cells are lists.
        none: words of such a cell that say "none of these", such as "No Finding"; an empty cell or list says so too.
        uncertain: what -1 in a column of 0 and 1 stands for: "negative", "positive", or "ignore" for an answer that is
            neither learnt from nor judged (CheXpert's U-Zeros, U-Ones and U-Ignore); None refuses it.
        blank: what an empty cell stands for: "negative", or "ignore"; None refuses it in a column of 0 and 1.
    """

    model_config = _STRICT
    separator: Annotated[str, Field(min_length=1)] | None = None
    none: tuple[Name, ...] = ()
    uncertain: Literal["negative", "positive", "ignore"] | None = None
    blank: Literal["negative", "ignore"] | None = None


def _true_is_all_defaults(value: Any) -> Any:
    return {} if value is True else None if value is False else value


class SamplingRule(BaseModel):
    """How the images of the study came about; the unit that was drawn is `columns.cluster`, or the image.

    Attributes:
        classes: "random" where the mix of classes is what was met, "fixed" where the study set how many images (or
            patients) there are of each class. It decides what other images would look like, and with it the intervals.
    """

    model_config = _STRICT
    classes: Literal["random", "fixed"] = "random"


class CardBlock(_Grown):
    """The `adaptclip:` block of a data card.

    Attributes:
        source: where the images are.
        splits: which images play which part; None takes the source's own train, validation and test.
        columns: which column means what.
        several_labels: an image may show several classes, or none of them, and this is how it is written down; None
            where each shows exactly one.
        class_names: names in the order of the label ids; None takes those of the source.
        aliases: class name -> words used in the prompt instead.
        templates: prompts with one `{}` for the class name.
        augmentation: training crops.
        groups: reported attribute -> bins, for numeric columns.
        intersections: lists of reported attributes that are also reported crossed.
        outcomes: two-sided questions that are reported beside the classes: value(s) of a level, or class(es), that are
            positive, and by which rule an image is called that.
        sampling: how the images came about.
        probes: kind -> words that are no class; the text probe counts how often images are given one of them.
        window: (black, white) values by which 16-bit and float images are scaled; None refuses them, and takes DICOM's
            own.
        frames: which frame of an animation, a stack or a multi-frame file is the image; "all" makes an image of each,
            with the file as their cluster; None refuses them.
        video: which frames of video files are images; None leaves videos out.
        dicom: what of the header of DICOM files is used.
        allow: checks that may fail, by name (ALLOWABLE).
        hard_pairs: pairs of classes that are known to be hard to tell apart; reports judge each pair by itself.
        show_images: whether reports may hold thumbnails of test images.
        expect: groups and classes of which there shall be test images; gates on absent ones cannot pass.
        gates: conditions for release.
        known_issues: sentences that are shown whenever the card is loaded.
    """

    model_config = _STRICT
    later = ("several_labels", "frames", "dicom", "video")
    source: Annotated[Source, Field(discriminator="kind")]
    splits: Splits | None = None
    columns: Columns = Columns()
    several_labels: Annotated[SeveralLabels | None, BeforeValidator(_true_is_all_defaults)] = None
    class_names: tuple[Name, ...] | None = None
    aliases: dict[Name, Name] = Field(default_factory=dict)
    templates: tuple[str, ...] = Field(default=("a photo of a {}.",), min_length=1)
    augmentation: Augmentation = Augmentation()
    groups: dict[Name, GroupBins] = Field(default_factory=dict)
    intersections: tuple[tuple[Name, ...], ...] = ()
    outcomes: tuple[Outcome, ...] = ()
    sampling: SamplingRule = SamplingRule()
    probes: dict[Name, Annotated[tuple[Name, ...], Field(min_length=1)]] = Field(default_factory=dict)
    window: tuple[float, float] | None = None
    frames: Literal["first", "middle", "all"] | None = None
    video: VideoRule | None = None
    dicom: DicomRule = DicomRule()
    allow: Annotated[tuple[str, ...], BeforeValidator(_current_checks)] = ()
    hard_pairs: tuple[tuple[Name, Name], ...] = ()
    show_images: bool = True
    expect: Expected | None = None
    gates: tuple[GateRule, ...] = ()
    known_issues: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> CardBlock:
        for template in self.templates:
            if template.count("{}") != 1:
                raise ValueError(f"templates need exactly one {{}} for the class name; got {template!r}")
        for name in self.allow:
            check, _, column = name.partition(".")
            if check not in ALLOWABLE or (column and check not in BY_COLUMN):
                raise ValueError(f"allow has no check named {name!r}. {did_you_mean(name, ALLOWABLE)}")
            if check in BY_COLUMN and not column:
                raise ValueError(f"allow names {check} without a column; write, for example, {check}.age")
        if self.window is not None and not self.window[0] < self.window[1]:
            raise ValueError(f"window must be [black, white] with black < white; got {list(self.window)}")
        for name in self.aliases:
            if self.class_names is not None and name not in self.class_names:
                has = did_you_mean(name, self.class_names, lead="The classes are")
                raise ValueError(f"aliases has no class {name!r}. {has}")
        for pair in self.hard_pairs:
            if pair[0] == pair[1]:
                raise ValueError(f"hard_pairs has {list(pair)}; a pair needs two classes")
            for name in pair:
                if self.class_names is not None and name not in self.class_names:
                    has = did_you_mean(name, self.class_names, lead="The classes are")
                    raise ValueError(f"hard_pairs has no class {name!r}. {has}")
        if not self.columns.has_classes:
            for key in ("class_names", "aliases", "hard_pairs", "expect", "gates", "outcomes", "probes"):
                if getattr(self, key):
                    raise ValueError(f"{key} is about classes, and this card has captions and no columns.label")
        for crossed in self.intersections:
            if len(crossed) < 2 or len(set(crossed)) < len(crossed):
                raise ValueError(f"intersections are lists of different attributes; got {list(crossed)}")
        self._check_groups()
        self._check_several()
        return self

    @property
    def frame(self) -> Literal["first", "middle"] | None:
        """Which frame is decoded of what has several; none where each is an image."""
        return None if self.frames == "all" else self.frames

    def _check_several(self) -> None:
        if self.several_labels is None:
            return
        if not self.columns.has_classes:
            raise ValueError(
                "several_labels is about classes, and this card has no columns.label and no columns.labels"
            )
        for key, given in (("columns.levels", self.columns.levels), ("hard_pairs", self.hard_pairs)):
            if given:
                raise ValueError(f"{key} is about images of one class each, and several_labels says that they are not")
        rule, flags = self.several_labels, bool(self.columns.labels)
        for key in ("separator", "none") if flags else ("uncertain",):
            if getattr(rule, key):
                what = "columns.labels has a column of 0 and 1 for each class" if flags else "columns.label names them"
                raise ValueError(f"several_labels.{key} has nothing to say where {what}; leave it out")

    def _check_groups(self) -> None:
        # The groups and levels of an embedded set are known only once it is made; `open_data` looks then.
        if isinstance(self.source, EmbeddedSource):
            return
        if self.dicom.cluster and self.columns.cluster:
            raise ValueError("both columns.cluster and dicom.cluster say what belongs together; keep one")
        if twice := set(self.dicom.groups) & set(self.columns.groups):
            raise ValueError(f"columns.groups and dicom.groups both have {sorted(twice)[0]!r}; rename one")
        known = {**self.columns.groups, **self.dicom.groups}
        for name in self.groups:
            if name not in known:
                has = did_you_mean(name, known, lead="It has")
                raise ValueError(f"groups.{name} names a group that columns.groups lacks: {name!r}. {has}")
        folders = self.source.levels if isinstance(self.source, ImageFolderSource) else ()
        check_declared(
            self.gates, self.outcomes, self.intersections, groups=known, levels=[*self.columns.levels, *folders],
            class_names=self.class_names, expect=self.expect,
        )  # fmt: skip
