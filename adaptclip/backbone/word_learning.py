"""A few words learnt from pictures by a text tower that is otherwise left as it is; used only to train the starter."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from adaptclip.errors import ConfigError
from adaptclip.seeding import numpy_generator

_IMAGES, _TEMPLATES, _KEPT = 400, 4, 160
"""Pictures, templates of all the classes, and kept texts per step."""


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
    """Learns the embeddings of some tokens, in place, so that prompts with them name the pictures of their classes.

    Every picture is told from the other classes, and from these and all of `others` together (CLIP's cross-entropy from
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
    for step in tqdm(range(steps), desc="words", disable=None, leave=False):
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
