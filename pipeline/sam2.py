"""sam2: pseudo-labels by SAM 2, which finds what there is on key frames and follows it through the clip."""

import functools
import itertools
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from pydantic import Field

from ..schemas.clip import ClipFrames
from ..schemas.errors import TokenizerError
from ..schemas.masks import SegmenterSpec
from ..schemas.recipe import Section
from .key_frames import CUT_CHANGE, chunks_of
from .sam2_masks import areas, at_size, distinct, good_masks, least_pixels, matched, newcomers, painted
from .sam2_network import ClipNetwork, check_network, load_network, transformers_version

DTYPES = ("float32", "bfloat16")
MOST_CANDIDATES = 1024  # masks of a frame, the best, among which equal ones are looked for
REVISION = 1


class Sam2Options(Section):
    """What sam2 alone knows."""

    image_size: int | None = Field(
        default=None, ge=64, le=4096, multiple_of=32,
        description="side of the squares that the networks see; null is the checkpoint's, 1024; 512 takes a fifth",
    )  # fmt: skip
    key_every: int = Field(default=8, ge=1, description="frames from key frame to key frame within a shot")
    cut_change: float = Field(
        default=CUT_CHANGE,
        ge=0,
        le=1,
        description="change between two frames from which on it can be a cut between shots",
    )
    points_per_side: int = Field(default=32, ge=1, le=256, description="points of the grid along each side of a frame")
    points_per_batch: int = Field(default=64, ge=1, description="points that are decoded together")
    predicted_iou: float = Field(default=0.8, ge=0, le=1, description="masks that SAM 2 rates lower are dropped")
    stability: float = Field(default=0.95, ge=0, le=1, description="masks with less certain borders are dropped")
    same_iou: float = Field(default=0.7, ge=0, le=1, description="of masks that overlap more, the best rated stays")
    least_area: float = Field(default=0.001, ge=0, le=1, description="share of the frame that an object has or more")
    link_iou: float = Field(default=0.5, gt=0, le=1, description="overlap from which on a found mask is a followed one")
    check_every: int = Field(
        default=4, ge=0, description="frames after which uncovered pixels are searched for new objects; 0: never"
    )
    new_share: float = Field(
        default=0.5, gt=0, le=1, description="share of a new object that lies where nothing is followed"
    )
    max_objects: int = Field(default=64, ge=1, le=255, description="objects followed at a time; the largest are kept")
    objects_per_batch: int = Field(default=16, ge=1, description="objects that are followed together")


