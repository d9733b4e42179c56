"""Frames and texts get the embeddings that open_clip's own models give them, from tiny checkpoints at random."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tokenmill.pipeline.relevance import FrameEncoder
from tokenmill.schemas.errors import RecipeError, TokenizerError
from tokenmill.schemas.relevance import STANDARDIZED
from tokenmill.tokenizers.open_clip_encoder import OpenClipEncoder

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
CONFIG = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": TEXT,
}
MOBILE = {"mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "bilinear", "resize_mode": "shortest"}
SIGLIP = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}


def frames(height: int = 48, width: int = 60) -> np.ndarray:
    """Pictures of smooth random colours."""
    coarse = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 6, 7)).astype(np.float32))
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")
    return smooth.permute(0, 2, 3, 1).clamp(0, 255).to(torch.uint8).numpy()


@pytest.fixture(scope="module")
def open_clip() -> Any:
    return pytest.importorskip(
        "open_clip", reason="needs open_clip: pip install 'tokenmill[open_clip]'", exc_type=ImportError
    )


def save(open_clip: Any, folder: Path, preprocess: dict[str, Any], **config: Any) -> Any:
    """A model of open_clip at random, and its folder as open_clip publishes them."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    settings = copy.deepcopy(CONFIG | config)  # which open_clip changes
    model = open_clip.CLIP(**copy.deepcopy(settings)).eval().requires_grad_(False)
    for value in model.parameters():
        value.add_(torch.randn_like(value) * 0.1)
    folder.mkdir()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings, "preprocess_cfg": preprocess}))
    return model


def load(weights: Path, dtype: str = "float32", **options: Any) -> OpenClipEncoder:
    return OpenClipEncoder(str(weights), "cpu", dtype, options)


def unit(rows: torch.Tensor) -> np.ndarray:
    return (rows / rows.norm(dim=-1, keepdim=True)).detach().numpy()


def plain_pixels(preprocess: dict[str, Any]) -> torch.Tensor:
    """What open_clip's settings make of the frames, written down anew on PIL."""
    made = []
    for one in frames():
        if preprocess["resize_mode"] == "shortest":  # 48x60 to 32x40, of which the middle 32 are seen
            seen = np.asarray(Image.fromarray(one).resize((40, 32), Image.Resampling.BILINEAR))[:, 4:36]
        else:
            seen = np.asarray(Image.fromarray(one).resize((32, 32), Image.Resampling.BICUBIC))
        made.append((seen / 255.0 - preprocess["mean"]) / preprocess["std"])
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).float()


@pytest.mark.parametrize("preprocess", [MOBILE, SIGLIP], ids=["mobile", "siglip"])
def test_embeddings_are_those_of_the_model(open_clip: Any, tmp_path: Path, preprocess: dict[str, Any]) -> None:
    model = save(open_clip, tmp_path / "model", preprocess)
    encoder = load(tmp_path / "model")
    assert isinstance(encoder, FrameEncoder)
    found, wanted = encoder.embed_frames(frames()), unit(model.encode_image(plain_pixels(preprocess)))
    assert (found.dtype, found.shape) == (np.float32, (3, encoder.spec.dim)) == (np.float32, (3, 12))
    np.testing.assert_allclose(found, wanted, atol=2e-3)
    assert np.abs(wanted[0] - wanted[1]).max() > 0.03
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    texts = ["A red square", "dog", "word " * 40]
    ids = open_clip.SimpleTokenizer(context_length=16)(texts)
    np.testing.assert_allclose(encoder.embed_texts(texts), unit(model.encode_text(ids)), atol=1e-6)
    assert encoder.embed_texts([]).shape == (0, 12)


def test_models_with_a_bias_give_probabilities(open_clip: Any, tmp_path: Path) -> None:
    model = save(open_clip, tmp_path / "siglip", SIGLIP, init_logit_bias=-10, init_logit_scale=2.0)
    calibration = load(tmp_path / "siglip").spec.calibration
    assert calibration.rule == "sigmoid"
    assert calibration.scale == pytest.approx(float(model.logit_scale.exp()))
    assert calibration.bias == pytest.approx(float(model.logit_bias))
    model = save(open_clip, tmp_path / "clip", MOBILE)
    spec = load(tmp_path / "clip").spec
    assert spec.calibration == STANDARDIZED
    assert spec.options["logit_scale"] == pytest.approx(float(model.logit_scale))


def test_specs_say_what_decides_embeddings(open_clip: Any, tmp_path: Path) -> None:
    save(open_clip, tmp_path / "a", MOBILE)
    save(open_clip, tmp_path / "b", SIGLIP)
    one, other = load(tmp_path / "a").spec, load(tmp_path / "b").spec
    assert (one.name, one.dim, one.takes_texts) == ("open_clip", 12, True)
    assert one.weights_sha256 != other.weights_sha256
    assert (one.options["size"], one.options["crop"], one.options["resample"]) == (32, [32, 32], "bilinear")
    assert (other.options["size"], other.options["crop"], other.options["resample"]) == ([32, 32], None, "bicubic")
    half = load(tmp_path / "a", "bfloat16")
    assert half.spec.options == one.options | {"dtype": "bfloat16"}
    exact = load(tmp_path / "a")
    np.testing.assert_allclose(half.embed_frames(frames()), exact.embed_frames(frames()), atol=0.05)
    np.testing.assert_allclose(half.embed_texts(["dog"]), exact.embed_texts(["dog"]), atol=0.05)


