"""Terms of a pyramid's training are what their formulas say, reach all projections, and fall as they are followed."""

from collections.abc import Sequence
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tokenmill.tokenizers.pyratok_autoregression import BitPredictor, LevelSites, bit_loss, sites_of, window_of
from tokenmill.tokenizers.pyratok_levels import pooled, spread
from tokenmill.tokenizers.pyratok_losses import (
    LossWeights,
    PredictorSizes,
    PyramidTraining,
    bit_divergence,
    codebook_terms,
    drift_loss,
    fit_projections,
    measured_statistics,
    reconstruction_loss,
    ssim,
)
from tokenmill.tokenizers.pyratok_pyramid import Pyramid, PyramidSizes, build_pyramid
from tokenmill.tokenizers.pyratok_quantizer import LatentStatistics
from tokenmill.tokenizers.pyratok_text import EmbeddedText
from tokenmill.tokenizers.pyratok_vae import VaeSizes

from .pyratok_kit import draw, filled

SIZES = VaeSizes(base_dim=4, z_dim=4, dim_mult=(1, 1, 2, 2), num_res_blocks=1)
GRIDS = pytest.mark.parametrize("native_grid", [False, True])
TERMS = ("reconstruction", "codebook", "autoregression", "drift")
TEXTS = ["a red square moves left", "a blue one moves up"]


pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(*, native_grid: bool = False) -> Pyramid:
    """A pyramid of four levels of 4 bits, whose weights are a function of their names."""
    statistics = LatentStatistics(mean=(0.5, 0, -0.5, 1), std=(2, 1, 0.5, 1))
    pyramid = PyramidSizes(native_grid=native_grid, text_width=6, text_vocabulary=50)
    return filled(build_pyramid(SIZES, pyramid, statistics), "pyramid.")


def video(num_frames: int = 5, height: int = 16, width: int = 24, batch: int = 2) -> torch.Tensor:
    """Frames (B,3,T,H,W) in [-1,1]."""
    return draw("video", (batch, 3, num_frames, height, width)).tanh()


