"""Reading frames with decord: files without surprises."""

import re
from collections.abc import Iterator, Sequence

import decord
import numpy as np

from ..schemas.errors import DecodeError
from .probe import VideoProbe

DECORD = f"decord-{decord.__version__}"
SOURCE_PLACE = re.compile(r"^(\[\d\d:\d\d:\d\d\] )?/\S+:\d+: ")

decord.logging.set_level(decord.logging.QUIET)


def read_with_decord(path: str, probe: VideoProbe, wanted: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """For each of the `wanted` frames (rising) its pixels (H,W,3) uint8 RGB, upright.

    DecodeError where decord errs, and where it is known to repeat frames or to take wrong ones.
    """
    if probe.decoder != "decord":
        raise DecodeError(
            f"decord is not exact on such a file ({probe.codec}; an edit list, open groups of pictures, times below"
            f" zero, damage, or a container without frame times): decode.decoder=auto or pyav reads it"
        )
    try:
        reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
        _check_times(reader, probe)
        for index in wanted:
            pixels_HWC = reader[index].asnumpy()
            if pixels_HWC.shape != (probe.height, probe.width, 3):  # of very small videos
                raise DecodeError(f"decord gives {pixels_HWC.shape} frames, expected {probe.height}x{probe.width}")
            yield index, pixels_HWC
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        raise DecodeError(f"decord: {_one_line(error)}") from error


def _check_times(reader: decord.VideoReader, probe: VideoProbe) -> None:
    if len(reader) != len(probe.pts_s):
        raise DecodeError(
            f"decord sees {len(reader)} frames, a viewer {len(probe.pts_s)}: decode.decoder=auto or pyav reads them"
        )
    starts_s = reader.get_frame_timestamp(range(len(reader)))[:, 0]  # float32, from an origin of its own
    offsets_s = (starts_s - starts_s[0]) - (probe.pts_s - probe.pts_s[0])
    if np.abs(offsets_s).max() > probe.frame_interval_s / 2:
        raise DecodeError("decord sees the frames at other times: decode.decoder=auto or pyav reads them")


def _one_line(error: Exception) -> str:
    line = str(error).strip().split("\n")[0]
    while SOURCE_PLACE.match(line):
        line = SOURCE_PLACE.sub("", line)
    return line
