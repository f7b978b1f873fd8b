"""The starter: train a small text tower against a fixed ImageNet image tower, so that a CLIP fits in the package.

Method    Locked image tower (Zhai et al., "LiT", arXiv:2111.07991). Class names: the text features of ImageNet's names
          are pulled to the image tower's own classifier, whose posterior over unlabelled images they also reproduce
          (Hinton et al., arXiv:1503.02531). Captions: the contrastive loss of CLIP (arXiv:2103.00020).
Run       accelerate launch recipes/starter.py --data-root DATA     (tiny_imagenet, flickr8k, imagenet1k_one_each)
Measure   accelerate launch recipes/starter.py --data-root DATA --evaluate
Expected  see adaptclip/backbone/starter_clip/README.md
"""

from __future__ import annotations

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
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

import adaptclip as ac
from adaptclip.backbone import ClipBackbone
from adaptclip.backbone.starter import FOLDER, build_starter, image_classifier, save_text_weights, text_state
from adaptclip.data.dataset import ImageDataset, MemoryStore
from adaptclip.errors import DataError
from adaptclip.evaluation.intervals import wilson
from adaptclip.prompts import zero_shot_weights
from adaptclip.seeding import numpy_generator
from adaptclip.storage import digest, write_json

TEMPLATES = (
    "a photo of a {}.", "itap of a {}.", "a bad photo of the {}.", "a photo of the large {}.", "art of the {}.",
    "a close-up photo of a {}.", "{}",
)  # fmt: skip
EVALUATION_TEMPLATES = TEMPLATES[:3]
MAX_CAPTION_TOKENS = 16
FEATURE_NORM = 33.5
"""Mean length of the image tower's features on tiny_imagenet. The cache keeps unit-norm features, and with this one
length for all the classifier's posterior changes by a KL divergence of 0.02 and its answer on 0.2 % of the images."""


@dataclass(frozen=True)
class Config:
    """Training of the starter's text tower."""

    data_root: Path = Path("data")
    """Folder with tiny_imagenet/, flickr8k/ and imagenet1k_one_each/, each of Parquet files."""
    steps: int = 1000
    """Optimizer steps."""
    num_names: int = 400
    """ImageNet class names per step."""
    num_images: int = 400
    """Images per step whose posterior is reproduced."""
    num_captions: int = 160
    """Image-caption pairs per step."""
    classifier_weight: float = 3.0
    """Weight of 1 - cosine between centred text features and centred classifier weights."""
    caption_weight: float = 0.3
    """Weight of the contrastive loss on captions."""
    synonyms: float = 0.1
    """Share of the class names that are replaced by another name of the same class."""
    lr: float = 2e-3
    """Peak learning rate of AdamW (betas 0.9 and 0.98, weight decay 0.05), one cycle."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "bf16"
    """Autocast of the text tower."""
    seed: int = 0
    """Chooses the initial text tower and every draw."""
    evaluate: bool = False
    """Measure the shipped starter instead of training one."""
    cache: Path = Path(".cache/features")
    """Image features."""
    out: Path = Path("runs/starter")
    """Run folder: settings, metrics, text_tower.safetensors, evaluation.json."""
    resume: bool = False
    """Go on with the run in `out`."""
    overwrite: bool = False
    """Replace the run in `out`."""


@dataclass(frozen=True)
class Draw:
    """One step: names (C, L) of the classes `classes`, images (B, D), captions (B, L) of the images `captioned`."""

    names: Tensor
    classes: Tensor
    images: Tensor
    captions: Tensor
    captioned: Tensor


class Student(nn.Module):
    """The text tower that learns, behind the one forward that the loss needs."""

    def __init__(self, clip: Any, text: Any) -> None:
        super().__init__()
        self.clip, self.text = clip, text
        clip.requires_grad_(True)
        clip.visual.requires_grad_(False)
        with torch.no_grad():
            clip.logit_scale.fill_(math.log(20.0))

    def forward(self, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
        """Returns unit-norm features of the names (C, D) and of the captions (B, D), and the scale of the logits."""
        names, captions = (F.normalize(self.encode(ids), dim=-1) for ids in (draw.names, draw.captions))
        return names, captions, self.clip.logit_scale.clamp(max=math.log(100.0)).exp()

    def encode(self, ids: Tensor) -> Tensor:
        """Encodes (B, L) token ids to (B, D) float32, in four parts by length so that little is spent on padding."""
        eot = self.text.pooled_position(ids)
        order = eot.argsort()
        parts = [
            self.text.encode_embeddings(self.text.embed_tokens(ids[rows, : int(eot[rows].max()) + 1]), eot[rows])
            for rows in order.chunk(4)
        ]
        return torch.cat(parts).float()[order.argsort()]

    def adapter_state(self) -> dict[str, Tensor]:
        """Returns everything but the image tower."""
        return text_state(self.clip)

    def load_adapter_state(self, state: dict[str, Tensor]) -> None:
        """Takes over what `adapter_state` returned."""
        self.clip.load_state_dict(state, strict=False)


class PictureSet:
    """One folder of Parquet files: its pictures for the feature cache, its other columns as a table."""

    def __init__(self, root: Path, name: str) -> None:
        files = sorted((root / name).glob("*.parquet"))
        if not files:
            raise DataError(f"no Parquet files in {root / name}; --data-root names the folder that holds {name}/")
        whole = pa.concat_tables([pq.read_table(file) for file in files], promote_options="default")
        pictures = [picture["bytes"] for picture in whole["image"].to_pylist()]
        rows = range(len(pictures))
        names = tuple(f"{name}/{row}" for row in rows)
        self.table = whole.drop_columns(["image"])
        self.images = ImageDataset(
            MemoryStore(pictures, names), np.array(rows), ("picture",), names, np.zeros(len(rows), np.int64),
            tuple(digest(picture) for picture in pictures),
        )  # fmt: skip

    def part(self, name: str) -> np.ndarray:
        """Returns the rows whose column "split" says `name`."""
        return np.flatnonzero(np.array(self.table["split"].to_pylist()) == name)

    def by_class(self, column: str) -> list[str]:
        """Returns the column's value for each class id in turn."""
        values = dict(zip(self.table["label"].to_pylist(), self.table[column].to_pylist(), strict=True))
        return [values[label] for label in range(len(values))]


