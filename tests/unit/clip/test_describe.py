# SPDX-License-Identifier: Apache-2.0
"""What `adaptclip inspect` says of a model, against the model's own configuration and tensors."""

from __future__ import annotations

import json

import pytest
from tiny_clip import write_tiny_checkpoint
from tiny_kinds import KINDS, PREPROCESS, make_kind

from adaptclip.cli import main
from adaptclip.cli.inspect import describe_backbone
from adaptclip.methods import CoOp, LoRA
from adaptclip.methods.registry import methods, methods_for

# A FastViT has 4 stages of one block here, and 3 reductions between them.
EXPECTED = {
    "ViT-B-16": ("open_clip VisionTransformer", 2, 32, "shared prefix"),
    "ViT-B-16-SigLIP": ("timm VisionTransformer", 2, 48, "whole context"),
    "coca_ViT-B-32": ("open_clip VisionTransformer", 2, 32, "class token"),
    "BiomedCLIP": ("timm VisionTransformer", 2, 48, "longest prompt"),
    "MobileCLIP-S1": ("timm FastVit", 7, None, "whole context"),
    "RN50": ("open_clip ModifiedResNet", 4, None, "shared prefix"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_towers_and_transform(name):
    backbone = make_kind(name)
    about = describe_backbone(backbone)
    kind, blocks, width, prompts = EXPECTED[name]
    assert (about["image"]["kind"], about["image"]["blocks"], about["image"]["width"]) == (kind, blocks, width)
    assert (about["text"]["blocks"], about["text"]["width"]) == (2, 32)
    assert prompts in about["text"]["prompts"]
    assert about["transform"]["mean"] == PREPROCESS["mean"]
    assert about["transform"]["interpolation"] == "bilinear"
    assert about["objective"] == ("sigmoid" if "SigLIP" in name else "softmax")
    assert about["image"]["image_size"] == KINDS[name].image["image_size"]
    decoder = sum(p.numel() for n, p in backbone.model.named_parameters() if n.startswith("text_decoder."))
    scales = sum(p.numel() for n, p in backbone.model.named_parameters() if n.startswith("logit_"))
    towers = about["image"]["parameters"] + about["text"]["parameters"]
    assert towers + decoder + scales == sum(p.numel() for p in backbone.model.parameters())
    json.dumps(about, allow_nan=False)


def test_methods_and_their_parameters():
    backbone = make_kind("ViT-B-16")
    found = {method.method: method for method in methods_for(backbone, num_classes=7)}
    assert set(found) == {*methods(), "contrastive"}
    assert all(method.applies and not method.reason for method in found.values())
    assert found["coop"].learnt == found["coop"].stored == 16 * 32 == CoOp(backbone, ["a"]).context.numel()
    # Rank 2 on q, k, v of two blocks in each tower, all of width 32.
    assert found["lora"].learnt == 2 * 2 * 3 * 2 * (32 + 32)
    assert (found["zero_shot"].learnt, found["zero_shot"].stored) == (0, 7 * 96)
    # The first stage and the head: 2 LayerNorms of width 32 in each of 2 x 2 blocks, 3 beside, weight and bias of each.
    assert found["two_stage"].learnt == (2 * 2 * 2 + 3) * 2 * 32 + 7 * 96
    assert found["lora"].consumes == "pixels" == LoRA(backbone, ["a"]).consumes
    learns_from = {name: method.learns_from for name, method in found.items()}
    assert learns_from["zero_shot"] == "nothing"
    assert learns_from["coop"] == learns_from["gda"] == "features"
    assert learns_from["two_stage"] == learns_from["lora"] == learns_from["contrastive"] == "images"
    assert next(iter(found)) == "zero_shot"  # cheap before dear
    assert list(found).index("gda") < list(found).index("coop") < list(found).index("lora")


def test_a_method_that_does_not_apply_says_why():
    backbone = make_kind("BiomedCLIP")
    backbone.model.text.config.pad_token_id = 4
    found = {method.method: method for method in methods_for(backbone, num_classes=3)}
    for name in ("coop", "cocoop", "lora"):
        assert not found[name].applies
        assert "hides the token 4" in found[name].reason
        assert found[name].learnt is found[name].stored is None
    assert found["zero_shot"].applies
    assert "hides the token 4" in describe_backbone(backbone)["text"]["prompts"]


def test_the_command(tmp_path, capsys):
    folder = write_tiny_checkpoint(tmp_path / "tiny")
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(folder), "--json", "--classes", "3"])
    assert stop.value.code == 0
    info = json.loads(capsys.readouterr().out)
    assert info["classes"] == 3
    assert {m["method"] for m in info["methods"]} == {*methods(), "contrastive"}
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(folder)])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert out.index("transform") < out.index("tower") < out.index("methods that apply") < out.index("zero_shot")
    for word in ("image", "text", "parameters", "logit scale", "shared prefix", "coop", "contrastive"):
        assert word in out
    with pytest.raises(SystemExit) as stop:
        main(["inspect", "ViT-B16"])
    assert stop.value.code == 1
