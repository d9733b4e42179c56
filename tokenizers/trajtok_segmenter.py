"""TrajTok's segmenter (arXiv:2602.22779) as a maker of masks: every pixel of a clip belongs to a trajectory."""

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field
from torch import nn

from ..schemas.clip import ClipFrames
from ..schemas.errors import TokenizerError
from ..schemas.masks import SegmenterSpec
from ..schemas.recipe import parse_options
from .base import Settings
from .trajtok import BESIDE_SEGMENTER, sizes_of
from .trajtok_link import LinkOptions, linked
from .trajtok_model import IMAGE_SIDE, Segmenter
from .weights import WeightsFile, check_tensors, fetch_weights, load_tensors, read_tensors

Model = TypeVar("Model", bound=nn.Module)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IN_CLIP, IN_SEGMENTER = "vision_encoder.traj_tokenizer.segmenter.", "vision_encoder."  # of keys in published files
QUERIES = "trajectory_perceiver.latents"  # every segmenter has them


def _check_grid(grid: int) -> int:
    if grid < 1 or IMAGE_SIDE % grid:
        raise ValueError(f"a divisor of {IMAGE_SIDE}; of the published weights 56")
    return grid


Grid = Annotated[
    int, AfterValidator(_check_grid), Field(description="patches to a side of a frame: not in the weights")
]


class SegmenterOptions(LinkOptions):
    """What masks depend on besides the weights."""

    grid: Grid = 56
    min_area: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of a frame; trajectories that are smaller in every frame are left out",
    )