def only(**weights: float) -> LossWeights:
    return LossWeights(**{**dict.fromkeys(TERMS, 0.0), **weights})


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def direct_ssim(one_HW: np.ndarray, other_HW: np.ndarray) -> float:
    """The mean over all windows that lie inside, each by its own weighted means and variances."""
    sizes = [min(11, side) - 1 + min(11, side) % 2 for side in one_HW.shape]
    weights = [np.exp(-0.5 * ((np.arange(size) - size // 2) / 1.5) ** 2) for size in sizes]
    window = np.outer(*weights) / np.outer(*weights).sum()
    found = []
    for y, x in product(*(range(side - size + 1) for side, size in zip(one_HW.shape, sizes, strict=True))):
        a, b = (image[y : y + sizes[0], x : x + sizes[1]] for image in (one_HW, other_HW))
        mean_a, mean_b = (window * a).sum(), (window * b).sum()
        var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
        both = (window * (a - mean_a) * (b - mean_b)).sum()
        top = (2 * mean_a * mean_b + 0.0004) * (2 * both + 0.0036)
        found.append(top / ((mean_a**2 + mean_b**2 + 0.0004) * (var_a + var_b + 0.0036)))
    return float(np.mean(found))


@pytest.mark.parametrize("size", [(16, 14), (6, 20), (1, 3), (11, 12)])
def test_similarity_is_that_of_its_formula(size: tuple[int, int]) -> None:
    one = draw("one", (2, 3, 2, *size)).tanh()
    other = (one + 0.5 * draw("other", (2, 3, 2, *size))).clamp(-1, 1)
    images = [x.double().flatten(0, 2).numpy() for x in (one, other)]
    wanted = np.mean([direct_ssim(a, b) for a, b in zip(*images, strict=True)])
    assert ssim(one, other).item() == pytest.approx(wanted, abs=1e-5)
    assert ssim(one, one).item() == pytest.approx(1, abs=1e-6)


def test_reconstruction_is_the_sum_of_its_parts() -> None:
    one, other = video().requires_grad_(), video().roll(1, 3)
    loss = reconstruction_loss(one, other)
    assert loss.item() == pytest.approx(((one - other).abs().mean() + 1 - ssim(one, other)).item())
    loss.backward()
    assert one.grad is not None
    assert one.grad.isfinite().all()
    more = reconstruction_loss(one, other, lambda a, b: (a - b).square().mean())
    assert (more - loss).item() == pytest.approx((one - other).square().mean().item(), rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert ssim(one, other).item() == pytest.approx(ssim(one.float(), other).item(), abs=1e-6)


def divergence(p: Any, q: Any) -> Any:
    """KL of bits, by numpy."""
    return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))


def test_divergence_of_bits_is_its_closed_form() -> None:
    p, q = torch.tensor([0.2, 0.5, 0.9]), torch.tensor([0.3, 0.5, 0.1])
    torch.testing.assert_close(bit_divergence(p, q), torch.tensor(divergence(p.numpy(), q.numpy())))
    assert bit_divergence(torch.tensor(1.0), torch.tensor(0.0)).item() == pytest.approx(np.log(1e6), rel=1e-3)


@GRIDS
def test_codebook_terms_are_those_of_their_formulas(*, native_grid: bool) -> None:
    model = tiny(native_grid=native_grid)
    with torch.no_grad():
        text = model.embed_texts([TEXTS[0], None])
        found = model.quantize(model.encode(video(), model.taps, in_groups=False), text)
        terms = {name: term.item() for name, term in codebook_terms(model, found, text).items()}
        without = codebook_terms(model, found, None)
        target = model.text_logits(text).sigmoid().double().numpy()
    assert list(terms) == ["commitment", "entropy", "levels", "text", "usage"]
    assert {name: term.item() for name, term in without.items()} == {name: terms[name] for name in without}
    assert list(without) == ["commitment", "entropy", "levels"]
    y, signs, guesses = ([x.double().numpy() for x in part] for part in (found.y, found.signs, found.guesses))
    chance = [1 / (1 + np.exp(-x)) for x in guesses]
    sharp = [1 / (1 + np.exp(-10 * x)) for x in y]
    entropy = [_entropy(p).mean() - _entropy(p.mean((0, 2, 3, 4))).mean() + np.log(2) for p in sharp]
    steps = zip(pairwise(chance), model.strides.step_ratios, strict=True)
    before = [(b, pooled(torch.from_numpy(a), ratio).numpy()) for (a, b), ratio in steps]
    wanted = {
        "commitment": sum(((a - b) ** 2).mean() / 4**i for i, (a, b) in enumerate(zip(y, signs, strict=True))),
        "entropy": sum(entropy),
        "levels": sum(divergence(b, a).mean() for b, a in before),
        "text": sum(divergence(p[:1], target[:1, :, None, None, None]).mean() for p in chance),
        "usage": sum(divergence(p.mean((0, 2, 3, 4)), target[0]).mean() for p in chance),
    }
    for name, value in wanted.items():
        assert terms[name] == pytest.approx(value, rel=2e-4), name


def _entropy(p: np.ndarray) -> np.ndarray:
    p = p.clip(1e-6, 1 - 1e-6)
    return -(p * np.log(p) + (1 - p) * np.log(1 - p))


def test_drift_is_the_divergence_of_gaussians() -> None:
    one, other, std = draw("a", (1, 2, 1, 1, 3)), draw("b", (1, 2, 1, 1, 3)), torch.tensor([0.5, 2.0])
    both = [torch.distributions.Normal(x, std.view(-1, 1, 1, 1)) for x in (one, other)]
    wanted = torch.distributions.kl_divergence(*both).mean()
    torch.testing.assert_close(drift_loss(one, other, std), wanted)


@GRIDS
@pytest.mark.parametrize("name", TERMS)
def test_each_term_alone_reaches_all_projections(name: str, *, native_grid: bool) -> None:
    training = PyramidTraining(tiny(native_grid=native_grid), only(**{name: 1.0}))
    terms = training(video(), None, seeded())
    assert list(terms) == [name]
    training.total(terms).backward()
    assert_reached(training.model, ("proj.weight",))
    assert training.model.encoder.conv_in.weight.grad.any()  # pyright: ignore


@GRIDS
@pytest.mark.parametrize("name", ["commitment", "entropy", "levels", "text", "usage"])
def test_each_codebook_term_alone_reaches_all_projections(name: str, *, native_grid: bool) -> None:
    model = tiny(native_grid=native_grid)
    text = model.embed_texts(TEXTS)
    found = model.quantize(model.encode(video(), model.taps, in_groups=False), text)
    codebook_terms(model, found, text)[name].backward()
    assert_reached(model, ("proj.weight", "text.context.weight", "text.out.weight"))
    assert model.pyramid.words.table.weight.grad.any()  # pyright: ignore
    assert (model.pyramid.text_target.weight.grad is not None) == (name in ("text", "usage"))  # pyright: ignore


def assert_reached(model: Pyramid, names: Sequence[str]) -> None:
    for level, name in product(model.levels, names):
        gradient = level.get_parameter(name).grad
        assert gradient is not None
        assert gradient.isfinite().all()
        assert gradient.any()


@GRIDS
def test_all_weights_but_those_of_the_posterior_are_trained(*, native_grid: bool) -> None:
    training = PyramidTraining(tiny(native_grid=native_grid))
    training.total(training(video(), TEXTS, seeded())).backward()
    idle = [key for key, value in training.named_parameters() if value.grad is None or not value.grad.any()]
    posterior = ("model.encoder.norm_out.", "model.encoder.conv_out.", "model.quant_conv.", "reference.")
    assert all(key.startswith(posterior) for key in idle)


def test_the_total_is_weighted_as_in_the_paper() -> None:
    training = PyramidTraining(tiny())
    terms = {name: torch.tensor(10.0**i) for i, name in enumerate(TERMS)}
    assert training.total(terms).item() == pytest.approx(2.5 + 25 + 150 + 600)
    assert training.total({"drift": torch.tensor(2.0)}).item() == pytest.approx(1.2)


def test_bytes_and_a_seed_give_the_same_terms() -> None:
    training = PyramidTraining(tiny(), None, PredictorSizes(max_sites=2))
    grey = (video() * 127.5 + 127.5).round().to(torch.uint8)
    with torch.no_grad():
        found = training(grey, TEXTS, seeded())
        assert found == training(grey, TEXTS, seeded())
        for name, term in training(grey / 127.5 - 1, TEXTS, seeded()).items():
            torch.testing.assert_close(term, found[name], rtol=1e-4, atol=1e-6)
        others = [training(grey, TEXTS, seeded(seed)) for seed in range(4)]
        assert len({other["autoregression"].item() for other in others}) > 1
        assert len({other["drift"].item() for other in others}) == 1


def test_no_text_is_none_at_all() -> None:
    training = PyramidTraining(tiny())
    with torch.no_grad():
        without = training(video(), None, seeded())
        assert training(video(), [None, None], seeded()) == without
        some, all_of_them = training(video(), [None, TEXTS[1]], seeded()), training(video(), TEXTS, seeded())
    for name in TERMS:
        assert len({without[name].item(), some[name].item(), all_of_them[name].item()}) == 3


def test_the_reference_stays_where_the_encoder_began() -> None:
    training = PyramidTraining(tiny(), only(drift=1.0))
    before = tiny().encode(video()).mean_BCthw.detach()
    optimizer = torch.optim.SGD(training.parameters(), lr=0.1)
    training.total(training(video())).backward()
    optimizer.step()
    assert training.reference is not None
    assert not any(p.requires_grad for p in training.reference.parameters())
    torch.testing.assert_close(training.reference.encode(video()).mean_BCthw, before)
    assert not torch.allclose(training.model.encode(video()).mean_BCthw, before)
    assert {key.partition(".")[0] for key in training.state_dict()} == {"model", "reference"}
    assert PyramidTraining(tiny(), only(codebook=1.0)).reference is None


@pytest.mark.parametrize("shape", [(1, 3, 4, 16, 16), (3, 5, 16, 16), (1, 3, 0, 16, 16)])
def test_frames_of_other_lengths_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"training takes frames \(B,3,1\+4k,H,W\)"):
        PyramidTraining(tiny())(torch.zeros(shape))


def levels_of(seed: str, *lengths: int) -> list[LevelSites]:
    return [
        LevelSites(signs_BNC=draw(f"{seed}{i}", (2, n, 4)).sign(), places_N3=torch.arange(3.0 * n).view(n, 3))
        for i, n in enumerate(lengths)
    ]


def test_an_id_is_foretold_by_what_is_before_it_alone() -> None:
    predictor = filled(BitPredictor(4, 3, None), "predictor.")
    levels = levels_of("x", 3, 2, 4)
    before = torch.cat(predictor(levels, None), dim=1)
    assert before.shape == (2, 9, 4)
    places = [(i, n) for i, length in enumerate((3, 2, 4)) for n in range(length)]
    for position, (i, n) in enumerate(places):
        changed = levels_of("x", 3, 2, 4)
        changed[i].signs_BNC[0, n] *= -1
        after = torch.cat(predictor(changed, None), dim=1)
        assert torch.equal(after[:, : position + 1], before[:, : position + 1])
        assert torch.equal(after[1], before[1])
        assert all((after[0, later] != before[0, later]).any() for later in range(position + 1, 9))


def test_ids_are_foretold_by_texts_but_not_by_padding() -> None:
    predictor = filled(BitPredictor(4, 2, 5), "predictor.")
    levels = levels_of("x", 2, 3)
    words = draw("words", (2, 3, 5))
    mask = torch.tensor([[True, True, False], [False, False, False]])
    text = EmbeddedText(text_BLE=words, mask_BL=mask)
    other = EmbeddedText(text_BLE=torch.where(mask[..., None], words, 7.0), mask_BL=mask)
    moved = EmbeddedText(text_BLE=-words, mask_BL=mask)
    found = torch.cat(predictor(levels, text), dim=1)
    torch.testing.assert_close(torch.cat(predictor(levels, other), dim=1), found)
    torch.testing.assert_close(found[1], torch.cat(predictor(levels, None), dim=1)[1])
    assert (torch.cat(predictor(levels, moved), dim=1)[0] - found[0]).abs().amin(-1).min() > 0


def test_the_loss_of_bits_is_their_cross_entropy() -> None:
    levels = levels_of("x", 1, 2)
    logits = [draw(f"logits{i}", (2, n, 4)) for i, n in enumerate((1, 2))]
    pairs = [(1 / (1 + np.exp(-x.numpy())), sites.signs_BNC.numpy()) for x, sites in zip(logits, levels, strict=True)]
    wanted = np.concatenate([-np.log(np.where(s > 0, p, 1 - p)).ravel() for p, s in pairs]).mean()
    assert bit_loss(logits, levels).item() == pytest.approx(wanted, rel=1e-5)


def test_a_window_is_the_same_place_of_all_levels() -> None:
    fine = torch.arange(9 * 4 * 8.0).view(1, 1, 9, 4, 8)
    coarse = torch.arange(3 * 2 * 4.0).view(1, 1, 3, 2, 4)
    window = (slice(0, 2), slice(1, 2), slice(1, 3))
    found, latents = sites_of(fine, (4, 2, 2), window), sites_of(coarse, (1, 1, 1), window)
    assert latents.signs_BNC.flatten().tolist() == [5, 6, 13, 14]
    assert torch.equal(found.signs_BNC.flatten(), fine[0, 0, :5, 2:4, 2:6].flatten())
    assert latents.places_N3.tolist() == [[0, 1, 1], [0, 1, 2], [1, 1, 1], [1, 1, 2]]
    assert found.places_N3[-1].tolist() == [1, 1.5, 2.5]
    later = sites_of(fine, (4, 2, 2), (slice(2, 3), *window[1:]))
    assert torch.equal(later.signs_BNC.flatten(), fine[0, 0, 5:, 2:4, 2:6].flatten())


@pytest.mark.parametrize(("most", "sides"), [(1000, (5, 6, 8)), (100, (5, 3, 4)), (8, (2, 2, 2)), (1, (1, 1, 1))])
def test_windows_have_so_many_sites_at_most_and_lie_anywhere(most: int, sides: tuple[int, ...]) -> None:
    generator = seeded()
    windows = [window_of((5, 6, 8), most, generator) for _ in range(60)]
    for axis, (side, whole) in enumerate(zip(sides, (5, 6, 8), strict=True)):
        found = {(window[axis].start, window[axis].stop - window[axis].start) for window in windows}
        assert found == {(start, side) for start in range(whole - side + 1)}


@pytest.mark.parametrize(("native_grid", "most", "num_latents"), [(False, 4, 4), (True, 128, 2), (True, 1, 1)])
def test_no_level_shows_more_sites_than_are_asked_for(*, native_grid: bool, most: int, num_latents: int) -> None:
    training = PyramidTraining(tiny(native_grid=native_grid), only(autoregression=1.0), PredictorSizes(max_sites=most))
    seen: list[int] = []
    assert training.predictor is not None
    training.predictor.register_forward_pre_hook(lambda _, x: seen.extend(s.signs_BNC.shape[1] for s in x[0]))
    training(video(9), None, seeded())
    assert max(seen) <= max(most, 64 * native_grid)  # those of one latent are always there
    assert seen[-1] == num_latents


def test_statistics_are_those_of_the_latents_of_all_clips() -> None:
    model = tiny()
    clips = [video(5), video(9, 8, 8, 1)]
    z_CN = torch.cat([model.encode(x).mean_BCthw.movedim(1, 0).flatten(1) for x in clips], dim=1)
    found = measured_statistics(model, iter(clips))
    torch.testing.assert_close(torch.tensor(found.mean), z_CN.mean(1))
    torch.testing.assert_close(torch.tensor(found.std), z_CN.std(1, correction=0))
    with pytest.raises(ValueError, match="statistics are measured of one clip or more"):
        measured_statistics(model, [])


@GRIDS
def test_fitted_projections_are_least_squares(*, native_grid: bool) -> None:
    model, clips = tiny(native_grid=native_grid), [video(5), video(9, 32, 32).flip(3)]
    model.statistics = measured_statistics(model, clips)
    fit_projections(model, clips)
    ratios = zip(model.strides.tap_ratios, model.strides.latent_ratios, strict=True)
    for tap, level, (of_tap, of_latents) in zip(model.taps, model.levels, ratios, strict=True):
        inputs, wanted, found = [], [], []
        for x in clips:
            encoded = model.encode(x, (tap,))
            z = spread(model.statistics.normalized(encoded.mean_BCthw), of_latents)
            inputs.append(level.inputs(encoded.taps[tap], of_tap).flatten(0, 3))
            wanted.append(z.movedim(1, -1).flatten(0, 3))
            found.append(level(encoded.taps[tap], of_tap).movedim(1, -1).flatten(0, 3))
        x_NC, z_NC, guess_NC = (torch.cat(part).detach().double() for part in (inputs, wanted, found))
        x_NC = F.pad(x_NC, (0, 1), value=1)
        best_NC = x_NC @ torch.linalg.lstsq(x_NC, z_NC).solution
        torch.testing.assert_close(guess_NC, best_NC, rtol=0, atol=1e-2)  # the ridge
        assert (guess_NC - z_NC).square().mean() < z_NC.square().mean()
    with pytest.raises(ValueError, match="projections are fitted to one clip or more"):
        fit_projections(model, [])


def squares(generator: torch.Generator) -> tuple[torch.Tensor, list[str]]:
    """Four clips (3,5,16,16) of a bright square that moves, and what they show."""
    clips, texts = torch.full((4, 3, 5, 16, 16), -0.5), []
    for clip in clips:
        channel, row, column, goes_down = (int(torch.randint(n, (), generator=generator)) for n in (3, 6, 6, 2))
        for t in range(5):
            y, x = row + goes_down * t, column + (1 - goes_down) * t
            clip[channel, t, y : y + 6, x : x + 6] = 1
        texts.append(f"a {('red', 'green', 'blue')[channel]} square moves {('right', 'down')[goes_down]}")
    return clips, texts


def test_thirty_steps_lower_the_total() -> None:
    torch.manual_seed(0)
    sizes = VaeSizes(base_dim=8, z_dim=8, dim_mult=(1, 1, 2), num_res_blocks=1, temperal_downsample=(True, True))
    model, generator = build_pyramid(sizes, PyramidSizes(text_width=8)), seeded()
    fit_projections(model, [squares(generator)[0] for _ in range(2)])
    training = PyramidTraining(model, None, PredictorSizes(width=32, depth=1))
    optimizer = torch.optim.AdamW(training.parameters(), lr=3e-3)
    totals: list[float] = []
    for _ in range(30):
        loss = training.total(training(*squares(generator), generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals.append(loss.item())
    assert np.mean(totals[-5:]) < 0.7 * np.mean(totals[:3])
