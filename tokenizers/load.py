"""Tokenizers by name: `family/variant`, one entry per family."""

from collections.abc import Callable

import torch

from ..schemas.errors import TokenizerError, did_you_mean
from .base import FakeTokenizer, VideoTokenizer


def load_tokenizer(
    name: str, weights: str | None = None, device: str = "cpu", dtype: str = "float32", *, logvar: bool = False
) -> VideoTokenizer:
    """The tokenizer called `name`, for instance "dct_fsq/488_262144", ready to encode on `device`.

    `weights` is the path or fsspec URL of its weights, for families that have any; `dtype` is the number type of
    the arithmetic; with `logvar` latents are means and, after them, logarithms of variances. TokenizerError for an
    unknown name, and for a setting that the family does not take.
    """
    family, _, variant = name.partition("/")
    if family not in FAMILIES:
        raise TokenizerError(
            f"unknown tokenizer family {family!r} in {name!r}{did_you_mean(family, list(FAMILIES))}:"
            f" accepted are {', '.join(FAMILIES)}"
        )
    _check_device(device)
    if logvar and family != "vidtok":
        raise TokenizerError(f"{family} has no variances: remove logvar")
    return FAMILIES[family](variant, weights, device, dtype, logvar)


def _load_dct_fsq(variant: str, weights: str | None, device: str, dtype: str, _: bool) -> VideoTokenizer:
    from .dct_fsq import DctFsq

    _refuse_weights("dct_fsq", weights)
    if dtype != "float32":
        raise TokenizerError(f"dct_fsq computes in float32 alone, found dtype {dtype!r}: set dtype to float32")
    return DctFsq(variant, device=device)


def _load_vidtok(variant: str, weights: str | None, device: str, dtype: str, logvar: bool) -> VideoTokenizer:
    from .vidtok import VidTokTokenizer

    return VidTokTokenizer(variant, weights, device, dtype, logvar=logvar)


def _load_fake(variant: str, weights: str | None, device: str, dtype: str, _: bool) -> VideoTokenizer:
    _refuse_weights("fake", weights)
    if variant:
        raise TokenizerError(f"fake has no variants, found {variant!r}: set the tokenizer to fake")
    return FakeTokenizer()


# Loaders import their family when called: loading one imports no other. A name, and what makes a tokenizer of
# (variant, weights, device, dtype, logvar).
FAMILIES: dict[str, Callable[[str, str | None, str, str, bool], VideoTokenizer]] = {
    "dct_fsq": _load_dct_fsq,
    "fake": _load_fake,
    "vidtok": _load_vidtok,
}


def _refuse_weights(family: str, weights: str | None) -> None:
    if weights is not None:
        raise TokenizerError(f"{family} has no weights, found {weights!r}: remove weights")


def _check_device(device: str) -> None:
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise TokenizerError(f"unknown device {device!r}: accepted are cpu, cuda and cuda:N")
    num_gpus = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= num_gpus:
        raise TokenizerError(f"device {device!r} was asked for, torch finds {num_gpus} GPUs here: set device to cpu")
