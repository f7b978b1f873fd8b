# SPDX-License-Identifier: Apache-2.0
"""Class names that a text tower's tokenizer barely knows are found before training, and names that it knows are not."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
from open_clip.tokenizer import HFTokenizer
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
from tiny_clip import make_tiny_backbone
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from adaptclip import CoOp, ZeroShotClassifier
from adaptclip.prompts import _ENGLISH_WORDS, _OTHER_WORDS, barely_known

GROCERY = Path(__file__).parents[3] / "shared" / "data" / "grocery" / "class_descriptions.csv"

OTHERS = {
    "Japanese": "犬 猫 桜 チューリップ ひまわり 薔薇 スズラン たんぽぽ 富士山 黒色腫 基底細胞癌",
    "Chinese": "玫瑰 狗 猫 向日葵 郁金香 黑色素瘤",
    "Korean": "장미 개 고양이 해바라기 민들레",
    "Arabic": "وردة كلب قطة زنبق سيارة طائرة",
    "Russian": "роза собака кошка подсолнух одуванчик меланома",
    "Hindi": "गुलाब कुत्ता बिल्ली सूरजमुखी",
    "Thai": "กุหลาบ สุนัข แมว ทานตะวัน",
    "Greek": "τριαντάφυλλο σκύλος γάτα ηλίανθος",
    "German": "Gänseblümchen Löwenzahn Maiglöckchen Schneeglöckchen Sonnenblume Hund Katze Flugzeug",
    "Finnish": "auringonkukka voikukka koira kissa ruusu perhonen kilpikonna lentokone kuorma-auto",
}
SPECIES = (
    "Quercus robur,Turdus merula,Canis lupus familiaris,Taraxacum officinale,Convallaria majalis,Helianthus annuus,"
    "Fritillaria meleagris,Tussilago farfara,Cypripedium calceolus,Chroicocephalus ridibundus,Dactylorhiza maculata"
)

ENGLISH = {
    "flowers17": "daffodil,snowdrop,lily of the valley,bluebell,crocus,iris,tigerlily,tulip,fritillary,sunflower,daisy,"
    "colts' foot,dandelion,cowslip,buttercup,windflower,pansy",
    "ham10000": "actinic keratoses and intraepithelial carcinoma,basal cell carcinoma,benign keratosis-like lesions,"
    "dermatofibroma,melanoma,melanocytic nevi,vascular lesions",
    "whurs19": "Airport,Beach,Bridge,Commercial,Desert,Farmland,football field,Forest,Industrial,Meadow,Mountain,Park,"
    "Parking,Pond,Port,railway station,Residential,River,Viaduct",
    "pets": "Abyssinian,American Bulldog,Bengal,Birman,Chihuahua,Keeshond,Leonberger,Pomeranian,Samoyed,Shiba Inu",
    "dishes": "baklava,beignets,bibimbap,bruschetta,ceviche,falafel,foie gras,gnocchi,gyoza,huevos rancheros,takoyaki",
    "aircraft": "707-320,737-800,A310,ATR-72,Boeing 717,Cessna 172,DC-10,Embraer Legacy 600,Il-76,Tu-154,Yak-42,MD-11",
    "chest x-rays": "Atelectasis,Cardiomegaly,Effusion,Infiltration,Mass,Nodule,Pneumonia,Pneumothorax,Consolidation,"
    "Edema,Emphysema,Fibrosis,Pleural thickening,Hernia",
    "birds": "Black-footed Albatross,Laysan Albatross,Groove-billed Ani,Crested Auklet,Indigo Bunting,"
    "Chuck-will's-widow,Bobolink,Pileated Woodpecker,Gadwall,American Goldfinch,Boat-tailed Grackle",
    "sentence case": "Red fox,Polar bear,Bald eagle,Grey wolf,Harbour seal,Snow leopard,Barn owl,Wild boar",
    "digits": "0,1,2,3,4,5,6,7,8,9",
}


def asked(tokenizer: Any) -> Any:
    """A backbone as far as `barely_known` asks it."""
    return SimpleNamespace(tokenizer=tokenizer, name="it")


CLIP = asked(open_clip.SimpleTokenizer())


@pytest.mark.parametrize("language", OTHERS)
def test_other_languages_under_clips_own_tokenizer(language):
    (found,) = barely_known(CLIP, OTHERS[language].split())
    assert "spelt out letter by letter" in found or "words of another language" in found
    assert OTHERS[language].split()[0] in found


def test_species_under_clips_own_tokenizer():
    (found,) = barely_known(CLIP, SPECIES.split(","))
    assert "names of species" in found
    assert "BioCLIP" in found


@pytest.mark.parametrize("list_name", ENGLISH)
def test_english_lists_raise_no_alarm(list_name):
    assert barely_known(CLIP, ENGLISH[list_name].split(",")) == []


def test_imagenet_and_its_parts_raise_no_alarm():
    assert not any("spelt" in said or "language" in said for said in barely_known(CLIP, IMAGENET_CLASSNAMES))
    alarms = [start for start in range(0, 1000, 10) if barely_known(CLIP, IMAGENET_CLASSNAMES[start : start + 10])]
    assert alarms == []


@pytest.mark.shared_data
def test_the_groceries_of_a_swedish_shop_raise_no_alarm():
    if not GROCERY.is_file():
        pytest.skip("the grocery set is not beside this checkout")
    with GROCERY.open(encoding="utf-8") as file:
        names = [row["label_name"] for row in csv.DictReader(file)]
    assert len(names) > 80
    assert barely_known(CLIP, names) == []


def test_one_foreign_name_among_english_ones_is_named():
    (found,) = barely_known(CLIP, ["daisy", "tulip", "ひまわり", "rose"])
    assert found.startswith("'ひまわり': spelt out")


def wrapped(inner: Tokenizer, folder: Path, **special: str) -> Any:
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)
    return asked(HFTokenizer(str(folder), context_length=64))


@pytest.fixture(scope="module")
def multilingual(tmp_path_factory) -> Any:
    """A sentencepiece-like tokenizer that has learnt the words of all these languages."""
    words = [*OTHERS.values(), _OTHER_WORDS, _ENGLISH_WORDS, SPECIES.replace(",", " "), "a photo of a dog"]
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    inner.train_from_iterator(words * 3, trainers.BpeTrainer(vocab_size=4000, special_tokens=special))
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder = tmp_path_factory.mktemp("multilingual")
    return wrapped(inner, folder, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("language", [*OTHERS, "species"])
def test_a_tokenizer_of_many_languages_raises_no_alarm(language, multilingual):
    names = SPECIES.split(",") if language == "species" else OTHERS[language].split()
    assert barely_known(multilingual, names) == []


def test_words_that_a_tokenizer_lacks_and_names_that_it_makes_equal(multilingual, tmp_path):
    (found,) = barely_known(multilingual, ["dog", "ყვავილი", "photo"])[:1]
    assert found == "'ყვავილი' has a word that its tokenizer lacks"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "photo", "of", "owl", "fox"]
    inner = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    found = barely_known(wrapped(inner, tmp_path, **special), ["owl", "Owl", "crow", "raven", "fox"])
    assert found[0] == "'owl', 'Owl', 'crow', 'raven' become the same tokens, so that nothing tells these classes apart"
    assert found[1] == "'crow', 'raven' have words that its tokenizer lacks"


def test_it_is_said_once_at_the_start_and_only_of_words_that_are_read():
    backbone = make_tiny_backbone(context_length=77, width=32)
    names = OTHERS["Russian"].split()
    with pytest.warns(UserWarning, match=r"of this list poorly: .*роза.*aliases.*SigLIP 2.*NLLB"):
        ZeroShotClassifier(backbone, names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ZeroShotClassifier(backbone, names, templates=["{}"])
        CoOp(backbone, names, n_ctx=2)
        ZeroShotClassifier(backbone, ["rose", "dog"])
    other = make_tiny_backbone(context_length=77, width=32)
    with pytest.warns(UserWarning, match="собака"):
        CoOp(other, names, n_ctx=2)


def test_methods_that_read_no_words_are_silent():
    from adaptclip import LinearProbe

    backbone = make_tiny_backbone(context_length=77, width=32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LinearProbe(backbone, OTHERS["Russian"].split())
