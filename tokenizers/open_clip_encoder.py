"""Frames and texts in one space by open_clip's models: MobileCLIP and many more, whose names it knows."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field

from ..schemas.errors import TokenizerError, did_you_mean
from ..schemas.recipe import Section, parse_options
from ..schemas.relevance import ScorerSpec
from .image_text import Preprocessing, calibration_of, model_on, options_of, pixels, unit_rows
from .weights import WeightsFile, fetch_folder, fetch_weights

CONFIG = "open_clip_config.json"
FILES = (".safetensors", ".pt", ".pth", ".bin")
PREPARED_BY = ("mean", "std", "interpolation", "resize_mode")  # what published weights say of frames
RESIZES = ("shortest", "squash")


class OpenClipOptions(Section):
    """Which model a file of weights is of; a folder says so itself."""

    model: str | None = Field(default=None, description="open_clip's name of the architecture, as MobileCLIP-S1")
    tag: str | None = Field(
        default=None, description="published weights that frames are prepared as for; needed where they differ"
    )


class OpenClipEncoder:
    """A model of open_clip as a FrameEncoder; TokenizerError for weights that are not its own.

    `weights` is the path or fsspec URL of a checkpoint file of `options.model`, or of a folder with
    open_clip_config.json and .safetensors.
    """

    def __init__(self, weights: str, device: str, dtype: str, options: Mapping[str, Any]) -> None:
        asked = parse_options(OpenClipOptions, options)
        _library()
        if weights.endswith(FILES):
            file = fetch_weights(weights)
            name, model = str(asked.model), _of_file(file, asked)
        else:
            file = fetch_folder(weights)
            name, model = f"local-dir:{file.path}", _of_folder(file, asked)
        self._tokenize = _tokenizer(name, file)
        self._preprocessing = _preprocessing(model, file)
        self._device, self._dtype = device, getattr(torch, dtype)
        bias, scale = getattr(model, "logit_bias", None), float(model.logit_scale)
        kept = {"model": asked.model} if asked.model else {}
        self.spec = ScorerSpec(
            name="open_clip",
            dim=_width(model, self._preprocessing),
            weights_sha256=file.sha256,
            options=kept | ({"logit_scale": scale} if bias is None else {}) | options_of(self._preprocessing, dtype),
            calibration=calibration_of(float(np.exp(scale)), None if bias is None else float(bias)),
        )
        self._model = model_on(model, device, self._dtype)

    @torch.inference_mode()
    def embed_frames(self, frames_NHWC: np.ndarray) -> np.ndarray:
        """float32 embeddings (N,D) of length 1 of uint8 RGB frames of any one size."""
        x_NCHW = pixels(frames_NHWC, self._preprocessing, self._device, self.spec.name)
        return unit_rows(self._model.encode_image(x_NCHW.to(self._dtype)), self.spec.name)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """float32 embeddings (N,D) of length 1; the end of a text that is too long is cut off."""
        if not texts:
            return np.zeros((0, self.spec.dim or 0), np.float32)
        ids_NM = self._tokenize(list(texts)).to(self._device)
        return unit_rows(self._model.encode_text(ids_NM), self.spec.name)


def _library() -> Any:
    """open_clip; TokenizerError where it is not installed."""
    try:
        import open_clip  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError) as error:  # a torchvision for another torch
        raise TokenizerError(
            f"open_clip is not here, or its torchvision is not one for this torch ({error}): pip install"
            f" 'tokenmill[open_clip]', with torchvision from where torch is from"
        ) from None
    return open_clip


def _of_folder(file: WeightsFile, asked: OpenClipOptions) -> Any:
    """The model that a folder describes."""
    if asked.model or asked.tag:
        raise TokenizerError(f"weights {file.uri}: a folder says itself what it holds: remove options")
    if not os.path.isfile(os.path.join(file.path, CONFIG)):
        raise TokenizerError(
            f"weights {file.uri}: there is no {CONFIG} in it: give a folder that has one, for instance"
            f" hf://apple/MobileCLIP-S1-OpenCLIP, or a checkpoint file ({', '.join(FILES)}) and options.model"
        )
    return _created(file, f"local-dir:{file.path}")


def _of_file(file: WeightsFile, asked: OpenClipOptions) -> Any:
    """The model of options with the weights of a file."""
    names = _library().list_models()
    if asked.model not in names:
        near = did_you_mean(asked.model or "", names)
        raise TokenizerError(
            f"weights {file.uri}: a file does not say what it holds: set options.model to open_clip's name of it, found"
            f" {asked.model!r}{near}: accepted are MobileCLIP-S1, ViT-B-32 and {len(names) - 2} more"
            f" (open_clip.list_models())"
        )
    return _created(file, asked.model, pretrained=file.path, force_preprocess_cfg=_published(asked))


def _published(asked: OpenClipOptions) -> dict[str, Any]:
    """How frames are prepared for a model's published weights; TokenizerError where they differ and none is named."""
    open_clip = _library()
    tags = open_clip.list_pretrained_tags_by_model(asked.model)
    if asked.tag is not None and asked.tag not in tags:
        near = did_you_mean(asked.tag, tags)
        raise TokenizerError(f"options.tag: {asked.model} has no {asked.tag!r}{near}: accepted are {', '.join(tags)}")
    known = [open_clip.get_pretrained_cfg(asked.model, tag) for tag in ([asked.tag] if asked.tag else tags)]
    prepared = [{key: one[key] for key in PREPARED_BY if key in one} for one in known]
    if any(one != prepared[0] for one in prepared):
        raise TokenizerError(
            f"open_clip {asked.model}: frames are prepared differently for its published weights: set options.tag to"
            f" those that yours are, or were trained like: {', '.join(tags)}"
        )
    return prepared[0] if prepared else {}


