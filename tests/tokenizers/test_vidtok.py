"""Clips of any length become tokens and come back, frame for frame; what a variant does not take is refused."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tokenmill.schemas.errors import TokenizerError
from tokenmill.tokenizers import vidtok_model
from tokenmill.tokenizers.base import NO_CODE
from tokenmill.tokenizers.load import load_tokenizer
from tokenmill.tokenizers.vidtok import VidTokTokenizer, build

from .vidtok_kit import clip, filled, normalized

Load = Callable[..., VidTokTokenizer]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Load]:
    """load(name, ...): a variant of an eighth of the width."""
    monkeypatch.setattr(vidtok_model, "WIDTH", 16)

    def tokenizer(name: str, dtype: str = "float32", **settings: bool) -> VidTokTokenizer:
        path = tmp_path / f"vidtok_{name}.ckpt"
        if not path.exists():
            torch.save(filled(build(name)).state_dict(), path)
        found = load_tokenizer(f"vidtok/{name}", weights=str(path), dtype=dtype, **settings)
        assert isinstance(found, VidTokTokenizer)
        return found

    with torch.no_grad():
        yield tokenizer


@pytest.mark.parametrize(
    ("name", "lengths"),
    [
        ("fsq_causal_488_4096", {1: 1, 5: 2, 17: 5, 16: 5, 3: 5, 18: 10, 34: 10, 40: 15}),
        ("fsq_noncausal_488_262144", {4: 1, 16: 4, 17: 8, 32: 8, 1: 4}),
        ("kl_causal_288_8chn", {1: 1, 3: 2, 17: 9, 18: 18}),
        ("fsq_causal_488_32768_v1_1", {1: 1, 2: 1, 3: 1, 4: 1, 5: 2, 17: 5, 18: 5, 20: 5, 49: 13, 50: 13}),
        ("fsq_causal_888_32768_v1_1", {1: 1, 9: 2, 40: 5}),
    ],
)
def test_clips_of_any_length_come_back_with_their_frames(load: Load, name: str, lengths: dict[int, int]) -> None:
    tokenizer = load(name)
    side = tokenizer.spec.stride_thw[1]
    for num_frames, num_tokens in lengths.items():
        frames = clip(num_frames, side, 2 * side).unsqueeze(0)
        tokens = tokenizer.encode(frames)
        assert tuple(tokens.shape[1:4]) == tokenizer.grid_shape(*frames.shape[1:4]) == (num_tokens, 1, 2)
        decoded = tokenizer.decode(tokens, num_frames)
        assert decoded.shape == frames.shape
        assert decoded.dtype == torch.uint8
        longest = tokenizer.decode(tokens)
        assert longest.shape[1] >= num_frames
        if not tokenizer.spec.name.endswith("v1_1"):  # there frames are put before the first, and fall away
            assert torch.equal(longest[:, :num_frames], decoded)


def test_windows_are_independent_and_the_last_repeats_its_last_frame(load: Load) -> None:
    tokenizer, frames = load("fsq_causal_488_4096"), clip(30, 8, 8).unsqueeze(0)
    codes = tokenizer.encode(frames)
    filled_up = torch.cat((frames[:, 17:], frames[:, -1:].expand(-1, 4, -1, -1, -1)), dim=1)
    assert torch.equal(codes, torch.cat((tokenizer.encode(frames[:, :17]), tokenizer.encode(filled_up)), dim=1))


def test_codes_are_those_of_the_networks_and_clips_do_not_touch(load: Load) -> None:
    tokenizer, frames = load("fsq_causal_488_32768"), clip(17, 16, 16)
    model = filled(build("fsq_causal_488_32768"))
    assert isinstance(model, vidtok_model.VidTok)
    _, codes = model.quantize(model.encode_latent(normalized(frames)))
    both = tokenizer.encode(torch.stack((frames, frames.flip(0))))
    assert both.dtype == torch.int32
    assert torch.equal(both[:1], codes)
    assert not torch.equal(both[1:], codes)
    assert not tokenizer.is_batched
    assert tokenizer.spec.codebook_size == 32768


def test_a_streamed_clip_has_the_codes_of_the_whole(load: Load) -> None:
    tokenizer, frames = load("fsq_causal_488_32768_v1_1"), clip(81, 8, 8)
    model = filled(build("fsq_causal_488_32768_v1_1"))
    assert isinstance(model, vidtok_model.VidTok)
    h = model.encode_latent(normalized(frames))
    others = tokenizer.encode(frames.unsqueeze(0)) != model.quantize(h)[1]
    assert model.fsq is not None
    assert (model.fsq.margins(h.movedim(1, -1))[others] < 1e-4).all()


def test_calls_outside_of_inference_mode_keep_no_gradients(load: Load) -> None:
    tokenizer, frames = load("kl_causal_488_4chn"), clip(5, 8, 8).unsqueeze(0)
    with torch.inference_mode():
        first = tokenizer.encode(frames)
    with torch.enable_grad():
        second = tokenizer.encode(frames)
        assert tokenizer.decode(second, 5).shape == frames.shape
    assert not second.requires_grad
    assert torch.equal(first, second)


def test_the_tokens_are_those_of_the_file_that_was_digested(load: Load, tmp_path: Path) -> None:
    frames, name = clip(5, 8, 8).unsqueeze(0), "kl_causal_488_4chn"
    wanted, tokenizer = load(name).encode(frames), load(name)
    (tmp_path / "other").write_bytes(b"")
    torch.save(build(name).state_dict(), tmp_path / "other")
    (tmp_path / "other").replace(tmp_path / f"vidtok_{name}.ckpt")
    assert torch.equal(tokenizer.encode(frames), wanted)


def test_latents_that_are_no_numbers_have_no_code(load: Load) -> None:
    tokenizer, frames = load("fsq_causal_488_4096"), clip(5, 8, 8).unsqueeze(0)
    assert (tokenizer.encode(frames) >= 0).all()
    tokenizer._model.encoder.get_parameter("conv_out.conv.bias")[1] = float("nan")
    assert (tokenizer.encode(frames) == NO_CODE).all()


def test_margins_are_those_of_the_latents(load: Load) -> None:
    tokenizer, frames = load("fsq_causal_488_4096"), clip(5, 8, 8).unsqueeze(0)
    model = filled(build("fsq_causal_488_4096"))
    assert isinstance(model, vidtok_model.VidTok)
    assert model.fsq is not None
    wanted = model.fsq.margins(model.encode_latent(normalized(frames[0])).movedim(1, -1))
    torch.testing.assert_close(tokenizer.margins(frames), wanted, atol=1e-5, rtol=0)
    assert load("kl_causal_488_4chn").margins(frames) is None


def test_latents_are_means_and_on_request_variances(load: Load) -> None:
    frames = clip(5, 8, 8).unsqueeze(0)
    means, both = load("kl_causal_488_4chn"), load("kl_causal_488_4chn", logvar=True)
    latents, more = means.encode(frames), both.encode(frames)
    assert (means.spec.latent_dim, both.spec.latent_dim) == (4, 8)
    assert latents.shape == (1, 2, 1, 1, 4)
    model = filled(build("kl_causal_488_4chn"))
    assert isinstance(model, vidtok_model.VidTok)
    wanted = torch.cat(model.posterior(model.encode_latent(normalized(frames[0]))), dim=1).movedim(1, -1)
    torch.testing.assert_close(more, wanted, atol=1e-5, rtol=0)
    assert torch.equal(more[..., :4], latents)
    assert torch.equal(means.decode(latents, 5), both.decode(more, 5))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_number_types_are_part_of_what_the_tokenizer_is(load: Load, dtype: str) -> None:
    frames = clip(5, 16, 16).unsqueeze(0)
    exact, other = load("kl_causal_488_4chn"), load("kl_causal_488_4chn", dtype)
    assert (exact.spec.dtype, other.spec.dtype) == ("float32", dtype)
    wanted, found = exact.encode(frames), other.encode(frames)
    assert found.dtype == getattr(torch, dtype)
    error = (found.float() - wanted).abs().max() / wanted.abs().max()
    assert 0 < error < {"bfloat16": 0.1, "float16": 0.01}[dtype]
    assert other.decode(found, 5).shape == frames.shape


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # compilers have warnings of their own
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("name", ["kl_causal_488_4chn", "kl_causal_288_8chn_v1_1", "kl_noncausal_488_4chn"])
def test_compiled_networks_give_the_same_latents(load: Load, name: str) -> None:
    frames = clip(17, 16, 16).unsqueeze(0)
    plain, compiled = load(name), load(name, compiled=True)
    assert compiled.spec != plain.spec
    torch.testing.assert_close(compiled.encode(frames), plain.encode(frames), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name": "vidtok/fsq_causal_488_4095"},
            r"no variant 'fsq_causal_488_4095' \(did you mean 'fsq_causal_488_4096'",
        ),
        (
            {"name": "vidtok/fsq_causal_488_4096"},
            "needs its weights: set weights to the path or URL of vidtok_fsq_causal",
        ),
        ({"name": "dct_fsq/488_262144", "logvar": True}, "dct_fsq has no variances: remove logvar"),
        ({"name": "fake", "compiled": True}, "fake has no networks to compile: remove compiled"),
        (
            {"name": "vidtok/fsq_causal_488_4096", "weights": "x", "logvar": True},
            "makes codes, which have no variance: remove logvar",
        ),
    ],
)
def test_what_cannot_be_loaded_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(**arguments)


def test_clips_and_tokens_of_other_sizes_are_refused(load: Load) -> None:
    codes, latents = load("fsq_causal_488_4096"), load("kl_causal_488_4chn")
    with pytest.raises(TokenizerError, match=r"whose height is a multiple of 8, found 12: set clips.height=16"):
        codes.encode(torch.zeros(1, 5, 12, 8, 3, dtype=torch.uint8))
    with pytest.raises(TokenizerError, match=r"encodes uint8 RGB frames of shape \(B,T,H,W,3\)"):
        codes.encode(torch.zeros(1, 5, 8, 8, 3))
    with pytest.raises(TokenizerError, match="decodes codes from 0 to 4095, found 0 to 4096"):
        codes.decode(torch.tensor([[[[0, 4096]]]]))
    with pytest.raises(
        TokenizerError, match=r"decodes latents of shape \(B,t,h,w,4\), found torch.float32 of shape \(1, 2, 1, 1, 5\)"
    ):
        latents.decode(torch.zeros(1, 2, 1, 1, 5))
    with pytest.raises(TokenizerError, match=r"decodes latents of shape \(B,t,h,w,4\), found torch.int64"):
        latents.decode(torch.zeros(1, 2, 1, 1, 4, dtype=torch.int64))
    with pytest.raises(TokenizerError, match="whose num_frames is a multiple of 1, found 0"):
        codes.encode(torch.zeros(1, 0, 8, 8, 3, dtype=torch.uint8))
    with pytest.raises(TokenizerError, match="no clip has 7 tokens in time: each window of 17 frames has 5"):
        codes.decode(torch.zeros(1, 7, 1, 1, dtype=torch.int32))
    with pytest.raises(TokenizerError, match="clips of 0 frames do not have 2 tokens"):
        codes.decode(torch.zeros(1, 2, 1, 1, dtype=torch.int32), 0)
    assert codes.decode(torch.zeros(1, 2, 1, 1, dtype=torch.uint16)).shape == (1, 5, 8, 8, 3)
    with pytest.raises(TokenizerError, match="clips of 9 frames do not have 2 tokens in time: 5 frames have"):
        codes.decode(torch.zeros(1, 2, 1, 1, dtype=torch.int32), 9)
