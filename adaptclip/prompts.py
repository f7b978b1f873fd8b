# SPDX-License-Identifier: Apache-2.0
"""Class names into prompts, and prompts into the weights of a zero-shot classifier."""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptclip.errors import BackboneError, ConfigError, DataError
from adaptclip.progress import progress_bar

if TYPE_CHECKING:
    from adaptclip.clip import ClipBackbone
    from adaptclip.feature_clip import FeatureClip

TEMPLATES: dict[str, tuple[str, ...]] = {
    "photo": ("a photo of a {}.",),
    "pets": ("a photo of a {}, a type of pet.",),
    "flowers": ("a photo of a {}, a type of flower.",),
    "aircraft": ("a photo of a {}, a type of aircraft.",),
    "texture": ("{} texture.",),
    "satellite": ("a centered satellite photo of {}.",),
    "food": ("a photo of {}, a type of food.",),
    "action": ("a photo of a person doing {}.",),
    "imagenet": (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ),
}
"""Published templates by domain (CoOp, arXiv:2109.01134; `imagenet` is CLIP's ensemble of seven); {} is the name."""


def clean_class_name(name: str) -> str:
    """Returns a class name as words: underscores become spaces, runs of white space one space.

    Raises:
        DataError: nothing is left.
    """
    cleaned = " ".join(name.replace("_", " ").split())
    if not cleaned:
        raise DataError(f"class name {name!r} has no words; give it a name, or an alias in the card")
    return cleaned


def fill(templates: Sequence[str], names: Sequence[str]) -> list[list[str]]:
    """Puts every class name into every template.

    Args:
        templates: P templates, each with one `{}`; other braces stay as they are.
        names: C class names, cleaned here.

    Returns:
        C lists of P prompts.

    Raises:
        ConfigError: no templates, or one without exactly one `{}`.
        DataError: a class name without words.
    """
    if isinstance(templates, str) or not templates:
        raise ConfigError(f"templates should be a list with at least one template, got {templates!r}")
    for template in templates:
        if template.count("{}") != 1:
            raise ConfigError(
                f"template {template!r} should have {{}} exactly once, where the class name goes, "
                f"got {template.count('{}')} times; for example {TEMPLATES['photo'][0]!r}"
            )
    return [[template.replace("{}", name) for template in templates] for name in map(clean_class_name, names)]


# -- names that the text tower barely knows ----------------------------------------------------------------------------

_SYLLABLES, _OF_SYLLABLES = "syllables", ("CJK", "HIRAGANA", "KATAKANA", "HANGUL")
"""Scripts whose characters are words or syllables: one token a character is what a tokenizer that knows them writes."""

_SPELT_LETTERS, _SPELT_SYLLABLES = 0.85, 1.5
"""Tokens a character from which on a script is spelt out. Measured on names of plants, animals and diseases: CLIP's own
tokenizer writes 0.92 (Arabic) to 2.0 (Greek) tokens a letter of scripts that it does not know and 1.9 (Korean) to 2.7
(Chinese) a syllable, one of many languages (DeepSeek's) at most 0.80 and 1.3; English names have 0.15 to 0.40."""

_FOREIGN_WORD, _SPECIES_WORD, _FEWEST_WORDS = 2.8, 1.8, 5
"""Tokens a word of Latin letters, of words of four letters and more. Lists of English names had 1.0 to 2.27 by CLIP's
tokenizer and at most 2.67 by BERT's (diseases); German 4.5, Swedish 3.0, Finnish 2.9. Names of species have 1.9 to 2.9,
too few to be told from diseases by their tokens alone, and are known by their form."""

_SPECIES = re.compile(r"[A-Z][a-z]+ (x )?[a-z-]+(us|um|is|a|ae|i|e|or|ns|ax|ix|oides|es|os|on|ys|er)( [a-z-]+)?")
_OTHER_WORDS = "город школа вода человек 中国 日本 学校 مدينة العالم الناس"
_ENGLISH_WORDS = "house water people music garden animal window mountain flower bread kitchen forest summer picture"

WAYS_OUT = (
    "Give each class words that it knows under `aliases` in the card (in Python: as class names), or take a tower of "
    "many languages: SigLIP 2 (ViT-B-16-SigLIP2-256), XLM-RoBERTa (xlm-roberta-base-ViT-B-32), NLLB (nllb-clip-base)."
)


