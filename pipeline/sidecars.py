"""Sidecars: pseudo-labels that were made elsewhere, beside the videos, in the formats of TrajTok's trainers.

Layouts (TrajTok, arXiv:2602.22779), for a video or picture ``<base>.<extension>``:
video  ``<base>_mask.npz`` (arr_0: T,H,W) and ``<base>_graph.npz`` (tensor: M,T); for ``<base>_short.mp4`` too
image  ``<base>_mask.npz`` (arr_0: H,W), every id a segment
sav    ``<base>_instances.json`` of a video at 6 frames a second
sa1b   ``<base>.json`` with annotations, or with a panoptic_mask
The files are taken not to change: a product's version does not depend on what they hold.
"""

import base64
import io
import json
import posixpath
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import av
import numpy as np
from av.error import FFmpegError
from pydantic import Field

from ..schemas.clip import ClipFailure, ClipFrames, Sampling
from ..schemas.errors import DecodeError, SourceError
from ..schemas.masks import SegmenterSpec
from ..schemas.recipe import Section
from .decode_clips import may_pass
from .fetch import local_file, open_for_reading
from .mask_formats import (
    SAV_FPS,
    SAV_STEP,
    ids_of_annotations,
    instances_by_frame,
    tracks_of_graph,
    tracks_of_instances,
)
from .places import ParquetCell, TarMember, local_path, read_errors, said_by, stored_file, video_inside
from .probe import probe_video
from .resize import place_of

KEPT_VIDEOS = 16  # whose sidecars are held: clips of several videos come in turns, as many as there are decoders
KEPT_TARS = 8
MOST_ID = 1 << 31
LONGEST_REASON = 200  # letters of what a library says
SAV_FPS_SLACK = 0.1  # share by which the rate of a video may differ: containers round
SHORT = "_short"  # what ends the name of a video that was cut down to the frames of its masks
# What values and lookups say of a file that holds something else.
MALFORMED = (
    ValueError, LookupError, TypeError, AttributeError, OverflowError, MemoryError, RecursionError, FFmpegError,
)  # fmt: skip


