# SPDX-License-Identifier: Apache-2.0
"""What names and values are taken for, however they are spelt: "Patient ID", "patientId"; "P003", "p003 "; "3", "3.0".

Names only ever propose. What they propose is shown, and what follows from them is either recognised without doubt or
asked about.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable

FEW_VALUES = 12
"""Up to so many different values, such as those of sex or hospital, make groups, which are in all parts by intent."""


def _words(listed: str) -> frozenset[str]:
    return frozenset(listed.split())


_JOINED = r"(?:set|data|dataset|daten|images?|imgs?|bilder|menge|satz|split)*"
_PARTS = {
    "train": rf"train(?:ing|ings)?(?:val)?{_JOINED}|trn|learn(?:ing)?|apprentissage|entrainement|entrenamiento"
    r"|trein(?:o|amento)|addestramento|обуч\w*|трениров\w*|训练集?|訓練集?|学習|훈련|학습",
    "validation": rf"val{_JOINED}|valid(?:ation|ierung)?s?{_JOINED}|validacion|validacao|validazione|dev|devel"
    r"|development|валидац\w*|验证集?|驗證集?|検証|검증",
    "test": rf"test(?:s|ing)?{_JOINED}|tst|holdout|heldout|prueba|prova|тест\w*|测试集?|測試集?|テスト|테스트",
}
_NEUTRAL = _words(
    "set data dataset split splits part folder dir images image imgs img pictures photos seg cls "
    "classification class classes real raw final full new all jpg png v version rev revision"
)
"""Words beside "train" and "test" that change nothing about what a folder is."""

CONTAINERS = _words(
    "images image imgs img pictures picture photos photo jpg jpeg jpegs png masks mask labels label "
    "annotations annotation segmentation segmentations groundtruth gt ground truth data raw originals original"
)
"""Words that name a kind of file and no class of things."""

_JUNK = frozenset({
    "__macosx", "__pycache__", "@eadir", "$recycle.bin", "#recycle", "system volume information", "lost+found",
    "thumbs.db", "desktop.ini",
})  # fmt: skip

_ROLES = {
    "id": frozenset({"id", "image id", "record", "record id", "uuid", "uid", "sop instance uid"}),
    "image": _words(
        "image file filename filepath path imagepath imagefile img picture photo photograph bild bilddatei datei "
        "dateiname pfad fichier imagen archivo immagine"
    )
    | {"file name", "image path", "image file", "file path", "bild datei", "image file name", "relative path"},
    "label": _words(
        "label labels class classes classname category species diagnosis diagnose dx target y finding findings klasse "
        "kategorie art befund clase classe etiqueta categoria diagnostico diagnostic"
    )
    | {"class name", "label name", "haupt diagnose", "main diagnosis", "primary diagnosis", "scientific name"},
    "split": _words("split subset partition fold dataset aufteilung"),
}
"""What a column is taken for by its words; where several columns fit, the first of the table is."""

_OF_ROLE = _words("name names full relative rel the of")

_SUFFIX = r"(?:ids?|s|no|nr|num|number|nummer|code|key|uid|name|hash)?"
_IDENTITIES = (
    r"clusters?|patient(?:en|in|innen)?|paciente|paziente|mrn",
    r"subject|proband(?:en)?|participant|person(?:en)?|sujet|individual|individuum|donor|volunteer|animal|mouse|owner",
    r"case|fall(?=nummer|nr|id)|examination|exam|accession|study|visit|encounter",
    r"lesion|specimen|biopsy|eye|tumou?r|nodule", r"slide|wsi|block|section", r"video|movie|sequence|burst|clip|scene",
    r"series|group(?=id)", r"collector|recorder|photographer|observer|sammler|fotograf|beobachter|coll?ecteur",
)  # fmt: skip
"""What images can be of, in words; the widest first, as one patient has several lesions and a lesion several slides."""

_PLACES = r"trap|camera|kamera|deployment|site|location|place|plot|station|transect|standort|fundort|ort|batch|plate"
_OF_IDENTITY = _words(
    "id ids uid no nr num number nummer code key name identifier kennung index idx hash instance pseudonym "
    "anon anonymized anonymised s"
)


def is_junk(name: str) -> bool:
    """Whether a file or folder of that name is left by a program and is no part of anybody's data."""
    return name.startswith(".") or name.lower() in _JUNK


def words_of(name: str) -> list[str]:
    """Splits a name into lower-case words without accents: "PatientID" and "patient-id" are ["patient", "id"]."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    plain = unicodedata.normalize("NFKC", plain)
    plain = re.sub(r"(?<=[a-z\d])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", plain)
    return re.findall(r"[^\W\d_]+|\d+(?:[.,]\d+)?", plain.casefold())


def split_part(name: str) -> tuple[str | None, str]:
    """Returns what part of a data set a folder's name means, and the rest of the name.

    Returns:
        "train", "validation", "test" or None where it means none or several; and the words that say something else,
        which two folders of one division share, such as "chest xray" in "chest_xray_train" and "chest_xray_test".
    """
    words = words_of(name)
    joined = ["".join(words)] if len(words) > 1 else []
    found = {part for part, pattern in _PARTS.items() for word in [*words, *joined] if re.fullmatch(pattern, word)}
    if found == {"train", "validation"} and "".join(words).startswith("trainval"):
        found = {"train"}  # what is left for training once a test part is taken away
    if len(found) != 1:
        return None, ""
    part = found.pop()
    rest = [w for w in words if not re.fullmatch(_PARTS[part], w) and w not in _NEUTRAL and w not in ("val", "hold")]
    rest = [w for w in rest if not w.isdecimal() and w not in ("out", "held")]
    return part, " ".join(rest)


def is_fold(name: str) -> bool:
    """Whether a folder's name means one of several folds: "fold1", "cv_3", "split-2"."""
    return bool(re.fullmatch(r"(?:k?folds?|cv|splits?|partition|faltung)[ _-]*\d+", name.strip().lower()))


