# SPDX-License-Identifier: Apache-2.0
"""The starter: train a small text tower against a fixed ImageNet image tower, so that a CLIP fits in the package.

Method    Locked image tower (Zhai et al., "LiT", arXiv:2111.07991). Class names: the text features of ImageNet's names
          are pulled to the image tower's own classifier, whose posterior over unlabelled images they also reproduce
          (Hinton et al., arXiv:1503.02531). Captions: the contrastive loss of CLIP (arXiv:2103.00020) against all
          captioned images, and the directions that a sentence encoder gives them (all-MiniLM-L6-v2 behind one
          linear map; Wang et al., arXiv:2002.10957). Numerals, last: the embeddings of their tokens alone learn to name
          drawn ones (adaptclip/datasets/numerals.py); a text without these tokens stays exactly as it was.
Needs     pip install "adaptclip[starter,starter-training]"
Run       python recipes/starter.py --data-root DATA     (tiny_imagenet, flickr8k, imagenet1k_one_each)
          With --start FILE only the numerals are learnt, on top of text weights that are there already.
Measure   python recipes/starter.py --data-root DATA --evaluate    (also flowers17, grocery, ham10000)
Expected  see adaptclip/clip/starter_clip/README.md
"""

from __future__ import annotations

import io
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

import adaptclip as ac
from adaptclip.bench.interpolation import Yardstick, interval_words
from adaptclip.clip import ClipBackbone
from adaptclip.clip.starter import FOLDER, build_starter, image_classifier, save_text_weights, text_state
from adaptclip.clip.starter_training import caption_directions, learn_words, sentence_embeddings
from adaptclip.data.dataset import ImageDataset, MemoryStore
from adaptclip.data.readers import card_places
from adaptclip.datasets.embedded import DIGIT_NAMES
from adaptclip.datasets.numerals import draw_numeral
from adaptclip.errors import DataError
from adaptclip.files import digest, write_json
from adaptclip.methods.contrastive import caption_tokens
from adaptclip.metrics.intervals import wilson
from adaptclip.outputs import check_cache
from adaptclip.progress import progress_bar
from adaptclip.prompts import zero_shot_weights
from adaptclip.reports.blocks import number
from adaptclip.reports.measuring import measure
from adaptclip.seeding import numpy_generator
from adaptclip.training.tracking import Run

TEMPLATES = (
    "a photo of a {}.", "itap of a {}.", "a bad photo of the {}.", "a photo of the large {}.", "art of the {}.",
    "a close-up photo of a {}.", "{}",
)  # fmt: skip
EVALUATION_TEMPLATES = TEMPLATES[:3]
NUMERAL_TEMPLATES = (
    "a photo of the digit {}.", "a photo of the number {}.", "a photo of the numeral {}.", "the handwritten digit {}.",
    "a handwritten {}.", "the number {}.", "the digit {}", "a photo of a handwritten {}.", "the number {} in print.",
    "a drawing of the number {}.", "the figure {} written by hand.", "number {}", "a blurry photo of the number {}.",
    'a photo of the number: "{}".',
)  # fmt: skip
NUMERAL_EVALUATION_TEMPLATES = ("a photo of the handwritten digit {}.", "the number {} written by hand.")
"""Those of the card digits; the numerals are learnt without them."""
NUMERALS = (DIGIT_NAMES, tuple("0123456789"))
"""What a digit is called, in words and in figures. Both learn, and only the words are kept: some names of ImageNet hold
figures, such as "maillot (clothing n03710721)"."""
NUMERAL_CONTEXT = ("digit", "number", "handwritten")
"""Words that learn with the numerals, so that "the number two" may mean what "two dogs" does not."""
UNSEEN = ("flowers17", "grocery", "ham10000", "digits")
"""Cards that nothing here is trained on; their zero-shot accuracy is measured."""
FEATURE_NORM = 33.5
"""Mean length of the image tower's features on tiny_imagenet. The cache keeps unit-norm features, and with this one
length for all the classifier's posterior changes by a KL divergence of 0.02 and its answer on 0.2 % of the images."""


