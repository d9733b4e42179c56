"""Reading frames with PyAV: anything that FFmpeg knows, and around damage."""

from collections.abc import Iterator, Sequence

import av
import av.container
import av.video
import numpy as np
from av.error import FFmpegError
from av.video.plane import VideoPlane
from av.video.reformatter import Interpolation, VideoReformatter

from ..schemas.errors import DecodeError
from .probe import VideoProbe
from .video_stream import best_stream, decoded, demuxed, one_line, open_container, seconds, upright

PYAV = f"av-{av.__version__}"
WORTH_A_JUMP = 8  # frames to skip: fewer are decoded sooner than the decoder is set up anew


def read_with_pyav(path: str, probe: VideoProbe, wanted: Sequence[int]) -> Iterator[tuple[int, np.ndarray | str]]:
    """For each of the `wanted` frames (rising) its pixels (H,W,3) uint8 RGB, upright, or why there are none.

    Decodes from the key frame before a wanted frame, once, in the order shown. DecodeError where the file
    cannot be read at all.
    """
    try:
        with open_container(path) as container:
            reader = _Reader(container, probe)
            for run in _runs(wanted, probe):
                yield from reader.read(run)
    except FFmpegError as error:
        raise DecodeError(f"damaged: {one_line(error)}") from error


def _runs(wanted: Sequence[int], probe: VideoProbe) -> Iterator[list[int]]:
    """`wanted`, cut wherever jumping to a key frame spares decoding."""
    run: list[int] = []
    for index in wanted:
        if run and probe.key_frames_K[_last_key(probe, index)] - run[-1] > WORTH_A_JUMP:
            yield run
            run = []
        run.append(index)
    if run:
        yield run


def _last_key(probe: VideoProbe, index: int) -> int:
    """Number of the last key frame that is shown no later than frame `index`."""
    return int(np.searchsorted(probe.key_frames_K, index, side="right")) - 1


class _Reader:
    """An open container and the decoder of its video."""

    def __init__(self, container: av.container.InputContainer, probe: VideoProbe) -> None:
        self._container, self._probe = container, probe
        self._stream = best_stream(container)
        self._reformatter = VideoReformatter()
        self._damage = "damaged or absent"

    def read(self, run: list[int]) -> Iterator[tuple[int, np.ndarray | str]]:
        """The frames of `run`, decoded from the key frame before the first."""
        waiting = run[::-1]
        for index, frame in self._frames(_last_key(self._probe, run[0])):
            while waiting and waiting[-1] < index:
                yield waiting.pop(), self._damage
            if waiting and waiting[-1] == index:
                yield waiting.pop(), self._pixels(frame)
            if not waiting:
                return
        for index in reversed(waiting):
            yield index, self._damage

    def _frames(self, key: int) -> Iterator[tuple[int, av.VideoFrame]]:
        """Index and frame, in the order shown, of all that is intact from a key frame on."""
        is_damaged = False
        for counted, frame in enumerate(self._decoded(key)):
            # What follows a damaged frame is predicted from it.
            is_damaged = frame.is_corrupt or (is_damaged and not frame.key_frame)
            index = self._index_of(frame) if self._probe.is_indexed else counted
            if index is not None and not is_damaged:
                yield index, frame

    def _index_of(self, frame: av.VideoFrame) -> int | None:
        """Which of the probe's frames is shown at exactly this time."""
        if frame.pts is None:
            return None
        time_s = seconds(frame.pts, self._stream)
        index = int(np.searchsorted(self._probe.pts_s, time_s))
        return index if index < len(self._probe.pts_s) and self._probe.pts_s[index] == time_s else None

    def _decoded(self, key: int) -> Iterator[av.VideoFrame]:
        """Frames from a key frame on; damage drops what follows up to the next key frame."""
        is_lost, first_pts = False, None
        for packet in self._packets(key):
            if packet.size and is_lost and not packet.is_keyframe:
                continue
            if is_lost or first_pts is None:
                # Frames shown before their key frame need pictures that are not there.
                is_lost, first_pts = False, packet.pts
            try:
                if packet.is_corrupt and self._probe.is_indexed:
                    raise DecodeError("the packet is cut short or garbled")
                frames = decoded(packet)
            except (FFmpegError, DecodeError) as error:
                if not self._probe.is_indexed:
                    raise  # nothing says which frame would be next
                is_lost, frames = True, self._drained(packet, error)
            for frame in frames:
                if not (self._probe.is_indexed and _is_before(frame.pts, first_pts)):
                    yield frame

    def _drained(self, packet: av.Packet, error: Exception) -> list[av.VideoFrame]:
        """The intact frames that the decoder still holds when it meets a damaged packet."""
        place = f" at {seconds(packet.pts, self._stream):.3f} s" if packet.pts is not None else ""
        self._damage = f"damaged{place}: {one_line(error)}"
        frames = []
        try:
            frames = self._stream.codec_context.decode(None)
        except FFmpegError:
            pass  # then it holds none
        self._stream.codec_context.flush_buffers()
        return [frame for frame in frames if frame.pts != packet.pts]

    def _packets(self, key: int) -> Iterator[av.Packet]:
        """The stream's packets from a key frame's own on."""
        if key <= 0:
            yield from demuxed(self._container, self._stream)
            return
        self._container.seek(int(self._probe.key_seek_pts_K[key]), stream=self._stream)
        key_pts = self._probe.key_pts_K[key]
        is_found = False
        for packet in demuxed(self._container, self._stream):
            is_found = is_found or packet.pts == key_pts
            if is_found:
                yield packet

    def _pixels(self, frame: av.VideoFrame) -> np.ndarray:
        shown = _progressive(frame) if frame.interlaced_frame else frame
        # 8-bit colour is repeated for each pixel; POINT does the same for more bits, as near to ffmpeg as it gets.
        rgb = self._reformatter.reformat(shown, format="rgb24", interpolation=Interpolation.POINT, threads=1)
        pixels_HWC = _rows(rgb.planes[0])[:, : rgb.width * 3].reshape(rgb.height, rgb.width, 3)
        return upright(pixels_HWC, self._probe.display_matrix)


def _progressive(frame: av.VideoFrame) -> av.VideoFrame:
    """The frame without its mark of two fields: ffmpeg and decord convert colours of all lines together."""
    copy = av.VideoFrame(frame.width, frame.height, frame.format.name)
    for source, target in zip(frame.planes, copy.planes, strict=True):
        source_HL, target_HL = _rows(source), _rows(target)
        num_bytes = min(source_HL.shape[1], target_HL.shape[1])
        target_HL[: len(source_HL), :num_bytes] = source_HL[:, :num_bytes]
    copy.colorspace, copy.color_range = frame.colorspace, frame.color_range
    return copy


def _rows(plane: VideoPlane) -> np.ndarray:
    return np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)


def _is_before(pts: int | None, first_pts: int | None) -> bool:
    return pts is not None and first_pts is not None and pts < first_pts
