"""A video file as PyAV opens it: its best stream, that stream's clock, and which way up its frames are."""

import os
from collections.abc import Iterator

import av
import av.container
import av.logging
import av.stream
import av.video
import numpy as np
from av.error import FFmpegError
from av.sidedata.sidedata import Type

from ..schemas.errors import DecodeError

av.logging.set_level(None)

DisplayMatrix = tuple[tuple[int, int], tuple[int, int]]


def open_container(path: str) -> av.container.InputContainer:
    """The opened file; DecodeError where it is no video file."""
    try:
        # Tags in any encoding are no reason to refuse a video.
        return av.open(path, metadata_errors="replace")
    except FFmpegError as error:
        raise DecodeError(f"not a readable video: {_first_look(path) or one_line(error)}") from error


def best_stream(container: av.container.InputContainer) -> av.video.VideoStream:
    """The stream that the ffmpeg command line takes, on one thread; DecodeError where there is none."""
    stream = container.streams.best("video")
    if not isinstance(stream, av.video.VideoStream) or stream.disposition & av.stream.Disposition.attached_pic:
        kinds = ", ".join(sorted({other.type or "unknown" for other in container.streams})) or "nothing"
        raise DecodeError(f"no video stream: the file holds {kinds}{' (cover art)' if stream else ''}")
    if stream.codec_context is None:  # pyright: ignore[reportUnnecessaryComparison]
        raise DecodeError("no decoder for its video stream: it is damaged, or of a codec that PyAV does not know")
    stream.codec_context.thread_count = 1  # processes are the parallelism
    return stream


def demuxed(container: av.container.InputContainer, *streams: av.video.VideoStream) -> Iterator[av.Packet]:
    """The packets of `streams`, or of all; DecodeError where a stream begins that the head did not announce."""
    packets = container.demux(*streams)
    while True:
        try:
            packet = next(packets, None)
        except IndexError as error:  # PyAV's own list of streams is too short
            raise DecodeError("damaged: a stream begins in the middle of the file") from error
        if packet is None:
            return
        yield packet


def decoded(packet: av.Packet) -> list[av.VideoFrame]:
    """The frames that the decoder has ready once it has taken the packet; FFmpegError where it is damaged."""
    return packet.decode()  # pyright: ignore[reportReturnType]


def one_line(error: Exception) -> str:
    """The decoder's own words, without the place in its source."""
    words = (error.strerror if isinstance(error, FFmpegError) else None) or str(error)
    return words.strip().split("\n")[0].rstrip(" .:") or type(error).__name__


def seconds(ticks: int, stream: av.video.VideoStream) -> float:
    """`ticks` of the stream's clock in seconds, rounded once."""
    if stream.time_base is None:
        raise DecodeError("the stream has no clock")
    return ticks * stream.time_base.numerator / stream.time_base.denominator


def upright(pixels_HW: np.ndarray, matrix: DisplayMatrix) -> np.ndarray:
    """A view of a frame's pixels (H,W,...) turned and mirrored as the display matrix asks, by quarter turns."""
    (a, b), (c, d) = matrix
    if abs(a) < abs(b):
        pixels_HW, a, d = pixels_HW.swapaxes(0, 1), c, b
    return pixels_HW[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def is_mirrored(matrix: DisplayMatrix) -> bool:
    """Whether the display matrix mirrors."""
    (a, b), (c, d) = matrix
    return a * d - b * c < 0


def display_matrix(frame: av.VideoFrame) -> DisplayMatrix:
    """How a step to the right and a step down in the picture point on the screen.

    To be asked of one frame per video: a frame whose side data was looked at is in a cycle with it, and its
    picture stays in memory until the garbage collector comes by.
    """
    data = frame.side_data.get(Type.DISPLAYMATRIX)  # pyright: ignore[reportCallIssue, reportArgumentType]
    if data is None:
        return (1, 0), (0, 1)
    matrix = np.frombuffer(memoryview(data), np.int32).tolist()
    return (matrix[0], matrix[1]), (matrix[3], matrix[4])


def _first_look(path: str) -> str:
    """What the head of an unreadable file tells about it."""
    if not os.path.exists(path):
        return "the file does not exist"
    with open(path, "rb") as stream:
        head = stream.read(512).lstrip()
    if not head:
        return "the file is empty" if not os.path.getsize(path) else "the file is blank"
    if head[:1] == b"<":
        return f"the file is a page of markup ({head[:15].decode('ascii', 'replace')!r})"
    return "an MP4 file without its index (moov), probably cut short" if head[4:8] == b"ftyp" else ""
