"""The quantizer gives the golden ids, losses and gradients; its ids are bits, and come back as the same values."""

import math
from typing import Any

import pytest
import torch

from tokenmill.schemas.errors import TokenizerError
from tokenmill.tokenizers.pyratok_quantizer import (
    WAN_STATISTICS,
    LatentStatistics,
    Quantized,
    ResidualSignQuantizer,
    entropy_loss,
    fixed_buffers,
    ids_of,
    signs_of,
)

from .pyratok_kit import CASES, certain, draw, filled, golden, quantizer_of

NAMES = [name for name, case in CASES.items() if case["kind"] == "residual_lapq"]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


pytestmark = pytest.mark.usefixtures("one_thread")


def quantizer_and_inputs(name: str) -> tuple[ResidualSignQuantizer, torch.Tensor, torch.Tensor | None]:
    """The quantizer of a golden case, its latents and its text."""
    case = CASES[name]
    quantizer = filled(quantizer_of(case["cfg"]), case["prefix"]).eval()
    quantizer.text_condition_scale = case["text_condition_scale_attr"]
    z = draw(case["input_keys"]["z"], case["z_shape"], case["z_scale"])
    z.view(-1)[:3] = torch.tensor(case["z_first3"])
    text = draw(case["input_keys"]["text"], case["text_shape"]) if case["text_shape"] else None
    return quantizer, z.requires_grad_(), text


def latents(num_channels: int, scale: float, seed: int = 0) -> torch.Tensor:
    """Normal latents (2,C,3,4,5)."""
    return scale * torch.randn(2, num_channels, 3, 4, 5, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NAMES)
def test_the_state_dict_is_the_released_one(name: str) -> None:
    state = quantizer_of(CASES[name]["cfg"]).state_dict()
    found = {key: [list(value.shape), str(value.dtype).removeprefix("torch.")] for key, value in state.items()}
    assert found == CASES[name]["keys"]
    assert list(found) == list(CASES[name]["keys"])


