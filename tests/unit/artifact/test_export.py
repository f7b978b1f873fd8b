# SPDX-License-Identifier: Apache-2.0
"""What leaves the toolkit answers as the adapter does, by stock libraries alone, or is refused and not written."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_artifacts import IMAGE_TOWERS, save, write_checkpoint
from PIL import Image
from tiny_kinds import KINDS, write_kind

from adaptclip.artifact import load
from adaptclip.artifact.export import FORMATS, classifier, export_artifact, onnx_graph, stock
from adaptclip.artifact.export.checking import check_pictures
from adaptclip.artifact.export.decoding import image_kinds
from adaptclip.clip import load_backbone
from adaptclip.data.card import load_card
from adaptclip.data.sources import open_data
from adaptclip.errors import AdaptclipError, ArtifactError, BackboneError, ConfigError, StorageError
from adaptclip.files import read_tensors, write_tensors
from adaptclip.methods.registry import methods
from adaptclip.training.thresholds import Thresholds

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "zero_shot": ("zero_shot", {"templates": ["a photo of a {}.", "the digit {}."]}),
    "coop": ("coop", {"n_ctx": 2}),
    "logistic": ("linear_probe", {"head": "logistic"}),
    "clap": ("linear_probe", {"head": "clap"}),
    "lp_plus_plus": ("linear_probe", {"head": "lp_plus_plus"}),
    "tip_adapter": ("tip_adapter", {"alpha": 2.0, "beta": 3.0, "num_keys": 30}),
    "gda": ("gda", {"alpha": 0.5}),
    "ss_text": ("ss_text", {}),
    "lora": ("lora", {"templates": ["a photo of a {}.", "the digit {}."], "rank": 3}),
    "dora": ("lora", {"dora": True, "scale": 0.5}),
    "two_stage": ("two_stage", {}),
    "layernorm": ("tower_tuning", {}),
    "clip_svd": ("clip_svd", {}),
    "prolip": ("prolip", {}),
    "wise_ft": ("wise_ft", {}),
    "maple": ("maple", {"depth": 2}),
    "prompt_src": ("prompt_src", {"depth": 2, "teacher_templates": ["a photo of the {}."]}),
    "cocoop": ("cocoop", {"n_ctx": 2, "ctx_init": ""}),
}
CASES |= {key: (key, {}) for key in sorted({*methods()} - {method for method, _ in CASES.values()})}
"""Name of a case -> method and settings; every method of methods() is among them."""


WITHOUT_HEAD = ("clip_adapter", "cocoop", "maple", "prompt_src")
"""Cases that cannot leave as a classifier, and say why."""


@pytest.fixture(scope="module")
def digits():
    return open_data(load_card("digits"), check=False)


@pytest.fixture(scope="module")
def pictures():
    return check_pictures()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, digits):
    """`artifact(case)` is a folder with that case's artifact on a small ViT, made once."""
    root = tmp_path_factory.mktemp("artifacts")
    backbone = load_backbone(f"local-dir:{write_checkpoint(root / 'vit', 'vit')}")

    def make(case: str) -> Path:
        if not (root / case).exists():
            method, settings = CASES[case]
            save(root / case, method, backbone, digits, **settings)
        return root / case

    return make


@pytest.fixture(scope="module")
def several(tmp_path_factory, digits):
    """`several(method)` is a folder with that method's artifact of the sigmoid objective, and thresholds."""
    root = tmp_path_factory.mktemp("several")
    backbone = load_backbone(f"local-dir:{write_checkpoint(root / 'vit', 'vit')}")
    chosen = Thresholds("f1", np.linspace(0, 0.1, 10), 40, np.full(10, 4))

    def make(method: str) -> Path:
        if not (root / method).exists():
            head: dict[str, Any] = {"head": "clap"} if method == "linear_probe" else {}
            save(root / method, method, backbone, digits, thresholds=chosen, objective="sigmoid", **head)
        return root / method

    return make