def share_of(name: str) -> float | None:
    """Returns the share that a folder's name gives, such as 70 for "70 percent", "70%" and "train_70pct"; else None."""
    found = re.search(r"(\d+(?:[.,]\d+)?)[ _-]*(?:%|pct|percent|per cent|prozent|pourcent|por ciento)", name.lower())
    return float(found[1].replace(",", ".")) if found else None


def role_of(name: str) -> str | None:
    """Returns "image", "label", "split" or "id" where a column's name says that it is that; else None."""
    words = words_of(name)
    bare = [w for w in words if w not in _OF_ROLE] or words
    return next((role for role, known in _ROLES.items() if " ".join(words) in known or " ".join(bare) in known), None)


def identity_rank(name: str) -> int | None:
    """Returns how wide a thing the column's name says the images are of: 0 the widest, None where it says nothing.

    "PatientID", "Patienten-Nr." and "MRN" are names of the patient; "PatientSex" and "patient_age" say something about
    the patient and are none.
    """
    words = words_of(name)
    if words == ["medical", "record", "number"]:
        return 0
    if words == ["group", "id"]:
        words = ["groupid"]
    return next((rank for rank, kind in enumerate(_IDENTITIES) if _names(words, rf"(?:{kind}){_SUFFIX}")), None)


def is_person(name: str) -> bool:
    """Whether a column's name says that it tells persons or animals apart, so that few values make no group of it."""
    rank = identity_rank(name)
    return rank is not None and (rank <= 1 or any(word in _OF_IDENTITY for word in words_of(name)))


def tells_units(name: str, num_values: int) -> bool:
    """Whether a column seems to say who or what images are of: persons by its name, or other things if many."""
    return is_person(name) or (identity_rank(name) is not None and num_values > FEW_VALUES)


def is_place(name: str) -> bool:
    """Whether a column's name says where images were taken, as "camera trap site" does."""
    return _names(words_of(name), rf"(?:{_PLACES}){_SUFFIX}")


_MEASURES = _words(
    "age alter edad eta idade leeftijd weight gewicht poids peso height groesse grosse taille altura bmi temp "
    "temperature temperatur year years jahr jahre annee ano month days hours score grade dose distance depth length "
    "width diameter area volume elevation altitude latitude longitude lat lon"
)


def is_measure(name: str) -> bool:
    """Whether a column's name says that it holds a measured or counted number, such as "Alter" or "age_years"."""
    return bool(set(words_of(name)) & _MEASURES) and identity_rank(name) is None


def _names(words: list[str], pattern: str) -> bool:
    """Whether some word fits the pattern and the others add nothing to it."""
    fits = [bool(re.fullmatch(pattern, word)) for word in words]
    return any(fits) and all(fit or w in _OF_IDENTITY or w.isdecimal() for fit, w in zip(fits, words, strict=True))


_NUMBER = re.compile(r"([+-]?)0*(\d+)(?:[.,]0+)?")


def plain(text: str) -> str:
    """Returns what all spellings of a value share: no case, single blanks, whole numbers without zeros around them.

    Numbers stay texts, so that ids of twenty digits that differ in the last one differ here too; "1.10" is not "1.1".
    """
    text = " ".join(text.split()).casefold()
    number = _NUMBER.fullmatch(text)
    return text if number is None else number[1].replace("+", "") + number[2]


def several_spellings(values: Iterable[str]) -> list[tuple[str, ...]]:
    """Returns the values that are spelt in two or more ways, each as its sorted spellings."""
    return _several(values, plain)


def numbers_twice(values: Iterable[str]) -> list[tuple[str, ...]]:
    """Returns the whole numbers that are spelt in two or more ways, as `several_spellings` does."""
    return several_spellings(value for value in values if _NUMBER.fullmatch(value.strip()))


def blanks_apart(values: Iterable[str]) -> list[tuple[str, ...]]:
    """Returns the values that are one without outer blanks and in Unicode form NFC, each as its sorted spellings."""
    return _several(values, lambda value: unicodedata.normalize("NFC", value).strip())


def _several(values: Iterable[str], key: Callable[[str], str]) -> list[tuple[str, ...]]:
    found: defaultdict[str, set[str]] = defaultdict(set)
    for value in values:
        found[key(value)].add(value)
    return sorted(tuple(sorted(spelt)) for spelt in found.values() if len(spelt) > 1)


def spelt(several: list[tuple[str, ...]], most: int = 3) -> str:
    """Words spellings for a message: 'P003' = 'p003', 'P004' = 'p004' and 2 more."""
    look_alike = any(len({unicodedata.normalize("NFC", text) for text in texts}) < len(texts) for texts in several)
    info = ", ".join(" = ".join(map(ascii if look_alike else repr, spellings)) for spellings in several[:most])
    return info + (f" and {len(several) - most} more" if len(several) > most else "")