class SidecarsOptions(Section):
    """Where sidecars are, and of which layout."""

    folder: str | None = Field(default=None, description="folder or URL that holds all sidecars; null is each video's")
    layout: Literal["auto", "video", "image", "sav", "sa1b"] = Field(
        default="auto", description="auto takes the first that is there, in the order video, image, sav, sa1b"
    )
    version: str = Field(
        default="", pattern=r"^[A-Za-z0-9_\-]*$", description="ends <base>_mask and <base>_graph; _v0 is nothing"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoShape:
    """How many frames a video shows, how many in a second, and their size."""

    num_frames: int
    fps: float
    height: int
    width: int


# Brings ids (N,h,w) of whole frames to the size of clips; and gives the tracks (N,H,W) of frames of a video so.
ScaleIds = Callable[[np.ndarray], np.ndarray]
TracksOf = Callable[[Sequence[int], ScaleIds], np.ndarray]


class Sidecars:
    """The segmenter that reads what others made. `sampling` says how frames were brought to the size of clips."""

    def __init__(self, options: SidecarsOptions, sampling: Sampling) -> None:
        self.spec = SegmenterSpec(name="sidecars", options=options.model_dump(mode="json"))
        self._options, self._sampling = options, sampling
        self._held: OrderedDict[str, tuple[TracksOf, VideoShape] | str] = OrderedDict()

    def segment(self, one: ClipFrames) -> np.ndarray | ClipFailure:
        """The tracks (T,H,W) that the sidecars of a clip's video show in its frames, or why there are none.

        SourceError: a store is out of reach, as for videos: failures would outlast an outage.
        """
        uri, clip_id = one.clip.video.uri, one.clip.clip_id
        held = self._sidecar(uri)
        if isinstance(held, str):
            return ClipFailure(clip_id=clip_id, step="segment", reason=held)
        tracks_of, shape = held
        numbers = sorted(set(one.frame_numbers))
        try:
            tracks_NHW = tracks_of(numbers, lambda ids_NHW: scaled_ids(ids_NHW, shape, self._sampling))
        except MALFORMED as error:
            return ClipFailure(clip_id=clip_id, step="segment", reason=f"{uri}: its sidecar: {_said(error)}")
        places = np.searchsorted(numbers, one.frame_numbers)
        return tracks_NHW[np.pad(places, (0, len(one.frames_THWC) - len(places)), mode="edge")]

    def _sidecar(self, uri: str) -> tuple[TracksOf, VideoShape] | str:
        """How to get the tracks of a video's frames, and its shape; or why there are none. The last few are held.

        SourceError: a store is out of reach. StorageError: our own disk takes no copy.
        """
        if uri not in self._held:
            try:
                shape = shape_of(uri)
                self._held[uri] = find_sidecar(uri, shape, self._options), shape
            except (SourceError, DecodeError) as error:
                places = uri, self._options.folder or uri
                if isinstance(error, SourceError) and any(may_pass(place, error) for place in places):
                    raise
                self._held[uri] = str(error)
            if len(self._held) > KEPT_VIDEOS:
                self._held.popitem(last=False)
        self._held.move_to_end(uri)
        return self._held[uri]


def shape_of(uri: str) -> VideoShape:
    """The number and size of the frames of a video: masks can be matched with them, not with those of a clip."""
    with local_file(uri) as path:
        try:
            probe = probe_video(path)
        except OSError as error:
            raise DecodeError(f"{uri}: {error}") from error
    return VideoShape(
        num_frames=len(probe.pts_s), fps=1 / probe.frame_interval_s, height=probe.height, width=probe.width
    )


def scaled_ids(ids_NHW: np.ndarray, shape: VideoShape, sampling: Sampling) -> np.ndarray:
    """Ids (N,h,w) of whole frames at the size of clips, placed as resize_frame places the frames; bars are 0.

    Each pixel takes the id at its middle. Ids of another size than the video's frames stand for them all the same.
    """
    _, source_h, source_w = ids_NHW.shape
    place = place_of(shape.height, shape.width, sampling)
    rows, is_row = _sources(sampling.height, place.top, place.height, source_h)
    columns, is_column = _sources(sampling.width, place.left, place.width, source_w)
    return ids_NHW[:, rows[:, None], columns] * (is_row[:, None] & is_column).astype(ids_NHW.dtype)


def _sources(size: int, corner: int, scaled: int, source: int) -> tuple[np.ndarray, np.ndarray]:
    """For each pixel along one side the pixel of the source, and whether there is one."""
    places = np.arange(size) - corner
    return (np.clip(places, 0, scaled - 1) * 2 + 1) * source // (2 * scaled), (places >= 0) & (places < scaled)


def find_sidecar(uri: str, shape: VideoShape, options: SidecarsOptions) -> TracksOf:
    """How to get the tracks of a video from the first sidecar that is there; SourceError where none is, or is wrong."""
    tried = []
    for base in _bases(uri, options.folder):
        version = "" if options.version == "_v0" else options.version
        for layout, (endings, read) in LAYOUTS.items():
            if options.layout not in ("auto", layout):
                continue
            names = [f"{base}{ending.format(version=version)}" for ending in endings]
            places = [_place(uri, name, options.folder) for name in names]
            data = [_contents(place) if place else None for place in places]
            if None in data:
                tried += [name for name, content in zip(names, data, strict=True) if content is None]
                continue
            try:
                return read(shape, *data)
            except MALFORMED as error:
                beside = "".join(f" with {posixpath.basename(name)}" for name in names[1:])
                raise SourceError(f"{names[0]}{beside}: {_said(error)}") from None
    sought = ", ".join(posixpath.basename(name) for name in dict.fromkeys(tried))
    where = "beside it" if options.folder is None else f"in {options.folder}"
    raise SourceError(f"{uri}: no masks {where}: sought {sought}")


def _bases(uri: str, folder: str | None) -> Iterator[str]:
    """Names of sidecars without their endings: those of the video, and without what marks it as cut down."""
    inside = video_inside(uri)
    if isinstance(inside, ParquetCell):
        raise SourceError(f"{uri}: a video in a Parquet column has no name that masks could share: use files or tars")
    name = inside.name if inside else uri if local_path(uri) is not None else uri.partition("?")[0]
    if folder is not None:
        name = f"{folder.rstrip('/')}/{posixpath.basename(name)}"
    base = posixpath.splitext(name)[0]
    yield base
    if base.endswith(SHORT):
        yield base.removesuffix(SHORT)


def _place(uri: str, name: str, folder: str | None) -> str | None:
    """The URI of the sidecar `name`: where the video is a member of a tar, another member of it; None where absent."""
    inside = video_inside(uri)
    if folder is not None or not isinstance(inside, TarMember):
        return name
    return _members(inside.file_uri, stored_file(inside.file_uri).stamp).get(name)


@lru_cache(maxsize=KEPT_TARS)
def _members(tar_uri: str, _stamp: str) -> dict[str, str]:
    """The URI of every file in a tar, by name."""
    with open_for_reading(tar_uri) as stream, read_errors(tar_uri):
        try:
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                found = [
                    TarMember(file_uri=tar_uri, name=one.name, offset=one.offset_data, size_bytes=one.size)
                    for one in tar
                    if one.isreg()
                ]
        except tarfile.TarError as error:
            raise SourceError(f"{tar_uri}: truncated, damaged or no tar ({error}): copy it again") from None
    return {member.name: member.uri for member in found}


def _contents(uri: str) -> bytes | None:
    """The bytes of a file; None where it does not exist."""
    try:
        with local_file(uri) as path, open(path, "rb") as stream:
            return stream.read()
    except SourceError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            return None
        raise


def _read_video(shape: VideoShape, masks: bytes, graph: bytes) -> TracksOf:
    ids_THW, graph_MT = _array(masks, "arr_0", "THW"), _array(graph, "tensor", "MT")
    if len(ids_THW) != shape.num_frames:
        raise ValueError(
            f"masks of {len(ids_THW)} frames, the video shows {shape.num_frames}: cut the video to the frames of its"
            f" masks"
        )
    if graph_MT.shape[1] != len(ids_THW):
        raise ValueError(f"masks of {len(ids_THW)} frames, the graph has {graph_MT.shape[1]}: write both again")
    return lambda numbers, scale: tracks_of_graph(scale(ids_THW[numbers]), graph_MT[:, numbers])


def _read_image(shape: VideoShape, masks: bytes) -> TracksOf:
    try:
        return _still(_array(masks, "arr_0", "HW"), shape)
    except ValueError as error:
        raise ValueError(f"{error}; masks of a video need a graph (<base>_graph.npz) beside them") from None


def _read_sav(shape: VideoShape, instances: bytes) -> TracksOf:
    shown = instances_by_frame(json.loads(instances))
    last = max(shown, default=0)
    if last >= shape.num_frames:
        raise ValueError(
            f"a mask of frame {SAV_STEP * last}, the last of the video is {SAV_STEP * (shape.num_frames - 1)}"
        )
    if shape.num_frames > 1 and abs(shape.fps / SAV_FPS - 1) > SAV_FPS_SLACK:
        raise ValueError(
            f"the video has {shape.fps:.4g} frames a second, its masks belong to one of {SAV_FPS}: re-encode it"
        )

    def tracks_of(numbers: Sequence[int], scale: ScaleIds) -> np.ndarray:
        return np.concatenate([scale(tracks_of_instances(shown.get(number, ()))[None]) for number in numbers])

    return tracks_of


def _read_sa1b(shape: VideoShape, document: bytes) -> TracksOf:
    found = json.loads(document)
    if "annotations" in found:
        return _still(ids_of_annotations(found["annotations"]), shape)
    if "panoptic_mask" in found:
        return _still(_ids_of_png(base64.b64decode(found["panoptic_mask"]["mask_png"])), shape)
    raise ValueError(f"neither annotations nor panoptic_mask, found {', '.join(map(str, found)) or 'nothing'}")


def _still(ids_HW: np.ndarray, shape: VideoShape) -> TracksOf:
    """The tracks of a picture: every id is one."""
    if shape.num_frames != 1:
        raise ValueError(f"masks of one picture, the video shows {shape.num_frames} frames: videos need a graph beside")
    return lambda numbers, scale: scale(ids_HW[None].astype(np.int32))


def _array(data: bytes, key: str, axes: str) -> np.ndarray:
    """An array of ids in an npz file."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            array, found = (arrays[key], "") if key in arrays else (None, ", ".join(arrays))
    except Exception as error:  # numpy lets through whatever zip files, zlib and tokenizers of Python raise
        said = "" if "pickle" in str(error) else f" ({said_by(error)})"  # numpy takes any other file for a pickle
        raise ValueError(f"not an npz file, or damaged{said}") from None
    if array is None:
        raise ValueError(f"no array {key!r}, found {found}")
    if array.ndim != len(axes) or (not array.size and "M" not in axes):
        raise ValueError(f"{key} has the shape {array.shape}, accepted is ({','.join(axes)})")
    if array.dtype.kind not in "bui" or (array.size and not 0 <= array.min() <= array.max() < MOST_ID):
        raise ValueError(f"{key} holds {array.dtype}, accepted are whole numbers from 0 to {MOST_ID - 1}")
    return array


def _ids_of_png(data: bytes) -> np.ndarray:
    """The ids in a PNG: its grey levels (8 or 16 bits), the numbers of its palette, or R + 256 G + 65536 B."""
    codec = av.CodecContext.create("png", "r")
    (frame,) = [*codec.decode(av.Packet(data)), *codec.decode(None)]  # pyright: ignore
    if frame.format.name == "pal8":
        plane = frame.planes[0]
        return np.frombuffer(bytes(plane), np.uint8).reshape(-1, plane.line_size)[: frame.height, : frame.width].copy()
    if frame.format.name in ("gray", "gray16be", "gray16le"):
        return frame.to_ndarray()
    rgb_HWC = frame.to_ndarray(format="rgb24").astype(np.int32)
    return rgb_HWC[..., 0] + 256 * rgb_HWC[..., 1] + 65536 * rgb_HWC[..., 2]


def _said(error: Exception) -> str:
    """What is wrong with a file, in one line; libraries may quote all of it."""
    said = said_by(error)
    text = said if len(said) <= LONGEST_REASON else f"{said[:LONGEST_REASON]}..."
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({text})"
    if isinstance(error, LookupError | TypeError | AttributeError):
        return f"not of this layout ({type(error).__name__}: {text})"
    return text


# The endings of the files of each layout, and what reads their contents.
LAYOUTS: dict[str, tuple[tuple[str, ...], Callable[..., TracksOf]]] = {
    "video": (("_mask{version}.npz", "_graph{version}.npz"), _read_video),
    "image": (("_mask{version}.npz",), _read_image),
    "sav": (("_instances.json",), _read_sav),
    "sa1b": ((".json",), _read_sa1b),
}