@pytest.mark.parametrize(
    ("method", "to"),
    [
        ("linear_probe", "classifier"),
        ("coop", "classifier"),
        ("coop", "hf"),
        ("coop", "onnx"),
        ("lora", "onnx"),
        ("lora", "open_clip"),
        ("lora", "hf"),
    ],
)
def test_classes_named_by_themselves_leave_with_bias_and_thresholds(several, tmp_path, pictures, method, to):
    if to == "onnx":
        pytest.importorskip("onnxruntime")
    found = export_artifact(several(method), to, tmp_path / "out", pictures=pictures)
    assert found.probabilities < FORMATS[to].tolerance
    model = load(several(method))
    adapter: Any = model.adapter
    assert adapter.class_bias().unique().numel() > 1
    info = json.loads((tmp_path / "out" / "classes.json").read_text())
    assert info["thresholds"] == np.linspace(0, 0.1, 10).tolist()
    assert info["objective"] == "sigmoid"
    named = set()
    for picture in (pictures[0], pictures[14]):
        answer = run_example(tmp_path / "out", picture)
        expected = model.predict([picture])[0]
        assert set(eval(answer["printed"])) == set(expected.labels)
        named.add(len(expected.labels))
        assert sum(expected.probabilities.values()) != pytest.approx(1, abs=0.01)
    assert max(named) > 1 or method == "linear_probe"
    text = (tmp_path / "out" / "README.md").read_text()
    assert "best F1 on 40 validation images, 4 of each class" in text
    assert "gives each image one of them" not in text
    if to == "onnx":
        onnx = pytest.importorskip("onnx")
        graph = {p.key: p.value for p in onnx.load(tmp_path / "out" / "model.onnx").metadata_props}
        assert json.loads(graph["thresholds"]) == info["thresholds"]


def test_a_text_encoder_of_hugging_face_is_found_beside_the_weights(tmp_path, digits, pictures):
    backbone = load_backbone(f"local-dir:{write_kind(tmp_path / 'model', KINDS['BiomedCLIP'])}")
    save(tmp_path / "artifact", "lora", backbone, digits)
    here = Path.cwd()
    found = export_artifact(tmp_path / "artifact", "open_clip", tmp_path / "out", pictures=pictures[:3])
    assert found.probabilities < 1e-5
    assert Path.cwd() == here
    assert (
        "asks for the configuration of the text encoder `text_encoder` by that name"
        in (tmp_path / "out" / "README.md").read_text()
    )
    expected = load(tmp_path / "artifact").predict([pictures[0]])[0].label
    assert run_example(tmp_path / "out", pictures[0])["printed"] == expected
    (tmp_path / "out" / "text_encoder" / "config.json").unlink()
    with pytest.raises(ArtifactError, match=r"cannot build the text encoder 'text_encoder'(.|\n)*--to classifier"):
        stock.read(tmp_path / "out")
    assert Path.cwd() == here


def test_every_method_is_either_exported_or_says_why_not():
    assert {method for method, _ in CASES.values()} == set(methods())
    assert len(CASES) - len(WITHOUT_HEAD) >= 17


def run_example(folder: Path, picture: Image.Image | bytes) -> dict[str, Any]:
    """Runs the Python block of an export's README where it stands, on an image, and returns its names."""
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "adaptclip" not in code
    assert len(code.splitlines()) <= 24
    if isinstance(picture, bytes):
        (folder / "image.png").write_bytes(picture)  # every reader goes by the bytes
    else:
        picture.save(folder / "image.png")
    names: dict[str, Any] = {}
    here = Path.cwd()
    os.chdir(folder)
    sys.path.insert(0, str(folder))  # as where a script lies
    sys.modules.pop("read_image", None)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code.replace("image.jpg", "image.png"), names)
    finally:
        os.chdir(here)
        sys.path.remove(str(folder))
    return {**names, "printed": printed.getvalue().strip()}


