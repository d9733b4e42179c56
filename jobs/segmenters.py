"""Segmenters by name: one entry each."""

from collections.abc import Callable

from ..pipeline.segment import FakeSegmenter, Segmenter
from ..schemas.errors import RecipeError, TokenizerError, did_you_mean
from ..tokenizers.base import Settings
from ..tokenizers.load import check_device, refuse_options


def load_segmenter(name: str, settings: Settings) -> Segmenter:
    """The segmenter called `name`, ready to segment; TokenizerError or RecipeError for what it cannot be."""
    if name not in SEGMENTERS:
        raise RecipeError(
            f"unknown segmenter {name!r}{did_you_mean(name, list(SEGMENTERS))}: accepted are {', '.join(SEGMENTERS)}"
        )
    check_device(settings.device)
    return SEGMENTERS[name](settings)


def _load_fake(settings: Settings) -> Segmenter:
    _refuse_networks("fake", settings)
    refuse_options("fake", settings)
    return FakeSegmenter()


def _load_slic3d(settings: Settings) -> Segmenter:
    from ..pipeline.slic3d import Slic3d, Slic3dOptions
    from ..schemas.recipe import parse_options

    _refuse_networks("slic3d", settings)
    return Slic3d(parse_options(Slic3dOptions, settings.options))


# Loaders import their segmenter when called: loading one imports no other.
SEGMENTERS: dict[str, Callable[[Settings], Segmenter]] = {
    "fake": _load_fake,
    "slic3d": _load_slic3d,
}


def _refuse_networks(name: str, settings: Settings) -> None:
    """TokenizerError for settings of networks, for a segmenter without any."""
    if settings.weights is not None:
        raise TokenizerError(f"{name} has no weights, found {settings.weights!r}: remove weights")
    if settings.device != "cpu" or settings.dtype != "float32":
        raise TokenizerError(
            f"{name} computes on the CPU without networks, found device {settings.device!r} and dtype"
            f" {settings.dtype!r}: remove them"
        )