@dataclass(frozen=True)
class Config:
    """Training of the starter's text tower."""

    data_root: Path = Path("data")
    """Folder with tiny_imagenet/, flickr8k/ and imagenet1k_one_each/, each of Parquet files."""
    steps: int = 1400
    """Optimizer steps."""
    num_names: int = 500
    """ImageNet class names per step."""
    num_images: int = 400
    """Images per step whose posterior is reproduced."""
    num_captions: int = 192
    """Captions per step."""
    classifier_weight: float = 4.0
    """Weight of 1 - cosine between centred text features and centred classifier weights."""
    caption_weight: float = 0.5
    """Weight of the contrastive loss on captions."""
    sentence_weight: float = 2.0
    """Weight of 1 - cosine between captions, centred, and the directions that the sentence encoder gives them."""
    synonyms: float = 0.1
    """Share of the class names that are replaced by another name of the same class."""
    start: Path | None = None
    """Text weights to go on from: nothing is learnt but the numerals. None begins with a random tower."""
    num_numerals: int = 8000
    """Drawn numerals to learn from; a quarter as many others measure what was learnt."""
    numeral_steps: int = 200
    """Optimizer steps in which the words for numerals are learnt; 0 leaves them as they are."""
    lr: float = 2e-3
    """Peak learning rate of AdamW (betas 0.9 and 0.98, weight decay 0.05), one cycle."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "bf16"
    """Autocast of the text tower."""
    seed: int = 0
    """Chooses the initial text tower and every draw."""
    save_every: int = 100
    """Optimizer steps between checkpoints; one is also written every five minutes."""
    evaluate: bool = False
    """Measure the shipped starter instead of training one."""
    cache: Path = Path(".cache/features")
    """Image features and sentence embeddings."""
    out: Path = Path("runs/starter")
    """Run folder: settings, metrics, text_tower.safetensors, evaluation.json on Flickr8k's validation part."""
    resume: bool = False
    """Go on with the run in `out`."""
    overwrite: bool = False
    """Replace the run in `out`."""


@dataclass(frozen=True)
class Draw:
    """One step.

    Names (C, L) of the classes `classes`, images (B, D), and captions (P, L) of the captioned images numbered
    `images`, whose directions the sentence encoder gives as `directions` (P, D).
    """

    names: Tensor
    classes: Tensor
    images: Tensor
    captions: Tensor
    pictures: Tensor
    directions: Tensor

    def to(self, device: torch.device) -> Draw:
        """Returns the draw on another device."""
        return Draw(*(value.to(device) for value in vars(self).values()))