@pytest.mark.parametrize("case", [case for case in CASES if case not in WITHOUT_HEAD])
def test_a_classifier_is_the_same_function(artifact, tmp_path, pictures, case):
    found = export_artifact(artifact(case), "classifier", tmp_path / "out", pictures=pictures)
    assert (found.num_pictures, found.same_label) == (len(pictures), len(pictures))
    assert max(found.probabilities, found.cosines, found.features) < 1e-5
    model = load(artifact(case))
    # The head alone, on features of the live model, by the formula that the README states.
    head = read_tensors(tmp_path / "out" / classifier.HEAD_FILE)
    with torch.no_grad():
        pixels = torch.stack([model.backbone.transform(p) for p in pictures[:3]])
        features = model.adapter.encoder.encode_image(pixels)
        logits = features @ head["weight"].T + head["bias"]
        if "keys" in head:
            near = (features[:, None] - head["keys"]).square().sum(-1) / 2  # 1 - cosine where both are unit norm
            if case == "tip_adapter" and torch.allclose(head["keys"].norm(dim=1), torch.ones(30)):
                logits = logits + torch.exp(-head["sharpness"] * near) @ head["votes"]
    torch.testing.assert_close(logits.softmax(1), model.probabilities(pictures[:3]), atol=1e-5, rtol=0)
    answer = run_example(tmp_path / "out", pictures[3])
    expected = model.predict([pictures[3]])[0]
    assert answer["printed"] == expected.label
    assert float(answer["logits"].softmax(1).max()) == pytest.approx(expected.confidence, abs=1e-5)


@pytest.mark.parametrize("case", ["zero_shot", "lora", "dora"])
def test_a_stock_checkpoint_is_the_same_function(artifact, tmp_path, pictures, case):
    found = export_artifact(artifact(case), "open_clip", tmp_path / "out", pictures=pictures)
    assert max(found.probabilities, found.cosines, found.features) < 1e-5
    answer = run_example(tmp_path / "out", pictures[0])
    expected = load(artifact(case)).predict([pictures[0]])[0]
    assert answer["printed"] == expected.label
    assert float(answer["logits"].softmax(1).max()) == pytest.approx(expected.confidence, abs=1e-5)
    # It is a backbone as any other, and what was learnt is in it.
    tuned = load_backbone(f"local-dir:{tmp_path / 'out'}")
    assert (tuned.digest == load(artifact(case)).backbone.digest) == (case == "zero_shot")


@pytest.mark.parametrize("case", ["lora", "tip_adapter", "logistic", "maple"])
def test_a_graph_is_the_same_function(artifact, tmp_path, pictures, case):
    onnx = pytest.importorskip("onnx")
    found = export_artifact(artifact(case), "onnx", tmp_path / "out", pictures=pictures)
    assert max(found.probabilities, found.cosines, found.features) < 1e-4
    model = load(artifact(case))
    answer = run_example(tmp_path / "out", pictures[13])  # not square
    expected = model.predict([pictures[13]])[0]
    assert answer["printed"] == expected.label
    assert float(answer["probabilities"].max()) == pytest.approx(expected.confidence, abs=1e-4)
    info = {p.key: p.value for p in onnx.load(tmp_path / "out" / "model.onnx").metadata_props}
    assert json.loads(info["class_names"]) == list(model.class_names)
    assert json.loads(info["preprocessing"])["mean"] == model.backbone.transform_spec["mean"]


@pytest.mark.parametrize("kind", [kind for kind in IMAGE_TOWERS if kind != "vit"])
def test_every_kind_of_image_tower_becomes_a_graph_and_a_classifier(tmp_path, digits, pictures, kind):
    pytest.importorskip("onnxruntime")
    backbone = load_backbone(f"local-dir:{write_checkpoint(tmp_path / kind, kind)}")
    save(tmp_path / "artifact", "zero_shot", backbone, digits)
    # The batches are of 1, 2 and 3 images: none of the sizes is baked in.
    for to in ("onnx", "classifier") if kind in ("coca", "resnet", "convnext") else ("onnx",):
        found = export_artifact(tmp_path / "artifact", to, tmp_path / to, pictures=pictures[10:16])
        assert found.num_pictures == 6
        assert max(found.probabilities, found.features) < FORMATS[to].tolerance


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
def test_pixels_without_torch_are_those_of_the_transform(tmp_path, pictures, mode):
    backbone = load_backbone(f"local-dir:{write_checkpoint(tmp_path / mode, 'vit', resize_mode=mode)}")
    spec = json.loads(json.dumps(backbone.transform_spec))
    for picture in pictures:
        own = onnx_graph.preprocess(picture, spec)
        np.testing.assert_allclose(own, backbone.transform(picture).numpy(), atol=1e-6, rtol=0)


