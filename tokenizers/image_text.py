"""Frames and texts in one space, by CLIP, SigLIP and SigLIP 2 as transformers has them.

Frames become pixels here and not by the library's processors: in torch, as the checkpoint's own settings say, and
resized as PIL does, by which these models saw pictures in training: of its grey levels 1 in 500 is another by bicubic
interpolation, 1 in 10 by bilinear, by 2 at most.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field

from ..schemas.errors import TokenizerError
from ..schemas.recipe import Section, parse_options
from ..schemas.relevance import STANDARDIZED, Calibration, ScorerSpec
from .base import check_frames
from .weights import WeightsFile, fetch_folder

SHOWN = 3  # missing tensors that an error names
RESAMPLES = {2: "bilinear", 3: "bicubic"}  # PIL's numbers of them, which settings have
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
NAFLEX = 256  # patches of a frame, unless a checkpoint says otherwise


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of checkpoint: its class in transformers, whether it saw small letters alone, and its settings."""

    model: str
    is_lower: bool
    settings: Mapping[str, Any]


KINDS = {
    "clip": Kind(
        model="CLIPModel",
        is_lower=False,  # its tokenizer does that
        settings={"resample": 3, "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "do_center_crop": True},
    ),
    "siglip": Kind(model="SiglipModel", is_lower=True, settings={"resample": 3, "image_mean": HALF, "image_std": HALF}),
    "siglip2": Kind(
        model="Siglip2Model", is_lower=True, settings={"resample": 2, "image_mean": HALF, "image_std": HALF}
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Patches:
    """Pictures of any shape, as patches of `side` pixels, `most` at most: NaFlex."""

    side: int
    most: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """How frames become what a network takes: resized, cut around the middle, and normalized.

    `size` is (height, width), or the shorter side of frames that keep their shape, or patches of such frames.
    """

    size: tuple[int, int] | int | Patches
    crop: tuple[int, int] | None
    resample: str
    rescale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


class ImageTextOptions(Section):
    """What embeddings depend on besides the weights."""

    max_num_patches: int | None = Field(
        default=None, ge=1, le=4096, description="of a frame, for NaFlex checkpoints; null: as the checkpoint says"
    )


class ImageTextEncoder:
    """A folder of transformers' CLIP, SigLIP or SigLIP 2 as a FrameEncoder; TokenizerError for another one.

    `weights` is its path or fsspec URL. Texts are filled up to the length of the model's positions, as in training.
    """

    def __init__(self, weights: str, device: str, dtype: str, options: Mapping[str, Any]) -> None:
        asked = parse_options(ImageTextOptions, options)
        _check_library()
        file = fetch_folder(weights)
        name = _kind_in(file)
        self._kind, self._device, self._dtype = KINDS[name], device, getattr(torch, dtype)
        model = _loaded(file, self._kind)
        self._config = model.config
        self._preprocessing = preprocessing_of(file, name, self._config.vision_config, asked.max_num_patches)
        self._words = _tokenizer_in(file)
        scale = float(model.logit_scale.exp())
        bias = getattr(model, "logit_bias", None)
        kept = {} if bias is not None else {"logit_scale": float(model.logit_scale)}
        self.spec = ScorerSpec(
            name=f"transformers/{name}",
            dim=getattr(self._config, "projection_dim", None) or self._config.vision_config.hidden_size,
            weights_sha256=file.sha256,
            options=kept | options_of(self._preprocessing, dtype),
            calibration=calibration_of(scale, None if bias is None else float(bias)),
        )
        self._model = model_on(model, device, self._dtype)

    @torch.inference_mode()
    def embed_frames(self, frames_NHWC: np.ndarray) -> np.ndarray:
        """float32 embeddings (N,D) of length 1 of uint8 RGB frames of any one size."""
        x_NCHW = pixels(frames_NHWC, self._preprocessing, self._device, self.spec.name).to(self._dtype)
        inputs = {"pixel_values": x_NCHW}
        if isinstance(self._preprocessing.size, Patches):
            inputs = _patches(x_NCHW, self._preprocessing.size)
        return unit_rows(self._model.get_image_features(**inputs).pooler_output, self.spec.name)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """float32 embeddings (N,D) of length 1; the end of a text that is too long is cut off."""
        if not texts:
            return np.zeros((0, self.spec.dim or 0), np.float32)
        texts = [text.lower() if self._kind.is_lower else text for text in texts]
        of_texts = self._config.text_config
        length, filling = of_texts.max_position_embeddings, self._words.pad_token_id
        pieces = self._words(texts, truncation=True, max_length=length)["input_ids"]
        filling = of_texts.pad_token_id if filling is None else filling
        ids_NM = torch.tensor([ids + [filling] * (length - len(ids)) for ids in pieces], device=self._device)
        return unit_rows(self._model.get_text_features(input_ids=ids_NM).pooler_output, self.spec.name)


def calibration_of(scale: float, bias: float | None) -> Calibration:
    """That of a model which gives probabilities, as one with a bias does (SigLIP), or of one which only ranks."""
    return STANDARDIZED if bias is None else Calibration(rule="sigmoid", scale=scale, bias=bias)


def options_of(preprocessing: Preprocessing, dtype: str) -> dict[str, Any]:
    """What embeddings depend on besides the weights, as a spec has it: what JSON gives back as it was."""
    return {**json.loads(json.dumps(asdict(preprocessing))), **({} if dtype == "float32" else {"dtype": dtype})}


def model_on(model: Any, device: str, dtype: torch.dtype) -> Any:
    """The model where it is to infer. On a GPU float32 means float32."""
    if torch.device(device).type == "cuda":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return model.eval().to(device, dtype)


def unit_rows(rows_ND: torch.Tensor, name: str) -> np.ndarray:
    """Rows at length 1, float32; TokenizerError for values that are not finite."""
    if not rows_ND.isfinite().all():
        raise TokenizerError(
            f"{name}: the networks gave values that are not finite: set dtype to float32 or bfloat16, whose range is"
            f" wider than that of float16, or check the weights"
        )
    return F.normalize(rows_ND.float(), dim=-1).cpu().numpy()


def pixels(frames_NHWC: np.ndarray, preprocessing: Preprocessing, device: str, name: str) -> torch.Tensor:
    """float32 (N,3,h,w) of uint8 RGB frames, as the network called `name` takes them; TokenizerError for others."""
    frames = torch.from_numpy(np.array(frames_NHWC))
    check_frames(frames.unsqueeze(0), name)
    size = _size_for(preprocessing.size, *frames.shape[1:3])
    x_NCHW = resized(frames.to(device).permute(0, 3, 1, 2).float(), size, preprocessing.resample)
    if preprocessing.crop:
        height, width = preprocessing.crop
        top, left = (size[0] - height) // 2, (size[1] - width) // 2
        x_NCHW = x_NCHW[:, :, top : top + height, left : left + width]
    mean, std = (torch.tensor(one, device=device).view(3, 1, 1) for one in (preprocessing.mean, preprocessing.std))
    return (x_NCHW * preprocessing.rescale - mean) / std


def resized(x_NCHW: torch.Tensor, size: tuple[int, int], resample: str) -> torch.Tensor:
    """Frames of 0 to 255 at another size, antialiased; rows and then columns, each to whole grey levels, as by PIL."""
    for shape in ((x_NCHW.shape[2], size[1]), size):
        if x_NCHW.shape[2:] != shape:
            x_NCHW = F.interpolate(x_NCHW, size=shape, mode=resample, antialias=True)
            x_NCHW = x_NCHW.add_(0.5).floor_().clamp_(0, 255)  # halves go up
    return x_NCHW


def _size_for(size: tuple[int, int] | int | Patches, height: int, width: int) -> tuple[int, int]:
    """What frames of this height and width are resized to."""
    if isinstance(size, tuple):
        return size
    if isinstance(size, Patches):
        rows, columns = patch_grid(height, width, size.most)
        return rows * size.side, columns * size.side
    return (size * height // width, size) if height > width else (size, size * width // height)


def patch_grid(height: int, width: int, most: int) -> tuple[int, int]:
    """Rows and columns of patches of a frame at the largest scale that needs `most` at most, begun ones counted."""
    by_rows = [(Fraction(n, height), n, -(-n * width // height)) for n in range(1, most + 1)]
    by_columns = [(Fraction(n, width), -(-n * height // width), n) for n in range(1, most + 1)]
    _, rows, columns = max(one for one in by_rows + by_columns if one[1] * one[2] <= most)
    return rows, columns


def _patches(x_NCHW: torch.Tensor, size: Patches) -> dict[str, torch.Tensor]:
    """What SigLIP 2 takes for frames: their patches row by row, filled up with zeros, and which are none."""
    num, _, height, width = x_NCHW.shape
    rows, columns = height // size.side, width // size.side
    x = x_NCHW.unflatten(3, (columns, size.side)).unflatten(2, (rows, size.side))
    x_NPD = x.permute(0, 2, 4, 3, 5, 1).reshape(num, rows * columns, -1)
    is_seen_P = torch.arange(size.most, device=x.device) < rows * columns
    return {
        "pixel_values": F.pad(x_NPD, (0, 0, 0, size.most - rows * columns)),
        "pixel_attention_mask": is_seen_P.expand(num, -1).to(torch.int32),
        "spatial_shapes": torch.tensor([[rows, columns]] * num),
    }


def preprocessing_of(file: WeightsFile, name: str, vision: Any, most: int | None = None) -> Preprocessing:
    """How a folder's preprocessor_config.json, or the part of processor_config.json that newer ones have in its place,
    prepares frames for its network; what they do not say is as usual for this kind of checkpoint.
    """
    outer = _json_in(file, "processor_config.json").get("image_processor")
    settings = {**KINDS[name].settings, **(outer or _json_in(file, "preprocessor_config.json"))}
    if most is not None and name != "siglip2":
        raise TokenizerError(f"options.max_num_patches is of NaFlex checkpoints, {file.uri} is {name}: remove it")
    resample = settings["resample"] if settings.get("do_resize", True) else None
    if resample not in RESAMPLES:
        raise _unusable(file, f"frames are resized by {resample}: bilinear (2) and bicubic (3) are known here")
    if name == "siglip2":
        crop, size = None, Patches(side=vision.patch_size, most=most or settings.get("max_num_patches", NAFLEX))
    else:
        size, crop = _sizes(settings, name, vision, file)
    is_normal = settings.get("do_normalize", True)
    return Preprocessing(
        size=size,
        crop=crop,
        resample=RESAMPLES[resample],
        rescale=float(settings.get("rescale_factor", 1 / 255)) if settings.get("do_rescale", True) else 1.0,
        mean=tuple(settings["image_mean"]) if is_normal else (0.0, 0.0, 0.0),
        std=tuple(settings["image_std"]) if is_normal else (1.0, 1.0, 1.0),
    )


def _sizes(
    settings: Mapping[str, Any], name: str, vision: Any, file: WeightsFile
) -> tuple[tuple[int, int] | int, tuple[int, int] | None]:
    """What frames are resized to and then cut to, which must be the square that the network takes."""
    side: int = vision.image_size
    said: Any = settings.get("size", side)
    size = _pair(said)
    if isinstance(said, Mapping) and "shortest_edge" in said:
        size = said["shortest_edge"]
    elif isinstance(said, int) and name == "clip":  # as older files say it
        size = said
    crop = _pair(settings.get("crop_size", side)) if settings.get("do_center_crop") else None
    least = size if isinstance(size, int) else min(size)
    if (crop or size) != (side, side) or least < side:
        raise _unusable(file, f"frames of size {said}, cut to {crop}, are not the {side}x{side} of its network")
    return size, crop


def _pair(value: Any) -> tuple[int, int]:
    """A height and width; 0 for one that is not said."""
    return (value, value) if isinstance(value, int) else (value.get("height", 0), value.get("width", 0))


def _check_library() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise TokenizerError(
            f"transformers is not here ({error}), which the encoder of that name needs: pip install"
            f" 'tokenmill[transformers]'"
        ) from None


def _kind_in(file: WeightsFile) -> str:
    """Which of KINDS the folder holds."""
    kind = _json_in(file, "config.json").get("model_type")
    if kind not in KINDS:
        raise _unusable(file, f"config.json has model_type {kind!r}: accepted are {', '.join(KINDS)}")
    return kind


def _json_in(file: WeightsFile, name: str) -> dict[str, Any]:
    """The values of a folder's JSON file, none where there is no such file."""
    try:
        values = json.loads((Path(file.path) / name).read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise _unusable(file, f"{name} is no JSON ({error})") from None
    return values if isinstance(values, dict) else {}


def _tokenizer_in(file: WeightsFile) -> Any:
    """The tokenizer of a folder's tokenizer.json, whatever class made it."""
    from transformers import PreTrainedTokenizerFast

    if not (Path(file.path) / "tokenizer.json").is_file():
        raise _unusable(file, "there is no tokenizer.json in it")
    try:
        return PreTrainedTokenizerFast.from_pretrained(file.path, local_files_only=True)
    except Exception as error:  # damaged files bring out errors of every kind
        raise _unusable(file, f"tokenizer.json is not readable ({_line(error)})") from error


def _loaded(file: WeightsFile, kind: Kind) -> Any:
    """The network of a folder in float32, with all its tensors."""
    import transformers

    try:
        with _no_progress():
            model, found = getattr(transformers, kind.model).from_pretrained(
                file.path, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
    except Exception as error:  # configurations and damaged files bring out errors of every kind
        raise _unusable(file, f"it does not load ({_line(error)})") from error
    missing = sorted(found["missing_keys"])
    if missing:
        shown = ", ".join(missing[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
        raise _unusable(file, f"{len(missing)} tensors are missing ({shown})")
    return model.requires_grad_(False)


@contextlib.contextmanager
def _no_progress() -> Iterator[None]:
    """transformers without its bars."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def _unusable(file: WeightsFile, fault: str) -> TokenizerError:
    return TokenizerError(
        f"weights {file.uri}: {fault}: give a folder with config.json, preprocessor_config.json, tokenizer.json and"
        f" .safetensors of CLIP, SigLIP or SigLIP 2, for instance hf://google/siglip-base-patch16-224"
    )


def _line(error: Exception) -> str:
    """An error's kind and message in one line of moderate length."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= 160 else f"{text[:157]}..."
