"""Segmenters by name: one entry each."""

from collections.abc import Callable

from ..pipeline.segment import FakeSegmenter, Segmenter
from ..schemas.clip import Sampling
from ..schemas.errors import RecipeError, TokenizerError, did_you_mean
from ..tokenizers.base import Settings
from ..tokenizers.load import check_device, refuse_options


def load_segmenter(name: str, settings: Settings, sampling: Sampling) -> Segmenter:
    """The segmenter called `name`, ready to segment clips of this sampling; TokenizerError or RecipeError for what it
    cannot be.
    """
    if name not in SEGMENTERS:
        known = [one for one in SEGMENTERS if one != "fake"]  # which is for tests
        raise RecipeError(f"unknown segmenter {name!r}{did_you_mean(name, known)}: accepted are {', '.join(known)}")
    check_device(settings.device)
    return SEGMENTERS[name](settings, sampling)


def _load_fake(settings: Settings, sampling: Sampling) -> Segmenter:
    _refuse_networks("fake", settings)
    refuse_options("fake", settings)
    return FakeSegmenter()


def _load_slic3d(settings: Settings, sampling: Sampling) -> Segmenter:
    from ..pipeline.slic3d import Slic3d, Slic3dOptions
    from ..schemas.recipe import parse_options

    _refuse_networks("slic3d", settings)
    return Slic3d(parse_options(Slic3dOptions, settings.options))


def _load_trajtok(settings: Settings, sampling: Sampling) -> Segmenter:
    from ..tokenizers.trajtok_segmenter import TrajTokSegmenter

    return TrajTokSegmenter(settings)


def _load_sidecars(settings: Settings, sampling: Sampling) -> Segmenter:
    from ..pipeline.sidecars import Sidecars, SidecarsOptions
    from ..schemas.recipe import parse_options

    _refuse_networks("sidecars", settings)
    return Sidecars(parse_options(SidecarsOptions, settings.options), sampling)


def _load_sam2(settings: Settings, sampling: Sampling) -> Segmenter:
    from ..pipeline.sam2 import Sam2, Sam2Options
    from ..schemas.recipe import parse_options
    from ..tokenizers.weights import fetch_folder

    if settings.weights is None:
        raise TokenizerError(
            "sam2 needs weights, found none: set weights to a folder with config.json and model.safetensors of a"
            " Sam2VideoModel of transformers, for instance hf://facebook/sam2.1-hiera-small"
        )
    options = parse_options(Sam2Options, settings.options)
    folder = fetch_folder(settings.weights)
    return Sam2(folder.path, folder.sha256, settings.device, settings.dtype, options)


# Loaders import their segmenter when called: loading one imports no other.
SEGMENTERS: dict[str, Callable[[Settings, Sampling], Segmenter]] = {
    "fake": _load_fake,
    "slic3d": _load_slic3d,
    "sam2": _load_sam2,
    "sidecars": _load_sidecars,
    "trajtok": _load_trajtok,
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
