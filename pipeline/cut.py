"""Cutting: the presentation times of a video's frames -> the clips that the recipe asks for."""

from dataclasses import dataclass

import numpy as np

from ..schemas.recipe import ClipsSection

SAME_TIME_S = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """The clips of one video: C spans in seconds, and for each the times of its valid frames.

    The times of clip i are ``times_s[offsets[i]:offsets[i + 1]]``. `num_spanned_C` counts the video's own
    frames in each span (what decoding costs), `num_dropped` the sampled frames that no clip holds.
    """

    starts_s_C: np.ndarray
    ends_s_C: np.ndarray
    times_s: np.ndarray
    offsets: np.ndarray
    num_spanned_C: np.ndarray
    num_dropped: int


def cut_video(pts_s: np.ndarray, end_s: float, clips: ClipsSection) -> Cut:
    """The clips of a video whose frames are shown at `pts_s` (seconds, rising) until `end_s`.

    Frames are sampled at every time (native) or at ``pts_s[0] + k / fps``, taking the frame whose time is
    nearest, the earlier on a tie. A window that reaches over the end is padded or dropped, unless all of its
    frames are in an earlier window already.
    """
    if clips.cut == "whole":
        wanted = np.linspace(pts_s[0], pts_s[-1], clips.num_frames)
        times = pts_s[nearest(pts_s, wanted)]
        span = np.array([pts_s[0]]), np.array([end_s])
        return _cut(pts_s, times, span, np.array([0, clips.num_frames]), num_dropped=0)
    if clips.fps == "native":
        grid_s = times = pts_s
    else:
        grid_s = pts_s[0] + np.arange(int(np.ceil((end_s - pts_s[0]) * clips.fps - SAME_TIME_S))) / clips.fps
        times = pts_s[nearest(pts_s, grid_s)]
    edges_s = np.append(grid_s, end_s)
    first, last = _windows(len(grid_s), clips)
    offsets = np.append(0, np.cumsum(last - first))
    index = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - first, last - first)
    num_dropped = _uncovered(first, last, len(grid_s)) if clips.tail == "drop" else 0
    return _cut(pts_s, times[index], (edges_s[first], edges_s[last]), offsets, num_dropped=num_dropped)


def nearest(pts_s: np.ndarray, wanted_s: np.ndarray) -> np.ndarray:
    """For every wanted time the index of the nearest time in `pts_s`; the earlier one on a tie."""
    after = np.clip(np.searchsorted(pts_s, wanted_s), 1, max(1, len(pts_s) - 1))
    if len(pts_s) == 1:
        return np.zeros(len(wanted_s), np.int64)
    later_is_nearer = pts_s[after] - wanted_s < wanted_s - pts_s[after - 1] - SAME_TIME_S
    return after - 1 + later_is_nearer


def _windows(num_sampled: int, clips: ClipsSection) -> tuple[np.ndarray, np.ndarray]:
    """First and one-past-last sampled frame of every window."""
    stride = clips.stride or clips.num_frames
    first = np.arange(0, num_sampled, stride)
    last = np.minimum(first + clips.num_frames, num_sampled)
    full = first + clips.num_frames <= num_sampled
    if clips.tail == "drop":
        return first[full], last[full]
    adds_frames = np.append(True, last[1:] > last[:-1]) if len(last) else full
    return first[full | adds_frames], last[full | adds_frames]


def _uncovered(first: np.ndarray, last: np.ndarray, num_sampled: int) -> int:
    """Frames behind the last window: what dropping the tail loses."""
    return num_sampled - int(last[-1]) if len(last) else num_sampled


def _cut(
    pts_s: np.ndarray,
    times_s: np.ndarray,
    spans_s: tuple[np.ndarray, np.ndarray],
    offsets: np.ndarray,
    *,
    num_dropped: int,
) -> Cut:
    starts_s, ends_s = spans_s
    spanned = np.searchsorted(pts_s, ends_s - SAME_TIME_S) - np.searchsorted(pts_s, starts_s - SAME_TIME_S)
    return Cut(
        starts_s_C=starts_s,
        ends_s_C=ends_s,
        times_s=times_s,
        offsets=offsets,
        num_spanned_C=np.maximum(spanned, 1),
        num_dropped=num_dropped,
    )
