"""Encoders of frames by name: one entry each."""

from collections.abc import Callable

from ..pipeline.relevance import FakeEncoder, FrameEncoder
from ..schemas.errors import RecipeError, TokenizerError, did_you_mean
from ..schemas.recipe import EncoderSection
from ..tokenizers.base import Settings
from ..tokenizers.load import check_device, refuse_options


def load_encoder(section: EncoderSection, device: str | None = None) -> FrameEncoder:
    """The encoder that a recipe's section asks for, on `device` if given instead of the section's own.

    TokenizerError or RecipeError for what it cannot be.
    """
    name = section.encoder
    if name not in ENCODERS:
        known = [one for one in ENCODERS if one != "fake"]  # which is for tests
        raise RecipeError(f"unknown encoder {name!r}{did_you_mean(name, known)}: accepted are {', '.join(known)}")
    used = device or section.device
    if name in PLAIN:
        _refuse_networks(section)
    else:
        check_device(used)
    settings = Settings(weights=section.weights, device=used, dtype=section.dtype, options=section.options)
    return ENCODERS[name](settings)


def _load_fake(settings: Settings) -> FrameEncoder:
    refuse_options("fake", settings)
    return FakeEncoder()


def _load_look(settings: Settings) -> FrameEncoder:
    from ..pipeline.look import LookEncoder

    refuse_options("look", settings)
    return LookEncoder()


def _load_transformers(settings: Settings) -> FrameEncoder:
    from ..tokenizers.image_text import ImageTextEncoder

    weights = _weights(
        "transformers", settings, "a folder of CLIP, SigLIP or SigLIP 2", "hf://google/siglip-base-patch16-224"
    )
    return ImageTextEncoder(weights, settings.device, settings.dtype, settings.options)


def _load_open_clip(settings: Settings) -> FrameEncoder:
    from ..tokenizers.open_clip_encoder import OpenClipEncoder

    weights = _weights(
        "open_clip",
        settings,
        "a folder with open_clip_config.json, or a checkpoint file and options.model to its architecture",
        "hf://apple/MobileCLIP-S1-OpenCLIP",
    )
    return OpenClipEncoder(weights, settings.device, settings.dtype, settings.options)


def _load_trajtok(settings: Settings) -> FrameEncoder:
    from ..tokenizers.trajtok_frames import TrajTokFrames

    return TrajTokFrames(settings)


PLAIN = ("fake", "look")  # encoders without networks
# Loaders import their encoder when called: loading one imports no other.
ENCODERS: dict[str, Callable[[Settings], FrameEncoder]] = {
    "fake": _load_fake,
    "look": _load_look,
    "transformers": _load_transformers,
    "open_clip": _load_open_clip,
    "trajtok": _load_trajtok,
}


def _weights(name: str, settings: Settings, what: str, example: str) -> str:
    """The weights that are set; TokenizerError without any."""
    if settings.weights is None:
        raise TokenizerError(f"{name} needs weights, found none: set weights to {what}, for instance {example}")
    return settings.weights


def _refuse_networks(section: EncoderSection) -> None:
    """TokenizerError for settings of networks, for an encoder without any."""
    if section.weights is not None:
        raise TokenizerError(f"{section.encoder} has no weights, found {section.weights!r}: remove weights")
    if section.device != "cpu" or section.dtype != "float32":
        raise TokenizerError(
            f"{section.encoder} computes on the CPU without networks, found device {section.device!r} and dtype"
            f" {section.dtype!r}: remove them"
        )
