"""Tokenizers by name: `family/variant`, one entry per family."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..schemas.errors import TokenizerError, did_you_mean
from .base import AnyTokenizer, FakeTokenizer, LevelTokenizer, Settings, TrajectoryTokenizer, VideoTokenizer


def load_tokenizer(
    name: str,
    weights: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    *,
    logvar: bool = False,
    compiled: bool = False,
    options: Mapping[str, Any] | None = None,
) -> AnyTokenizer:
    """The tokenizer called `name`, for instance "dct_fsq/488_262144", ready to encode on `device`.

    `weights` is the path or fsspec URL of its weights, for families that have any; `dtype` is the number type of
    the arithmetic; with `logvar` latents are means and, after them, logarithms of variances; with `compiled` networks
    go through torch.compile. `options` are what a family alone knows (docs/tokenizers.md). TokenizerError for an
    unknown name, and for a setting that the family does not take.
    """
    family, _, variant = name.partition("/")
    if family not in FAMILIES:
        raise TokenizerError(
            f"unknown tokenizer family {family!r} in {name!r}{did_you_mean(family, list(FAMILIES))}:"
            f" accepted are {', '.join(FAMILIES)}"
        )
    check_device(device)
    settings = Settings(
        weights=weights, device=device, dtype=dtype, logvar=logvar, compiled=compiled, options=options or {}
    )
    return FAMILIES[family](variant, settings)


def _load_dct_fsq(variant: str, settings: Settings) -> VideoTokenizer:
    from .dct_fsq import DctFsq

    _refuse_networks("dct_fsq", settings)
    if settings.dtype != "float32":
        raise TokenizerError(f"dct_fsq computes in float32 alone, found dtype {settings.dtype!r}: set dtype to float32")
    return DctFsq(variant, device=settings.device)


def _load_pyratok(variant: str, settings: Settings) -> LevelTokenizer:
    from .pyratok_tokenizer import PyraTokTokenizer

    return PyraTokTokenizer(variant, settings)


def _load_trajtok(variant: str, settings: Settings) -> TrajectoryTokenizer:
    from .trajtok_tokenizer import TrajTokTokenizer

    return TrajTokTokenizer(variant, settings)


def _load_vidtok(variant: str, settings: Settings) -> VideoTokenizer:
    from .vidtok import VidTokTokenizer

    refuse_options("vidtok", settings)
    return VidTokTokenizer(variant, settings)


def _load_fake(variant: str, settings: Settings) -> VideoTokenizer:
    _refuse_networks("fake", settings)
    if variant:
        raise TokenizerError(f"fake has no variants, found {variant!r}: set the tokenizer to fake")
    return FakeTokenizer()


# Loaders import their family when called: loading one imports no other.
FAMILIES: dict[str, Callable[[str, Settings], AnyTokenizer]] = {
    "dct_fsq": _load_dct_fsq,
    "fake": _load_fake,
    "pyratok": _load_pyratok,
    "trajtok": _load_trajtok,
    "vidtok": _load_vidtok,
}


def _refuse_networks(family: str, settings: Settings) -> None:
    """TokenizerError for settings of networks, in a family without any."""
    if settings.weights is not None:
        raise TokenizerError(f"{family} has no weights, found {settings.weights!r}: remove weights")
    if settings.logvar:
        raise TokenizerError(f"{family} has no variances: remove logvar")
    if settings.compiled:
        raise TokenizerError(f"{family} has no networks to compile: remove compiled")
    refuse_options(family, settings)


def refuse_options(family: str, settings: Settings) -> None:
    """TokenizerError for options, in a family without any."""
    if settings.options:
        raise TokenizerError(f"{family} has no options, found {', '.join(settings.options)}: remove options")


def check_device(device: str) -> None:
    """TokenizerError unless torch can compute on `device` here."""
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise TokenizerError(f"unknown device {device!r}: accepted are cpu, cuda and cuda:N")
    num_gpus = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= num_gpus:
        raise TokenizerError(f"device {device!r} was asked for, torch finds {num_gpus} GPUs here: set device to cpu")