class TrajTokSegmenter:
    """The segmenter of either published checkpoint. Its weights are checked here and loaded when first used."""

    def __init__(self, settings: Settings) -> None:
        self._options = parse_options(SegmenterOptions, settings.options)
        if settings.weights is None:
            raise TokenizerError(
                "trajtok needs its weights: set weights to the path or URL of model.pth, from"
                " hf://michaelzch001/trajtok-segmenter or hf://michaelzch001/trajtok-trajvitv2 (docs/tokenizers.md)"
            )
        weights = fetch_weights(settings.weights)
        self._settings, self._tensors = settings, segmenter_tensors(read_tensors(weights), weights)
        self._sizes = sizes_of(self._tensors, "", self._options.grid, weights)
        with torch.device("meta"):
            check_tensors(self._tensors, Segmenter(self._sizes).state_dict(), weights, "TrajTok's segmenter")
        self.spec = SegmenterSpec(
            name="trajtok",
            options=self._options.model_dump(mode="json"),
            weights_sha256=weights.sha256,
            dtype=settings.dtype,
        )

    @torch.inference_mode()
    def segment(self, one: ClipFrames) -> np.ndarray:
        """The tracks (T,H,W) int32 of a clip, from 1, at the size of its frames; 0 where `min_area` left some out.

        By the finer head where the weights have one, else by patches. TokenizerError for values that are not finite.
        """
        return self.tracks(one.frames_THWC)

    def tracks(self, frames_THWC: np.ndarray) -> np.ndarray:
        """The tracks (T,H,W) int32 of one clip of uint8 RGB frames."""
        labels, queries = [], []
        for part_THWC in torch.from_numpy(np.array(frames_THWC)).split(self._options.chunk_frames):
            labels_Thw, queries_KD = self._look(part_THWC)
            labels.append(labels_Thw)
            queries.append(queries_KD)
        valid_CK = np.stack([np.bincount(one.ravel(), minlength=self._sizes.num_slots) > 0 for one in labels])
        numbers_CK = 1 + linked(np.stack(queries), valid_CK, self._options.threshold).astype(np.int32)
        tracks_Thw = np.concatenate([numbers_K[one] for numbers_K, one in zip(numbers_CK, labels, strict=True)])
        return _nearest(_without_small(tracks_Thw, self._options.min_area), *frames_THWC.shape[1:3])

    def _look(self, frames_THWC: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The slot (T,h,w) of every place of a chunk, and the features (K,D) of the slots."""
        frames = _squashed(frames_THWC.to(self._settings.device))
        found = self._model(normalized(frames, dtype_of(self._settings)).unsqueeze(0))
        logits_NK = (found.logits_BNK if found.fine_logits_BNK is None else found.fine_logits_BNK)[0]
        if not logits_NK.isfinite().all():
            raise TokenizerError(
                "trajtok: the networks gave values that are not finite: set dtype to float32 or bfloat16, whose range"
                " is wider than that of float16, or check the weights"
            )
        side = round((len(logits_NK) / len(frames_THWC)) ** 0.5)
        labels_Thw = logits_NK.argmax(-1).view(-1, side, side)
        return labels_Thw.cpu().numpy(), found.queries_BKD[0].float().cpu().numpy()

    @cached_property
    @torch.inference_mode(False)  # its parameters serve calls in and outside of that mode
    def _model(self) -> Segmenter:
        with torch.device("meta"):
            model = Segmenter(self._sizes)
        tensors, self._tensors = self._tensors, {}
        return on_device(model, tensors, self._settings)


def segmenter_tensors(tensors: Mapping[str, torch.Tensor], weights: WeightsFile) -> dict[str, torch.Tensor]:
    """The segmenter's tensors of either published file, by the keys of Segmenter; TokenizerError without one."""
    if IN_CLIP + QUERIES in tensors:
        return {name.removeprefix(IN_CLIP): value for name, value in tensors.items() if name.startswith(IN_CLIP)}
    if IN_SEGMENTER + QUERIES in tensors:
        kept = {name: value for name, value in tensors.items() if not name.startswith(BESIDE_SEGMENTER)}
        return {name.removeprefix(IN_SEGMENTER): value for name, value in kept.items()}
    raise TokenizerError(
        f"weights {weights.uri}: no tensor {IN_SEGMENTER}{QUERIES}, and none that begins with {IN_CLIP}: they are not"
        f" those of TrajTok: give model.pth of hf://michaelzch001/trajtok-segmenter"
    )


def on_device(model: Model, tensors: Mapping[str, torch.Tensor], settings: Settings) -> Model:
    """`model`, made on no device, with checked `tensors` on the device and in the number type of `settings`."""
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    load_tensors(model, tensors)
    if torch.device(settings.device).type == "cuda":  # float32 means float32
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return model.to(settings.device, dtype_of(settings))


def dtype_of(settings: Settings) -> torch.dtype:
    """The number type of the arithmetic."""
    return getattr(torch, settings.dtype)


def normalized(frames_THWC: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Frames (..,3) of 0 to 255 by the mean and deviation of ImageNet, computed in float32."""
    mean, std = (torch.tensor(values, device=frames_THWC.device) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((frames_THWC.float() / 255 - mean) / std).to(dtype)


def _squashed(frames_THWC: torch.Tensor) -> torch.Tensor:
    """Whole frames at the size that the networks take: bicubic and antialiased, in grey levels, as published."""
    if frames_THWC.shape[1:3] == (IMAGE_SIDE, IMAGE_SIDE):
        return frames_THWC
    x_TCHW = frames_THWC.permute(0, 3, 1, 2).float()
    x_TCHW = F.interpolate(x_TCHW, size=(IMAGE_SIDE, IMAGE_SIDE), mode="bicubic", antialias=True)
    return x_TCHW.round_().clamp_(0, 255).permute(0, 2, 3, 1)


def _nearest(tracks_Thw: np.ndarray, height: int, width: int) -> np.ndarray:
    """Tracks at another size, each place that of the source it lies in."""
    _, h, w = tracks_Thw.shape
    return tracks_Thw[:, (np.arange(height) * h // height)[:, None], np.arange(width) * w // width]


def _without_small(tracks_Thw: np.ndarray, min_area: float) -> np.ndarray:
    """Tracks with 0 in place of those that have less than this share of every frame."""
    num = int(tracks_Thw.max()) + 1
    areas_MT = np.stack([np.bincount(frame.ravel(), minlength=num) for frame in tracks_Thw], axis=1)
    is_kept_M = areas_MT.max(axis=1) >= min_area * tracks_Thw[0].size
    return np.where(is_kept_M, np.arange(num, dtype=np.int32), 0)[tracks_Thw]
