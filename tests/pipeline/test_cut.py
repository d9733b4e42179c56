"""Cutting: which frames each clip gets."""

import numpy as np
import pytest

from tokenmill.pipeline.cut import Cut, cut_video, nearest
from tokenmill.schemas.recipe import ClipsSection

FPS = 25
PTS_S = np.arange(50) / FPS
END_S = 2.0


def frames_of(cut: Cut, pts_s: np.ndarray = PTS_S) -> list[list[int]]:
    """The frame numbers of every clip."""
    index = nearest(pts_s, cut.times_s)
    return [index[a:b].tolist() for a, b in zip(cut.offsets[:-1], cut.offsets[1:], strict=True)]


def test_windows_follow_one_another_and_the_tail_is_padded() -> None:
    cut = cut_video(PTS_S, END_S, ClipsSection(num_frames=16))
    assert frames_of(cut) == [list(range(0, 16)), list(range(16, 32)), list(range(32, 48)), [48, 49]]
    assert cut.starts_s_C.tolist() == [0.0, 0.64, 1.28, 1.92]
    assert cut.ends_s_C.tolist() == [0.64, 1.28, 1.92, 2.0]
    assert cut.num_dropped == 0
    assert cut.num_spanned_C.tolist() == [16, 16, 16, 2]


def test_a_dropped_tail_is_counted() -> None:
    cut = cut_video(PTS_S, END_S, ClipsSection(num_frames=16, tail="drop"))
    assert len(frames_of(cut)) == 3
    assert cut.num_dropped == 2


def test_a_video_shorter_than_a_clip_is_padded_or_dropped_whole() -> None:
    assert frames_of(cut_video(PTS_S[:3], 0.12, ClipsSection(num_frames=16))) == [[0, 1, 2]]
    dropped = cut_video(PTS_S[:3], 0.12, ClipsSection(num_frames=16, tail="drop"))
    assert (frames_of(dropped), dropped.num_dropped) == ([], 3)


def test_overlapping_windows_do_not_repeat_a_covered_tail() -> None:
    cut = cut_video(PTS_S[:20], 0.8, ClipsSection(num_frames=16, stride=4))
    assert frames_of(cut) == [list(range(0, 16)), list(range(4, 20))]


def test_a_stride_beyond_the_clip_leaves_frames_between() -> None:
    cut = cut_video(PTS_S, END_S, ClipsSection(num_frames=4, stride=20))
    assert frames_of(cut) == [[0, 1, 2, 3], [20, 21, 22, 23], [40, 41, 42, 43]]


def test_a_target_rate_takes_the_nearest_frame_and_the_earlier_on_a_tie() -> None:
    cut = cut_video(PTS_S, END_S, ClipsSection(num_frames=4, fps=10))
    # 10 frames/s from 25: 0, 2.5, 5, 7.5 ... ; a half goes to the earlier frame.
    assert frames_of(cut)[0] == [0, 2, 5, 7]
    assert sum(len(clip) for clip in frames_of(cut)) == 20
    assert cut.ends_s_C[0] == pytest.approx(0.4)
    assert cut.num_spanned_C.tolist() == [10] * 5


def test_a_rate_above_the_videos_repeats_frames() -> None:
    cut = cut_video(PTS_S[:4], 4 / FPS, ClipsSection(num_frames=8, fps=50))
    assert frames_of(cut) == [[0, 0, 1, 1, 2, 2, 3, 3]]


def test_variable_frame_rate_is_sampled_by_time_not_by_count() -> None:
    pts_s = np.array([0.0, 0.01, 0.02, 0.03, 1.0, 2.0, 3.0])
    cut = cut_video(pts_s, 4.0, ClipsSection(num_frames=4, fps=1))
    assert frames_of(cut, pts_s) == [[0, 4, 5, 6]]


def test_times_that_do_not_begin_at_zero_are_kept() -> None:
    cut = cut_video(PTS_S + 10, END_S + 10, ClipsSection(num_frames=25))
    assert cut.starts_s_C.tolist() == [10.0, 11.0]


def test_the_whole_video_is_resampled_to_n_frames() -> None:
    cut = cut_video(PTS_S, END_S, ClipsSection(cut="whole", num_frames=8))
    assert frames_of(cut) == [[0, 7, 14, 21, 28, 35, 42, 49]]
    assert (cut.starts_s_C.tolist(), cut.ends_s_C.tolist()) == ([0.0], [2.0])
    assert cut.num_spanned_C.tolist() == [50]


def test_one_frame_is_a_video() -> None:
    for clips in (ClipsSection(num_frames=4), ClipsSection(num_frames=4, fps=3)):
        assert frames_of(cut_video(PTS_S[:1], 0.04, clips), PTS_S[:1]) == [[0]]
    whole = cut_video(PTS_S[:1], 0.04, ClipsSection(cut="whole", num_frames=4))
    assert frames_of(whole, PTS_S[:1]) == [[0, 0, 0, 0]]
