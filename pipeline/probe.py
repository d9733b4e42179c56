"""Probing: which frames a video shows and when, from its packets alone wherever that is certain."""

from array import array
from dataclasses import dataclass, field
from typing import Literal

import av
import av.container
import av.video
import numpy as np
from av.error import FFmpegError

from ..schemas.errors import DecodeError
from .video_stream import (
    DisplayMatrix,
    best_stream,
    decoded,
    demuxed,
    display_matrix,
    is_mirrored,
    one_line,
    open_container,
    seconds,
    upright,
)

# In these containers a packet is a frame and says when it is shown; elsewhere fields, hidden frames and absent
# times have to be reckoned with, and the video is decoded once to learn its times.
INDEXED_FORMATS = frozenset({"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "flv", "gif"})
HIDDEN_FRAME_CODECS = frozenset({"vp8"})
MISSING_S = 1.0  # heads round, and sound may go on without pictures
NO_TICK = -(1 << 63)
NOT_FOR_DECORD = frozenset({"av1", "gif"})


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoProbe:
    """What a viewer sees of a video: N frames, at `pts_s` (seconds, rising), the last one until `end_s`.

    `fps` is the average rate, `width` and `height` are as displayed, after rotation. `decoder` is the one that
    ``auto`` takes, `display_matrix` how its pictures are turned. A reader may start at any of the K key frames:
    `key_frames_K` is the first frame shown from there on, `key_pts_K` names its packet and `key_seek_pts_K` a
    place no later in the file, both in the stream's own ticks. Where `is_indexed` is false the first frame is the
    only start, and frames are known by counting.
    """

    pts_s: np.ndarray
    end_s: float
    fps: float | None
    width: int
    height: int
    codec: str
    decoder: Literal["decord", "pyav"]
    display_matrix: DisplayMatrix
    is_indexed: bool
    key_frames_K: np.ndarray
    key_pts_K: np.ndarray
    key_seek_pts_K: np.ndarray

    def __post_init__(self) -> None:
        if not len(self.pts_s) or not (np.diff(self.pts_s) > 0).all() or not self.end_s > self.pts_s[-1]:
            raise ValueError(f"frames need rising times before the end: {self.pts_s=} {self.end_s=}")

    @property
    def frame_interval_s(self) -> float:
        """Seconds from frame to frame, on average."""
        return (self.end_s - float(self.pts_s[0])) / len(self.pts_s)


def probe_video(path: str) -> VideoProbe:
    """The times, size and codec of the video's best stream; DecodeError says in one line why it cannot be read."""
    try:
        with open_container(path) as container:
            stream = best_stream(container)
            packets = _read_packets(container, stream)
            _refuse_cut_short(path, container, stream, packets)
            if packets.are_frames(container.format.name, stream.codec_context.codec.canonical_name):
                return _from_packets(packets, stream)
        with open_container(path) as container:
            return _from_frames(container, best_stream(container))
    except FFmpegError as error:
        raise DecodeError(f"damaged: {one_line(error)}") from error


@dataclass(slots=True, kw_only=True)
class _Packets:
    """The packets of a stream, in file order, in few bytes each, and the first frame that they give."""

    pts: "array[int]" = field(default_factory=lambda: array("q"))
    dts: "array[int]" = field(default_factory=lambda: array("q"))
    durations: "array[int]" = field(default_factory=lambda: array("q"))
    is_key: bytearray = field(default_factory=bytearray)
    is_shown: bytearray = field(default_factory=bytearray)
    is_corrupt: bool = False
    first_frame: av.VideoFrame | None = None

    def are_frames(self, container: str, codec: str) -> bool:
        """Whether every shown packet is one frame at its own time, decodable from the key frame before it."""
        if container not in INDEXED_FORMATS or codec in HIDDEN_FRAME_CODECS:
            return False
        pts = np.sort(np.array(self.pts))
        if pts[0] == NO_TICK or not np.diff(pts).all():
            return False
        return bool(self.is_key[0]) and pts[0] == self.pts[0]


def _read_packets(container: av.container.InputContainer, stream: av.video.VideoStream) -> _Packets:
    packets, last_error = _Packets(), "the file holds no packets"
    for packet in demuxed(container, stream):
        if packet.size:
            packets.pts.append(NO_TICK if packet.pts is None else packet.pts)
            packets.dts.append(NO_TICK if packet.dts is None else packet.dts)
            packets.durations.append(packet.duration or 0)
            packets.is_key.append(packet.is_keyframe)
            packets.is_shown.append(not packet.is_discard)
            packets.is_corrupt |= packet.is_corrupt
        if packets.first_frame is None:
            try:
                packets.first_frame = next(iter(decoded(packet)), None)
            except FFmpegError as error:
                last_error = one_line(error)
    if packets.first_frame is None or not any(packets.is_shown):
        raise DecodeError(f"no frame can be decoded: {last_error}")
    return packets


def _refuse_cut_short(
    path: str, container: av.container.InputContainer, stream: av.video.VideoStream, packets: _Packets
) -> None:
    """DecodeError where the file's head promises more than there is, and no packet is marked as damaged.

    With a damaged packet the clips that lack its frame fail, and those before come out.
    """
    if packets.is_corrupt:
        return
    if container.format.name.startswith("mov") and len(stream.index_entries) > len(packets.pts):
        raise DecodeError(
            f"cut short: its index lists {len(stream.index_entries)} frames, the file holds {len(packets.pts)}"
        )
    if container.format.name.startswith("matroska") and container.duration:
        promised_s = container.duration / av.time_base
        least_s = promised_s - MISSING_S - 2 * promised_s / len(packets.pts)
        if seconds(max(packets.pts), stream) < least_s and (end_s := _end_s(path)) < least_s:
            raise DecodeError(f"cut short: its head promises {promised_s:.3f} s, the file ends at {end_s:.3f} s")


def _end_s(path: str) -> float:
    """When the last packet of any stream ends."""
    with open_container(path) as container:
        return max(
            float((packet.pts + (packet.duration or 0)) * packet.time_base)
            for packet in demuxed(container)
            if packet.pts is not None
        )


def _from_packets(packets: _Packets, stream: av.video.VideoStream) -> VideoProbe:
    assert packets.first_frame is not None
    pts, dts = np.array(packets.pts), np.array(packets.dts)
    is_shown, is_key = np.array(packets.is_shown, bool), np.array(packets.is_key, bool)
    order = np.argsort(pts[is_shown])
    shown_pts = pts[is_shown][order]
    last_duration = int(np.array(packets.durations)[is_shown][order][-1])
    key_order = np.argsort(pts[is_key])
    key_pts, key_dts = pts[is_key][key_order], dts[is_key][key_order]
    # Matroska has no decoding times.
    key_seek_pts = np.where(key_dts == NO_TICK, key_pts, np.minimum(key_pts, key_dts))
    codec = stream.codec_context.codec.canonical_name
    is_plain = (
        is_shown.all()
        and shown_pts[0] >= 0
        and not packets.is_corrupt
        and not _has_open_groups(pts, is_key)
        and not is_mirrored(display_matrix(packets.first_frame))
        and codec not in NOT_FOR_DECORD
        and not _has_deep_colour(packets.first_frame)
    )
    return _probe(
        stream,
        packets.first_frame,
        pts_s=np.array([seconds(tick, stream) for tick in shown_pts.tolist()]),
        last_duration_s=seconds(last_duration, stream),
        decoder="decord" if is_plain else "pyav",
        is_indexed=True,
        keys=(np.searchsorted(shown_pts, key_pts), key_pts, key_seek_pts),
    )


def _has_deep_colour(frame: av.VideoFrame) -> bool:
    """Whether a colour has more than 8 bits: there the decoders' pixels differ, and damage may change decoders."""
    return any(component.bits > 8 for component in frame.format.components)


def _has_open_groups(pts: np.ndarray, is_key: np.ndarray) -> bool:
    """Whether frames that come behind a key frame are shown before it: decord miscounts those after a jump."""
    last_key = np.maximum.accumulate(np.where(is_key, np.arange(len(pts)), 0))
    return bool((pts < pts[last_key]).any())


def _from_frames(container: av.container.InputContainer, stream: av.video.VideoStream) -> VideoProbe:
    """By decoding every frame: slow, and right where packets and frames differ."""
    ticks, frame = [], None
    for packet in demuxed(container, stream):
        for frame in decoded(packet):
            ticks.append(frame.dts if frame.pts is None else frame.pts)
    if frame is None:
        raise DecodeError("no frame can be decoded")
    rate = float(stream.average_rate or stream.guessed_rate or 0)
    times_s = [None if tick is None else seconds(tick, stream) for tick in ticks]
    return _probe(
        stream,
        frame,
        pts_s=rising_times(times_s, 1 / rate if rate else 0.0),
        last_duration_s=seconds(frame.duration or 0, stream),
        decoder="pyav",
        is_indexed=False,
        keys=(np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1, np.int64)),
    )


def _probe(
    stream: av.video.VideoStream,
    frame: av.VideoFrame,
    *,
    pts_s: np.ndarray,
    last_duration_s: float,
    decoder: Literal["decord", "pyav"],
    is_indexed: bool,
    keys: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> VideoProbe:
    matrix = display_matrix(frame)
    shape_HW = upright(np.empty((frame.height, frame.width)), matrix).shape
    rate = float(stream.average_rate) if stream.average_rate else None
    if last_duration_s <= 0:
        last_duration_s = float(np.median(np.diff(pts_s))) if len(pts_s) > 1 else 1 / (rate or 1.0)
    end_s = float(pts_s[-1]) + last_duration_s
    if not (np.diff(pts_s) > 0).all() or not end_s > pts_s[-1]:
        raise DecodeError(f"its times cannot be told apart: from {pts_s[0]:g} to {pts_s[-1]:g} s")
    pts_s.flags.writeable = False
    return VideoProbe(
        pts_s=pts_s,
        end_s=end_s,
        fps=rate or len(pts_s) / (end_s - float(pts_s[0])),
        width=shape_HW[1],
        height=shape_HW[0],
        codec=stream.codec_context.codec.canonical_name,
        decoder=decoder,
        display_matrix=matrix,
        is_indexed=is_indexed,
        key_frames_K=keys[0],
        key_pts_K=keys[1],
        key_seek_pts_K=keys[2],
    )


def rising_times(times_s: list[float | None], interval_s: float) -> np.ndarray:
    """A rising time for every frame in the order shown, from times that may be absent, repeated or fall back.

    Absent and repeated ones are spread evenly between their neighbours; where the clock falls back, what
    follows goes on one usual interval later. `interval_s` is the usual interval where the times do not tell.
    """
    known = [i for i, time_s in enumerate(times_s) if time_s is not None]
    values_s = np.array([times_s[i] for i in known], np.float64)
    steps_s = np.diff(values_s)
    if (steps_s > 0).any():
        interval_s = float(np.median(steps_s[steps_s > 0] / np.diff(known)[steps_s > 0]))
    if interval_s <= 0:
        raise DecodeError("its frames have neither times nor a rate")
    fallen = np.cumsum(np.where(steps_s < 0, interval_s - steps_s, 0.0))
    values_s[1:] += fallen
    kept = np.append(True, np.diff(values_s) > 0) if known else np.zeros(0, bool)
    anchors, anchors_s = np.array(known, np.int64)[kept], values_s[kept]
    if not len(anchors):
        anchors, anchors_s = np.zeros(1, np.int64), np.zeros(1)
    index = np.arange(len(times_s))
    spread_s = np.interp(index, anchors, anchors_s)
    spread_s += np.minimum(index - anchors[0], 0) * interval_s + np.maximum(index - anchors[-1], 0) * interval_s
    return spread_s
