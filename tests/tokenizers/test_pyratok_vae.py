"""The VAE gives the golden values, in groups, in pieces and at once, and loses no frame; weights load by name."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tokenmill.schemas.errors import TokenizerError
from tokenmill.tokenizers.pyratok import (
    PyraTok,
    QuantizerSizes,
    build_release,
    build_vae,
    load_release,
)
from tokenmill.tokenizers.pyratok_layers import LengthNorm
from tokenmill.tokenizers.pyratok_quantizer import WAN_STATISTICS, LatentStatistics
from tokenmill.tokenizers.pyratok_vae import Encoded, EncoderStream, VaeSizes, WanVae

from .pyratok_kit import CASES, FIXED, TINY, certain, draw, filled, golden

CASE = CASES["wan_tiny"]
TEXT = QuantizerSizes(text_embed_dim=12, text_input_dim=20, text_hidden_dim=16)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def tiny() -> PyraTok:
    """The model of the golden case."""
    return filled(build_release(VaeSizes(**TINY)), CASE["prefix"])


def video(num_frames: int = 9, height: int = 32, width: int = 32, batch: int = 1) -> torch.Tensor:
    """Frames (B,3,T,H,W) in [-1,1]; those of the golden case by default."""
    return draw(CASE["input_keys"]["video"], (batch, 3, num_frames, height, width)).tanh()


def assert_same(found: Encoded, wanted: Encoded, atol: float = 0) -> None:
    """The same posterior and features, to the bit where `atol` is 0."""
    assert found.taps.keys() == wanted.taps.keys()
    for one, other in zip(values_of(found), values_of(wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


def values_of(encoded: Encoded) -> list[torch.Tensor]:
    return [encoded.mean_BCthw, encoded.logvar_BCthw, *encoded.taps.values()]


def test_the_state_dict_is_the_released_one() -> None:
    state = tiny().state_dict()
    found = {key: [list(value.shape), str(value.dtype).removeprefix("torch.")] for key, value in state.items()}
    assert found == CASE["keys"]
    assert list(found) == list(CASE["keys"])
    vae = [key for key in CASE["keys"] if not key.startswith("lapq_")]
    assert list(build_vae(**TINY).state_dict()) == vae


def test_the_published_sizes_are_those_of_wan() -> None:
    with torch.device("meta"):
        vae = build_vae()
        release = build_release(None, QuantizerSizes(text_embed_dim=256, text_input_dim=2560))
    encoder, decoder = (sum(p.numel() for p in part.parameters()) for part in (vae.encoder, vae.decoder))
    assert (round(encoder / 1e6, 2), round(decoder / 1e6, 2)) == (53.60, 73.30)
    assert round(sum(p.numel() for p in vae.parameters()) / 1e6, 2) == 126.89
    assert vae.sizes.stride_thw == (4, 8, 8)
    assert vae.encoder.tap_names == (*(f"down{i}" for i in range(11)), "mid")
    added = {key: tuple(value.shape) for key, value in release.state_dict().items() if key.startswith("lapq_")}
    assert len(added) == 4 + 4 * 12
    assert sum(p.numel() for p in release.lapq_quantizer.parameters()) == 21_056
    assert added["lapq_text_mlp.0.weight"] == (1024, 2560)
    assert added["lapq_text_mlp.2.weight"] == (256, 1024)
    assert added["lapq_quantizer.layers.3.text_proj.weight"] == (16, 256)
    assert added["lapq_quantizer.layers.3.codebook"] == (65536, 16)


@pytest.mark.parametrize("in_groups", [True, False])
def test_posterior_features_ids_and_frames_are_the_golden_ones(*, in_groups: bool) -> None:
    model, wanted = tiny(), golden("wan_tiny")
    found = model.encode(video(), model.encoder.tap_names, in_groups=in_groups)
    assert {f"tap_{name}" for name in found.taps} == {name for name in wanted if name.startswith("tap_")}
    for name, features in found.taps.items():
        assert list(features.shape) == CASE["tap_shapes"][name]
        torch.testing.assert_close(features, wanted[f"tap_{name}"], rtol=0, atol=2e-5)
    torch.testing.assert_close(found.mean_BCthw, wanted["mean"], rtol=0, atol=2e-5)
    torch.testing.assert_close(found.logvar_BCthw, wanted["logvar"], rtol=0, atol=2e-5)
    quantized = model.quantize(found.mean_BCthw)
    sure = certain(wanted["margin"])
    assert sure.float().mean() > 0.9
    assert torch.equal(quantized.ids_BthwQ[sure], wanted["indices"].long()[sure])
    torch.testing.assert_close(quantized.loss, wanted["loss_eval"], rtol=1e-5, atol=0)
    frames = model.decode(wanted["quantized"], 1 if in_groups else None)
    torch.testing.assert_close(frames, wanted["recon"], rtol=0, atol=1e-4)
    assert frames.abs().max() <= 1
    assert torch.equal(model.latents_of(quantized.ids_BthwQ), quantized.values_BCthw)


@pytest.mark.parametrize("lengths", [[1] * 13, [13], [2, 5, 6], [7, 1, 1, 4], [12, 1]])
def test_frames_in_any_pieces_give_the_same_bits(lengths: list[int]) -> None:
    vae, taps = tiny(), ("down1", "down3", "mid")
    x = video(13, 16, 24)
    stream = EncoderStream(vae, taps)
    parts = [part for piece in x.split(lengths, dim=2) for part in stream.push(piece)]
    assert_same(Encoded.joined([*parts, *stream.finish()]), vae.encode(x, taps))
    assert_same(Encoded.joined([*stream.push(x), *stream.finish()]), vae.encode(x, taps))  # it begins anew


@pytest.mark.parametrize("num_frames", range(1, 14))
def test_clips_of_any_length_keep_all_frames(num_frames: int) -> None:
    vae, taps = tiny(), ("down0", "down3", "mid")
    x = video(num_frames, 8, 16)
    found = vae.encode(x, taps)
    num_latents = 1 + -(-(num_frames - 1) // 4)
    assert found.mean_BCthw.shape == (1, 4, num_latents, 1, 2)
    assert [features.shape[2] for features in found.taps.values()] == [
        4 * num_latents - 3,
        2 * num_latents - 1,
        num_latents,
    ]
    filled_up = torch.cat((x, x[:, :, -1:].expand(-1, -1, 4 * num_latents - 3 - num_frames, -1, -1)), dim=2)
    assert_same(found, vae.encode(filled_up, taps))
    assert_same(vae.encode(x, taps, in_groups=False), found, atol=1e-5)
    changed = x.clone()
    changed[:, :, -1] *= -1
    assert (vae.encode(changed).mean_BCthw[:, :, -1] - found.mean_BCthw[:, :, -1]).abs().max() > 1e-3
    assert vae.decode(found.mean_BCthw).shape == (1, 3, 4 * num_latents - 3, 8, 16)


@pytest.mark.parametrize("in_groups", [True, False])
def test_later_frames_change_no_earlier_latent(*, in_groups: bool) -> None:
    vae, x = tiny(), video(13, 16, 16)
    whole = vae.encode(x, in_groups=in_groups).mean_BCthw
    for num_frames in (1, 5, 9):
        other = torch.cat((x[:, :, :num_frames], -x[:, :, num_frames:]), dim=2)
        kept = 1 + (num_frames - 1) // 4
        assert torch.equal(vae.encode(other, in_groups=in_groups).mean_BCthw[:, :, :kept], whole[:, :, :kept])
        assert (vae.encode(other).mean_BCthw[:, :, kept:] - whole[:, :, kept:]).abs().amin((0, 1, 3, 4)).max() > 0
        alone = vae.encode(x[:, :, :num_frames]).mean_BCthw
        torch.testing.assert_close(whole[:, :, :kept], alone, rtol=0, atol=1e-5)


def test_latents_in_parts_give_the_same_frames() -> None:
    vae, z = tiny(), draw("latents", (2, 4, 5, 2, 3))
    frames = vae.decode(z)
    assert frames.shape == (2, 3, 17, 16, 24)
    for part in (2, 3, 5, 8, None):
        torch.testing.assert_close(vae.decode(z, part), frames, rtol=0, atol=1e-5)
    lengths = [part.shape[2] for part in vae.decode_parts(z, 2)]
    assert lengths == [5, 8, 4]
    assert torch.equal(vae.decode(z[:, :, :3]), frames[:, :, :9])


@pytest.mark.parametrize("temperal_downsample", [[True, True], [True, False], [False, False]])
def test_other_strides_in_time_are_the_same_in_groups_and_at_once(temperal_downsample: list[bool]) -> None:
    sizes = {"base_dim": 6, "z_dim": 2, "dim_mult": [1, 3, 2], "num_res_blocks": 2}
    vae = filled(build_vae(**sizes, temperal_downsample=temperal_downsample), "other.")
    stride = 2 ** sum(temperal_downsample)
    assert vae.sizes.stride_thw == (stride, 4, 4)
    x = video(1 + 2 * stride, 12, 4, batch=2)
    found = vae.encode(x)
    assert found.mean_BCthw.shape == (2, 2, 3, 3, 1)
    assert_same(vae.encode(x, in_groups=False), found, atol=1e-5)
    assert vae.decode(found.mean_BCthw).shape == x.shape


def test_bytes_are_frames_from_minus_one_to_one() -> None:
    vae = tiny()
    grey = torch.arange(3 * 5 * 16 * 8, dtype=torch.int64).remainder(256).to(torch.uint8).view(1, 3, 5, 16, 8)
    assert_same(vae.encode(grey), vae.encode(grey.float() / 127.5 - 1), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(dtype: torch.dtype) -> None:
    model, x = tiny(), video(5, 16, 16)
    wanted = model.encode(x).mean_BCthw
    frames = model.decode(wanted)
    model = model.to(dtype)
    found = model.encode(x).mean_BCthw
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), wanted, rtol=0, atol=0.1)
    torch.testing.assert_close(model.decode(wanted).float(), frames, rtol=0, atol=0.1)
    assert model.quantize(found).values_BCthw.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pixels_without_length_stay_so(dtype: torch.dtype) -> None:
    norm = LengthNorm(4).to(dtype)
    x = torch.tensor([[0.0, 0, 0, 0], [3.0, 0, 0, 4]], dtype=dtype)
    torch.testing.assert_close(norm(x).float(), torch.tensor([[0.0, 0, 0, 0], [1.2, 0, 0, 1.6]]), rtol=0, atol=1e-2)


def test_gradients_reach_all_weights_through_groups() -> None:
    model = tiny().requires_grad_()
    with torch.enable_grad():
        found = model.encode(video(5, 8, 8))
        values = model.quantize(found.mean_BCthw).values_BCthw
        (model.decode(values).square().mean() + found.logvar_BCthw.mean()).backward()
    without = [key for key, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert all(key.startswith("lapq_") for key in without)


def test_gradients_in_groups_are_those_of_all_at_once() -> None:
    gradients: list[dict[str, torch.Tensor]] = []
    for in_groups in (True, False):
        vae = tiny().requires_grad_()
        with torch.enable_grad():
            found = vae.encode(video(9, 8, 8), in_groups=in_groups).mean_BCthw
            vae.decode(found, 1 if in_groups else None).square().mean().backward()
        gradients.append({key: value.grad for key, value in vae.named_parameters() if value.grad is not None})
    for key, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][key], rtol=1e-3, atol=1e-5)


def test_statistics_are_taken_off_before_quantizing_and_put_back_after() -> None:
    statistics = LatentStatistics(mean=(1.0, 0.0, -1.0, 2.0), std=(2.0, 1.0, 0.5, 4.0))
    plain, model = tiny(), filled(build_release(VaeSizes(**TINY), None, statistics), CASE["prefix"])
    mean = plain.encode(video(5, 16, 16)).mean_BCthw
    found = model.quantize(mean)
    assert torch.equal(found.ids_BthwQ, plain.quantize(statistics.normalized(mean)).ids_BthwQ)
    torch.testing.assert_close(model.restored(found.values_BCthw), statistics.restored(found.values_BCthw))
    assert torch.equal(model.latents_of(found.ids_BthwQ), model.restored(found.values_BCthw))


def test_text_goes_through_its_own_layers_where_the_scale_is_not_0() -> None:
    model = filled(build_release(VaeSizes(**TINY), TEXT), "text.")
    mean, text = model.encode(video(1, 64, 64)).mean_BCthw, draw("text", (1, 7, 20))
    without = model.quantize(mean).ids_BthwQ
    assert torch.equal(model.quantize(mean, text).ids_BthwQ, without)
    model.lapq_quantizer.text_condition_scale = 1.0
    assert (model.quantize(mean, text).ids_BthwQ != without).any()
    assert torch.equal(model.quantize(mean).ids_BthwQ, without)


def save(model: WanVae, path: Path, **more: Any) -> str:
    """A checkpoint as training writes it; `more` beside the tensors."""
    torch.save({"model_state_dict": model.state_dict(), **more}, path)
    return str(path)


def test_the_checkpoint_of_a_training_loads(tmp_path: Path) -> None:
    model = filled(build_release(VaeSizes(**TINY), TEXT), "text.")
    optimizer = torch.optim.AdamW(model.parameters())
    path = save(model, tmp_path / "a.pt", step=3, epoch=1, optimizer_state_dict=optimizer.state_dict(), config={"a": 1})
    loaded = load_release(path)
    assert loaded.sizes == VaeSizes(**TINY)
    assert not any(p.requires_grad for p in loaded.parameters())
    for (key, value), (other, wanted) in zip(loaded.state_dict().items(), model.state_dict().items(), strict=True):
        assert key == other
        assert torch.equal(value, wanted), key
    assert not loaded.training
    torch.save({"module." + key: value for key, value in model.state_dict().items()}, path)
    assert torch.equal(load_release(path).quant_conv.weight, model.quant_conv.weight)


@pytest.mark.parametrize("num_files", [1, 2])
def test_the_folder_of_a_model_loads_with_its_statistics(tmp_path: Path, num_files: int) -> None:
    model = tiny()
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    for i in range(num_files):
        save_file(dict(list(state.items())[i::num_files]), tmp_path / f"diffusion_pytorch_model-{i}.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"latents_mean": [1, 2, 3, 4], "latents_std": [1, 2, 2, 1]}))
    x = video(5, 16, 16)
    loaded = load_release(str(tmp_path))
    assert loaded.statistics is None
    assert_same(loaded.encode(x), model.encode(x))
    normalized = load_release(str(tmp_path), normalized=True)
    assert normalized.statistics == LatentStatistics(mean=(1, 2, 3, 4), std=(1, 2, 2, 1))
    mean = model.encode(x).mean_BCthw
    assert (normalized.quantize(mean).ids_BthwQ != model.quantize(mean).ids_BthwQ).any()
    (tmp_path / "config.json").write_text(json.dumps({"latents_mean": [1, 2, 3, 4], "latents_std": [1, 2, 0, 1]}))
    with pytest.raises(TokenizerError, match=r"latents_mean and latents_std of config\.json are not usable"):
        load_release(str(tmp_path), normalized=True)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"config\.json is not JSON"):
        load_release(str(tmp_path))


def test_a_vae_without_quantizer_loads_and_quantizes_as_the_release(tmp_path: Path) -> None:
    model = tiny()
    vae = {key: value for key, value in model.state_dict().items() if not key.startswith("lapq_")}
    missing, unexpected = model.load_state_dict(vae, strict=False)
    assert not unexpected
    assert all(key.startswith("lapq_") for key in missing)
    save_file({key: value.contiguous() for key, value in vae.items()}, tmp_path / "vae.safetensors")
    loaded = load_release(str(tmp_path / "vae.safetensors"))
    mean = model.encode(video()).mean_BCthw
    assert torch.equal(loaded.quantize(mean).ids_BthwQ, model.quantize(mean).ids_BthwQ)
    for key, value in loaded.state_dict().items():
        if key.endswith(FIXED):
            assert torch.equal(value, model.state_dict()[key])


def test_the_statistics_of_wan_are_for_16_channels(tmp_path: Path) -> None:
    path = save(tiny(), tmp_path / "a.pt")
    with pytest.raises(TokenizerError, match="its latents have 4 channels, and there are statistics of 16"):
        load_release(path, normalized=True)
    path = save(build_release(replace(VaeSizes(**TINY), z_dim=16)), tmp_path / "b.pt")
    assert load_release(path, normalized=True).statistics == WAN_STATISTICS
    with pytest.raises(ValueError, match="statistics of 4 channels are wanted"):
        build_release(VaeSizes(**TINY), None, WAN_STATISTICS)


def test_other_weights_are_refused_by_name(tmp_path: Path) -> None:
    path, state = tmp_path / "a.pt", tiny().state_dict()
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(TokenizerError, match=r"not those of PyraTok's release or of the VAE of Wan 2\.1 .*conv_in"):
        load_release(str(path))
    name = "lapq_quantizer.layers.2.query_norm.weight"
    torch.save({key: value for key, value in state.items() if key != name}, path)
    with pytest.raises(TokenizerError, match=f"1 missing \\({name}\\)"):
        load_release(str(path))
    torch.save({**state, "encoder.more": torch.zeros(1)}, path)
    with pytest.raises(TokenizerError, match=r"1 not known \(encoder\.more\)"):
        load_release(str(path))
    torch.save({**state, "decoder.conv_out.bias": torch.zeros(4)}, path)
    with pytest.raises(TokenizerError, match=r"decoder\.conv_out\.bias is"):
        load_release(str(path))


@pytest.mark.parametrize(
    ("dims", "said"),
    [
        ({"attn_scales": [0.5]}, "attention is in the middle alone"),
        ({"temperal_downsample": [True]}, "temperal_downsample one shorter than dim_mult"),
        ({"dim_mult": []}, "temperal_downsample one shorter than dim_mult"),
        ({"num_res_blocks": 0}, "sizes from 1 on"),
        ({"base_dim": 5, "dim_mult": [1, 1, 2, 4]}, "the decoder halves its widths, which must be even"),
    ],
)
def test_sizes_that_cannot_be_are_refused(dims: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build_vae(**dims)


def test_frames_and_latents_of_other_shapes_are_refused() -> None:
    vae = tiny()
    for shape in ((1, 3, 5, 12, 16), (1, 4, 5, 16, 16), (3, 5, 16, 16), (1, 3, 0, 16, 16), (0, 3, 1, 16, 16)):
        with pytest.raises(ValueError, match=r"frames are \(B,3,T,H,W\), their sides multiples of 8"):
            vae.encode(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"no taps of this encoder: \['down9'\], it has down0"):
        vae.encode(video(), ("down9", "mid"))
    with pytest.raises(ValueError, match="a clip has one frame or more: push some before the end"):
        EncoderStream(vae).finish()
    for shape in ((1, 3, 1, 2, 2), (4, 1, 2, 2), (1, 4, 0, 2, 2)):
        with pytest.raises(ValueError, match=r"latents are \(B,4,t,h,w\), none of them 0"):
            vae.decode(torch.zeros(shape))
    with pytest.raises(ValueError, match="parts have one latent frame or more"):
        vae.decode(torch.zeros(1, 4, 1, 2, 2), 0)