class Corpus:
    """Draws each step's names, images and captions from (seed, step) alone, so that a resumed run sees the same.

    The pictures of imagenet1k_one_each and Flickr8k's test part are never drawn: the evaluation is on them.
    """

    def __init__(self, cfg: Config, backbone: ClipBackbone) -> None:
        self.cfg = cfg
        tiny, flickr, imagenet = (
            PictureSet(cfg.data_root, name) for name in ("tiny_imagenet", "flickr8k", "imagenet1k_one_each")
        )
        names = zip(imagenet.by_class("label_name"), imagenet.by_class("synonyms"), strict=True)
        spellings = [list(dict.fromkeys([name, *(s.strip() for s in more.split(","))])) for name, more in names]
        self.names = [[backbone.tokenize([t.format(n) for t in TEMPLATES]) for n in own] for own in spellings]
        cache = ac.FeatureCache(cfg.cache)
        self.captioned = cache.get(backbone, flickr.images.select(flickr.part("train"))).values[0]
        captions = [flickr.table["captions"][int(row)].as_py() for row in flickr.part("train")]
        short = [[c for c in own if backbone.count_tokens(c) <= MAX_CAPTION_TOKENS] for own in captions]
        shortest = [min(own, key=len) for own in captions]
        self.captions = [backbone.tokenize(own or [one]) for own, one in zip(short, shortest, strict=True)]
        self.pictures = cache.get(backbone, tiny.images.select(tiny.part("train"))).values[0]

    def batch(self, micro_step: int) -> Draw:
        """Returns the draw of a step, counted from 0."""
        cfg, rng = self.cfg, numpy_generator(self.cfg.seed, "draw", micro_step)
        classes = rng.choice(len(self.names), cfg.num_names, replace=False)
        own = [self.names[c] for c in classes]
        other = [rng.integers(1, len(n)) if len(n) > 1 and rng.random() < cfg.synonyms else 0 for n in own]
        names = torch.stack([n[i][rng.integers(len(TEMPLATES))] for n, i in zip(own, other, strict=True)])
        pairs = rng.choice(len(self.captions), cfg.num_captions, replace=False)
        captions = torch.stack([self.captions[p][rng.integers(len(self.captions[p]))] for p in pairs])
        # Flickr8k's pictures are as many as they are; of Tiny ImageNet's, more than twice as many are taken.
        num_flickr = cfg.num_images * 3 // 10
        flickr = rng.choice(len(self.captioned), num_flickr, replace=False)
        tiny = rng.choice(len(self.pictures), cfg.num_images - num_flickr, replace=False)
        images = torch.cat([self.captioned[flickr], self.pictures[tiny]])
        return Draw(names, torch.from_numpy(classes), images, captions, self.captioned[pairs])


