"""What two processes compare, started by torchrun: CoOp with its classes shared out against CoOp on one process."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from tiny_clip import make_tiny_backbone
from torch.nn import functional as F

from adaptclip.adapters import CoOp
from adaptclip.types import Batch

NAMES = ("rose", "lily of the valley", "Größe 42", "dog", "cat", "northern hairy-nosed wombat", "fox")


def rows(batch, start, stop):
    return Batch(labels=batch.labels[start:stop], index=batch.index[start:stop], features=batch.features[start:stop])


def compare(accelerator, backbone, names, whole, **settings):
    """Largest differences of logits and context gradient, and the size of the gradient."""
    size = len(whole.labels) // accelerator.num_processes
    mine = slice(accelerator.process_index * size, (accelerator.process_index + 1) * size)
    alone = CoOp(backbone, names, n_ctx=4, shard_classes=False, **settings)
    logits = alone(whole)
    (F.cross_entropy(logits, whole.labels) + alone.penalty()).backward()

    shared = CoOp(backbone, names, n_ctx=4, **settings)
    prepared = accelerator.prepare(shared)
    own_logits = prepared(rows(whole, mine.start, mine.stop))
    loss = F.cross_entropy(own_logits, whole.labels[mine]) + accelerator.unwrap_model(prepared).penalty()
    accelerator.backward(loss)
    got, expected = shared.context.grad, alone.context.grad
    assert got is not None
    assert expected is not None
    return {
        "logits": (own_logits - logits[mine]).abs().max().item(),
        "gradient": (got - expected).abs().max().item(),
        "size": expected.abs().max().item(),
    }, shared


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
    plain, coop = compare(accelerator, backbone, NAMES, whole)
    share = coop._shares[(accelerator.process_index, accelerator.num_processes, coop.context.device)]
    kg, _ = compare(accelerator, backbone, NAMES, whole, kg_weight=8.0)
    chunked, _ = compare(accelerator, backbone, NAMES, whole, memory_budget_bytes=1)
    single, _ = compare(accelerator, backbone, NAMES[:1], one, kg_weight=8.0)
    report = {
        "num_processes": accelerator.num_processes,
        "classes_encoded": sum(len(ids) for chunk in share.chunks for ids in chunk),
        "difference": {
            "logits": plain["logits"],
            "gradient": plain["gradient"],
            "gradient_kg": kg["gradient"],
            "gradient_chunked": chunked["gradient"],
            "one_class": single["gradient"],
        },
        "gradient_size": plain["size"],
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