@pytest.fixture
def known(open_clip: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A checkpoint file of an architecture called Tiny, which open_clip is told of."""
    save(open_clip, tmp_path / "model", MOBILE)
    (tmp_path / "Tiny.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(tmp_path / "Tiny.json")
    published = {"one": MOBILE, "other": MOBILE | {"url": "elsewhere"}}
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda name: list(published))
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: published[tag])
    return tmp_path / "model" / "open_clip_model.safetensors"


def test_a_file_is_prepared_for_as_published_weights_are(known: Path) -> None:
    encoder, folder = load(known, model="Tiny"), load(known.parent)
    assert np.array_equal(encoder.embed_frames(frames()), folder.embed_frames(frames()))
    assert encoder.spec.options == folder.spec.options | {"model": "Tiny"}
    with pytest.raises(
        TokenizerError, match=r"options.tag: Tiny has no 'on' \(did you mean 'one'\?\): accepted are one,"
    ):
        load(known, model="Tiny", tag="on")


def test_a_file_of_a_model_that_is_prepared_for_in_several_ways_needs_a_tag(
    open_clip: Any, known: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: {"one": MOBILE, "other": SIGLIP}[tag])
    with pytest.raises(
        TokenizerError, match=r"open_clip Tiny: frames are prepared differently .* options.tag .* one, other"
    ):
        load(known, model="Tiny")
    assert load(known, model="Tiny", tag="one").spec.options["resample"] == "bilinear"
    assert load(known, model="Tiny", tag="other").spec.options["resample"] == "bicubic"


def test_published_weights_of_mobileclip_are_prepared_for_in_one_way(open_clip: Any) -> None:
    from tokenmill.tokenizers.open_clip_encoder import OpenClipOptions, _published

    found = _published(OpenClipOptions(model="MobileCLIP-S1"))
    assert found == {key: tuple(value) if isinstance(value, list) else value for key, value in MOBILE.items()}


def test_what_cannot_be_loaded_is_refused(open_clip: Any, known: Path, tmp_path: Path) -> None:
    with pytest.raises(
        TokenizerError, match=r"set options.model to open_clip's name of it, found None: accepted are Mob"
    ):
        load(known)
    with pytest.raises(TokenizerError, match=r"found 'MobileCLIP-S' \(did you mean 'MobileCLIP-S[12]'\?\)"):
        load(known, model="MobileCLIP-S")
    with pytest.raises(TokenizerError, match="a folder says itself what it holds: remove options"):
        load(known.parent, model="Tiny")
    with pytest.raises(TokenizerError, match=r"open_clip does not load them as RN50 .*: name the model"):
        load(known, model="RN50", tag="one")
    (known.parent / "open_clip_config.json").rename(known.parent / "config.json")
    with pytest.raises(TokenizerError, match=r"there is no open_clip_config.json in it: give a folder that has one"):
        load(known.parent)
    save(open_clip, tmp_path / "long", MOBILE | {"resize_mode": "longest"})
    with pytest.raises(
        TokenizerError, match="frames would be resized by longest, bilinear: known here are shortest and"
    ):
        load(tmp_path / "long")
    (tmp_path / "long" / "open_clip_model.safetensors").unlink()
    with pytest.raises(TokenizerError, match=r"open_clip does not load them as local-dir"):
        load(tmp_path / "long")
    save(open_clip, tmp_path / "words", MOBILE, text_cfg=TEXT | {"hf_tokenizer_name": "absent"})
    with pytest.raises(TokenizerError, match=r"no tokenizer of texts .*: give a folder that has tokenizer.json"):
        load(tmp_path / "words")


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(TokenizerError, match=r"open_clip is not here, .*: pip install 'tokenmill\[open_clip\]'"):
        load(tmp_path)
    with pytest.raises(RecipeError, match=r"options.models: unknown key \(did you mean 'model'\?\)"):
        load(tmp_path, models="RN50")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_embeddings(open_clip: Any, tmp_path: Path) -> None:
    save(open_clip, tmp_path / "model", MOBILE)
    here, there = load(tmp_path / "model"), OpenClipEncoder(str(tmp_path / "model"), "cuda", "float32", {})
    np.testing.assert_allclose(there.embed_frames(frames()), here.embed_frames(frames()), atol=1e-3)
    np.testing.assert_allclose(there.embed_texts(["dog"]), here.embed_texts(["dog"]), atol=1e-3)
    assert there.spec == here.spec
