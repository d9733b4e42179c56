"""The networks give the official values: golden ones, and for all variants those of the specification read plainly."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tokenmill.tokenizers import vidtok_model
from tokenmill.tokenizers.vidtok import build
from tokenmill.tokenizers.vidtok_model import VidTok
from tokenmill.tokenizers.vidtok_variants import NAMES, variant_of

from .vidtok_kit import GOLDEN, clip, filled, normalized

ROOT = Path(__file__).parent.parent.parent
GOLDEN_NAMES = ("fsq_causal_488_32768", "fsq_noncausal_488_262144", "kl_causal_488_4chn")
CAUSAL = [name for name in NAMES if "noncausal" not in name]
# Parameters of encoder and of all, and tensors, as published.
SIZES = {
    "fsq_causal_488_4096": (69_202_822, 157_396_363, 416),
    "fsq_causal_488_32768": (69_216_647, 157_424_012, 416),
    "fsq_causal_488_262144": (69_230_472, 157_451_661, 416),
    "fsq_causal_41616_262144": (89_494_152, 198_967_949, 500),
    "fsq_noncausal_488_262144": (69_230_472, 157_451_661, 416),
    "fsq_noncausal_41616_262144": (89_494_152, 198_967_949, 500),
    "kl_causal_488_4chn": (69_258_122, 157_451_663, 416),
    "kl_causal_488_8chn": (69_368_722, 157_617_559, 416),
    "kl_causal_488_16chn": (69_589_922, 157_949_351, 416),
    "kl_causal_288_8chn": (62_290_321, 148_769_429, 410),
    "kl_causal_444_4chn": (69_110_538, 154_944_271, 412),
    "kl_causal_41616_4chn": (89_521_802, 198_967_951, 500),
    "kl_noncausal_488_4chn": (69_258_122, 157_451_663, 416),
    "kl_noncausal_488_16chn": (69_589_922, 157_949_351, 416),
    "kl_noncausal_41616_4chn": (89_521_802, 198_967_951, 500),
    "kl_noncausal_41616_16chn": (89_853_602, 199_465_639, 500),
    "fsq_causal_488_32768_v1_1": (69_216_647, 157_424_012, 416),
    "fsq_causal_41616_262144_v1_1": (89_494_152, 198_967_949, 500),
    "fsq_causal_888_32768_v1_1": (69_659_144, 164_944_910, 422),
    "kl_causal_288_8chn_v1_1": (62_290_321, 148_769_429, 410),
    "kl_causal_41616_16chn_v1_1": (89_853_602, 199_465_639, 500),
    "kl_causal_488_4chn_v1_1": (69_258_122, 157_451_663, 416),
    "kl_causal_488_16chn_v1_1": (69_589_922, 157_949_351, 416),
}


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of an eighth of the width: the rules are the same, the work a sixtieth."""
    monkeypatch.setattr(vidtok_model, "WIDTH", 16)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def plain() -> Any:
    """The specification in plain PyTorch, which benchmarks compare with."""
    spec = importlib.util.spec_from_file_location("plain_vidtok", ROOT / "benchmarks" / "plain_vidtok.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.PlainVidTok


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_has_its_published_size(name: str) -> None:
    with torch.device("meta"):
        model = VidTok(variant_of(name))
    sizes = {key: value.numel() for key, value in model.state_dict().items()}
    encoder = sum(size for key, size in sizes.items() if key.startswith("encoder."))
    assert (encoder, sum(sizes.values()), len(sizes)) == SIZES[name]


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_the_state_dict_is_the_official_one(name: str) -> None:
    with torch.device("meta"):
        model = VidTok(variant_of(name))
    wanted = json.loads((GOLDEN / f"vidtok_{name}.keys.json").read_text())
    assert [[key, list(value.shape)] for key, value in model.state_dict().items()] == wanted


@pytest.mark.parametrize(
    "name", [GOLDEN_NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in GOLDEN_NAMES[1:])]
)
def test_latents_codes_and_frames_are_the_golden_ones(name: str) -> None:
    model = filled(build(name))
    assert isinstance(model, VidTok)
    golden = np.load(GOLDEN / f"vidtok_{name}.npz")
    for case, size in json.loads((GOLDEN / f"vidtok_{name}.json").read_text())["cases"].items():
        h = model.encode_latent(normalized(clip(size["T"], size["H"], size["W"], size["seed"])))
        np.testing.assert_allclose(h, golden[f"{case}.enc"], atol=1e-4, rtol=0)
        if model.fsq:
            z, codes = model.quantize(h)
            assert np.array_equal(codes, golden[f"{case}.indices"])
            assert np.array_equal(z, golden[f"{case}.z"])
            assert torch.equal(model.indices_to_latent(codes), z)
        else:
            z, logvar = model.posterior(torch.from_numpy(golden[f"{case}.enc"]))
            drawn = z + (logvar / 2).exp() * torch.randn(z.shape, generator=torch.Generator().manual_seed(1234))
            np.testing.assert_allclose(drawn, golden[f"{case}.z_sample"], atol=1e-5)
        frames = model.decode_latent(z)
        assert list(frames.shape) == size["dec_shape"]
        step = 3 if frames.shape[-1] >= 64 else 1
        np.testing.assert_allclose(frames[..., ::step, ::step], golden[f"{case}.dec"], atol=5e-4, rtol=0)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("name", NAMES)
