"""The pyramid of PyraTok (arXiv:2601.16210): one level of ids for each depth of the causal VAE's encoder.

Each level takes signs of what its features say of the latents beyond what the levels before it have said, at half
their scale. The paper leaves grids and the way between them open; here the sum of all levels lives in the VAE's latent
space, and levels are on the latents' grid, or each on the grid of its features.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..schemas.errors import TokenizerError
from .base import NO_CODE
from .pyratok_layers import Down
from .pyratok_levels import Grid, PyramidLevel, Strides, pooled
from .pyratok_quantizer import ID_TYPES, MOST_BITS, LatentStatistics, LevelIds, ids_of, signs_of
from .pyratok_text import EmbeddedText, WordEmbedding
from .pyratok_vae import Encoded, EncoderStream, VaeSizes, WanVae
from .weights import (
    WeightsFile,
    check_tensors,
    description_of,
    fetch_weights,
    load_tensors,
    read_tensors,
    save_described,
)

METADATA_KEY, MODE = "tokenmill.pyratok", "pyramid"


@dataclass(frozen=True, slots=True, kw_only=True)
class PyramidSizes:
    """What decides the levels beside the VAE. With `native_grid` each is on the grid of its features.

    `num_levels` takes the deepest ones alone; None all, as many as the encoder has depths. Words are embedded in
    `text_width` numbers; None is a pyramid that takes no text.
    """

    native_grid: bool = False
    num_levels: int | None = None
    text_width: int | None = 32
    text_vocabulary: int = 4096
    text_heads: int = 2

    def __post_init__(self) -> None:
        given = [size for size in (self.num_levels, self.text_width) if size is not None]
        if min(self.text_vocabulary, self.text_heads, *given) < 1:
            raise ValueError(f"sizes from 1 on: {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedLevels:
    """What was quantized and its signs, (B,C,t,h,w) on the grid of each level, and their sum on the latents' grid.

    `guesses` are what each level says of the latents, of which it quantizes what the levels before have left. All are
    float32; signs and sum pass gradients to what was quantized.
    """

    guesses: tuple[torch.Tensor, ...]
    y: tuple[torch.Tensor, ...]
    signs: tuple[torch.Tensor, ...]
    values_BCthw: torch.Tensor


def strides_of(sizes: VaeSizes, pyramid: PyramidSizes) -> Strides:
    """The strides of the levels that there are."""
    every = Strides.of(sizes, native_grid=pyramid.native_grid)
    return every.last(pyramid.num_levels or len(every.levels))


class PyramidHead(nn.Module):
    """What a pyramid has beside its VAE."""

    def __init__(self, sizes: VaeSizes, pyramid: PyramidSizes) -> None:
        super().__init__()
        width, heads = pyramid.text_width, pyramid.text_heads
        num_levels = pyramid.num_levels or len(sizes.dim_mult)
        self.levels = nn.ModuleList(
            [PyramidLevel(channels, sizes.z_dim, width, heads) for channels in sizes.widths[1:][-num_levels:]]
        )
        if width is not None:
            self.words = WordEmbedding(width, pyramid.text_vocabulary)
            self.text_target = nn.Linear(width, sizes.z_dim)


class Pyramid(WanVae):
    """The VAE, and a level of ids of as many bits as latents have channels for each depth of its encoder.

    Keys are those of the VAE, and `pyramid.*`. Methods take and give (B,C,T,H,W). `statistics` bring the VAE's latents
    to the range of the levels' sum, about -2 to 2; without them the latents are in that range.
    """

    def __init__(self, sizes: VaeSizes, pyramid: PyramidSizes, statistics: LatentStatistics | None = None) -> None:
        super().__init__(sizes)
        heads = 1 if pyramid.text_width is None else pyramid.text_heads
        if sizes.z_dim > MOST_BITS or sizes.z_dim % heads:
            raise ValueError(f"1 to {MOST_BITS} bits, which the heads divide: {sizes.z_dim=} {pyramid.text_heads=}")
        if statistics is not None and len(statistics.mean) != sizes.z_dim:
            raise ValueError(f"statistics of {sizes.z_dim} channels are wanted: {len(statistics.mean)=}")
        if (pyramid.num_levels or 1) > len(sizes.dim_mult):
            raise ValueError(f"an encoder of {len(sizes.dim_mult)} depths has no more levels: {pyramid.num_levels=}")
        self.pyramid_sizes, self.statistics = pyramid, statistics
        self.strides = strides_of(sizes, pyramid)
        self.pyramid = PyramidHead(sizes, pyramid)
        blocks = enumerate(self.encoder.down_blocks)
        taps = (*(f"down{i}" for i, block in blocks if isinstance(block, Down)), "mid")
        self.taps = taps[-len(self.strides.levels) :]

    @property
    def levels(self) -> list[PyramidLevel]:
        """The levels, the first of which has the features nearest to the frames."""
        return [level for level in self.pyramid.levels if isinstance(level, PyramidLevel)]

    def level_grids(self, num_frames: int, height: int, width: int) -> tuple[Grid, ...]:
        """The (t,h,w) grid of every level of a clip, whose last frame is repeated up to a length of 1 + 4k."""
        return self.strides.grids_of(self.sizes.grid_of(num_frames, height, width))

    def embed_texts(self, texts: Sequence[str | None]) -> EmbeddedText:
        """Texts as the other methods take them, one for each clip, of which None is no text."""
        if self.pyramid_sizes.text_width is None:
            raise ValueError("this pyramid takes no text: build it with text_width")
        return self.pyramid.words(texts)

    def text_logits(self, text: EmbeddedText) -> torch.Tensor:
        """(B,C): how much a text is for each bit to be 1, from the mean of its words."""
        self._check_text(text, text.text_BLE.shape[0])
        return self.pyramid.text_target(text.mean_BE.to(self.dtype)).float()

    def encode_levels(
        self, x_BCTHW: torch.Tensor, text: EmbeddedText | None = None, scale: float = 1.0, *, in_groups: bool = True
    ) -> list[LevelIds]:
        """The ids of every level, of frames as `encode` takes them; text moves what is quantized by `scale`.

        In groups only the features of a few frames are kept. ValueError as `encode`, and for text that is not taken.
        """
        stream = EncoderStream(self, self.taps, in_groups=in_groups)
        pieces = x_BCTHW.split(self.sizes.stride_thw[0], dim=2) if in_groups else (x_BCTHW,)
        parts = [
            self.ids_of_levels(self.quantize(part, text, scale)) for piece in pieces for part in stream.push(piece)
        ]
        parts += [self.ids_of_levels(self.quantize(part, text, scale)) for part in stream.finish()]
        return [
            LevelIds(
                ids_Bthw=torch.cat([part.ids_Bthw for part in level], dim=1),
                margins_Bthw=torch.cat([part.margins_Bthw for part in level], dim=1),
            )
            for level in zip(*parts, strict=True)
        ]

    def quantize(self, encoded: Encoded, text: EmbeddedText | None = None, scale: float = 1.0) -> QuantizedLevels:
        """What the levels make of the features of `taps`, of a clip or of one group of its frames.

        Level l quantizes 2^l (f - r), f what its features say of the latents and r the sum of the levels before it,
        which add 1, 1/2, 1/4, .. of their signs.
        """
        if text is not None:
            self._check_text(text, encoded.mean_BCthw.shape[0])
        guesses, found, signs, values_BCthw = [], [], [], None
        for i, level in enumerate(self.levels):
            guess_BCthw = level(encoded.taps[self.taps[i]], self.strides.tap_ratios[i])
            before_BCthw = self._brought(values_BCthw, i)
            known_BCthw = torch.zeros_like(guess_BCthw) if before_BCthw is None else before_BCthw.detach()
            y_BCthw = (guess_BCthw - known_BCthw) * 2.0**i
            if text is not None and scale != 0:
                y_BCthw = y_BCthw + scale * level.text(y_BCthw, text)
                guess_BCthw = y_BCthw * 2.0**-i + known_BCthw
            signs_BCthw = torch.where(y_BCthw >= 0, 1.0, -1.0)
            if y_BCthw.requires_grad:
                signs_BCthw = signs_BCthw + (y_BCthw - y_BCthw.detach())
            values_BCthw = _added(before_BCthw, signs_BCthw, i)
            for values, value in ((guesses, guess_BCthw), (found, y_BCthw), (signs, signs_BCthw)):
                values.append(value)
        assert values_BCthw is not None  # the last level is on the latents' grid
        return QuantizedLevels(guesses=tuple(guesses), y=tuple(found), signs=tuple(signs), values_BCthw=values_BCthw)

    def ids_of_levels(self, found: QuantizedLevels) -> list[LevelIds]:
        """The ids of what was quantized; NO_CODE where it, or a level before, was no number.

        Margins are in normalized latents. A sign that could be another one could change all later levels: theirs are
        no larger.
        """
        levels: list[LevelIds] = []
        least_B1thw = None
        for i, (y_BCthw, signs_BCthw) in enumerate(zip(found.y, found.signs, strict=True)):
            margin_B1thw = y_BCthw.detach().abs().amin(1, keepdim=True) * 2.0**-i
            lost = ~y_BCthw.isfinite().all(1, keepdim=True)
            margin_B1thw = margin_B1thw.masked_fill(lost, -torch.inf)
            if least_B1thw is not None:
                margin_B1thw = margin_B1thw.minimum(pooled(least_B1thw, self.strides.step_ratios[i - 1], torch.amin))
            least_B1thw = margin_B1thw
            margins_Bthw = margin_B1thw[:, 0]
            ids_Bthw = ids_of(signs_BCthw.detach().movedim(1, -1)).masked_fill(margins_Bthw < 0, NO_CODE)
            levels.append(LevelIds(ids_Bthw=ids_Bthw, margins_Bthw=margins_Bthw.clamp(min=0)))
        return levels

    def values_of_levels(self, ids: Sequence[torch.Tensor]) -> torch.Tensor:
        """The float32 sum (B,C,t,h,w), on the latents' grid, of ids (B,t,h,w) of all levels or of the first.

        Of all levels it is exactly that of `quantize`. TokenizerError for anything that is no ids of a clip.
        """
        self._check_ids(ids)
        values_BCthw = None
        for i, ids_Bthw in enumerate(ids):
            signs_BCthw = signs_of(ids_Bthw, self.sizes.z_dim).movedim(-1, 1)
            values_BCthw = _added(self._brought(values_BCthw, i), signs_BCthw, i)
        assert values_BCthw is not None
        return pooled(values_BCthw, self.strides.latent_ratios[len(ids) - 1]).contiguous()

    def restored(self, values_BCthw: torch.Tensor) -> torch.Tensor:
        """Latents for `decode`, of the levels' sum."""
        return values_BCthw if self.statistics is None else self.statistics.restored(values_BCthw)

    def latents_of_levels(self, ids: Sequence[torch.Tensor]) -> torch.Tensor:
        """Latents (B,C,t,h,w) for `decode` and `decode_parts`, of ids as `values_of_levels` takes them."""
        return self.restored(self.values_of_levels(ids))

    def decode_levels(self, ids: Sequence[torch.Tensor]) -> torch.Tensor:
        """Frames (B,3,1+4(t-1),H,W) in [-1,1], of ids as `values_of_levels` takes them."""
        return self.decode(self.latents_of_levels(ids))

    def _brought(self, values_BCthw: torch.Tensor | None, i: int) -> torch.Tensor | None:
        """The sum of the levels before level `i`, on its grid; None before the first."""
        return None if values_BCthw is None else pooled(values_BCthw, self.strides.step_ratios[i - 1])

    def _check_text(self, text: EmbeddedText, num_clips: int) -> None:
        width, (b, _, found) = self.pyramid_sizes.text_width, text.text_BLE.shape
        if (b, found) != (num_clips, width):
            raise ValueError(f"text is (B,L,E) with B={num_clips}, E={width}: {tuple(text.text_BLE.shape)=}")

    def _check_ids(self, ids: Sequence[torch.Tensor]) -> None:
        shapes = [tuple(ids_Bthw.shape) for ids_Bthw in ids]
        said = ", ".join(f"{ids_Bthw.dtype} of shape {tuple(ids_Bthw.shape)}" for ids_Bthw in ids) or "none"
        are_ids = all(ids_Bthw.dtype in ID_TYPES for ids_Bthw in ids)
        if not are_ids or not 1 <= len(ids) <= len(self.taps) or any(len(s) != 4 or 0 in s for s in shapes):
            raise TokenizerError(
                f"ids of PyraTok's pyramid are integers (B,t,h,w) of each of its {len(self.taps)} levels or of the"
                f" first, found {said}: pass them as they were made"
            )
        every, rows, columns = self.strides.latent_ratios[0]
        b, t, h, w = shapes[0]
        latents = (1 + (t - 1) // every, max(1, h // rows), max(1, w // columns))
        wanted = [(b, *grid) for grid in self.strides.grids_of(latents)[: len(ids)]]
        if shapes != wanted:
            raise TokenizerError(
                f"levels of PyraTok's pyramid that fit each other have shapes such as"
                f" {', '.join(map(str, wanted))}, found {said}: pass all levels of the same clips, in their order"
            )
        for ids_Bthw in ids:
            low, high = (int(bound) for bound in ids_Bthw.long().aminmax())
            if not 0 <= low <= high < 1 << self.sizes.z_dim:
                raise TokenizerError(
                    f"ids of PyraTok's pyramid are from 0 to {(1 << self.sizes.z_dim) - 1}, found {low} to {high}:"
                    f" decode with the model that made them"
                )


def _added(known_BCthw: torch.Tensor | None, signs_BCthw: torch.Tensor, i: int) -> torch.Tensor:
    return signs_BCthw if known_BCthw is None else known_BCthw + signs_BCthw * 2.0**-i


def build_pyramid(sizes: VaeSizes, pyramid: PyramidSizes, statistics: LatentStatistics | None = None) -> Pyramid:
    """A pyramid of these sizes, with random weights."""
    return Pyramid(sizes, pyramid, statistics).eval()


def save_pyramid(model: Pyramid, path: str, extra: Mapping[str, str] | None = None) -> None:
    """Write a .safetensors file, whose metadata say all sizes; the same model and `extra` give the same bytes."""
    said = {
        "mode": MODE,
        "vae": dataclasses.asdict(model.sizes),
        "pyramid": dataclasses.asdict(model.pyramid_sizes),
        "statistics": None if model.statistics is None else dataclasses.asdict(model.statistics),
        "extra": dict(extra or {}),
    }
    save_described(path, model.state_dict(), METADATA_KEY, said)


@dataclass(frozen=True, slots=True, kw_only=True)
class PyramidFile:
    """A file that `save_pyramid` wrote, checked: where it lies, its tensors, sizes, and what was given as `extra`."""

    file: WeightsFile
    tensors: Mapping[str, torch.Tensor]
    sizes: VaeSizes
    pyramid: PyramidSizes
    statistics: LatentStatistics | None
    extra: Mapping[str, str]

    @staticmethod
    def read(weights: str) -> "PyramidFile":
        """The file at a path or URL; TokenizerError unless it is one of a pyramid and every tensor fits."""
        file = fetch_weights(weights)
        said = _metadata(file)
        try:
            sizes, pyramid = VaeSizes(**said["vae"]), PyramidSizes(**said["pyramid"])
            statistics = LatentStatistics(**said["statistics"]) if said["statistics"] else None
            with torch.device("meta"):
                expected = build_pyramid(sizes, pyramid, statistics).state_dict()
        except (KeyError, TypeError, ValueError) as error:
            raise TokenizerError(
                f"weights {file.uri}: this version knows no pyramid such as their metadata describe ({error}):"
                f" use the version that wrote them"
            ) from None
        tensors = read_tensors(file)
        check_tensors(tensors, expected, file, "the PyraTok pyramid that its metadata describe")
        return PyramidFile(
            file=file, tensors=tensors, sizes=sizes, pyramid=pyramid, statistics=statistics, extra=said.get("extra", {})
        )

    def level_grids(self, num_frames: int, height: int, width: int) -> tuple[Grid, ...]:
        """As of the model."""
        strides = strides_of(self.sizes, self.pyramid)
        return strides.grids_of(self.sizes.grid_of(num_frames, height, width))

    def build(self) -> Pyramid:
        """The model with these weights."""
        with torch.device("meta"):
            model = build_pyramid(self.sizes, self.pyramid, self.statistics)
        model = model.to_empty(device="cpu")
        load_tensors(model, self.tensors)
        return model.requires_grad_(False)


def _metadata(file: WeightsFile) -> dict[str, Any]:
    remedy = "give the file that training wrote; published weights are for pyratok/release"
    said = description_of(file, METADATA_KEY, "a PyraTok pyramid", remedy)
    if said.get("mode") != MODE:
        raise TokenizerError(
            f"weights {file.uri}: their metadata describe no {MODE}: give the file that training of a pyramid wrote"
        )
    return said
