"""The VAE and the quantizer give what a second, plain rendering of the specification gives, at other sizes too."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenmill.tokenizers.pyratok import PyraTok, build_release
from tokenmill.tokenizers.pyratok_quantizer import ResidualSignQuantizer
from tokenmill.tokenizers.pyratok_vae import VaeSizes

from .pyratok_kit import CASES, TINY, certain, draw, filled, golden

ROOT = Path(__file__).parent.parent.parent
OTHER_SIZES = {
    "as released, narrow": {"base_dim": 6, "z_dim": 16},
    "all levels halve time": {"base_dim": 4, "dim_mult": (1, 3, 2), "temperal_downsample": (True, True)},
    "time is halved first": {"base_dim": 8, "dim_mult": (2, 1, 4), "temperal_downsample": (True, False)},
    "time stays": {"base_dim": 8, "z_dim": 2, "dim_mult": (3, 1), "temperal_downsample": (False,), "num_res_blocks": 3},
    "one level": {"base_dim": 5, "z_dim": 6, "dim_mult": (3,), "temperal_downsample": (), "num_res_blocks": 1},
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def plain() -> Any:
    """The specification in plain PyTorch, which benchmarks compare with."""
    spec = importlib.util.spec_from_file_location("plain_pyratok", ROOT / "benchmarks" / "plain_pyratok.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.PlainPyraTok


def model_of(name: str) -> PyraTok:
    """A model of one of the other sizes, with weights that follow from its name."""
    sizes = {"z_dim": 4} | OTHER_SIZES[name]
    return filled(build_release(VaeSizes(**sizes)), f"{name}.")


def assert_near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)


@torch.no_grad()
def test_the_plain_rendering_gives_the_golden_values(plain: Any) -> None:
    case, wanted = CASES["wan_tiny"], golden("wan_tiny")
    oracle = plain(filled(build_release(VaeSizes(**TINY)), case["prefix"]).state_dict())
    mean, logvar, taps = oracle.encode(draw(case["input_keys"]["video"], (1, 3, 9, 32, 32)).tanh())
    for name, found in {"mean": mean, "logvar": logvar, **{f"tap_{tap}": taps[tap] for tap in taps}}.items():
        assert_near(found, wanted[name])
    _, ids, loss, margins = oracle.quantize(mean)
    sure = certain(wanted["margin"])
    assert torch.equal(ids[sure], wanted["indices"].long()[sure])
    assert_near(margins, wanted["margin"])
    torch.testing.assert_close(loss, wanted["loss_eval"], rtol=1e-5, atol=0)
    torch.testing.assert_close(oracle.decode(wanted["quantized"]), wanted["recon"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("num_frames", [1, 5, 9, 17])
@pytest.mark.parametrize("name", OTHER_SIZES)
@torch.no_grad()
def test_posterior_features_ids_and_frames_are_those_of_the_plain_rendering(
    plain: Any, name: str, num_frames: int
) -> None:
    model = model_of(name)
    oracle = plain(model.state_dict())
    _, rows, columns = model.sizes.stride_thw
    x = draw(name, (2, 3, num_frames, 3 * rows, 2 * columns)).tanh()
    mean, logvar, taps = oracle.encode(x)
    for in_groups in (True, False):
        found = model.encode(x, model.encoder.tap_names, in_groups=in_groups)
        assert_near(found.mean_BCthw, mean)
        assert_near(found.logvar_BCthw, logvar)
        assert found.taps.keys() == taps.keys()
        for tap, features in taps.items():
            assert_near(found.taps[tap], features)
        quantized = model.quantize(found.mean_BCthw)
        values, ids, _, margins = oracle.quantize(mean)
        sure = certain(margins)
        assert sure.float().mean() > 0.9
        assert torch.equal(quantized.ids_BthwQ[sure], ids[sure])
        frames = model.decode(values, 1 if in_groups else None)
        torch.testing.assert_close(frames, oracle.decode(values), rtol=0, atol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 0.4])
@pytest.mark.parametrize(("num_bits", "num_stages", "heads"), [(16, 4, 2), (6, 1, 3), (9, 5, 1)])
def test_values_ids_losses_and_gradients_are_those_of_the_plain_quantizer(
    plain: Any, num_bits: int, num_stages: int, heads: int, scale: float
) -> None:
    weights = {"commitment_weight": 0.7, "entropy_weight": 0.3, "inv_temperature": 5.0}
    quantizer = filled(
        ResidualSignQuantizer(
            num_bits,
            num_stages,
            text_embed_dim=7,
            text_condition_heads=heads,
            text_condition_scale=scale,
            **weights,
        ),
        "other.",
    )
    state = {f"lapq_quantizer.{key}": value for key, value in quantizer.state_dict().items()}
    oracle = plain(state, heads=heads, text_scale=scale, **weights)
    z, text = draw("z", (2, num_bits, 3, 4, 5)).requires_grad_(), draw("text", (2, 6, 7))
    found = quantizer.train()(z, text)
    values, ids, loss, margins = oracle.quantize(z, text, is_training=True)
    sure = certain(margins)
    assert sure.float().mean() > 0.9
    assert torch.equal(found.ids_BthwQ[sure], ids[sure])
    all_sure = sure.all(-1).unsqueeze(1).expand_as(z)
    torch.testing.assert_close(found.values_BCthw[all_sure], values[all_sure], rtol=0, atol=1e-6)
    torch.testing.assert_close(found.loss, loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(quantizer.eval()(z, text).loss, oracle.quantize(z, text)[2], rtol=1e-5, atol=0)
    cotangent = draw("cotangent", tuple(z.shape))
    for one, other in ((found.values_BCthw * cotangent, values * cotangent), (found.loss, loss)):
        (gradient,), (wanted,) = (torch.autograd.grad(y.sum(), z, retain_graph=True) for y in (one, other))
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)