def test_a_folder_for_the_hub(artifact, tmp_path, pictures):
    from huggingface_hub import ModelCard

    for case, kind in (("lora", "open_clip"), ("gda", "classifier")):
        out = tmp_path / case
        export_artifact(artifact(case), "hf", out, pictures=pictures, licence="apache-2.0")
        card = ModelCard.load(out / "README.md")
        data = card.data.to_dict()
        assert (data["license"], data["library_name"]) == ("apache-2.0", "open_clip")
        assert data["model-index"][0]["results"][0]["metrics"][0]["value"] == 1.0
        assert "## Results on the test split" in card.text
        assert (
            card.text.count("\n## How to use it without adaptclip\n") == card.text.count("\n## How to load it\n") == 1
        )
        assert (out / classifier.HEAD_FILE).exists() == (kind == "classifier")
        expected = load(artifact(case)).probabilities(pictures[:4])
        assert torch.equal(load(out).probabilities(pictures[:4]), expected)
        assert run_example(out, pictures[0])["printed"] == load(out).predict([pictures[0]])[0].label


@pytest.mark.parametrize(
    ("case", "to", "message"),
    [
        ("cocoop", "classifier", "made anew for every image"),
        ("cocoop", "onnx", "made anew for every image"),
        ("cocoop", "hf", "made anew for every image"),
        ("clip_adapter", "classifier", "pass through a network of its own"),
        ("maple", "classifier", "carries prompts in its blocks"),
        ("maple", "open_clip", "leaves as `--to onnx` alone"),
        ("maple", "hf", "carries prompts in its blocks"),
        ("prompt_src", "classifier", "carries prompts in its blocks"),
        ("coop", "open_clip", r"head on image features, not a CLIP(.|\n)*--to classifier"),
        ("two_stage", "open_clip", r"not a CLIP(.|\n)*is for .*\blora, .*zero_shot\."),
    ],
)
def test_what_cannot_leave_is_refused_and_nothing_is_left(artifact, tmp_path, case, to, message):
    with pytest.raises(ArtifactError, match=message):
        export_artifact(artifact(case), to, tmp_path / "out" / "deep")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("window", [None, (0, 4095), (100, 3000)])
@pytest.mark.parametrize("to", ["classifier", "onnx"])
def test_every_kind_of_image_gets_the_label_that_predict_gives(digits, tmp_path, window, to):
    if to == "onnx":
        pytest.importorskip("onnxruntime")
    folder = tmp_path / "artifact"
    backbone = load_backbone(f"local-dir:{write_checkpoint(tmp_path / 'vit', 'vit')}")
    data = dataclasses.replace(digits, card=digits.card.model_copy(update={"window": window}))
    save(folder, "linear_probe", backbone, data, head="clap")
    export_artifact(folder, to, tmp_path / "out")
    model, kinds = load(folder), image_kinds((0, 4095))
    info = json.loads((tmp_path / "out" / "check.json").read_text())["kinds_decoded_alike"]
    deep = [kind for kind in kinds if "16-bit" in kind or "12-bit" in kind or kind == "float"]
    assert len(kinds) >= 15
    assert len(deep) == 6
    assert set(kinds) - set(info) == (set(deep) if window is None else set())
    for kind, content in kinds.items():
        if kind not in info:
            with pytest.raises(ValueError, match="nothing says which are black and white"):
                run_example(tmp_path / "out", content)
            continue
        expected = model.predict([content])[0]
        answer = run_example(tmp_path / "out", content)
        assert answer["printed"] == expected.label, kind
        found = answer["probabilities"] if to == "onnx" else answer["logits"].softmax(1)
        assert float(found.max()) == pytest.approx(expected.confidence, abs=1e-4), kind


