"""What a pyramid of PyraTok is trained with (arXiv:2601.16210, 3.2.4): four terms, some of them made operational here.

The paper takes KL between codes, codebook and text embeddings, which are no distributions over a common set. Here all
of them are chances of bits: of a site, by how far its values are from 0, and of a text, by a learned product.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from ..schemas.errors import TokenizerError
from .pyratok_autoregression import BitPredictor, LevelSites, bit_loss, sites_of, window_of
from .pyratok_levels import pooled, spread
from .pyratok_pyramid import Pyramid, QuantizedLevels
from .pyratok_quantizer import LatentStatistics, entropy_loss
from .pyratok_text import EmbeddedText
from .pyratok_vae import WanVae

SSIM_WINDOW, SSIM_SIGMA, SSIM_FLOORS = 11, 1.5, (0.02**2, 0.06**2)  # (0.01 and 0.03 of the range, which is 2)^2
ENTROPY_BETA = 5.0  # how sharp bits are where their entropy is taken; the release's 100 leaves most without gradient
CHANCE_BETA = 0.5  # and where they are compared: KL of sharper ones would outweigh all else
CHANCE_FLOOR = 1e-6
RIDGE = 1e-4  # of the mean square of features, which keeps alike features apart

Perceptual = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossWeights:
    """The weights of the terms, by default those of the paper. A term of weight 0 is not computed."""

    reconstruction: float = 2.5
    codebook: float = 2.5
    autoregression: float = 1.5
    drift: float = 0.6


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictorSizes:
    """What decides the transformer that foretells ids, and how many sites of a level it is given, at most."""

    width: int = 64
    depth: int = 2
    heads: int = 4
    max_sites: int = 256


class PyramidTraining(nn.Module):
    """A pyramid beside what only its training needs. `model` is what is to be saved.

    `text_scale` is how much texts move what is quantized. `perceptual` takes the frames made and the true ones,
    (B,3,T,H,W) in [-1,1]. The encoder as it is given here is kept, frozen, for the drift.
    """

    def __init__(
        self,
        model: Pyramid,
        weights: LossWeights | None = None,
        predictor: PredictorSizes | None = None,
        *,
        text_scale: float = 1.0,
        perceptual: Perceptual | None = None,
    ) -> None:
        super().__init__()
        self.model, self.weights = model.requires_grad_(), weights or LossWeights()
        sizes = predictor or PredictorSizes()
        self.max_sites, self.text_scale, self.perceptual = sizes.max_sites, text_scale, perceptual
        self.reference = frozen_encoder(model) if self.weights.drift else None
        self.predictor = None
        if self.weights.autoregression:
            self.predictor = BitPredictor(
                model.sizes.z_dim,
                len(model.taps),
                model.pyramid_sizes.text_width,
                width=sizes.width,
                depth=sizes.depth,
                heads=sizes.heads,
            )

    def forward(
        self,
        x_BCTHW: torch.Tensor,
        texts: Sequence[str | None] | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, torch.Tensor]:
        """The terms by the names of LossWeights, before they are weighted, of frames (B,3,1+4k,H,W).

        Frames are in [-1,1], or uint8. None is a clip without text. `generator`, one of the CPU, draws which sites the
        autoregressive term sees. ValueError for frames that are not 1+4k.
        """
        every, weights, model = self.model.sizes.stride_thw[0], self.weights, self.model
        if x_BCTHW.ndim != 5 or x_BCTHW.shape[2] % every != 1 % every:
            raise ValueError(f"training takes frames (B,3,1+{every}k,H,W): {tuple(x_BCTHW.shape)=}")
        x_BCTHW = _in_range(x_BCTHW)
        text = None if texts is None or all(text is None for text in texts) else model.embed_texts(texts)
        found = model.quantize(model.encode(x_BCTHW, model.taps, in_groups=False), text, self.text_scale)
        latents = model.restored(found.values_BCthw)
        terms: dict[str, torch.Tensor] = {}
        if weights.reconstruction:
            made_BCTHW = model.decode(latents, None, clamped=False)
            terms["reconstruction"] = reconstruction_loss(made_BCTHW, x_BCTHW, self.perceptual)
        if weights.codebook:
            terms["codebook"] = torch.stack(list(codebook_terms(model, found, text).values())).sum()
        if self.predictor is not None:
            levels = self._sites(found, generator)
            terms["autoregression"] = bit_loss(self.predictor(levels, text), levels)
        if self.reference is not None:
            terms["drift"] = self._drift(x_BCTHW, latents)
        return terms

    def vae_loss(self, x_BCTHW: torch.Tensor) -> torch.Tensor:
        """The squared error of the VAE alone, without levels, of frames as `forward` takes them."""
        mean_BCthw = self.model.encode(x_BCTHW, in_groups=False).mean_BCthw
        return F.mse_loss(self.model.decode(mean_BCthw, None, clamped=False), _in_range(x_BCTHW))

    def begin_levels(self, clips: Sequence[torch.Tensor], *, normalized: bool) -> None:
        """Let levels begin with the VAE as it is: its statistics, if wanted, what they guess, and what drift is from.

        Clips are (B,3,T,H,W).
        """
        if normalized:
            self.model.statistics = measured_statistics(self.model, clips)
        fit_projections(self.model, clips)
        if self.reference is not None:
            self.reference = frozen_encoder(self.model)

    def total(self, terms: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The sum of the terms, weighted."""
        return torch.stack([getattr(self.weights, name) * term for name, term in terms.items()]).sum()

    def _sites(self, found: QuantizedLevels, generator: torch.Generator | None) -> list[LevelSites]:
        """The same place of all levels, one latent's or so large that the finest level has `max_sites` at most.

        Of one latent the last level has a single id, which foretells nothing: that level then has no gradient.
        """
        ratios = self.model.strides.latent_ratios
        most = max(1, self.max_sites // max(every * rows * columns for every, rows, columns in ratios))
        window = window_of(tuple(found.values_BCthw.shape[2:]), most, generator)
        return [sites_of(signs, ratio, window) for signs, ratio in zip(found.signs, ratios, strict=True)]

    def _drift(self, x_BCTHW: torch.Tensor, latents_BCthw: torch.Tensor) -> torch.Tensor:
        assert self.reference is not None
        with torch.no_grad():
            mean_BCthw = self.reference.encode(x_BCTHW, in_groups=False).mean_BCthw.float()
        std = 1.0 if self.model.statistics is None else torch.tensor(self.model.statistics.std)
        return drift_loss(latents_BCthw, mean_BCthw, torch.as_tensor(std, device=mean_BCthw.device))


def _in_range(x_BCTHW: torch.Tensor) -> torch.Tensor:
    """Frames in [-1,1], of such ones or of uint8."""
    return x_BCTHW.float() / 127.5 - 1 if x_BCTHW.dtype == torch.uint8 else x_BCTHW


def frozen_encoder(model: WanVae) -> WanVae:
    """A copy of `model` that encodes and does nothing else, and that training leaves as it is."""
    reference = WanVae.__new__(WanVae)
    nn.Module.__init__(reference)
    reference.sizes = model.sizes
    reference.encoder, reference.quant_conv = copy.deepcopy(model.encoder), copy.deepcopy(model.quant_conv)
    return reference.eval().requires_grad_(False)


def measured_statistics(vae: WanVae, clips: Iterable[torch.Tensor]) -> LatentStatistics:
    """Mean and deviation of each channel of the encoder's means, over clips (B,3,T,H,W); ValueError without any.

    TokenizerError where a channel is constant, or no number.
    """
    moments_3C = None
    with torch.no_grad():
        for x_BCTHW in clips:
            z_CN = vae.encode(x_BCTHW).mean_BCthw.double().movedim(1, 0).flatten(1)
            of_clip = torch.stack((torch.ones_like(z_CN), z_CN, z_CN.square())).sum(-1)
            moments_3C = of_clip if moments_3C is None else moments_3C + of_clip
    if moments_3C is None:
        raise ValueError("statistics are measured of one clip or more")
    mean_C, square_C = moments_3C[1:] / moments_3C[0]
    std_C = (square_C - mean_C.square()).clamp(min=0).sqrt()
    unusable = torch.nonzero(~(std_C > 0) | ~std_C.isfinite()).flatten().tolist()
    if unusable:
        raise TokenizerError(
            f"channels {unusable} of the latents are constant or no numbers over the first clips, and cannot be"
            f" normalized: give other clips or another VAE, or set model.normalized to false"
        )
    return LatentStatistics(mean=tuple(mean_C.tolist()), std=tuple(std_C.tolist()))


def fit_projections(model: Pyramid, clips: Iterable[torch.Tensor]) -> None:
    """Make every level begin with the best linear guess, from its features, of the VAE's normalized latents.

    Least squares over clips (B,3,T,H,W); ValueError without any. A pyramid above a trained VAE is then of use at once.
    """
    sums: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.no_grad():
        for x_BCTHW in clips:
            of_clip = [_products(*pair) for pair in _guesses(model, x_BCTHW)]
            sums = [(a + c, b + d) for (a, b), (c, d) in zip(sums, of_clip, strict=True)] if sums else of_clip
        if not sums:
            raise ValueError("projections are fitted to one clip or more")
        for (squares, products), layer in zip(sums, model.levels, strict=True):
            ridge = RIDGE * squares.diagonal().mean().item() * torch.eye(len(squares), dtype=squares.dtype)
            fitted = torch.linalg.solve(squares.cpu() + ridge, products.cpu())
            layer.proj.weight.copy_(fitted[:-1].T)
            layer.proj.bias.copy_(fitted[-1])


def _guesses(model: Pyramid, x_BCTHW: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Of each level: what its projection takes (N,C'), and the normalized latents (N,C) of these sites."""
    encoded = model.encode(x_BCTHW, model.taps)
    z_BCthw = encoded.mean_BCthw.float()
    z_BCthw = z_BCthw if model.statistics is None else model.statistics.normalized(z_BCthw)
    ratios = zip(model.strides.tap_ratios, model.strides.latent_ratios, strict=True)
    for tap, level, (of_tap, of_latents) in zip(model.taps, model.levels, ratios, strict=True):
        x_BthwC = level.inputs(encoded.taps[tap], of_tap)
        yield x_BthwC.flatten(0, 3), spread(z_BCthw, of_latents).movedim(1, -1).flatten(0, 3)


def _products(x_NC: torch.Tensor, z_NC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x_NC = F.pad(x_NC.double(), (0, 1), value=1)
    return x_NC.T @ x_NC, x_NC.T @ z_NC.double()


def reconstruction_loss(
    frames_BCTHW: torch.Tensor, x_BCTHW: torch.Tensor, perceptual: Perceptual | None = None
) -> torch.Tensor:
    """L1 + (1 - SSIM) of frames in [-1,1], and what `perceptual` adds."""
    frames_BCTHW, x_BCTHW = frames_BCTHW.float(), x_BCTHW.float()
    loss = F.l1_loss(frames_BCTHW, x_BCTHW) + 1 - ssim(frames_BCTHW, x_BCTHW)
    return loss if perceptual is None else loss + perceptual(frames_BCTHW, x_BCTHW)


def ssim(one_BCTHW: torch.Tensor, other_BCTHW: torch.Tensor) -> torch.Tensor:
    """The mean structural similarity (Wang et al. 2004) of frames in [-1,1], channel by channel.

    Windows are gaussian, 11x11, and lie inside the frames; smaller frames have the largest odd window that fits.
    """
    pair = torch.stack((one_BCTHW, other_BCTHW)).float()
    one, other = pair.movedim(3, 1).flatten(1, 3).unsqueeze(2)
    moments = torch.stack((one, other, one * one, other * other, one * other))
    with torch.autocast(moments.device.type, enabled=False):  # variances are differences of near numbers
        mean_1, mean_2, square_1, square_2, product = _blurred(moments.flatten(0, 1)).unflatten(0, (5, -1))
    c1, c2 = SSIM_FLOORS
    covariance = product - mean_1 * mean_2
    variances = square_1 - mean_1 * mean_1 + square_2 - mean_2 * mean_2
    luminance = (2 * mean_1 * mean_2 + c1) / (mean_1 * mean_1 + mean_2 * mean_2 + c1)
    return (luminance * (2 * covariance + c2) / (variances + c2)).mean()


def _blurred(x_N1HW: torch.Tensor) -> torch.Tensor:
    for dim in (2, 3):
        size = min(SSIM_WINDOW, x_N1HW.shape[dim])
        size -= 1 - size % 2
        away = torch.arange(size, dtype=x_N1HW.dtype, device=x_N1HW.device) - size // 2
        weight = (-0.5 * (away / SSIM_SIGMA).square()).exp()
        x_N1HW = F.conv2d(x_N1HW, (weight / weight.sum()).view(1, 1, *((size, 1) if dim == 2 else (1, size))))
    return x_N1HW


def codebook_terms(model: Pyramid, found: QuantizedLevels, text: EmbeddedText | None) -> dict[str, torch.Tensor]:
    """The parts of the codebook's loss by name, each summed over levels; those with text only where there is one.

    All are means over bits and sites:
    `commitment`, the square of how far a level's guess is from the sum up to this level;
    `entropy`, that of the release, a bit's share of it;
    `levels`, KL of the chances of a guess to those of the level before, pooled to its grid;
    `text`, KL of the chances of a guess to those of its text, and `usage`, of their mean over the batch.
    Chances are of guesses and not of bits, as bits of all levels but the first are of what is left: were they alike,
    all levels would say the same. The paper stops gradients at the text, which then would never learn: here it learns
    from the chances as they do from it, by the same KL.
    """
    chances = [chance_of(guess) for guess in found.guesses]
    pairs = zip(found.y, found.signs, strict=True)
    parts = {
        "commitment": [4.0**-i * (y - signs.detach()).square().mean() for i, (y, signs) in enumerate(pairs)],
        "entropy": [entropy_loss(y.flatten(2).transpose(1, 2), ENTROPY_BETA) / y.shape[1] for y in found.y],
        "levels": [
            bit_divergence(chance, pooled(before, ratio)).mean()
            for (before, chance), ratio in zip(pairwise(chances), model.strides.step_ratios, strict=True)
        ],
    }
    if text is not None:
        given_B = text.given_B
        target_BC = model.text_logits(text).sigmoid()[given_B]
        of_sites_BC111 = target_BC[..., None, None, None]
        parts["text"] = [bit_divergence(chance[given_B], of_sites_BC111).mean() for chance in chances]
        parts["usage"] = [bit_divergence(chance.mean((0, 2, 3, 4)), target_BC).mean() for chance in chances]
    return {name: torch.stack(of_levels).sum() for name, of_levels in parts.items() if of_levels}


def chance_of(guess: torch.Tensor) -> torch.Tensor:
    """How likely the first bit of a guess is to be 1."""
    return (2 * CHANCE_BETA * guess).sigmoid()


def bit_divergence(chance: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL, in nats, of bits that are 1 with a chance to those with another."""
    chance, other = (value.clamp(CHANCE_FLOOR, 1 - CHANCE_FLOOR) for value in (chance, other))
    return chance * (chance / other).log() + (1 - chance) * ((1 - chance) / (1 - other)).log()


def drift_loss(latents_BCthw: torch.Tensor, mean_BCthw: torch.Tensor, std_C: torch.Tensor) -> torch.Tensor:
    """KL, in nats, of Gaussians around `latents` to those around `mean`, all of deviation `std`; a channel's mean."""
    return 0.5 * ((latents_BCthw - mean_BCthw) / std_C.view(-1, 1, 1, 1)).square().mean()