def main(cfg: Config) -> int:
    """Pictures and words → cached features → text tower → evaluation."""
    accelerator = ac.make_accelerator(cfg.mixed_precision)
    if cfg.evaluate:
        return show(evaluate(ac.load_backbone("starter"), cfg), None)
    ac.seed_everything(cfg.seed)
    clip = build_starter(random_text=True, seed=cfg.seed)
    backbone = ClipBackbone(clip, open_clip.get_tokenizer(f"local-dir:{FOLDER}"), name="starter")
    student = Student(clip, backbone.text)
    corpus = Corpus(cfg, backbone)
    weight, bias = image_classifier()
    centred = F.normalize(weight - weight.mean(dim=0), dim=-1)
    run = ac.start_run(cfg.out, config=asdict(cfg), accelerator=accelerator, resume=cfg.resume, overwrite=cfg.overwrite)
    learnt = [p for p in student.parameters() if p.requires_grad]
    groups = [{"params": [p for p in learnt if p.ndim > 1], "weight_decay": 0.05}]
    groups.append({"params": [p for p in learnt if p.ndim <= 1], "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.98))
    scheduler = OneCycleLR(optimizer, cfg.lr, total_steps=cfg.steps + 1, pct_start=0.1)
    model, optimizer = accelerator.prepare(student, optimizer)
    start = ac.load_checkpoint(run.checkpoints, student, optimizer, scheduler, accelerator)

    for step, draw in ac.train_steps(corpus, cfg.steps, accelerator, start=start):
        with accelerator.accumulate(model):
            names, captions, scale = model(draw)
            teacher = (FEATURE_NORM * draw.images @ weight[draw.classes].T + bias[draw.classes]).softmax(dim=1)
            names_loss = F.kl_div((scale * draw.images @ names.T).log_softmax(dim=1), teacher, reduction="batchmean")
            shape_loss = 1 - F.cosine_similarity(names - names.mean(dim=0), centred[draw.classes]).mean()
            pairs, own = scale * draw.captioned @ captions.T, torch.arange(len(captions))
            caption_loss = (F.cross_entropy(pairs, own) + F.cross_entropy(pairs.T, own)) / 2
            loss = names_loss + cfg.classifier_weight * shape_loss + cfg.caption_weight * caption_loss
            ac.backward_and_step(accelerator, loss, model, optimizer, scheduler, step=step, max_grad_norm=1.0)
        if ac.is_due(step, 10, cfg.steps):
            run.log(step, loss=loss, names_loss=names_loss, shape_loss=shape_loss, caption_loss=caption_loss)
        if ac.is_due(step, 100, cfg.steps):
            ac.save_checkpoint(run.checkpoints, step, student, optimizer, scheduler, accelerator)

    weights = run.path / "text_tower.safetensors"
    save_text_weights(clip, weights)
    return show(evaluate(ac.load_backbone("starter", text_weights=weights), cfg), run.path / "evaluation.json")


@torch.no_grad()
def evaluate(backbone: ClipBackbone, cfg: Config) -> dict[str, tuple[int, int]]:
    """Returns successes and trials: ImageNet's names on one picture each, retrieval on Flickr8k's test part."""
    cache = ac.FeatureCache(cfg.cache)
    imagenet, flickr = (PictureSet(cfg.data_root, name) for name in ("imagenet1k_one_each", "flickr8k"))
    weights = zero_shot_weights(backbone, imagenet.by_class("label_name"), EVALUATION_TEMPLATES)
    answers = (cache.get(backbone, imagenet.images).values[0] @ weights.T).argmax(dim=1)
    right = int((answers == torch.tensor(imagenet.table["label"].to_pylist())).sum())
    test = flickr.part("test")
    pictures = cache.get(backbone, flickr.images.select(test)).values[0]
    captions = [flickr.table["captions"][int(row)].as_py() for row in test]
    of_picture = torch.tensor([i for i, own in enumerate(captions) for _ in own])
    # Captions longer than the context are cut, as is usual in retrieval; a prompt never is (`backbone.tokenize`).
    texts = torch.cat([backbone.encode_text(backbone.tokenizer(own)) for own in captions])
    similarity = pictures @ texts.T
    to_text = (of_picture[similarity.topk(10, dim=1).indices] == torch.arange(len(test))[:, None]).any(dim=1)
    to_image = (similarity.T.topk(10, dim=1).indices == of_picture[:, None]).any(dim=1)
    return {
        "ImageNet names, top-1": (right, len(answers)),
        "Flickr8k image to text, R@10": (int(to_text.sum()), len(to_text)),
        "Flickr8k text to image, R@10": (int(to_image.sum()), len(to_image)),
    }


def show(results: dict[str, tuple[int, int]], path: Path | None) -> int:
    """Prints the results with 95 % Wilson intervals and writes them to `path`."""
    for name, (count, n) in results.items():
        low, high = wilson(count, n)
        print(f"{name:<30} {count / n:6.1%}  [{low:.1%}, {high:.1%}]  n = {n}")
    if path is not None:
        write_json(path, {name: {"count": count, "n": n} for name, (count, n) in results.items()})
    return 0


if __name__ == "__main__":
    ac.launch(main, Config)
