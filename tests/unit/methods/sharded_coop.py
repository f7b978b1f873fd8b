# SPDX-License-Identifier: Apache-2.0
"""What two processes compare, started by torchrun: CoOp with shared-out classes, and CoCoOp, against one process."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from tiny_clip import make_tiny_backbone
from torch.nn import functional as F

from adaptclip.methods import CoCoOp, CoOp
from adaptclip.types import Batch

NAMES = ("rose", "lily of the valley", "Größe 42", "dog", "cat", "northern hairy-nosed wombat", "fox")


def rows(batch, start, stop):
    return Batch(labels=batch.labels[start:stop], index=batch.index[start:stop], features=batch.features[start:stop])


def compare(accelerator, alone, shared, whole):
    """Largest differences of logits and gradient, and the size of the gradient, over all trainable tensors."""
    size = len(whole.labels) // accelerator.num_processes
    mine = slice(accelerator.process_index * size, (accelerator.process_index + 1) * size)
    logits = alone(whole)
    (F.cross_entropy(logits, whole.labels) + alone.penalty()).backward()

    prepared = accelerator.prepare(shared)
    own_logits = prepared(rows(whole, mine.start, mine.stop))
    loss = F.cross_entropy(own_logits, whole.labels[mine]) + accelerator.unwrap_model(prepared).penalty()
    accelerator.backward(loss)
    pairs = [(a.grad, b.grad) for a, b in zip(alone.trainable_parameters(), shared.trainable_parameters(), strict=True)]
    assert all(got is not None for pair in pairs for got in pair)
    return {
        "logits": (own_logits - logits[mine]).abs().max().item(),
        "gradient": max((got - expected).abs().max().item() for expected, got in pairs),
        "gradient_size": max(expected.abs().max().item() for expected, _ in pairs),
    }


def both(backbone, names=NAMES, **settings):
    """The same CoOp without and with its classes shared out."""
    return [CoOp(backbone, names, n_ctx=4, shard_classes=shard, **settings) for shard in (False, True)]


def main(out):
    accelerator = Accelerator(cpu=True)
    generator = torch.Generator().manual_seed(0)
    backbone = make_tiny_backbone()
    whole = Batch(
        labels=torch.randint(0, len(NAMES), (8,), generator=generator),
        index=torch.arange(8),
        features=F.normalize(torch.randn(8, backbone.embed_dim, generator=generator), dim=-1),
    )
    one = Batch(labels=torch.zeros(8, dtype=torch.long), index=whole.index, features=whole.features)
    plain = both(backbone)
    coop = plain[1]
    cases = {
        "plain": (*plain, whole),
        "kg": (*both(backbone, kg_weight=8.0), whole),
        "chunked": (*both(backbone, memory_budget_bytes=1), whole),
        "one_class": (*both(backbone, NAMES[:1], kg_weight=8.0), one),
        "sigmoid": (*both(backbone, objective="sigmoid"), whole),
        "class_specific": (*both(backbone, class_specific=True, position="middle"), whole),
        "cocoop": (CoCoOp(backbone, NAMES), CoCoOp(backbone, NAMES), whole),
    }
    found = {name: compare(accelerator, *case) for name, case in cases.items()}
    plan = coop._classes.plan(accelerator.process_index, accelerator.num_processes, coop.context.device)
    report = {
        "num_processes": accelerator.num_processes,
        "classes_encoded": sum(len(group.classes) for chunk in plan.chunks for group in chunk),
        **{key: {name: case[key] for name, case in found.items()} for key in ("logits", "gradient", "gradient_size")},
        "evaluated_alone": False,
    }
    if accelerator.is_main_process:
        # The other process is not asked: this would hang if evaluation needed it.
        with torch.no_grad():
            report["evaluated_alone"] = bool(torch.isfinite(coop.eval()(whole)).all())
    (out / f"rank-{accelerator.process_index}.json").write_text(json.dumps(report))
    accelerator.wait_for_everyone()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
