"""PyraTok as a tokenizer: clips alone or together, any length, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tokenmill.pipeline.token_file import TokenLayout
from tokenmill.schemas.errors import TokenizerError
from tokenmill.tokenizers.base import NO_CODE, LevelTokenizer, TrajectoryTokenizer, joined_levels
from tokenmill.tokenizers.load import load_tokenizer
from tokenmill.tokenizers.pyratok import build_release
from tokenmill.tokenizers.pyratok_levels import Strides
from tokenmill.tokenizers.pyratok_pyramid import PyramidSizes, build_pyramid, save_pyramid
from tokenmill.tokenizers.pyratok_tokenizer import PyraTokTokenizer
from tokenmill.tokenizers.pyratok_vae import VaeSizes

from .pyratok_kit import filled

SIZES = VaeSizes(base_dim=4, z_dim=16, dim_mult=(1, 2, 2), num_res_blocks=1, temperal_downsample=(True, True))
WAYS = ["release", "pyramid", "native"]
Load = Callable[..., LevelTokenizer]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """load(way, **options): a small tokenizer, of the release or of a pyramid on one grid or native ones."""

    def loaded(way: str, text_width: int | None = 32, **settings: Any) -> LevelTokenizer:
        path = str(tmp_path / f"{way}.safetensors")
        if way == "release":
            path = str(tmp_path / "release.pt")
            torch.save(filled(build_release(SIZES), "tokenizer.").state_dict(), path)
        else:
            sizes = PyramidSizes(native_grid=way == "native", text_width=text_width)
            save_pyramid(filled(build_pyramid(SIZES, sizes), "tokenizer."), path)
        tokenizer = load_tokenizer(f"pyratok/{'release' if way == 'release' else 'pyramid'}", path, **settings)
        assert isinstance(tokenizer, LevelTokenizer)
        assert not isinstance(tokenizer, TrajectoryTokenizer)
        return tokenizer

    return loaded


def frames(num_frames: int, num_clips: int = 1, side: int = 16) -> torch.Tensor:
    values = np.random.default_rng(num_frames).integers(0, 256, (num_clips, num_frames, side, side, 3), np.uint8)
    return torch.from_numpy(values)


def levels_of(tokens: Any) -> list[torch.Tensor]:
    return list(tokens.unbind(-1)) if isinstance(tokens, torch.Tensor) else list(tokens)


@pytest.mark.parametrize("way", WAYS)
def test_clips_do_not_depend_on_each_other(load: Load, way: str) -> None:
    tokenizer, clips = load(way), frames(5, num_clips=3)
    together = joined_levels(tokenizer.encode(clips))
    assert together.dtype == torch.int32
    for i in range(3):
        assert torch.equal(joined_levels(tokenizer.encode(clips[i : i + 1])), together[i : i + 1])
    assert not tokenizer.is_batched


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("num_frames", [1, 2, 4, 5, 6, 9])
def test_clips_of_any_length_come_back_with_all_their_frames(load: Load, way: str, num_frames: int) -> None:
    tokenizer, clip = load(way), frames(num_frames)
    tokens = tokenizer.encode(clip)
    shapes = [tuple(level.shape[1:]) for level in levels_of(tokens)]
    assert shapes == list(tokenizer.level_grids(num_frames, 16, 16))
    assert [tuple(m.shape) for m in levels_of(tokenizer.margins(clip))] == [(1, *shape) for shape in shapes]
    assert tokenizer.decode(tokens, num_frames).shape == clip.shape
    longest = 1 + 4 * -(-(num_frames - 1) // 4)
    assert tokenizer.decode(tokens).shape[1] == longest
    for wrong in (longest + 1, longest - 4, 0):
        with pytest.raises(TokenizerError, match=f"found num_frames={wrong}: give that of the clips"):
            tokenizer.decode(tokens, wrong)


@pytest.mark.parametrize("way", WAYS)
def test_the_first_levels_decode_too_and_more_levels_change_frames(load: Load, way: str) -> None:
    tokenizer = load(way)
    levels = levels_of(tokenizer.encode(frames(5, num_clips=2)))
    made = [tokenizer.decode(levels[: m + 1], 5) for m in range(len(levels))]
    assert {tuple(one.shape) for one in made} == {(2, 5, 16, 16, 3)}
    assert all(not torch.equal(one, other) for one, other in zip(made[1:], made, strict=False))
    assert torch.equal(made[-1], tokenizer.decode(tokenizer.encode(frames(5, num_clips=2)), 5))


@pytest.mark.parametrize(
    ("clip", "native", "num_bytes"),
    [
        ((17, 256, 512), False, 81_920),
        ((9, 128, 128), False, 6_144),
        ((1, 256, 256), False, 8_192),
        ((97, 720, 1280), False, 2_880_000),
        ((17, 256, 512), True, 1_302_528),
    ],
)
def test_grids_of_the_published_sizes_take_two_bytes_a_code(
    clip: tuple[int, int, int], num_bytes: int, *, native: bool
) -> None:
    grids = Strides.of(VaeSizes(), native_grid=native).grids_of(VaeSizes().grid_of(*clip))
    assert sum(TokenLayout.of_levels(grids, 1 << 16).widths.values()) == num_bytes
    if native:
        assert grids == ((17, 128, 256), (9, 64, 128), (5, 32, 64), (5, 32, 64))


def test_spec_says_what_decides_codes(load: Load) -> None:
    release, pyramid = load("release").spec, load("pyramid", options={"text": "A red ball", "text_scale": 0.5}).spec
    assert (release.name, release.codebook_size, release.stride_thw) == ("pyratok/release", 1 << 16, (4, 4, 4))
    assert release.options == {"normalized": False, "statistics": None}
    assert pyramid.options["text_sha256"] == "816159e273797ca0ba36436644500194128a7d633f4bc6206c70911a299b6aac"
    assert pyramid.options["text"] == "A red ball"
    assert load("pyramid").spec.options["text_scale"] is None
    assert load("release", options={"normalized": True}).spec.options["statistics"]["mean"][0] == -0.7571


def test_a_text_moves_codes_of_a_pyramid(load: Load) -> None:
    clip = frames(5)
    plain = joined_levels(load("pyramid").encode(clip))
    told, other = (
        joined_levels(load("pyramid", options={"text": text, "text_scale": 0.1}).encode(clip))
        for text in ("a red ball", "two green squares")
    )
    more = joined_levels(load("pyramid", options={"text": "a red ball", "text_scale": 0.3}).encode(clip))
    assert (plain != told).any()
    assert (other != told).any()
    assert (more != told).any()


def test_latents_that_are_no_numbers_have_no_code(tmp_path: Path) -> None:
    model = filled(build_release(SIZES), "tokenizer.")
    with torch.no_grad():
        model.quant_conv.bias[3] = torch.inf
    torch.save(model.state_dict(), tmp_path / "a.pt")
    tokenizer = load_tokenizer("pyratok/release", str(tmp_path / "a.pt"))
    assert isinstance(tokenizer, LevelTokenizer)
    assert (joined_levels(tokenizer.encode(frames(1))) == NO_CODE).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("way", WAYS)
def test_half_precision_gives_mostly_the_same_bits(load: Load, way: str, dtype: str) -> None:
    clip = frames(5, side=32)
    full, half = (levels_of(load(way, dtype=name).encode(clip))[0] for name in ("float32", dtype))
    places = 1 << torch.arange(16)
    differing = ((full.unsqueeze(-1) & places) != (half.unsqueeze(-1) & places)).float().mean()
    assert differing < 0.1


def test_normalized_latents_have_other_codes_and_come_back(load: Load) -> None:
    clip = frames(5)
    plain, normalized = (load("release", options={"normalized": one}) for one in (False, True))
    codes = normalized.encode(clip)
    assert not torch.equal(joined_levels(codes), joined_levels(plain.encode(clip)))
    assert not torch.equal(normalized.decode(codes), plain.decode(codes))


def test_a_batch_has_the_text_of_its_clips(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = frames(5, num_clips=3)
    tokenizer = load("pyramid", options={"text": "a red ball"})
    alone = joined_levels(tokenizer.encode(clips))
    monkeypatch.setattr(PyraTokTokenizer, "is_batched", True)  # as on a GPU
    assert (joined_levels(tokenizer.encode(clips)) == alone).float().mean() > 0.99


@pytest.mark.parametrize("way", WAYS)
def test_other_frames_and_codes_are_refused(load: Load, way: str) -> None:
    tokenizer = load(way)
    with pytest.raises(TokenizerError, match="encodes uint8 RGB frames"):
        tokenizer.encode(frames(1).float())
    with pytest.raises(TokenizerError, match="width is a multiple of 4, found 18"):
        tokenizer.level_grids(5, 16, 18)
    levels = levels_of(tokenizer.encode(frames(5)))
    for wrong in (
        levels[0],
        [levels[0], levels[1].expand(2, -1, -1, -1)],
        torch.zeros(0, 5, 4, 4, 3, dtype=torch.int32),
        [],
    ):
        with pytest.raises(TokenizerError, match=r"decodes codes \(B,t,h,w,L\), or a tensor"):
            tokenizer.decode(wrong)
    for wrong in (
        [*levels, levels[-1]],
        [level.float() for level in levels],
        [level + (1 << 16) for level in levels],
    ):
        with pytest.raises(TokenizerError, match="ids of PyraTok"):
            tokenizer.decode(wrong)


def test_settings_that_cannot_be_are_refused(load: Load) -> None:
    with pytest.raises(TokenizerError, match=r"trained without texts: remove options\.text"):
        load("pyramid", text_width=None, options={"text": "a"})
    with pytest.raises(TokenizerError, match=r"set options\.text, or remove it"):
        load("pyramid", options={"text_scale": 2.0})