@pytest.mark.parametrize("name", NAMES)
def test_ids_values_and_losses_are_the_golden_ones(name: str) -> None:
    quantizer, z, text = quantizer_and_inputs(name)
    wanted = golden(name)
    found = quantizer(z, text)
    sure = certain(wanted["margin"])
    assert sure.float().mean() > 0.9
    assert found.ids_BthwQ.dtype == torch.int64
    assert torch.equal(found.ids_BthwQ[sure], wanted["indices"].long()[sure])
    all_sure = sure.all(-1).unsqueeze(1).expand_as(z)
    torch.testing.assert_close(found.values_BCthw[all_sure], wanted["quantized"][all_sure], rtol=0, atol=1e-6)
    torch.testing.assert_close(found.margins_BthwQ, wanted["margin"], rtol=0, atol=2e-6)
    torch.testing.assert_close(found.loss, wanted["loss_eval"], rtol=1e-5, atol=0)
    torch.testing.assert_close(quantizer.train()(z, text).loss, wanted["loss_train"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_the_golden_ones(name: str) -> None:
    quantizer, z, text = quantizer_and_inputs(name)
    wanted = golden(name)
    cotangent = draw(CASES[name]["input_keys"]["cotangent"], tuple(z.shape))
    (of_values,) = torch.autograd.grad(quantizer(z, text).values_BCthw, z, cotangent)
    torch.testing.assert_close(of_values, wanted["grad_quantized"], **TOLERANCE)
    (of_loss,) = torch.autograd.grad(quantizer.train()(z, text).loss, z)
    far = ~torch.isclose(of_loss, wanted["grad_loss_train"], **TOLERANCE)
    if name == "c16_text07":
        # Beta of 100 magnifies the rounding of the attention: in float64 as many are as far from the golden ones.
        assert far.sum() <= 4
        torch.testing.assert_close(of_loss, wanted["grad_loss_train"], rtol=4e-4, atol=4e-5)
    else:
        assert not far.any()


def test_text_without_scale_has_no_effect() -> None:
    quantizer, z, text = quantizer_and_inputs("c16_release")
    with_text, without = quantizer(z, text), quantizer(z)
    assert torch.equal(with_text.ids_BthwQ, without.ids_BthwQ)
    assert torch.equal(with_text.loss, without.loss)
    quantizer.text_condition_scale = 0.7
    assert (quantizer(z, text).ids_BthwQ != without.ids_BthwQ).any()


def test_padding_behind_a_mask_changes_no_id() -> None:
    quantizer, z, text = quantizer_and_inputs("c16_text07")
    assert text is not None
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[:, 6:] = False
    padded = text.clone()
    padded[:, 6:] = 9.0
    short, masked, unmasked = quantizer(z, text[:, :6]), quantizer(z, padded, mask), quantizer(z, padded)
    torch.testing.assert_close(masked.margins_BthwQ, short.margins_BthwQ, rtol=0, atol=2e-6)
    assert torch.equal(masked.ids_BthwQ, short.ids_BthwQ)
    assert (unmasked.ids_BthwQ != short.ids_BthwQ).any()


@pytest.mark.parametrize("num_stages", range(1, 7))
def test_without_text_it_is_a_uniform_quantizer_of_each_channel(num_stages: int) -> None:
    quantizer = ResidualSignQuantizer(16, num_stages)
    z = latents(16, 1.5, num_stages)
    step, most = 2.0 ** (2 - num_stages), 2 - 2.0 ** (1 - num_stages)
    values = quantizer(z).values_BCthw
    assert torch.equal(values, ((z / step).floor() * step + step / 2).clamp(-most, most))
    assert (values - z).abs()[z.abs() <= 2].max() <= 2.0 ** (1 - num_stages)


def test_each_further_stage_lowers_the_largest_error() -> None:
    quantizer, z = ResidualSignQuantizer(8), latents(8, 1.0).clamp(-2, 2)
    ids = quantizer(z).ids_BthwQ
    errors = [(quantizer.decode(ids[..., :num]) - z).abs().max() for num in range(1, 5)]
    assert all(error <= 2.0**-stage for stage, error in enumerate(errors))
    assert errors == sorted(errors, reverse=True)


def test_gradients_pass_as_often_as_stages_count() -> None:
    quantizer, z = ResidualSignQuantizer(16), latents(16, 1.5).requires_grad_()
    (gradient,) = torch.autograd.grad(quantizer(z).values_BCthw.sum(), z)
    assert torch.equal(gradient, torch.full_like(z, 1.875))


def test_all_ids_are_bits_with_channel_0_the_highest() -> None:
    ids = torch.arange(1 << 16)
    assert torch.equal(ids_of(signs_of(ids, 16)), ids)
    assert signs_of(torch.tensor(0x8001), 16).tolist() == [1.0, *[-1.0] * 14, 1.0]
    assert fixed_buffers(4)["bitmask"].tolist() == [8, 4, 2, 1]
    assert torch.equal(ids_of(fixed_buffers(4)["codebook"]), torch.arange(16))


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int32, torch.int64])
@pytest.mark.parametrize("num_stages", [1, 4, 6])
def test_ids_come_back_as_the_very_values(dtype: torch.dtype, num_stages: int) -> None:
    quantizer = ResidualSignQuantizer(16, num_stages)
    found: Quantized = quantizer(latents(16, 1.2))
    assert torch.equal(quantizer.decode(found.ids_BthwQ.to(dtype)), found.values_BCthw)


def test_zero_is_positive_and_what_is_no_number_negative() -> None:
    z = torch.tensor([0.0, -0.0, -1e-30, math.nan, math.inf, -math.inf, 1e-30, 5.0]).view(1, 8, 1, 1, 1)
    found = ResidualSignQuantizer(8, 1)(z)
    assert found.values_BCthw.flatten().tolist() == [1, 1, -1, -1, 1, -1, 1, 1]
    assert found.ids_BthwQ.item() == 0b11001011


