"""The scorer finds what a text says in the bits of the first level, from frames or from stored codes alike."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tokenmill.pipeline.relevance import FrameEncoder, best_span, relevance, smoothed
from tokenmill.schemas.errors import TokenizerError
from tokenmill.tokenizers.pyratok_pyramid import Pyramid, PyramidSizes, build_pyramid, save_pyramid
from tokenmill.tokenizers.pyratok_scorer import PyraTokScorer
from tokenmill.tokenizers.pyratok_vae import VaeSizes

from .pyratok_kit import filled

SIZES = VaeSizes(base_dim=4, z_dim=16, dim_mult=(1, 2, 2), num_res_blocks=1, temperal_downsample=(True, True))
Load = Callable[..., tuple[Pyramid, PyraTokScorer]]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """load(native_grid=..., knows=frames): a pyramid whose text projection names the bits of these frames, if given."""

    def loaded(
        *, native_grid: bool = True, knows: np.ndarray | None = None, text_width: int | None = 32
    ) -> tuple[Pyramid, PyraTokScorer]:
        sizes = PyramidSizes(native_grid=native_grid, text_width=text_width)
        model = filled(build_pyramid(SIZES, sizes), "scorer.")
        path = str(tmp_path / "model.safetensors")
        save_pyramid(model, path)
        if knows is not None:
            seen = PyraTokScorer(path).embed_frames(knows).mean(0)
            with torch.no_grad():
                model.pyramid.text_target.weight.zero_()
                model.pyramid.text_target.bias.copy_(8 * torch.from_numpy(seen))
            save_pyramid(model, path)
        return model, PyraTokScorer(path)

    return loaded


def moving(colour: tuple[int, int, int], num_frames: int) -> np.ndarray:
    """A square of this colour that goes over a noisy ground."""
    frames = np.random.default_rng(0).integers(0, 60, (num_frames, 16, 16, 3), np.uint8)
    for i in range(num_frames):
        frames[i, 2:14, i % 8 : i % 8 + 8] = colour
    return frames


@pytest.mark.parametrize("native_grid", [True, False])
def test_frames_and_stored_codes_have_the_same_embeddings(load: Load, *, native_grid: bool) -> None:
    model, scorer = load(native_grid=native_grid)
    clip = moving((250, 20, 20), 11)
    level = model.encode_levels(torch.from_numpy(clip).permute(3, 0, 1, 2)[None])[0].ids_Bthw[0]
    embedded = scorer.embed_frames(clip)
    assert embedded.shape == (11, 16)
    assert np.array_equal(embedded, scorer.embed_codes(level, 11))
    bits = (level.numpy()[..., None] >> np.arange(15, -1, -1)) & 1
    means = (2.0 * bits - 1).mean((1, 2))
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    every = 2 if native_grid else 4
    wanted = means[[0, *(1 + (i - 1) // every for i in range(1, 11))]]
    assert np.allclose(embedded, wanted, atol=1e-6)


def test_a_planted_event_is_found(load: Load) -> None:
    red = moving((250, 20, 20), 9)
    _, scorer = load(knows=red)
    found: FrameEncoder = scorer
    clip = np.concatenate([moving((20, 20, 250), 40), moving((250, 20, 20), 30), moving((20, 20, 250), 31)])
    scores = smoothed(relevance(found.embed_frames(clip), found.embed_texts(["a red square"])[0]), 9)
    span = best_span(scores, float(scores.mean() + scores.std()))
    assert span is not None
    assert 36 <= span[0] <= 46
    assert 64 <= span[1] <= 74


def test_texts_have_length_one_and_words_alone_count(load: Load) -> None:
    _, scorer = load()
    texts = scorer.embed_texts(["A red square!", "a red  square", "something else"])
    assert np.allclose(np.linalg.norm(texts, axis=1), 1, atol=1e-6)
    assert np.array_equal(texts[0], texts[1])
    assert not np.allclose(texts[0], texts[2])


def test_what_cannot_be_scored_is_refused(load: Load) -> None:
    with pytest.raises(TokenizerError, match="trained without texts and cannot score frames"):
        load(text_width=None)
    _, scorer = load()
    with pytest.raises(ValueError, match="codes \\(t,h,w\\) of the first level"):
        scorer.embed_codes(torch.zeros(3, 8, 8, dtype=torch.int64), 11)
    for code in (-1, 1 << 16):
        with pytest.raises(ValueError, match="codes of this model are from 0 to 65535"):
            scorer.embed_codes(torch.full((1, 8, 8), code), 1)
    with pytest.raises(TokenizerError, match="encodes uint8 RGB frames"):
        scorer.embed_frames(moving((0, 0, 0), 5).astype(np.float32))
    assert scorer.embed_texts([]).shape == (0, 16)