def test_an_export_that_decodes_otherwise_is_not_kept(artifact, tmp_path, monkeypatch):
    def plain(folder, model):
        classifier.write(folder, model)
        code = "import io\nfrom PIL import Image\n\n\ndef read_image(data):\n"
        (folder / "read_image.py").write_text(code + "    return Image.open(io.BytesIO(data)).convert('RGB')\n")

    monkeypatch.setitem(FORMATS, "classifier", FORMATS["classifier"].__class__(plain, classifier.read, 1e-5))
    with pytest.raises(ArtifactError, match=r"decodes an image of the kind .* otherwise"):
        export_artifact(artifact("clap"), "classifier", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_export_is_not_kept(artifact, tmp_path, pictures, monkeypatch):
    def slightly_off(folder, model):
        classifier.write(folder, model)
        head = read_tensors(folder / classifier.HEAD_FILE)
        write_tensors(folder / classifier.HEAD_FILE, {**head, "bias": head["bias"] + 0.1 * torch.arange(10)})

    monkeypatch.setitem(FORMATS, "classifier", FORMATS["classifier"].__class__(slightly_off, classifier.read, 1e-5))
    with pytest.raises(ArtifactError, match=r"does not answer as the adapter does.*allowed is 1e-05"):
        export_artifact(artifact("clap"), "classifier", tmp_path / "out", pictures=pictures)

    def not_a_number(folder, model):
        stock.write(folder, model)
        weights = read_tensors(folder / "open_clip_model.safetensors")
        weights["visual.ln_post.weight"] = torch.full_like(weights["visual.ln_post.weight"], float("nan"))
        write_tensors(folder / "open_clip_model.safetensors", weights)

    monkeypatch.setitem(FORMATS, "open_clip", FORMATS["open_clip"].__class__(not_a_number, stock.read, 1e-5))
    with pytest.raises(ArtifactError, match=r"does not answer.*inf"):
        export_artifact(artifact("lora"), "open_clip", tmp_path / "out", pictures=pictures)
    assert list(tmp_path.iterdir()) == []


def printed_or_raised(folder: Path, picture: Image.Image) -> str:
    """What an export's example prints, or why it ends."""
    try:
        return run_example(folder, picture)["printed"]
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    ("case", "to"), [("gda", "classifier"), ("lora", "open_clip"), ("gda", "onnx"), ("lora", "hf")]
)
def test_an_export_that_changed_is_not_loaded(artifact, tmp_path, pictures, case, to):
    if to == "onnx":
        pytest.importorskip("onnxruntime")
    out = tmp_path / "out"
    export_artifact(artifact(case), to, out, pictures=pictures[:2])
    files = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    info = json.loads((out / "check.json").read_text())["files"]
    assert set(info) == set(files) - {"check.json"}
    assert not [name for name in files if "pycache" in name]  # Python writes those anew after a copy
    assert all(info[name]["sha256"] == hashlib.sha256(files[name]).hexdigest() for name in info)
    answer = printed_or_raised(out, pictures[0])
    assert answer == load(artifact(case)).predict([pictures[0]])[0].label
    draw = np.random.default_rng(0)
    for name, content in files.items():
        if name in ("README.md", "check.json"):
            continue
        for damaged in (*(flipped(content, draw) for _ in range(4)), content[:-1], b""):
            (out / name).write_bytes(damaged)
            assert printed_or_raised(out, pictures[0]) == f"SystemExit: {name} is damaged"
            if to != "onnx":
                with pytest.raises(BackboneError, match=f"{re.escape(name)} is missing or changed"):
                    load_backbone(f"local-dir:{out}")
        (out / name).write_bytes(content)
    (out / "README.md").write_bytes(files["README.md"] + b"Edited before it was uploaded.\n")
    assert printed_or_raised(out, pictures[0]) == answer
    (out / "check.json").write_bytes(files["check.json"].replace(b'"sha256": "', b'"sha256": "0'))
    assert printed_or_raised(out, pictures[0]).endswith("is damaged")
    if to != "onnx":
        with pytest.raises(BackboneError, match=r"check\.json was changed after it was written"):
            load_backbone(f"local-dir:{out}")


