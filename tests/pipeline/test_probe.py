"""Probing: the frames that a viewer sees, and when."""

from collections.abc import Callable

import numpy as np
import pytest

from tokenmill.pipeline.probe import VideoProbe, probe_video, rising_times
from tokenmill.schemas.errors import DecodeError

EXACT_KINDS = [
    "h264", "mkv", "mkv_without_duration", "fragmented", "vfr", "open_gop", "hevc_open_gop", "intra", "vp8", "vp9",
    "av1", "gif", "mpeg4_avi", "mpeg_ts", "interlaced", "interlaced_ts", "raw_h264", "edit_list", "edit_list_both_ends",
    "start_offset", "negative_start", "negative_start_mkv", "rotated_90", "two_streams",
]  # fmt: skip


@pytest.mark.parametrize("kind", EXACT_KINDS)
def test_there_is_a_time_for_every_frame_that_ffmpeg_shows(kind: str, make_video: Callable, ffmpeg_frames) -> None:
    probe = probe_video(make_video(kind))
    frames_NHWC = ffmpeg_frames(make_video(kind))
    assert (len(probe.pts_s), probe.height, probe.width) == frames_NHWC.shape[:3]
    assert (np.diff(probe.pts_s) > 0).all()


def test_times_size_rate_and_codec_of_a_plain_video(make_video: Callable) -> None:
    probe = probe_video(make_video("h264", num_frames=36, fps=25))
    np.testing.assert_array_equal(probe.pts_s, np.arange(36) / 25)
    assert (probe.end_s, probe.fps, probe.width, probe.height, probe.codec) == (36 / 25, 25.0, 96, 64, "h264")
    assert probe.frame_interval_s == pytest.approx(1 / 25)
    np.testing.assert_array_equal(probe.key_frames_K, [0, 12, 24])


def test_a_variable_rate_keeps_its_own_times(make_video: Callable) -> None:
    probe = probe_video(make_video("vfr", num_frames=20))
    np.testing.assert_allclose(probe.pts_s, [n / 25 for n in range(40) if n % 5 not in (1, 2)][:20], atol=1e-6)


@pytest.mark.parametrize(("kind", "start_s"), [("start_offset", 2.0), ("negative_start_mkv", -0.5), ("edit_list", 0)])
def test_the_first_time_is_the_files_own(kind: str, start_s: float, make_video: Callable) -> None:
    assert probe_video(make_video(kind)).pts_s[0] == pytest.approx(start_s, abs=1e-3)


@pytest.mark.parametrize(
    ("kind", "size"), [("rotated_90", (64, 96)), ("rotated_180", (96, 64)), ("rotated_270", (64, 96))]
)
def test_the_size_is_as_displayed(kind: str, size: tuple[int, int], make_video: Callable) -> None:
    probe = probe_video(make_video(kind))
    assert (probe.width, probe.height) == size


def test_of_several_streams_the_best_is_taken(make_video: Callable) -> None:
    probe = probe_video(make_video("two_streams"))
    assert (probe.width, probe.height) == (192, 128)


@pytest.mark.parametrize("kind", ["h264", "mkv", "vfr", "vp9", "hevc", "fragmented", "start_offset", "rotated_90"])
def test_plain_files_are_for_decord(kind: str, make_video: Callable) -> None:
    assert probe_video(make_video(kind)).decoder == "decord"


@pytest.mark.parametrize(
    "kind",
    ["av1", "gif", "ten_bit", "edit_list", "open_gop", "hevc_open_gop", "negative_start", "mirrored", "vp8", "mpeg_ts"],
)
def test_files_that_decord_reads_wrong_or_not_are_for_pyav(kind: str, make_video: Callable) -> None:
    assert probe_video(make_video(kind)).decoder == "pyav"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("empty", "not a readable video: the file is empty"),
        ("garbage", "not a readable video: Invalid data found"),
        ("html", "not a readable video: the file is a page of markup"),
        ("truncated", r"not a readable video: an MP4 file without its index \(moov\), probably cut short"),
        ("truncated_mkv", r"cut short: its head promises 3\.\d+ s, the file ends at 1\.\d+ s"),
        ("truncated_between_packets", "cut short: its index lists 36 frames, the file holds 20"),
        ("audio_only", "no video stream: the file holds audio$"),
        ("cover_art", r"no video stream: the file holds audio, video \(cover art\)"),
        ("absent", "the file does not exist"),
    ],
)
def test_what_is_no_readable_video_is_refused_in_one_line(what: str, message: str, unreadable: dict[str, str]) -> None:
    with pytest.raises(DecodeError, match=message) as refusal:
        probe_video(unreadable[what])
    assert "\n" not in str(refusal.value)


def test_absent_times_are_spread_between_their_neighbours() -> None:
    times_s = rising_times([None, 1.0, None, 2.0, 2.5, None], 0.04)
    np.testing.assert_allclose(times_s, [0.5, 1.0, 1.5, 2.0, 2.5, 3.0])


def test_repeated_times_are_spread_up_to_the_next() -> None:
    np.testing.assert_allclose(rising_times([0.0, 1.0, 1.0, 2.0, 2.0], 0.04), [0.0, 1.0, 1.5, 2.0, 3.0])


def test_times_go_on_where_the_clock_falls_back() -> None:
    np.testing.assert_allclose(rising_times([5.0, 6.0, 7.0, 0.0, 1.0], 0.04), [5.0, 6.0, 7.0, 8.0, 9.0])


def test_frames_without_times_are_counted_at_their_rate() -> None:
    np.testing.assert_allclose(rising_times([None, None, None], 0.04), [0.0, 0.04, 0.08])


def test_frames_with_neither_times_nor_rate_are_refused() -> None:
    with pytest.raises(DecodeError, match="neither times nor a rate"):
        rising_times([None, None], 0.0)


def test_a_probe_with_falling_times_cannot_be_made(make_video: Callable) -> None:
    good = probe_video(make_video())
    values = {name: getattr(good, name) for name in VideoProbe.__slots__}
    with pytest.raises(ValueError, match="rising times"):
        VideoProbe(**{**values, "pts_s": good.pts_s[::-1]})