def test_every_variant_is_the_specification_read_plainly(name: str, plain: Any) -> None:
    model, variant = filled(build(name)), variant_of(name)
    assert isinstance(model, VidTok)
    wanted = plain(name, model.state_dict())
    side = variant.stride_thw[1]
    for num_frames in (1, 2, 9, 19) if variant.is_causal else (4, 18):
        x = normalized(clip(num_frames, side, 2 * side, num_frames))
        h = model.encode_latent(x)
        torch.testing.assert_close(h, wanted.encode(x), atol=2e-5, rtol=0)
        z = torch.rand(1, variant.channels, *h.shape[2:]) * 2 - 1
        torch.testing.assert_close(model.decode_latent(z), wanted.decode(z), atol=1e-4, rtol=0)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("name", CAUSAL)
def test_a_clip_in_parts_is_the_clip(name: str) -> None:
    model, variant = filled(build(name)), variant_of(name)
    assert isinstance(model, VidTok)
    stride, side, _ = variant.stride_thw
    for num_frames in (24, 25, 26):
        x = normalized(clip(num_frames, side, side))
        h = model.encode_latent(x)
        z = torch.rand(1, variant.channels, *h.shape[2:]) * 2 - 1
        frames = model.decode_latent(z)
        for parts in (1, 2) if num_frames == 25 else (2,):
            torch.testing.assert_close(model.encode_latent(x, parts * stride), h, atol=2e-5, rtol=0)
            torch.testing.assert_close(model.decode_latent(z, parts), frames, atol=1e-4, rtol=0)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("name", CAUSAL)
def test_later_frames_change_no_earlier_token(name: str) -> None:
    model, variant = filled(build(name)), variant_of(name)
    assert isinstance(model, VidTok)
    stride, side, _ = variant.stride_thw
    x = normalized(clip(17, side, side))
    whole = model.encode_latent(x)
    for num_frames in (1, 17 - stride):
        h = model.encode_latent(x[:, :, :num_frames])
        torch.testing.assert_close(whole[:, :, : h.shape[2]], h, atol=2e-5, rtol=0)
        other = torch.cat((x[:, :, :num_frames], -x[:, :, num_frames:]), dim=2)
        assert torch.equal(model.encode_latent(other)[:, :, : h.shape[2]], whole[:, :, : h.shape[2]])


@pytest.mark.usefixtures("narrow")
def test_the_order_of_frames_matters() -> None:
    model = filled(build("fsq_causal_488_4096"))
    assert isinstance(model, VidTok)
    x = normalized(clip(17, 16, 16))
    swapped = x[:, :, [0, 2, 1, *range(3, 17)]]
    codes, others = (model.quantize(model.encode_latent(frames))[1] for frames in (x, swapped))
    assert (codes != others).any()
    assert torch.equal(codes[:, 0], others[:, 0])


@pytest.mark.usefixtures("narrow")
def test_clips_that_look_ahead_are_not_cut_into_parts() -> None:
    model = build("kl_noncausal_488_4chn")
    with pytest.raises(ValueError, match="sees later frames"):
        model.encode_latent(torch.zeros(1, 3, 16, 8, 8), 4)


@pytest.mark.usefixtures("narrow")
def test_sizes_and_parts_that_lose_frames_are_refused() -> None:
    model = build("fsq_causal_488_4096")
    with pytest.raises(ValueError, match="takes frames whose sides 8 divides"):
        model.encode_latent(torch.zeros(1, 3, 5, 12, 8))
    for part in (0, 3, 6):
        with pytest.raises(ValueError, match="takes parts of a multiple of 4 frames"):
            model.encode_latent(torch.zeros(1, 3, 17, 8, 8), part)
    with pytest.raises(ValueError, match="one latent frame or more"):
        model.decode_latent(torch.zeros(1, 4, 5, 1, 1), 0)


def test_what_a_variant_does_not_have_is_refused() -> None:
    with torch.device("meta"):
        codes, latents = VidTok(variant_of("fsq_causal_488_4096")), VidTok(variant_of("kl_causal_488_4chn"))
    with pytest.raises(TypeError, match="has codes and no posterior: use quantize"):
        codes.posterior(torch.zeros(1, 4, 1, 1, 1))
    with pytest.raises(TypeError, match="has no codes: use posterior"):
        latents.quantize(torch.zeros(1, 4, 1, 1, 1))