def _created(file: WeightsFile, name: str | None, **how: Any) -> Any:
    """A model of open_clip in float32 with all its tensors, which it insists on."""
    try:
        return _library().create_model(name, require_pretrained=True, **how).requires_grad_(False)
    except Exception as error:  # configurations and damaged files bring out errors of every kind
        said = " ".join(str(error).split())
        raise TokenizerError(
            f"weights {file.uri}: open_clip does not load them as {name} ({type(error).__name__}: {said[:160]}): name"
            f" the model that they are of, or download them again"
        ) from error


def _tokenizer(name: str, file: WeightsFile) -> Any:
    """Texts to ids (N,M) of a fixed length."""
    try:
        return _library().get_tokenizer(name)
    except Exception as error:  # some are downloaded
        raise TokenizerError(
            f"weights {file.uri}: no tokenizer of texts ({type(error).__name__}: {' '.join(str(error).split())[:160]}):"
            f" give a folder that has tokenizer.json beside {CONFIG}"
        ) from error


def _preprocessing(model: Any, file: WeightsFile) -> Preprocessing:
    """How frames are prepared for a model."""
    said = _library().get_model_preprocess_cfg(model)
    if said["resize_mode"] not in RESIZES or said["interpolation"] not in ("bilinear", "bicubic"):
        raise TokenizerError(
            f"weights {file.uri}: frames would be resized by {said['resize_mode']}, {said['interpolation']}: known here"
            f" are {' and '.join(RESIZES)}, bilinear and bicubic: give another model"
        )
    size = said["size"]
    height, width = (size, size) if isinstance(size, int) else size
    is_whole = said["resize_mode"] == "squash"
    return Preprocessing(
        size=(height, width) if is_whole or height != width else height,
        crop=None if is_whole else (height, width),
        resample=said["interpolation"],
        rescale=1 / 255,
        mean=tuple(said["mean"]),
        std=tuple(said["std"]),
    )


@torch.inference_mode()
def _width(model: Any, preprocessing: Preprocessing) -> int:
    """The length of embeddings: models have no one name for it."""
    frame = np.zeros((1, 64, 64, 3), np.uint8)
    return model.eval().encode_image(pixels(frame, preprocessing, "cpu", "open_clip")).shape[1]