class Network(Protocol):
    """What finds and follows objects in the frames of one clip: see ClipNetwork."""

    def decode(self, t: int, points_P2: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (N,h,w) of masks at points (x,y) of frame t, shares of width and height, and their rated IoU (N)."""
        ...

    def prompt(self, t: int, masks_NHW: torch.Tensor) -> None:
        """Begin to follow the objects that these masks show in frame t."""
        ...

    def follow(self, t: int) -> torch.Tensor:
        """Where the objects are in frame t (N,H,W, bool), in the order of their prompts; frames come in order."""
        ...

    def forget(self) -> None:
        """Follow no object any longer."""
        ...


class Sam2:
    """Segments clips by a Sam2VideoModel of transformers; holds its weights.

    `folder` is a checkpoint as transformers saves it (config.json, model.safetensors) and `weights_sha256` its digest.
    It is checked at once, and its numbers are loaded when the first clip comes.
    In bfloat16 the weights stay in float32, and the arithmetic is mixed. TokenizerError where transformers is missing,
    for folders that hold no such checkpoint, and for float16.
    """

    def __init__(self, folder: str, weights_sha256: str, device: str, dtype: str, options: Sam2Options) -> None:
        if dtype not in DTYPES:
            raise TokenizerError(
                f"sam2 computes in {' or '.join(DTYPES)}, as its memory of past frames is bfloat16, found dtype"
                f" {dtype!r}: set dtype to bfloat16"
            )
        self.spec = SegmenterSpec(
            name="sam2",
            options={**options.model_dump(), "transformers": transformers_version()},
            weights_sha256=weights_sha256,
            dtype=dtype,
            revision=REVISION,
        )
        self._options = options
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._folder, self._device = folder, device
        check_network(folder, options.image_size)

    @functools.cached_property
    def _model(self) -> Any:
        return load_network(self._folder, self._device, self._options.image_size)

    def segment(self, one: ClipFrames) -> np.ndarray:
        """The tracks (T,H,W, int32) of a clip, 0 where no object is; frames of padding repeat the last real one."""
        real_THWC = one.frames_THWC[: one.clip.num_valid]
        with torch.inference_mode():
            tracks_THW = tracks_of(real_THWC, ClipNetwork(self._model, real_THWC, self._dtype), self._options)
        padding = ((0, len(one.frames_THWC) - len(real_THWC)), (0, 0), (0, 0))
        return np.pad(tracks_THW, padding, mode="edge")


@dataclass(frozen=True, slots=True, kw_only=True)
class Objects:
    """Objects of one frame: their labels, from 1, and boolean masks (N,H,W)."""

    labels: tuple[int, ...]
    masks_NHW: torch.Tensor


def tracks_of(frames_THWC: np.ndarray, network: Network, options: Sam2Options) -> np.ndarray:
    """The tracks (T,H,W, int32) of the objects that a network finds and follows in uint8 RGB frames.

    Objects keep their label from chunk to chunk of a shot, and no label is given twice. Where masks overlap, the
    smallest is on top.
    """
    num_frames, height, width, _ = frames_THWC.shape
    tracks_THW = np.zeros((num_frames, height, width), np.int32)
    search = _Search(network, (height, width), options)
    objects = None
    for chunk in chunks_of(frames_THWC, options.key_every, options.cut_change):
        network.forget()
        objects = search.at_key_frame(chunk.first, objects if chunk.is_linked else None)
        tracks_THW[chunk.first] = painted(objects.masks_NHW, objects.labels)
        for t in range(chunk.first + 1, chunk.last + 1):
            objects = Objects(labels=objects.labels, masks_NHW=network.follow(t))
            if options.check_every and t < chunk.last and (t - chunk.first) % options.check_every == 0:
                objects = search.with_entered(t, objects)
            tracks_THW[t] = painted(objects.masks_NHW, objects.labels)
    return tracks_THW


class _Search:
    """Looks for objects in the frames of one clip, and has the network follow those that it finds."""

    def __init__(self, network: Network, size: tuple[int, int], options: Sam2Options) -> None:
        self._network = network
        self._size = size
        self._options = options
        self._num_pixels = least_pixels(*size, options.least_area)
        self._labels = itertools.count(1)
        middles = (np.arange(options.points_per_side) + 0.5) / options.points_per_side
        y, x = np.meshgrid(middles, middles, indexing="ij")
        self._grid_P2 = np.stack([x.ravel(), y.ravel()], axis=1)

    def at_key_frame(self, t: int, before: Objects | None) -> Objects:
        """The objects of a key frame: those followed up to it that are still seen, and new ones.

        One that matches a found mask goes on with that, so that errors do not grow; the others go on as they are.
        """
        found_NHW = self._found(t, self._grid_P2)
        if before is None:
            before = Objects(labels=(), masks_NHW=found_NHW[:0])
        seen = (areas(before.masks_NHW) >= self._num_pixels).tolist()
        masks_NHW = torch.stack([*itertools.compress(before.masks_NHW, seen)]) if any(seen) else found_NHW[:0]
        for n, m in matched(masks_NHW, found_NHW, self._options.link_iou):
            masks_NHW[n] = found_NHW[m]
        self._prompt(t, masks_NHW)
        objects = Objects(labels=tuple(itertools.compress(before.labels, seen)), masks_NHW=masks_NHW)
        return self._with_new(t, objects, found_NHW)

    def with_entered(self, t: int, objects: Objects) -> Objects:
        """The objects of a frame, and new ones found from points where nothing is followed."""
        height, width = self._size
        columns, rows = (self._grid_P2 * (width, height)).astype(np.int64).T
        covered_HW = objects.masks_NHW.any(dim=0).cpu().numpy()
        open_P2 = self._grid_P2[~covered_HW[rows, columns]]
        if len(objects.labels) >= self._options.max_objects or not len(open_P2):
            return objects
        return self._with_new(t, objects, self._found(t, open_P2))

    def _with_new(self, t: int, objects: Objects, found_NHW: torch.Tensor) -> Objects:
        """The objects of a frame and, prompted, those of the found masks that are new."""
        new_NHW = newcomers(
            found_NHW,
            objects.masks_NHW,
            room=self._options.max_objects - len(objects.labels),
            least_share=self._options.new_share,
            num_pixels=self._num_pixels,
        )
        self._prompt(t, new_NHW)
        labels = (*objects.labels, *itertools.islice(self._labels, len(new_NHW)))
        return Objects(labels=labels, masks_NHW=torch.cat([objects.masks_NHW, new_NHW]))

    def _prompt(self, t: int, masks_NHW: torch.Tensor) -> None:
        for i in range(0, len(masks_NHW), self._options.objects_per_batch):
            self._network.prompt(t, masks_NHW[i : i + self._options.objects_per_batch])

    def _found(self, t: int, points_P2: np.ndarray) -> torch.Tensor:
        """Distinct masks (N,H,W, bool) of the objects at points of a frame (one or more), the best rated first."""
        options = self._options
        parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        for i in range(0, len(points_P2), options.points_per_batch):
            logits_Nhw, iou_N = self._network.decode(t, points_P2[i : i + options.points_per_batch])
            good_N = good_masks(
                logits_Nhw,
                iou_N,
                least_iou=options.predicted_iou,
                least_stability=options.stability,
                least_area=options.least_area,
            )
            parts.append((logits_Nhw[good_N], iou_N[good_N]))
        logits_Nhw, iou_N = (torch.cat(values) for values in zip(*parts, strict=True))
        best = torch.argsort(iou_N, descending=True, stable=True)[:MOST_CANDIDATES]
        logits_Nhw = logits_Nhw[best]
        return at_size(logits_Nhw[distinct(logits_Nhw > 0, options.same_iou)], *self._size)