def flipped(content: bytes, draw: np.random.Generator) -> bytes:
    """The same bytes but for one bit."""
    damaged = bytearray(content)
    damaged[draw.integers(len(content))] ^= 1 << int(draw.integers(8))
    return bytes(damaged)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f, s: (f / "README.md").symlink_to(s), "README.md is a link that leaves the folder"),
        (lambda f, s: (f / "README.md").symlink_to(s.parent), "README.md is a link that leaves the folder"),
        (lambda f, s: (f / "README.md").symlink_to("nothing"), "README.md is missing"),
        (lambda f, s: os.mkfifo(f / "README.md"), "README.md is a device, pipe or socket"),
        (lambda f, s: (f / "README.md").mkdir(), "README.md is a folder"),
        (lambda f, s: ((f / "README.md").touch(), os.truncate(f / "README.md", 2**40)), "README.md has 1,099,5"),
        (lambda f, s: (f / "README.md").write_bytes(b"\xff\xfe"), "is not UTF-8"),
        (lambda f, s: (f / "README.md").write_text("---\nmodel-index: 3\n---\n"), "README.md is not a model card"),
        (lambda f, s: (f / "README.md").write_text("---\na: 1\na: 2\n---\n"), "a"),
    ],
)
def test_nothing_of_a_strangers_artifact_is_copied_from_elsewhere(artifact, tmp_path, pictures, change, message):
    stranger = shutil.copytree(artifact("gda"), tmp_path / "stranger")
    (tmp_path / "secret").write_text("---\nlicense: mit\n---\n\nsecret\n")
    (stranger / "README.md").unlink()
    change(stranger, tmp_path / "secret")
    with pytest.raises(AdaptclipError, match=message):
        export_artifact(stranger, "hf", tmp_path / "out", pictures=pictures[:1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret", "stranger"]


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "open_clip_model.safetensors", "open_clip_config.json", "notes.txt"]
)
def test_no_file_of_a_bundle_is_followed_out_of_it(artifact, tmp_path, pictures, name):
    bundle = write_checkpoint(tmp_path / "bundle", "vit")
    assert load_backbone(f"local-dir:{bundle}").digest
    outside = tmp_path / "outside"
    (bundle / name).rename(outside) if (bundle / name).exists() else outside.write_text("{}")
    (bundle / name).symlink_to(outside)
    with pytest.raises(BackboneError, match=f"{re.escape(name)} is a link that leaves the folder"):
        load_backbone(f"local-dir:{bundle}")


def test_bad_requests(artifact, tmp_path, digits):
    with pytest.raises(ConfigError, match='Did you mean "onnx"'):
        export_artifact(artifact("coop"), "onxx", tmp_path / "out")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="got none"):
        export_artifact(artifact("coop"), "classifier", tmp_path / "out", pictures=[])
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "thesis.txt").touch()
    with pytest.raises(StorageError, match="exists already"):
        export_artifact(artifact("coop"), "classifier", tmp_path / "there")
    with pytest.raises(ArtifactError, match="not an artifact"):
        export_artifact(tmp_path / "there", "classifier", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_a_failed_gate_stays_inside_unless_asked_for(tmp_path, digits, pictures):
    backbone = load_backbone(f"local-dir:{write_checkpoint(tmp_path / 'vit', 'vit')}")
    save(tmp_path / "failed", "zero_shot", backbone, digits, max_ece=0.01)
    with pytest.raises(ArtifactError, match="failed 1 of 1 gates"):
        export_artifact(tmp_path / "failed", "classifier", tmp_path / "out")
    export_artifact(tmp_path / "failed", "classifier", tmp_path / "out", pictures=pictures, allow_failed_gates=True)
    assert "It failed the gates: ece" in (tmp_path / "out" / "README.md").read_text()


def test_the_command(artifact, tmp_path, pictures, capsys):
    from adaptclip.cli import main

    (tmp_path / "images").mkdir()
    for i, picture in enumerate(pictures[:4]):
        picture.save(tmp_path / "images" / f"{i}.png")
    arguments = ["export", str(artifact("gda")), "--to", "hf", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--images", str(tmp_path / "images")])
    printed = capsys.readouterr()
    assert stop.value.code == 0, printed.err
    assert "on 4 images: probabilities" in printed.out
    assert "names no licence" in printed.out
    with pytest.raises(SystemExit) as stop:
        main(["export", str(artifact("coop")), "--to", "open_clip", "--out", str(tmp_path / "other")])
    assert stop.value.code == 1
    assert "--to classifier" in capsys.readouterr().err
