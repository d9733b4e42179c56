"""Single frames and texts get the embeddings of TrajViT2 as clips do."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tokenmill.pipeline.relevance import FrameEncoder
from tokenmill.schemas.errors import RecipeError, TokenizerError
from tokenmill.tokenizers import trajtok, trajtok_model, trajtok_towers
from tokenmill.tokenizers.base import Settings
from tokenmill.tokenizers.trajtok_frames import TrajTokFrames
from tokenmill.tokenizers.trajtok_text import TextTokenizer, embed_texts
from tokenmill.tokenizers.trajtok_towers import SegmentClip

from .trajtok_kit import TINY, clip, filled, normalized

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = replace(TINY, vit_layers=1)
Load = Callable[..., TrajTokFrames]


@pytest.fixture(scope="module")
def model() -> Iterator[SegmentClip]:
    """The whole model, tiny, with a text tower of one layer, of frames of half the sides."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trajtok_model, "IMAGE_SIDE", 112)
        patch.setattr("tokenmill.tokenizers.trajtok_frames.IMAGE_SIDE", 112)
        patch.setattr("tokenmill.tokenizers.trajtok_segmenter.IMAGE_SIDE", 112)
        for module in (trajtok, trajtok_towers):
            patch.setattr(module, "TEXT_LAYERS", 1)
        with torch.device("meta"):
            made = SegmentClip(SIZES).eval()
        made = filled(made, "").requires_grad_(False)
        assert isinstance(made, SegmentClip)
        yield made


@pytest.fixture(scope="module")
def weights(model: SegmentClip, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    more = {"text_encoder.embeddings.position_ids": torch.arange(512)[None]}
    torch.save({"model": model.state_dict() | more}, path)
    return str(path)


@pytest.fixture
def vocab(tmp_path: Path) -> str:
    (tmp_path / "vocab.txt").write_text("\n".join("[PAD] [UNK] [CLS] [SEP] a man plays the guitar".split()) + "\n")
    return str(tmp_path / "vocab.txt")


@pytest.fixture
def load(weights: str) -> Load:
    """load(dtype=.., option=..): the encoder with those weights."""

    def encoder(*, dtype: str = "float32", **options: Any) -> TrajTokFrames:
        settings = {"grid": SIZES.grid, "vit_heads": SIZES.vit_heads} | options
        return TrajTokFrames(Settings(weights=weights, dtype=dtype, options=settings))

    return encoder


def test_a_frame_has_the_embedding_of_a_clip_of_one_frame(load: Load, model: SegmentClip) -> None:
    encoder, frames = load(), clip(3, 112, 0)
    found = encoder.embed_frames(frames.numpy())
    rows = torch.cat([model.vision_encoder(normalized(frame.unsqueeze(0)))[0] for frame in frames])
    assert isinstance(encoder, FrameEncoder)
    assert (found.dtype, found.shape) == (np.float32, (3, encoder.spec.dim)) == (np.float32, (3, 256))
    np.testing.assert_allclose(found, model.embed_rows(rows).numpy(), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert np.abs(found[0] - found[2]).max() > 1e-3
    assert encoder.embed_frames(frames[:0].numpy()).shape == (0, 256)


def test_frames_of_any_size_are_squashed(load: Load) -> None:
    encoder, frames = load(), clip(2, 112, 0).numpy()
    wide = frames.repeat(2, axis=1).repeat(3, axis=2)
    assert ((encoder.embed_frames(wide) * encoder.embed_frames(frames)).sum(1) > 0.99).all()


def test_texts_have_the_embeddings_of_the_text_tower(load: Load, model: SegmentClip, vocab: str) -> None:
    encoder, texts = load(vocab=vocab), ["A man plays.", "the guitar"]
    found = encoder.embed_texts(texts)
    np.testing.assert_allclose(found, embed_texts(model, TextTokenizer(vocab), texts).numpy(), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert encoder.spec.takes_texts
    assert encoder.embed_texts([]).shape == (0, 256)


def test_without_a_vocabulary_frames_alone_are_compared(load: Load) -> None:
    encoder = load()
    assert not encoder.spec.takes_texts
    with pytest.raises(
        TokenizerError, match=r"trajtok/trajvit2 takes no texts .*: set options.vocab to the path or URL"
    ):
        encoder.embed_texts(["a man"])


def test_specs_say_what_decides_embeddings(load: Load, vocab: str, model: SegmentClip, tmp_path: Path) -> None:
    spec = load(vocab=vocab).spec
    assert spec.name == "trajtok/trajvit2"
    assert spec.options == {
        "grid": 14, "vit_heads": 4, "mask_mode": "official_sdpa", "add_mean_traj": False, "attend_other_latents": False,
        "vocab_sha256": TextTokenizer(vocab).sha256,
    }  # fmt: skip
    assert json.dumps(spec.options)
    other = model.state_dict() | {"vision_proj.bias": model.vision_proj.bias + 1}
    torch.save({"model": other}, tmp_path / "other.pth")
    options = {"grid": SIZES.grid, "vit_heads": SIZES.vit_heads}
    changed = TrajTokFrames(Settings(weights=str(tmp_path / "other.pth"), options=options))
    assert changed.spec.weights_sha256 != spec.weights_sha256
    assert "vocab_sha256" not in changed.spec.options


def test_options_and_number_types_count(load: Load, vocab: str) -> None:
    frames, exact = clip(2, 112, 1).numpy(), load(vocab=vocab)
    half, masked = load(vocab=vocab, dtype="bfloat16"), load(mask_mode="masked")
    assert half.spec.options["dtype"] == "bfloat16"
    assert ((half.embed_frames(frames) * exact.embed_frames(frames)).sum(1) > 0.98).all()
    texts = ["a man", "the guitar"]
    assert ((half.embed_texts(texts) * exact.embed_texts(texts)).sum(1) > 0.98).all()
    assert half.embed_texts(texts).dtype == np.float32
    assert np.abs(masked.embed_frames(frames) - exact.embed_frames(frames)).max() > 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"level": 1},
            r"options.level: unknown key.*accepted are add_mean_traj, attend_other_latents, grid, mask_mode",
        ),
        ({"vit_heads": 3}, "64 channels of weights .* are no multiple of options.vit_heads=3"),
        ({"vocab": "/absent/vocab.txt"}, "/absent/vocab.txt: it does not exist"),
    ],
)
def test_what_it_does_not_take_is_refused(load: Load, options: dict[str, Any], message: str) -> None:
    with pytest.raises((RecipeError, TokenizerError), match=message):
        load(**options)


def test_frames_and_values_that_cannot_be_are_refused(load: Load, model: SegmentClip, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"trajtok/trajvit2 encodes uint8 RGB frames .*found torch.float32"):
        load().embed_frames(np.zeros((1, 112, 112, 3), np.float32))
    with pytest.raises(TokenizerError, match="trajtok/trajvit2 needs its weights"):
        TrajTokFrames(Settings())
    broken = model.state_dict() | {"vision_proj.bias": torch.full((256,), float("nan"))}
    torch.save({"model": broken}, tmp_path / "broken.pth")
    options = {"grid": SIZES.grid, "vit_heads": SIZES.vit_heads}
    encoder = TrajTokFrames(Settings(weights=str(tmp_path / "broken.pth"), options=options))
    with pytest.raises(TokenizerError, match="trajtok/trajvit2: the networks gave values that are not finite"):
        encoder.embed_frames(clip(1, 112, 0).numpy())
