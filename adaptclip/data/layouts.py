# SPDX-License-Identifier: Apache-2.0
"""How a folder of images is laid out: which of its folders are splits, which are classes, and which are neither.

Folders are taken for classes where they hold images. Those that hold only folders, look like splits or files' kinds, or
all have the same folders in them are never classes without being asked: they are splits where their names leave no
doubt, and otherwise refused with the lines to write into a card.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from adaptclip.data.card_block import PARTS, Splits, normalise_text
from adaptclip.data.image_files import is_image_file, list_images
from adaptclip.data.masks import MASK, is_mask_folder
from adaptclip.errors import CardError, DataError, agree, shown
from adaptclip.words import CONTAINERS, is_fold, is_junk, share_of, split_part, words_of

MADE_UP_FRACTIONS = {"train": 0.6, "validation": 0.1, "test": 0.3}
"""Shares of the images in the split that is made for a folder without one."""


@dataclass(frozen=True)
class Layout:
    """What the folders of a folder are.

    Attributes:
        folder: what holds the folders of classes or splits; below the given one where that only wraps it.
        rule: how the images are divided: by `folder`'s own split folders, or drawn.
        classes: (split name, class name, folder of its images), class names in Unicode form NFC; the split's name is ""
            where one is drawn.
        unused: sentences about what was left aside.
        levels: class name -> names of the folders above its own, coarse to fine, where classes are nested.
    """

    folder: Path
    rule: Splits
    classes: tuple[tuple[str, str, Path], ...]
    unused: tuple[str, ...] = ()
    levels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def read_layout(
    folder: Path, rule: Splits | None = None, class_names: Sequence[str] | None = None, depth: int = 0
) -> Layout:
    """Finds out which folders are splits and which are classes.

    Args:
        folder: to look into.
        rule: what the card says of the splits; None finds out.
        class_names: classes that the card names; folders with these names are classes whatever they look like.
        depth: how many folders there are above those of the classes, as levels of a taxonomy.

    Raises:
        CardError: that cannot be told, or the folders contradict each other; the message says what to write.
        DataError: there are no class folders, or a name cannot be used.
    """
    layout = _nested(folder, rule, depth) if depth else _layout(folder, rule, frozenset(class_names or ()))
    masks = [words for place in dict.fromkeys((folder, layout.folder)) for words in _mask_words(place)]
    return replace(layout, unused=(*layout.unused, *masks)) if masks else layout


def _layout(folder: Path, rule: Splits | None, asked: frozenset[str]) -> Layout:
    if rule is not None and rule.fractions is None:
        base = folder if any((folder / name).is_dir() for name in rule.names.values()) else _unwrapped(folder)
        return _named(base, rule, asked)
    base = _unwrapped(folder)
    top = _folders(base)
    if rule is None or not _are_asked(top, asked):
        found = _split_folders(base, top, asked)
        if found and rule is None:
            return _named(base, Splits(**found), asked)  # pyright: ignore[reportArgumentType]
        if found:  # a split is drawn anew from the images of all split folders
            inner = _named(base, Splits(**found), asked)  # pyright: ignore[reportArgumentType]
            together = tuple(("", name, path) for _, name, path in inner.classes)
            words = f"the images of the folders {', '.join(found.values())} are put together, and divided anew"
            return Layout(base, rule, together, (*inner.unused, words))  # pyright: ignore[reportArgumentType]
    rule = rule or Splits(fractions=dict(MADE_UP_FRACTIONS))  # pyright: ignore[reportArgumentType]
    classes = tuple(("", name, path) for name, path in _class_folders(base, asked).items())
    return Layout(base, rule, classes, tuple(_loose(base)))


def _nested(folder: Path, rule: Splits | None, depth: int) -> Layout:
    """The layout of nested folders: the innermost are the classes, those above are levels."""
    folder = _unwrapped(folder)
    starts, made = {"": folder}, Splits(fractions=dict(MADE_UP_FRACTIONS))  # pyright: ignore[reportArgumentType]
    if rule is not None and rule.fractions is None:
        starts = {name: folder / name for name in rule.names.values() if (folder / name).is_dir()}
    elif found := _split_folders(folder, _folders(folder), frozenset()):
        starts = {name: folder / name for name in found.values()}
        made = Splits(**found)  # pyright: ignore[reportArgumentType]
    drawn = rule is not None and rule.fractions is not None
    classes: list[tuple[str, str, Path]] = []
    levels: dict[str, tuple[str, ...]] = {}
    unused: list[str] = []
    for split, start in starts.items():
        for path in _innermost(start, depth, unused):
            name, above = normalise_text(path.name), tuple(map(normalise_text, path.relative_to(start).parts[:-1]))
            if levels.setdefault(name, above) != above:
                raise DataError(
                    f"{shown(folder)} has the class {shown(name)!r} both in {shown('/'.join(levels[name]))} and in "
                    f"{shown('/'.join(above))}; rename one, as a class has one place in a taxonomy"
                )
            classes.append(("" if drawn else split, name, path))
    if not classes:
        raise DataError(f"{shown(folder)} has no folders below {depth} {agree(depth, 'level', 'levels')} of folders")
    return Layout(folder, rule or made, tuple(classes), tuple(unused), levels)


def _innermost(start: Path, depth: int, unused: list[str]) -> list[Path]:
    """Returns the folders `depth` folders below those of `start`; appends what lies beside them to `unused`."""
    unused += _loose(start)
    below = _folders(start)
    for path in below:
        if not is_text(path.name):
            raise DataError(f"the folder {shown(path)} has a name that is not UTF-8 text; rename it")
    return below if depth == 0 else [path for one in below for path in _innermost(one, depth - 1, unused)]


_FAMILY = re.compile(r"\w+(idae|aceae)")


def nested_levels(folder: Path, *, asked: bool) -> tuple[str, ...]:
    """Returns names of the levels that nested folders are: () where the classes are not nested.

    Without being asked, folders are levels only where all names at one depth are those of biological families (-idae,
    -aceae), so that there is no doubt.

    Args:
        folder: of the outermost folders; split folders are looked into.
        asked: whether somebody said that the folders are nested.

    Raises:
        CardError: images lie at several depths, where nested folders are asked for.
    """
    base = _unwrapped(folder)
    top = _folders(base)
    parts = [path for path in top if split_part(path.name)[0] and _holds_only_folders(path)]
    starts = parts if parts and len(parts) == len(top) else [base]
    above: dict[int, set[str]] = {}
    depths: dict[int, Path] = {}
    for start in starts:
        for image in list_images(start).images:
            names = image.relative_to(start).parts[:-1]
            depths.setdefault(len(names), image)
            for i, name in enumerate(names[:-1]):
                above.setdefault(i, set()).add(name)
    depth = max(depths, default=0)
    family = [i for i, names in above.items() if all(map(_FAMILY.fullmatch, names))]
    if not asked and not (family and len(depths) == 1):
        return ()
    if depth < 2 or len(depths) > 1:
        found = ", ".join(f"{shown(path.relative_to(base).as_posix())}" for path in depths.values())
        raise CardError(
            f"{shown(folder)}: nested class folders all have as many folders above them, one or more; found {found}"
        )
    known = (
        {family[0] + i: name for i, name in ((-2, "class"), (-1, "order"), (0, "family"), (1, "genus"))}
        if family
        else {}
    )
    return tuple(known.get(i, f"level {i + 1}") for i in range(depth - 1))


def is_text(name: str) -> bool:
    """Whether a name from a file system can be written as UTF-8; on disk it may be any bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def require_text(path: Path) -> None:
    """Raises CardError where a path cannot stand in a card, because it is not UTF-8 text."""
    if not is_text(str(path.resolve())):
        raise CardError(
            f"the path {shown(path.resolve())} is not UTF-8 text, so no card can name it; rename the folder"
        )


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder, without what programs left there and without masks of images beside them."""
    try:
        found = sorted(p for p in folder.iterdir() if p.is_dir() and not is_junk(p.name))
    except OSError as error:
        raise DataError(f"cannot look into {shown(folder)}: {error.strerror or error}") from error
    masks = _mask_folders(folder, found)
    return [path for path in found if path not in masks]


def _mask_folders(folder: Path, found: Sequence[Path]) -> dict[Path, int]:
    """Returns folders that hold nothing but masks -> their number; {} where images and masks are all that there is."""
    named = [path for path in found if is_mask_folder(path.name)]
    rest = [path for path in found if path not in named]
    # A folder of images and one of masks have no classes in them, and are asked about.
    if not named or not any(
        set(words_of(path.name)) - CONTAINERS or any(p.is_dir() for p in path.iterdir()) for path in rest
    ):
        return {}
    listing = list_images(folder)
    masks = Counter(path.relative_to(folder).parts[0] for path in listing.passed_over.get(MASK, ()))
    images = Counter(path.relative_to(folder).parts[0] for path in listing.images)
    return {path: masks[path.name] for path in named if masks[path.name] and not images[path.name]}


def _mask_words(folder: Path) -> list[str]:
    found = sorted(p for p in folder.iterdir() if p.is_dir() and not is_junk(p.name))
    return [
        f"{number} {agree(number, 'mask', 'masks')} in the folder {shown(path.name)} {agree(number, 'is', 'are')} not "
        "used: an image of the same name lies beside each"
        for path, number in _mask_folders(folder, found).items()
    ]


def class_folder_names(folder: Path) -> list[str]:
    """Returns the names of the folders directly in a folder, without what programs left there."""
    return [path.name for path in _folders(folder)]


def _images(folder: Path) -> int:
    """Number of images directly in a folder."""
    return sum(is_image_file(path) for path in folder.iterdir())


def images_below(folder: Path) -> tuple[Path, ...]:
    """Returns the images in a folder and in the folders below it, as `list_images` finds them."""
    return list_images(folder).images


def _folders_with_images(folder: Path) -> set[str]:
    """Names of the folders directly in a folder that have images in them or below."""
    below = (path.relative_to(folder).parts for path in images_below(folder))
    return {parts[0] for parts in below if len(parts) > 1}


def _says_images(name: str) -> bool:
    return set(words_of(name)) <= CONTAINERS and not is_mask_folder(name)


def _holds_only_folders(folder: Path) -> bool:
    return bool(_folders(folder)) and not _images(folder)


def _unwrapped(folder: Path) -> Path:
    """Goes down through folders that hold a single folder of folders, as archives unpack."""
    below = _folders(folder)
    if len(below) != 1 or _images(folder) or split_part(below[0].name)[0] or not _holds_only_folders(below[0]):
        return folder
    return _unwrapped(below[0])


def _are_asked(folders: Sequence[Path], asked: frozenset[str]) -> bool:
    return bool(asked) and all(normalise_text(path.name) in asked for path in folders)


def _split_folders(base: Path, top: Sequence[Path], asked: frozenset[str]) -> dict[str, str]:
    """Returns part -> folder name where folders are splits without doubt; {} where none looks like one."""
    if _are_asked(top, asked):
        return {}
    part_of = {path: split_part(path.name) for path in top if not _images(path) or _folders(path)}
    part_of = {path: found for path, found in part_of.items() if found[0] is not None}
    # "steam_train" is a kind of train; "chest_xray_train" is none beside "chest_xray_test".
    rests = Counter(rest for _, rest in part_of.values())
    plain = {path: part for path, (part, rest) in part_of.items() if not rest or rests[rest] > 1}
    by_part = {part: [path.name for path, own in plain.items() if own == part] for part in PARTS}
    by_part = {part: names for part, names in by_part.items() if names}
    for part, names in by_part.items():
        if len(names) > 1:
            raise CardError(
                f"{shown(base)} has several {part} folders: {', '.join(map(shown, names))}; keep one, or name one for "
                f"each part in the card: {_splits_line(by_part)}"
            )
    if not by_part:
        return {}
    if not {"train", "test"} <= by_part.keys():
        _refuse_half(base, top, {part: names[0] for part, names in by_part.items()})
    return {part: by_part[part][0] for part in PARTS if part in by_part}


def _refuse_half(base: Path, top: Sequence[Path], found: dict[str, str]) -> None:
    """Raises CardError about a division without training or test images; returns where the folder is a class."""
    if len(top) > len(found) and not any(_holds_only_folders(base / name) for name in found.values()):
        return
    lacks = "test" if "train" in found else "training"
    train, test = shown(found.get("train", "...")), shown(found.get("test", "..."))
    loose = [path for path in top if split_part(path.name)[0] and path.name not in found.values()]
    alike = [path.name for path in loose if _folders(path)]
    has = ""
    if alike:
        has = f"; {shown(alike[0])} may hold some, which its name does not say for certain"
        train, test = (shown(alike[0]), test) if lacks == "training" else (train, shown(alike[0]))
    elif loose:
        has = f"; {shown(loose[0].name)} holds images without class folders, so nothing says what they show"
    elif lacks == "training":
        own = shown(found.get("test") or next(iter(found.values())))
        has = "; to judge models on them alone, write a card with `splits: {test: " + own + "}`"
        if "test" in found and "validation" in found:  # a development set is what some learn from
            train = shown(found["validation"])
    names = ", ".join(repr(shown(name)) for name in found.values())
    raise CardError(
        f"{shown(base)} has a folder {names} but none for the {lacks} images{has}. Add one; or say in a card which "
        f"folder plays which part, `splits: {{train: {train}, test: {test}}}`, or let the images of all of them be "
        "divided anew, `splits: {fractions: {train: 0.6, validation: 0.1, test: 0.3}}`"
    )


def _splits_line(by_part: dict[str, list[str]]) -> str:
    return "`splits: {" + ", ".join(f"{part}: {shown(names[0])}" for part, names in by_part.items()) + "}`"


def _named(base: Path, rule: Splits, asked: frozenset[str]) -> Layout:
    """The layout of split folders by name."""
    starts = {name: base / name for name in rule.names.values()}
    if rule == Splits() or rule.validation is None:
        starts = {name: start for name, start in starts.items() if start.is_dir()}
    for start in starts.values():
        if not start.is_dir():
            raise DataError(f"{shown(start)} is not a folder; the card takes it for a split of class folders")
    used = {Path(name).parts[0] for name in starts}
    unused = [
        f"{len(files)} {agree(len(files), 'image', 'images')} in the folder {shown(path.name)} "
        f"{agree(len(files), 'is', 'are')} not used: it is no split and no class"
        for path in _folders(base)
        if path.name not in used and (files := images_below(path))
    ]
    tops = {name: {p.name for p in _folders(start)} for name, start in starts.items()}
    classes: list[tuple[str, str, Path]] = []
    for name, start in starts.items():
        # A split with a single folder of folders wraps its classes, unless it is one of several in another split.
        is_class = any(tops[name] < other for other in tops.values())
        inner = start if is_class else _unwrapped_split(start)
        classes += [(name, label, path) for label, path in _class_folders(inner, asked).items()]
        unused += _loose(inner)
    return Layout(base, rule, tuple(classes), (*_loose(base), *unused))


def _unwrapped_split(start: Path) -> Path:
    below = _folders(start)
    if len(below) == 1 and not _images(start) and _holds_only_folders(below[0]):
        return _unwrapped_split(below[0])
    return start


def _loose(folder: Path) -> list[str]:
    number = _images(folder)
    if not number:
        return []
    images, are, they = ("image", "is", "it lies") if number == 1 else ("images", "are", "they lie")
    return [f"{number} {images} directly in {shown(folder)} {are} not used: {they} in no class folder"]


def _class_folders(folder: Path, asked: frozenset[str]) -> dict[str, Path]:
    """Returns class name (Unicode form NFC) -> folder."""
    found: dict[str, Path] = {}
    for path in _folders(folder):
        name = normalise_text(path.name)
        if not is_text(name):
            raise DataError(f"the class folder {shown(path)} has a name that is not UTF-8 text; rename it")
        if name in found:
            both = [path.name, found[name].name]
            how = "blanks around it" if len({own.strip() for own in both}) == 1 else "its Unicode form"
            raise DataError(
                f"{shown(folder)} has two folders that differ from {shown(name)!r} only in {how}; merge them"
            )
        found[name] = path
    if not found:
        raise DataError(
            f"{shown(folder)} has no class folders: put the images of each class into a folder with its name"
        )
    if not _are_asked(list(found.values()), asked):
        _refuse_doubtful(folder, found)
    return found


def _refuse_doubtful(folder: Path, found: dict[str, Path]) -> None:
    """Raises CardError where folders may be something else than classes."""
    with_images = {name: path for name, path in found.items() if _images(path)}
    only_folders = {
        name: path for name, path in found.items() if name not in with_images and images_below(path)
    }  # those without any image are classes without images, of which the checks speak
    inner = {name: _folders_with_images(path) for name, path in found.items()}
    within = set.union(*inner.values())
    if not with_images and len(within) == 1 and all(inner.values()) and _says_images(next(iter(within))):
        return  # each class has its images in one folder that says so, as in COVID/images beside COVID/masks
    same = next(iter(inner.values())) if len(inner) > 1 and len(set(map(frozenset, inner.values()))) == 1 else set()
    # "trainA" and "testA" share what they say besides; "steam_train" and "crash_test" do not.
    parts: dict[str, set[str]] = {}
    for part, rest in map(split_part, with_images):
        if part is not None:
            parts.setdefault(rest, set()).add(part)
    shares = [share_of(name) for name in found]
    names = list(found)
    if len(names) > 1 and all(map(is_fold, names)):
        why = "look like the folds of a cross-validation"
    elif len(names) > 1 and None not in shares and abs(sum(s or 0 for s in shares) - 100) < 1:
        why = "look like shares of one set"
    elif any(len(shared) > 1 for shared in parts.values()):
        why = "look like splits, and hold images without class folders"
    elif same:
        why = f"all have the same folders in them ({_some(sorted(same))})"
    elif only_folders:
        names = list(only_folders)
        below = sorted(inner[names[0]])
        why = f"hold only folders ({_some(below)})"
    elif len(names) > 1 and all(set(words_of(name)) <= CONTAINERS for name in names):
        why = "have names of kinds of files"
    else:
        return
    few = [shown(name) for name in found][:8]
    listed = ", ".join(few) + (", ..." if len(found) > len(few) else "")
    raise CardError(
        f"{shown(folder)}: {_some(names)} {why}, so they are not taken for classes without being asked. "
        "If they are splits, say which in a card: `splits: {train: FOLDER, test: FOLDER}`. If they are the classes, "
        f"name them there: `class_names: [{listed}]` (`adaptclip card new FOLDER --classes folders` writes such a "
        "card). If they are levels above the classes, as of a taxonomy, `adaptclip card new FOLDER --classes nested` "
        "takes the innermost for the classes. If they are neither, list the images in a table"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(shown(name) for name in names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