def barely_known(backbone: ClipBackbone | FeatureClip, class_names: Sequence[str]) -> list[str]:
    """Finds class names of which a text tower cannot know much, by what its tokenizer makes of them.

    It looks at tokens alone: a tokenizer that has a word says nothing of whether the tower has learnt it. (Features do
    not show it either: the starter's of names in scripts that it does not know are no more alike than of English ones.)

    Args:
        backbone: whose tokenizer is asked. Where only features are known, or the tokenizer is of an unknown kind,
            nothing is found.
        class_names: C class names.

    Returns:
        One sentence for each kind of trouble: names that become the same tokens, that hold an unknown word, that are
        spelt letter by letter, or that are cut into many pieces a word. None where all is well.
    """
    from adaptclip.clip.text_towers import PromptTokens

    try:
        tokens = PromptTokens(backbone.tokenizer)  # type: ignore[union-attr]
    except (AttributeError, BackboneError):
        return []
    names = [clean_class_name(name) for name in class_names]

    def count(words: Sequence[str]) -> int:
        return sum(map(len, tokens.word_ids(words, "a photo of a ")))

    found = []
    own = tokens.word_ids(names, "a photo of a ")
    same = defaultdict(list)
    for name, ids in zip(names, own, strict=True):
        same[tuple(ids)].append(name)
    twins = [name for alike in same.values() if len(set(alike)) > 1 for name in alike]
    if twins:
        found.append(f"{_few(twins)} become the same tokens, so that nothing tells these classes apart")
    unknown = [name for name, ids in zip(names, own, strict=True) if tokens.unknown_id in ids]
    if unknown:
        found.append(f"{_few(unknown)} {'has a word' if len(unknown) == 1 else 'have words'} that its tokenizer lacks")
    scripts = defaultdict(list)
    for name in names:
        for word in _words(name):
            scripts[_script(word)].append(word)
    latin = scripts.pop("LATIN", [])
    for script, words in scripts.items():
        rate = count(words) / sum(map(len, words))
        if rate > (_SPELT_SYLLABLES if script == _SYLLABLES else _SPELT_LETTERS):
            shown = [name for name in names if any(_script(word) == script for word in _words(name))]
            found.append(f"{_few(shown)}: spelt out letter by letter ({rate:.1f} tokens a character)")
    long = [word for word in latin if len(word) > 3]
    rate = count(long) / len(long) if len(long) >= _FEWEST_WORDS else 0.0
    species = [name for name in names if _SPECIES.fullmatch(name)]
    is_species = 2 * len(species) > len(names) and rate > _SPECIES_WORD
    if (is_species or rate > _FOREIGN_WORD) and not _knows_many_languages(count):
        kind = "names of species" if is_species else "words of another language"
        known = ", unless it was trained on such names, as BioCLIP was" if is_species else ""
        found.append(
            f"{_few(species if is_species else names)}: {kind} ({rate:.1f} tokens a word, and "
            f"{count(_ENGLISH_WORDS.split()) / len(_ENGLISH_WORDS.split()):.1f} for everyday English){known}"
        )
    return found


def tell_of_names(backbone: ClipBackbone | FeatureClip, class_names: Sequence[str]) -> None:
    """Warns once of each list of names that `barely_known` finds fault with; nothing is refused."""
    # Kept with the tokenizer, which a model and all that is made of it share.
    kept = getattr(getattr(backbone, "tokenizer", None), "__dict__", None)
    names = tuple(class_names)
    if kept is None or names in kept.setdefault("_told_of", set()):
        return
    kept["_told_of"].add(names)
    found = barely_known(backbone, names)
    if found:
        warnings.warn(
            f"the text tower of {backbone.name} knows class names of this list poorly: {'; '.join(found)}. {WAYS_OUT}",
            stacklevel=3,
        )


def _knows_many_languages(count: Callable[[Sequence[str]], int]) -> bool:
    words = _OTHER_WORDS.split()
    return count(words) < 0.7 * sum(map(len, words))


def _words(name: str) -> list[str]:
    """The words of a name without digits and signs, cut where the script changes."""
    words: list[str] = []
    kinds = ["", *(unicodedata.category(character)[0] for character in name)]
    for before, kind, character in zip(kinds, kinds[1:], name, strict=False):
        if kind not in "LM":
            continue
        goes_on = before and before in "LM" and (kind == "M" or _script(words[-1]) == _script(character))
        words[len(words) - bool(goes_on) :] = [words[-1] + character if goes_on else character]
    return words


def _script(word: str) -> str:
    """The script that a word begins in; those whose characters are words or syllables are one."""
    name = unicodedata.name(word[0], "?")
    return _SYLLABLES if any(script in name for script in _OF_SYLLABLES) else name.partition(" ")[0]


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:4]))
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def class_tokens(backbone: ClipBackbone | FeatureClip, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Returns the (C * P, L) token ids of every name in every template, and warns of names that are barely known.

    Raises:
        BackboneError: a prompt is longer than the context; nothing is ever cut.
        ConfigError: a template is not valid.
        DataError: a class name without words.
    """
    prompts = [prompt for per_class in fill(templates, class_names) for prompt in per_class]
    tell_of_names(backbone, class_names)
    return backbone.tokenize(prompts)


@torch.no_grad()
def zero_shot_weights(
    backbone: ClipBackbone | FeatureClip,
    class_names: Sequence[str],
    templates: Sequence[str],
    *,
    batch_size: int = 256,
) -> Tensor:
    """Returns the classifier that CLIP makes of words alone (Radford 2021, section 3.1.4).

    Each class is the mean of its prompts' unit-norm features, normalised again.

    Args:
        backbone: the model whose text tower reads the prompts. Where only features are known, those of the classes are
            taken, and the templates are not read.
        class_names: C class names.
        templates: P templates with one `{}` each.
        batch_size: prompts encoded at once.

    Returns:
        (C, D) float32, unit norm, on the backbone's device.

    Raises:
        BackboneError: a prompt is longer than the context; nothing is ever cut.
        ConfigError: a template is not valid.
        DataError: a class name without words, or no classes.
    """
    if not class_names:
        raise DataError("zero-shot weights need at least one class name, got none")
    known = getattr(backbone, "class_features", None)
    if known is not None:
        return known(class_names)
    tokens = class_tokens(backbone, class_names, templates)
    chunks = progress_bar(tokens.split(batch_size), desc="Encoding prompts", unit="batch", leave=False, delay=2)
    features = torch.cat([backbone.encode_text(chunk) for chunk in chunks])
    return F.normalize(features.reshape(len(class_names), len(templates), -1).mean(dim=1), dim=-1)
