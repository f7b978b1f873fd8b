# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from adaptclip.data.dataset import ImageDataset, MemoryStore
from adaptclip.errors import DataError
from adaptclip.methods.predicting import evaluation_mode, predict
from adaptclip.types import Features

ROOT = Path(__file__).resolve().parents[3]


class Linear(nn.Module):
    """Half-precision logits, and dropout that shows when it is on."""

    def __init__(self, num_classes=3):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(4 * num_classes).reshape(4, num_classes).float() / 7)
        self.dropout = nn.Dropout(0.9)
        self.frozen = nn.Dropout(0.5).eval()
        self.sizes: list[int] = []

    def forward(self, batch):
        self.sizes.append(len(batch.labels))
        return self.dropout(batch.features @ self.weight).half()


def split(n, num_classes=3):
    labels = np.arange(n) % num_classes
    ids = tuple(f"row{i}" for i in range(n))
    dataset = ImageDataset(
        store=MemoryStore([b""] * n, ids),
        rows=np.arange(n),
        class_names=tuple("abc"[:num_classes]),
        ids=ids,
        labels=labels,
        contents=ids,
        clusters=tuple(f"p{i // 2}" for i in range(n)),
        groups={"site": tuple("xy"[i % 2] for i in range(n))},
        levels={"kind": ("k", "k", "l")},
    )
    values = torch.randn(1, n, 4, generator=torch.Generator().manual_seed(0))
    return Features(nn.functional.normalize(values, dim=-1), torch.from_numpy(labels), ids), dataset


def test_rows_keep_their_order_and_bring_their_columns_along():
    features, dataset = split(11)
    adapter = Linear()
    judged = predict(adapter, features, dataset, batch_size=4)
    expected = (features.values[0] @ adapter.weight).half().float().softmax(-1).detach().numpy()
    assert np.allclose(judged.probs, expected, atol=1e-6)
    assert judged.probs.dtype == np.float32
    assert np.allclose(judged.probs.sum(axis=1), 1, atol=1e-6)
    assert (judged.ids, judged.groups, judged.clusters) == (dataset.ids, dataset.groups, dataset.clusters)
    assert judged.labels.tolist() == dataset.labels.tolist()
    assert judged.levels == dataset.levels
    assert adapter.sizes == [4, 4, 3]


def test_every_submodule_gets_its_own_mode_back_also_after_an_error():
    features, dataset = split(2)
    adapter = Linear().train()
    adapter.frozen.eval()
    predict(adapter, features, dataset)
    assert (adapter.training, adapter.dropout.training, adapter.frozen.training) == (True, True, False)

    def interrupted():
        with evaluation_mode(adapter):
            assert not adapter.dropout.training
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert adapter.training
    assert not adapter.frozen.training


def test_no_gradient_is_kept_but_tensors_made_meanwhile_may_be_trained_on():
    class Caching(Linear):
        def forward(self, batch):
            self.cached = self.weight * 2
            return batch.features @ self.cached

    features, dataset = split(3)
    adapter = Caching()
    predict(adapter, features, dataset)
    assert not adapter.cached.requires_grad
    (adapter.weight * adapter.cached).sum().backward()


def test_bad_input_is_named():
    features, dataset = split(4)
    with pytest.raises(DataError, match="not of the same images"):
        predict(Linear(), features, split(3)[1])
    with pytest.raises(DataError, match="got 2 augmented views"):
        predict(Linear(), Features(features.values.repeat(2, 1, 1), features.labels, features.ids), dataset)
    with pytest.raises(DataError, match="the split is empty"):
        predict(Linear(), *split(0))
    with pytest.raises(DataError, match="batch_size must be at least 1"):
        predict(Linear(), features, dataset, batch_size=0)
    broken = Linear()
    nn.init.constant_(broken.weight, float("nan"))
    with pytest.raises(DataError, match="not finite"):
        predict(broken, features, dataset)


SCRIPT = """
import sys
sys.path.insert(0, {here!r})
import numpy as np
from accelerate import Accelerator
from test_predicting import Linear, split
from adaptclip.methods.predicting import predict
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2, accelerator.num_processes
for n in (1, 7, 8):
    adapter = Linear()
    judged = predict(adapter, *split(n), batch_size=2, accelerator=accelerator)
    np.savez(f"{{sys.argv[1]}}/{{n}}-{{accelerator.process_index}}.npz", probs=judged.probs, seen=sum(adapter.sizes))
accelerator.end_training()
"""


@pytest.mark.slow
def test_two_processes_lose_and_repeat_no_row(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(here=str(Path(__file__).parent)))
    env = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*command, str(script), str(tmp_path)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for n in (1, 7, 8):
        alone = predict(Linear(), *split(n))
        for rank in range(2):
            result = np.load(tmp_path / f"{n}-{rank}.npz")
            assert np.array_equal(result["probs"], alone.probs)
            assert result["seen"] == (n + 1) // 2