def test_entropy_is_lowest_where_bits_are_certain_and_balanced() -> None:
    balanced = torch.tensor([1.0, -1.0]).repeat(8).view(1, 16, 1).expand(1, 16, 4)
    assert entropy_loss(balanced, 100).item() == pytest.approx(0, abs=1e-3)
    assert entropy_loss(torch.ones(1, 16, 4), 100).item() == pytest.approx(4 * math.log(2), abs=1e-3)
    assert entropy_loss(torch.zeros(1, 16, 4), 100).item() == pytest.approx(4 * math.log(2), abs=1e-3)
    weak = (0.5 * balanced).requires_grad_()
    (sharp,) = torch.autograd.grad(entropy_loss(weak, 100), weak)
    (mild,) = torch.autograd.grad(entropy_loss(weak, 5), weak)
    assert not sharp.any()
    assert mild.all()


def test_the_loss_of_one_site_and_one_bit_is_a_number() -> None:
    quantizer = ResidualSignQuantizer(1, 2, text_condition_heads=1).train()
    z = torch.tensor(0.25).view(1, 1, 1, 1, 1).requires_grad_()
    found = quantizer(z)
    found.loss.backward()
    assert z.grad is not None
    assert found.ids_BthwQ.tolist() == [[[[[1, 0]]]]]
    assert z.grad.isfinite().all()


def test_statistics_bring_latents_to_the_range_of_the_quantizer_and_back() -> None:
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (WAN_STATISTICS.mean, WAN_STATISTICS.std))
    z = latents(16, 1.0) * std + mean
    assert (z.abs() > 2).float().mean() > 0.3  # more than a third would be clipped
    normalized = WAN_STATISTICS.normalized(z)
    assert (normalized.abs() > 2).float().mean() < 0.06
    torch.testing.assert_close(WAN_STATISTICS.restored(normalized), z)
    for other in ({"mean": [1.0], "std": []}, {"mean": [1.0], "std": [0.0]}, {"mean": [], "std": []}):
        with pytest.raises(ValueError, match="as many means as deviations, which are above 0"):
            LatentStatistics(**other)


@pytest.mark.parametrize("sizes", [(0,), (17,), (16, 0), (15,)])
def test_other_sizes_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="1 to 16 bits, which the heads divide, and one stage or more"):
        ResidualSignQuantizer(*sizes)


def test_other_shapes_are_refused() -> None:
    quantizer = ResidualSignQuantizer(4, text_embed_dim=3, text_condition_scale=1.0)
    z, text = torch.zeros(2, 4, 1, 1, 1), torch.zeros(2, 5, 3)
    for other in (torch.zeros(2, 3, 1, 1, 1), torch.zeros(4, 1, 1, 1), torch.zeros(2, 4, 0, 1, 1)):
        with pytest.raises(ValueError, match=r"latents are \(B,4,t,h,w\), none of them 0"):
            quantizer(other)
    for other in (text[:1], text[..., :2], text[0], text[:, :0]):
        with pytest.raises(ValueError, match=r"text is \(B,L,E\) with B=2, E=3"):
            quantizer(z, other)
    for mask in (torch.ones(2, 5), torch.ones(2, 4, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"a mask is bool of shape \(2, 5\)"):
            quantizer(z, text, mask)
    with pytest.raises(ValueError, match="a text has one token or more"):
        quantizer(z, text, torch.zeros(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="this quantizer takes no text: make it with text_embed_dim"):
        ResidualSignQuantizer(4, text_condition_scale=1.0)(z, text)


IDS: Any = torch.zeros(1, 1, 2, 2, 4, dtype=torch.int64)


@pytest.mark.parametrize("ids", [IDS.float(), IDS.bool(), IDS.to(torch.int16), IDS[0], torch.cat((IDS, IDS), -1)])
def test_what_is_no_id_is_refused(ids: torch.Tensor) -> None:
    with pytest.raises(TokenizerError, match=r"ids of PyraTok are integers \(B,t,h,w,Q\) of 1 to 4 stages"):
        ResidualSignQuantizer(8).decode(ids)


@pytest.mark.parametrize("ids", [IDS - 1, IDS + 256])
def test_ids_out_of_range_are_refused(ids: torch.Tensor) -> None:
    with pytest.raises(TokenizerError, match="ids of PyraTok are from 0 to 255, found"):
        ResidualSignQuantizer(8).decode(ids)
