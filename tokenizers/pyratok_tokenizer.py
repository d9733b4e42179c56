"""PyraTok (arXiv:2601.16210) as a tokenizer: levels of codes of 16 bits, by published or self-trained weights."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

import torch
from pydantic import Field

from ..schemas.errors import TokenizerError, did_you_mean
from ..schemas.recipe import Section, parse_options
from ..schemas.tokens import TokenizerSpec
from .base import Levels, Settings, check_frames, check_multiple
from .pyratok import PyraTok, ReleaseFile
from .pyratok_pyramid import Pyramid, PyramidFile
from .pyratok_quantizer import LatentStatistics, LevelIds
from .pyratok_vae import on_device

VARIANTS = {
    "release": "a checkpoint of hf://onkarsus13/PyraTok, or a VAE of Wan 2.1",
    "pyramid": "the model.safetensors that tokenmill train pyratok makes",
}


class ReleaseOptions(Section):
    """What codes of the release depend on besides the weights."""

    normalized: bool = Field(
        default=False,
        description="latents are brought to the quantizer's range: for a VAE that was not trained with it",
    )


class PyramidOptions(Section):
    """What codes of a pyramid depend on besides the weights."""

    text: str | None = Field(
        default=None, min_length=1, description="what all clips are told to be about; null: pixels and weights decide"
    )
    text_scale: float = Field(default=1.0, gt=0, description="how much a text moves what is quantized")


class PyraTokTokenizer:
    """A model with its weights, which are checked here and loaded when they are first used."""

    def __init__(self, variant: str, settings: Settings) -> None:
        if variant not in VARIANTS:
            near = did_you_mean(variant, list(VARIANTS))
            raise TokenizerError(f"pyratok has no variant {variant!r}{near}: accepted are {', '.join(VARIANTS)}")
        name = f"pyratok/{variant}"
        for key, is_set in (("logvar", settings.logvar), ("compiled", settings.compiled)):
            if is_set:
                raise TokenizerError(f"{name} makes codes by groups of frames, without {key}: remove {key}")
        if settings.weights is None:
            raise TokenizerError(
                f"{name} needs its weights: set weights to the path or URL of {VARIANTS[variant]} (docs/tokenizers.md)"
            )
        self._settings = settings
        self._file: ReleaseFile | PyramidFile
        if variant == "release":
            self._file = ReleaseFile.read(settings.weights)
            self._options = _release_options(self._file, settings.options)
        else:
            self._file = PyramidFile.read(settings.weights)
            self._options = _pyramid_options(self._file, settings.options)
        sizes = self._file.sizes
        self.spec = TokenizerSpec(
            name=name,
            kind="discrete",
            codebook_size=1 << sizes.z_dim,
            latent_dim=None,
            stride_thw=sizes.stride_thw,
            weights_sha256=self._file.file.sha256,
            dtype=settings.dtype,
            options=self._options,
        )

    @property
    def is_batched(self) -> bool:
        """On the CPU clips go one by one, so that their codes do not depend on each other."""
        return torch.device(self._settings.device).type != "cpu"

    def level_grids(self, num_frames: int, height: int, width: int) -> tuple[tuple[int, int, int], ...]:
        """The (t,h,w) grid of every level of a clip of this size; TokenizerError unless strides divide its sides."""
        _, rows, columns = self.spec.stride_thw
        check_multiple("num_frames", num_frames, 1, self.spec.name)
        check_multiple("height", height, rows, self.spec.name)
        check_multiple("width", width, columns, self.spec.name)
        return self._file.level_grids(num_frames, height, width)

    @torch.inference_mode()
    def encode(self, frames_BTHWC: torch.Tensor) -> Levels:
        """int32 codes (B,t,h,w,L) of uint8 RGB frames; L tensors (B,t,h,w) where each level has a grid of its own.

        A clip of 1 + 4k frames has 1 + k in time; others are filled up by repeating the last frame. TokenizerError for
        other frames.
        """
        return _as_levels([level.ids_Bthw.to(torch.int32) for level in self._encode(frames_BTHWC)])

    @torch.inference_mode()
    def margins(self, frames_BTHWC: torch.Tensor) -> Levels:
        """How far each code's least certain bit, and those of the levels before, were from turning.

        In (normalized) latents, where the first level's signs are 2 apart.
        """
        return _as_levels([level.margins_Bthw for level in self._encode(frames_BTHWC)])

    @torch.inference_mode()
    def decode(self, tokens: Levels, num_frames: int | None = None) -> torch.Tensor:
        """uint8 RGB frames (B,T,H,W,3) of codes as `encode` gives them, of all levels or of the first.

        Clips had `num_frames`; None stands for the longest with such a grid. TokenizerError for what are no codes.
        """
        levels = self._levels_of(tokens)
        model = self._model
        frames: list[torch.Tensor] = []
        for i in range(len(levels[0])):
            latents_1Cthw = model.latents_of_levels([level[i : i + 1].to(self._settings.device) for level in levels])
            parts = [_to_uint8(x_BCTHW) for x_BCTHW in model.decode_parts(latents_1Cthw)]
            frames.append(self._cut(torch.cat(parts, dim=1), num_frames))
        return torch.cat(frames)

    def _levels_of(self, tokens: Levels) -> list[torch.Tensor]:
        """Each level of the same clips; TokenizerError for what are no levels."""
        levels = list(tokens.unbind(-1)) if isinstance(tokens, torch.Tensor) and tokens.ndim else list(tokens)
        shapes = [tuple(level.shape) for level in levels]
        if not levels or any(len(shape) != 4 or 0 in shape or shape[0] != shapes[0][0] for shape in shapes):
            found = f"({tuple(tokens.shape)})" if isinstance(tokens, torch.Tensor) else ", ".join(map(str, shapes))
            raise TokenizerError(
                f"{self.spec.name} decodes codes (B,t,h,w,L), or a tensor (B,t,h,w) for each level of the same clips,"
                f" found {found or 'none'}: pass them as encode returns them"
            )
        return levels

    def _cut(self, frames_BTHWC: torch.Tensor, num_frames: int | None) -> torch.Tensor:
        """The frames of a clip, without those that filled it up; TokenizerError where it cannot have had so many."""
        longest, group = frames_BTHWC.shape[1], self.spec.stride_thw[0]
        if num_frames is not None and not max(0, longest - group) < num_frames <= longest:
            raise TokenizerError(
                f"{self.spec.name}: these are the codes of {max(1, longest - group + 1)} to {longest} frames, found"
                f" num_frames={num_frames}: give that of the clips"
            )
        return frames_BTHWC[:, :num_frames]

    def _encode(self, frames_BTHWC: torch.Tensor) -> list[LevelIds]:
        check_frames(frames_BTHWC, self.spec.name)
        self.level_grids(*frames_BTHWC.shape[1:4])
        at_once = len(frames_BTHWC) if self.is_batched else 1
        parts = [self._encode_at_once(part) for part in frames_BTHWC.split(at_once)]
        return [
            LevelIds(
                ids_Bthw=torch.cat([one.ids_Bthw for one in of_level]),
                margins_Bthw=torch.cat([one.margins_Bthw for one in of_level]),
            )
            for of_level in zip(*parts, strict=True)
        ]

    def _encode_at_once(self, frames_BTHWC: torch.Tensor) -> list[LevelIds]:
        model, x_BCTHW = self._model, frames_BTHWC.to(self._settings.device).movedim(-1, 1)
        if isinstance(model, PyraTok):
            return model.encode_levels(x_BCTHW)
        text = self._options["text"]
        if text is None:
            return model.encode_levels(x_BCTHW)
        return model.encode_levels(x_BCTHW, model.embed_texts([text] * len(x_BCTHW)), self._options["text_scale"])

    @cached_property
    @torch.inference_mode(False)  # its parameters serve calls in and outside of that mode
    def _model(self) -> PyraTok | Pyramid:
        if isinstance(self._file, ReleaseFile):
            model = self._file.build(normalized=self._options["normalized"])
        else:
            model = self._file.build()
        return on_device(model, self._settings.device, getattr(torch, self._settings.dtype))


def _release_options(file: ReleaseFile, values: Mapping[str, Any]) -> dict[str, Any]:
    """The options as the cache keeps them."""
    options = parse_options(ReleaseOptions, values)
    statistics = file.statistics() if options.normalized else None
    return {"normalized": options.normalized, "statistics": _plain(statistics)}


def _pyramid_options(file: PyramidFile, values: Mapping[str, Any]) -> dict[str, Any]:
    """The options as the cache keeps them, with the digest of the text; TokenizerError for texts that are not taken."""
    options = parse_options(PyramidOptions, values)
    if options.text and file.pyramid.text_width is None:
        raise TokenizerError(f"weights {file.file.uri}: this model was trained without texts: remove options.text")
    if options.text is None and "text_scale" in options.model_fields_set:
        raise TokenizerError("options.text_scale is of texts, and there is none: set options.text, or remove it")
    return {
        "native_grid": file.pyramid.native_grid,
        "statistics": _plain(file.statistics),
        "text": options.text,
        "text_sha256": hashlib.sha256(options.text.encode()).hexdigest() if options.text else None,
        "text_scale": options.text_scale if options.text else None,
    }


def _plain(statistics: LatentStatistics | None) -> dict[str, Any] | None:
    return None if statistics is None else {key: list(values) for key, values in asdict(statistics).items()}


def _as_levels(levels: Sequence[torch.Tensor]) -> Levels:
    """One tensor (B,t,h,w,L) where all levels lie on one grid."""
    is_one_grid = len({tuple(level.shape) for level in levels}) == 1
    return torch.stack(list(levels), dim=-1) if is_one_grid else tuple(levels)


def _to_uint8(x_BCTHW: torch.Tensor) -> torch.Tensor:
    """Frames (B,T,H,W,3) at the nearest grey level."""
    return x_BCTHW.movedim(1, -1).float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