class Student(nn.Module):
    """The text tower that learns, behind the one forward that the loss needs."""

    def __init__(self, clip: Any, text: Any) -> None:
        super().__init__()
        self.clip, self.text = clip, text
        clip.requires_grad_(True)
        clip.visual.requires_grad_(False)

    def forward(self, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
        """Returns unit-norm features of the names (C, D) and of the captions (P, D), and the scale of the logits."""
        names, captions = self.encode(torch.cat([draw.names, draw.captions])).tensor_split([len(draw.names)])
        return names, captions, self.clip.logit_scale.clamp(max=math.log(100.0)).exp()

    def encode(self, ids: Tensor) -> Tensor:
        """Encodes (B, L) token ids to unit-norm (B, D) float32, in parts by length: little is spent on padding."""
        eot = self.text.pooled_position(ids)
        order = eot.argsort()
        parts = [
            self.text.encode_embeddings(self.text.embed_tokens(ids[rows, : int(eot[rows].max()) + 1]), eot[rows])
            for rows in order.chunk(8)
        ]
        return F.normalize(torch.cat(parts).float()[order.argsort()], dim=-1)

    def adapter_state(self) -> dict[str, Tensor]:
        """Returns everything but the image tower."""
        return text_state(self.clip)

    def load_adapter_state(self, state: dict[str, Tensor]) -> None:
        """Takes over what `adapter_state` returned."""
        self.clip.load_state_dict(state, strict=False)


class PictureSet:
    """One folder of Parquet files: its images for the feature cache, its other columns as a table."""

    def __init__(self, root: Path, name: str) -> None:
        files = sorted((root / name).glob("*.parquet"))
        if not files:
            raise DataError(f"no Parquet files in {root / name}; --data-root names the folder that holds {name}/")
        whole = pa.concat_tables([pq.read_table(file) for file in files], promote_options="default")
        self.table = whole.drop_columns(["image"])
        self.images = in_memory([picture["bytes"] for picture in whole["image"].to_pylist()], name)

    def part(self, name: str) -> np.ndarray:
        """Returns the rows whose column "split" says `name`."""
        return np.flatnonzero(np.array(self.table["split"].to_pylist()) == name)

    def by_class(self, column: str) -> list[str]:
        """Returns the column's value for each class id in turn."""
        values = dict(zip(self.table["label"].to_pylist(), self.table[column].to_pylist(), strict=True))
        return [values[label] for label in range(len(values))]


def in_memory(pictures: list[bytes], name: str) -> ImageDataset:
    """Returns encoded images, all of one class, as the feature cache takes them."""
    rows = range(len(pictures))
    names = tuple(f"{name}/{row}" for row in rows)
    return ImageDataset(
        MemoryStore(pictures, names), np.array(rows), ("picture",), names, np.zeros(len(rows), np.int64),
        tuple(digest(picture) for picture in pictures),
    )  # fmt: skip


class Words:
    """Tokens of ImageNet's names and synonyms, class by class, and of the captions that are learnt from."""

    def __init__(self, cfg: Config, backbone: ClipBackbone) -> None:
        imagenet, card = PictureSet(cfg.data_root, "imagenet1k_one_each"), ac.load_card("flickr8k")
        check_cache(cfg.cache, *card_places(card, cfg.data_root))
        self.flickr = ac.open_data(card, data_root=cfg.data_root).train
        self.digests = {"flickr8k": self.flickr.digest, "imagenet1k_one_each": imagenet.images.digest}
        self.first_names = imagenet.by_class("label_name")
        names = zip(self.first_names, imagenet.by_class("synonyms"), strict=True)
        spellings = [list(dict.fromkeys([name, *(s.strip() for s in more.split(","))])) for name, more in names]
        self.names = [[backbone.tokenize([t.format(n) for t in TEMPLATES]) for n in own] for own in spellings]
        captions, _ = caption_tokens(backbone, self.flickr.captions or ())
        self.captions, self.owner = captions.tokens, captions.owner


class Corpus:
    """Draws each step's names, images and captions from (seed, step) alone, so that a resumed run sees the same.

    The images of imagenet1k_one_each and Flickr8k's test part are never drawn: the evaluation is on them.
    """

    def __init__(self, cfg: Config, backbone: ClipBackbone, words: Words) -> None:
        self.cfg, self.names, self.captions, self.owner = cfg, words.names, words.captions, words.owner
        tiny, cache = PictureSet(cfg.data_root, "tiny_imagenet"), ac.FeatureCache(cfg.cache)
        self.digests = {"tiny_imagenet": tiny.images.digest, **words.digests}
        self.captioned = cache.get(backbone, words.flickr).values[0]
        texts = [text for own in words.flickr.captions or () for text in own]
        embeddings = sentence_embeddings(texts, cfg.cache / "sentences")
        self.directions = caption_directions(embeddings, self.captioned, self.owner, seed=cfg.seed)
        self.pictures = cache.get(backbone, tiny.images.select(tiny.part("train"))).values[0]

    def batch(self, micro_step: int) -> Draw:
        """Returns the draw of a step, counted from 0."""
        cfg, rng = self.cfg, numpy_generator(self.cfg.seed, "draw", micro_step)
        classes = rng.choice(len(self.names), cfg.num_names, replace=False)
        own = [self.names[c] for c in classes]
        other = [rng.integers(1, len(n)) if len(n) > 1 and rng.random() < cfg.synonyms else 0 for n in own]
        names = torch.stack([n[i][rng.integers(len(TEMPLATES))] for n, i in zip(own, other, strict=True)])
        captions = torch.from_numpy(rng.choice(len(self.captions), cfg.num_captions, replace=False))
        # Flickr8k's images are as many as they are; of Tiny ImageNet's, more than twice as many are taken.
        num_flickr = cfg.num_images * 3 // 10
        flickr = rng.choice(len(self.captioned), num_flickr, replace=False)
        tiny = rng.choice(len(self.pictures), cfg.num_images - num_flickr, replace=False)
        images = torch.cat([self.captioned[flickr], self.pictures[tiny]])
        return Draw(
            names, torch.from_numpy(classes), images, self.captions[captions], self.owner[captions],
            self.directions[captions],
        )  # fmt: skip


def main(cfg: Config) -> int:
    """Images and words → cached features → text tower → words for drawn numerals → evaluation."""
    accelerator = ac.make_accelerator(cfg.mixed_precision, 1)
    if cfg.evaluate:
        backbone = ac.load_backbone("starter")
        return show(
            evaluate_names(backbone, cfg) | recall_at_10(backbone, cfg, "test") | evaluate_unseen(backbone, cfg)
        )
    ac.seed_everything(cfg.seed)
    clip = build_starter(cfg.start, random_text=cfg.start is None, seed=cfg.seed)
    backbone = ClipBackbone(clip, open_clip.get_tokenizer(f"local-dir:{FOLDER}"), name="starter")
    words = Words(cfg, backbone)
    corpus = Corpus(cfg, backbone, words) if cfg.start is None else None
    run = ac.start_run(
        cfg.out, config=asdict(cfg), accelerator=accelerator, backbone=backbone,
        others=words.digests if corpus is None else corpus.digests, resume=cfg.resume, overwrite=cfg.overwrite,
        save_every=cfg.save_every,
    )  # fmt: skip
    student = Student(clip, backbone.text)
    if corpus is not None:
        train_tower(cfg, student, corpus, accelerator, run)
    results = learn_numerals(cfg, student, backbone, words) if cfg.numeral_steps else {}
    weights = run.path / "text_tower.safetensors"
    save_text_weights(clip, weights)
    # The test sets are left to --evaluate, on the one tower that is kept.
    results |= recall_at_10(ac.load_backbone("starter", text_weights=weights), cfg, "validation")
    write_json(run.path / "evaluation.json", results)
    return show(results)


def train_tower(cfg: Config, student: Student, corpus: Corpus, accelerator: Accelerator, run: Run) -> None:
    """Trains the whole text tower on names, images and captions."""
    device, clip = accelerator.device, student.clip
    with torch.no_grad():
        clip.logit_scale.fill_(math.log(20.0))
    captioned, weight, bias = (value.to(device) for value in (corpus.captioned, *image_classifier()))
    centred = F.normalize(weight - weight.mean(dim=0), dim=-1)
    learnt = [p for p in student.parameters() if p.requires_grad]
    groups = [{"params": [p for p in learnt if p.ndim > 1], "weight_decay": 0.05}]
    groups.append({"params": [p for p in learnt if p.ndim <= 1], "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.98))
    scheduler = OneCycleLR(optimizer, cfg.lr, total_steps=cfg.steps + 1, pct_start=0.1)
    model, optimizer = accelerator.prepare(student, optimizer)
    start = ac.load_checkpoint(run.checkpoints, student, optimizer, scheduler, accelerator)

    for step, draw in ac.train_steps(corpus, cfg.steps, accelerator, start=start, run=run):
        with accelerator.accumulate(model):
            draw = draw.to(device)
            names, captions, scale = model(draw)
            teacher = (FEATURE_NORM * draw.images @ weight[draw.classes].T + bias[draw.classes]).softmax(dim=1)
            names_loss = F.kl_div((scale * draw.images @ names.T).log_softmax(dim=1), teacher, reduction="batchmean")
            shape_loss = 1 - F.cosine_similarity(names - names.mean(dim=0), centred[draw.classes]).mean()
            # The images never change, so every caption is told from all of them and not only from its batch's.
            # A second product, because rows picked out of the first have a gradient that adds up in no fixed order.
            texts, own = scale * captions, torch.arange(len(captions), device=device)
            to_picture = F.cross_entropy(texts @ captioned.T, draw.pictures)
            caption_loss = (to_picture + F.cross_entropy(captioned[draw.pictures] @ texts.T, own)) / 2
            sentence_loss = 1 - F.cosine_similarity(captions - captions.mean(dim=0), draw.directions).mean()
            loss = names_loss + cfg.classifier_weight * shape_loss
            loss = loss + cfg.caption_weight * caption_loss + cfg.sentence_weight * sentence_loss
            ac.backward_and_step(accelerator, loss, model, optimizer, scheduler, step=step, max_grad_norm=1.0)
        if ac.is_due(step, 10, cfg.steps):
            run.log(
                step, loss=loss, names_loss=names_loss, shape_loss=shape_loss, caption_loss=caption_loss,
                sentence_loss=sentence_loss,
            )  # fmt: skip
        if run.save_is_due(step, cfg.steps):
            ac.save_checkpoint(run.checkpoints, step, student, optimizer, scheduler, accelerator)


def learn_numerals(cfg: Config, student: Student, backbone: ClipBackbone, words: Words) -> dict[str, dict[str, Any]]:
    """Teaches the words for numerals, and returns the top-1 accuracy on drawings that were not learnt from."""
    cache, device = ac.FeatureCache(cfg.cache), student.clip.logit_scale.device
    amounts = {"train": cfg.num_numerals, "validation": cfg.num_numerals // 4}
    features, labels = {}, {name: torch.arange(amount) % 10 for name, amount in amounts.items()}
    for name, amount in amounts.items():
        rng, pictures = numpy_generator(cfg.seed, "numerals", name), []
        for i in progress_bar(range(amount), desc=f"drawing numerals, {name}", leave=False):
            buffer = io.BytesIO()
            draw_numeral(i % 10, rng).picture.save(buffer, "PNG")
            pictures.append(buffer.getvalue())
        features[name] = cache.get(backbone, in_memory(pictures, f"numerals, {name}")).values[0]
    prompts = [backbone.tokenize([t.format(n) for n in names]) for t in NUMERAL_TEMPLATES for names in NUMERALS]
    tokens = backbone.tokenize([*(word for names in NUMERALS for word in names), *NUMERAL_CONTEXT])[:, 1].unique()
    others = zero_shot_weights(backbone, words.first_names, EVALUATION_TEMPLATES)
    kept = torch.cat([*(name for own in words.names for name in own), words.captions])
    student.requires_grad_(False)
    figures, embedding = backbone.tokenize(NUMERALS[1])[:, 1].to(device), student.clip.token_embedding.weight
    before = embedding.detach()[figures].clone()
    cosine = learn_words(
        student.clip.token_embedding, student.encode, tokens.to(device), prompts=torch.stack(prompts).to(device),
        images=features["train"].to(device), labels=labels["train"].to(device), others=others.to(device),
        kept=kept.to(device), scale=float(backbone.logit_scale), steps=cfg.numeral_steps, seed=cfg.seed,
    )  # fmt: skip
    with torch.no_grad():
        embedding[figures] = before
    print(f"names and captions with the learnt tokens kept a mean cosine of {cosine:.3f} to what they were")
    weights = zero_shot_weights(backbone, DIGIT_NAMES, NUMERAL_EVALUATION_TEMPLATES).cpu()
    answers = (features["validation"] @ weights.T).argmax(dim=1)
    right, n = int((answers == labels["validation"]).sum()), len(answers)
    low, high = wilson(right, n)
    return {"drawn numerals, top-1": {"value": right / n, "low": low, "high": high, "n": n}}


def evaluate_names(backbone: ClipBackbone, cfg: Config) -> dict[str, dict[str, Any]]:
    """Returns the top-1 accuracy of ImageNet's names on one image of each class."""
    imagenet = PictureSet(cfg.data_root, "imagenet1k_one_each")
    weights = zero_shot_weights(backbone, imagenet.by_class("label_name"), EVALUATION_TEMPLATES)
    answers = (ac.FeatureCache(cfg.cache).get(backbone, imagenet.images).values[0] @ weights.T).argmax(dim=1)
    right, n = int((answers == torch.tensor(imagenet.table["label"].to_pylist())).sum()), len(answers)
    low, high = wilson(right, n)
    return {"ImageNet names, top-1": {"value": right / n, "low": low, "high": high, "n": n}}


def recall_at_10(backbone: ClipBackbone, cfg: Config, part: Literal["validation", "test"]) -> dict[str, dict[str, Any]]:
    """Searches the captions of one part of Flickr8k by its images, and the other way round."""
    flickr = ac.open_data(ac.load_card("flickr8k"), data_root=cfg.data_root)
    found = Yardstick(backbone, getattr(flickr, part), flickr, cache=ac.FeatureCache(cfg.cache))(backbone)
    return {f"Flickr8k {part}, {way}, R@10": recalls["R@10"] for way, recalls in found.items()}


def evaluate_unseen(backbone: ClipBackbone, cfg: Config) -> dict[str, dict[str, Any]]:
    """Returns the zero-shot accuracy on the cards that nothing was trained on."""
    results = {}
    for name in UNSEEN:
        card = ac.load_card(name)
        data = ac.open_data(card, data_root=cfg.data_root)
        adapter = ac.ZeroShotClassifier(backbone, data.prompt_names, card.templates)
        predictions = ac.predict(adapter, ac.FeatureCache(cfg.cache).get(backbone, data.test), data.test)
        for metric, found in measure(predictions, metrics=("accuracy", "mean_per_class_accuracy")).items():
            results[f"{name} zero-shot, {metric}"] = number(found.model, 0.95)
    return results


def show(results: dict[str, dict[str, Any]]) -> int:
    """Prints the results."""
    for name, found in results.items():
        print(f"{name:<42} {found['value']:6.1%}  {interval_words(found)}  n = {found['n']}")
    return 0


if __name__ == "__main__":
    ac.launch(main, Config)
