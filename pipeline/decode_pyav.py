"""Reading frames with PyAV: anything that FFmpeg knows, around damage where that is possible."""

from collections.abc import Iterator, Sequence

import av
import av.container
import av.video
import numpy as np
from av.video.reformatter import VideoReformatter

from ..schemas.errors import DecodeError
from .probe import VideoProbe, best_stream, one_line, open_container, seconds

NAME = f"av-{av.__version__}"


def read_frames(path: str, probe: VideoProbe, wanted: Sequence[int]) -> Iterator[tuple[int, np.ndarray | str]]:
    """For every wanted frame of the video (rising) its RGB pixels (H,W,3) uint8, or why there are none.

    Only groups of pictures that hold wanted frames are decoded. DecodeError where the file cannot be read on.
    """
    try:
        with open_container(path) as container:
            yield from _Reader(container, probe).read(wanted)
    except av.FFmpegError as error:
        raise DecodeError(f"damaged: {one_line(error)}") from error


class _Reader:
    """An open container, and the video's next frame in the order shown."""

    def __init__(self, container: av.container.InputContainer, probe: VideoProbe) -> None:
        self._container, self._probe = container, probe
        self._stream = best_stream(container)
        self._reformatter = VideoReformatter()
        self._damage = "the decoder gave no frame"

    def read(self, wanted: Sequence[int]) -> Iterator[tuple[int, np.ndarray | str]]:
        waiting = list(reversed(wanted))
        position = -1
        while waiting:
            # The key frame to start from, and the wanted frames up to the next one that is worth a jump.
            start = self._key_before(waiting[-1])
            for position, frame in self._frames_from(start, after=position):
                while waiting and waiting[-1] < position:
                    yield waiting.pop(), self._missing
                if waiting and waiting[-1] == position:
                    yield waiting.pop(), self._rgb(frame)
                if not waiting or self._key_before(waiting[-1]) > self._key_before(position + 1):
                    break
            else:
                break
        for index in reversed(waiting):
            yield index, self._missing
