"""Decoding: the right frames, a failure for what cannot be read, and no more memory than open clips need."""

import re
import shutil
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import av
import numpy as np
import pytest

from tokenmill.pipeline.assemble import ClipWant, assemble, wanted_frames
from tokenmill.pipeline.decode import FakeDecoder, VideoDecoder
from tokenmill.pipeline.probe import probe_video
from tokenmill.schemas.clip import Clip, ClipFailure, ClipFrames, Sampling, Video

EXACT_KINDS = [
    "h264", "mkv", "mkv_without_duration", "fragmented", "vfr", "open_gop", "hevc_open_gop", "hevc", "intra",
    "chroma_444", "bt709", "full_range", "vp8", "vp9", "av1", "gif", "mpeg4_avi", "mpeg_ts", "interlaced",
    "interlaced_ts", "raw_h264", "rotated_90", "rotated_180", "rotated_270", "mirrored", "rotated_interlaced",
    "edit_list", "edit_list_both_ends", "start_offset", "negative_start", "negative_start_mkv", "two_streams",
]  # fmt: skip
GROUP = 12  # frames from key frame to key frame of the H.264 kinds


def sampling(num_frames: int, height: int = 64, width: int = 96) -> Sampling:
    return Sampling(fps=None, num_frames=num_frames, height=height, width=width, resize="squash/bilinear", tail="pad")


def clip_at(times_s: Sequence[float], clip_id: str = "clip") -> Clip:
    video = Video(uri="file:///video", size_bytes=1, digest="0" * 64)
    times_s = tuple(float(time_s) for time_s in times_s)
    return Clip(clip_id=clip_id, video=video, start_s=times_s[0], end_s=times_s[-1] + 1, frame_pts_s=times_s)


def windows(pts_s: np.ndarray, length: int, stride: int | None = None) -> list[Clip]:
    starts = range(0, len(pts_s) - length + 1, stride or length)
    return [clip_at(pts_s[start : start + length], str(start)) for start in starts]


def decode_all(path: str, clips: list[Clip], settings: Sampling, decoder: str = "auto") -> list[ClipFrames]:
    results = list(VideoDecoder(settings, decoder).decode(path, clips))  # pyright: ignore[reportArgumentType]
    failures = [result.reason for result in results if isinstance(result, ClipFailure)]
    assert not failures
    assert len(results) == len(clips)
    return [result for result in results if isinstance(result, ClipFrames)]


def failure_of(path: str, clip: Clip, settings: Sampling, decoder: str = "auto") -> ClipFailure:
    (result,) = VideoDecoder(settings, decoder).decode(path, [clip])  # pyright: ignore[reportArgumentType]
    assert isinstance(result, ClipFailure)
    assert (result.clip_id, result.step) == (clip.clip_id, "decode")
    assert "\n" not in result.reason
    return result


def native(path: str) -> tuple[np.ndarray, Sampling]:
    probe = probe_video(path)
    return probe.pts_s, sampling(1, probe.height, probe.width)


@pytest.mark.parametrize("decoder", ["auto", "pyav"])
@pytest.mark.parametrize("kind", EXACT_KINDS)
def test_every_frame_is_the_one_that_ffmpeg_shows(
    kind: str, decoder: str, make_video: Callable, ffmpeg_frames: Callable
) -> None:
    path = make_video(kind)
    pts_s, settings = native(path)
    found = decode_all(path, windows(pts_s, 1), settings, decoder)
    np.testing.assert_array_equal(np.concatenate([one.frames_THWC for one in found]), ffmpeg_frames(path))
    assert [one.decoded_pts_s[0] for one in found] == pts_s.tolist()


@pytest.mark.parametrize("decoder", ["auto", "pyav"])
@pytest.mark.parametrize("kind", EXACT_KINDS)
def test_frames_here_and_there_are_the_same_as_in_a_row(
    kind: str, decoder: str, make_video: Callable, ffmpeg_frames: Callable
) -> None:
    path = make_video(kind, num_frames=75)
    pts_s, settings = native(path)
    expected_NHWC = ffmpeg_frames(path)
    for picks in ([1, 30, 31, len(pts_s) - 1], [len(pts_s) - 2], [13, 37]):
        kept = [pick for pick in picks if pick < len(pts_s)]
        found = decode_all(path, [clip_at([pts_s[pick]], str(pick)) for pick in kept], settings, decoder)
        np.testing.assert_array_equal(np.concatenate([one.frames_THWC for one in found]), expected_NHWC[kept])


def test_real_footage_is_decoded_alike_by_all(real_video: str, ffmpeg_frames: Callable) -> None:
    pts_s, settings = native(real_video)
    expected_NHWC = ffmpeg_frames(real_video)
    for decoder in ("decord", "pyav"):
        found = decode_all(real_video, windows(pts_s, 1), settings, decoder)
        np.testing.assert_array_equal(np.concatenate([one.frames_THWC for one in found]), expected_NHWC)


def test_ten_bits_are_near_to_ffmpeg(make_video: Callable, ffmpeg_frames: Callable) -> None:
    path = make_video("ten_bit")
    pts_s, settings = native(path)
    for decoder in ("auto", "pyav"):
        found = decode_all(path, windows(pts_s, 1), settings, decoder)
        difference = np.concatenate([one.frames_THWC for one in found]).astype(int) - ffmpeg_frames(path)
        assert 10 * np.log10(255**2 / (difference**2).mean()) > 25


def test_a_clip_names_the_decoder_of_its_video(make_video: Callable) -> None:
    for kind, decoder, name in (("h264", "auto", "decord-"), ("h264", "pyav", "av-"), ("av1", "auto", "av-")):
        (found,) = decode_all(make_video(kind), [clip_at([0.0])], sampling(1), decoder)
        assert found.decoder.startswith(name)


def test_the_nearest_frame_is_taken_and_the_earlier_on_a_tie(make_video: Callable, ffmpeg_frames: Callable) -> None:
    path = make_video("h264", fps=10)
    (found,) = decode_all(path, [clip_at([0.14, 0.15, 0.16, 1.0])], sampling(4))
    np.testing.assert_array_equal(found.frames_THWC, ffmpeg_frames(path)[[1, 1, 2, 10]])
    assert found.decoded_pts_s == (0.1, 0.1, 0.2, 1.0)


def test_a_short_clip_is_padded_with_its_last_frame(make_video: Callable, ffmpeg_frames: Callable) -> None:
    path = make_video()
    (found,) = decode_all(path, [clip_at([0.0, 0.04])], sampling(5))
    np.testing.assert_array_equal(found.frames_THWC, ffmpeg_frames(path)[[0, 1, 1, 1, 1]])
    assert found.decoded_pts_s == (0.0, 0.04)


def test_overlapping_clips_are_what_each_is_alone(make_video: Callable) -> None:
    path, settings = make_video("open_gop", num_frames=75), sampling(16, 32, 32)
    clips = windows(probe_video(path).pts_s, 16, stride=5)
    for together in decode_all(path, clips, settings):
        (alone,) = decode_all(path, [together.clip], settings)
        np.testing.assert_array_equal(together.frames_THWC, alone.frames_THWC)


@pytest.mark.parametrize(
    ("time_s", "message"),
    [
        (
            1.6,
            r"frame at 1\.600 s, the video shows 36 frames from 0\.000 to 1\.440 s: the table that listed it is wrong",
        ),
        (-0.1, r"frame at -0\.100 s, the video shows 36 frames"),
    ],
)
def test_a_time_outside_of_the_video_is_a_failure(time_s: float, message: str, make_video: Callable) -> None:
    clip = clip_at(sorted([0.5, time_s]))
    assert re.search(message, failure_of(make_video(), clip, sampling(2)).reason)


def test_a_time_just_behind_the_end_is_the_last_frame(make_video: Callable) -> None:
    (found,) = decode_all(make_video(), [clip_at([1.47])], sampling(1))
    assert found.decoded_pts_s == (1.4,)


def test_an_unreadable_video_is_a_failure_for_each_clip(unreadable: dict[str, str]) -> None:
    clips = [clip_at([0.0], "first"), clip_at([1.0], "second")]
    for path in unreadable.values():
        results = list(VideoDecoder(sampling(1), "auto").decode(path, clips))
        assert [type(result) for result in results] == [ClipFailure, ClipFailure]


def test_a_clip_with_too_many_times_is_a_bug_not_a_failure(make_video: Callable) -> None:
    with pytest.raises(ValueError, match="has 3 times"):
        list(VideoDecoder(sampling(2), "auto").decode(make_video(), [clip_at([0.0, 0.1, 0.2])]))


def test_an_unknown_resize_is_refused_before_any_video() -> None:
    settings = Sampling(fps=None, num_frames=1, height=8, width=8, resize="stretch/bilinear", tail="pad")
    with pytest.raises(ValueError, match="accepted are"):
        VideoDecoder(settings, "auto")


@pytest.mark.parametrize("kind", ["av1", "gif", "edit_list", "open_gop", "mpeg_ts", "vp8"])
def test_decord_alone_refuses_what_it_reads_wrong(kind: str, make_video: Callable) -> None:
    failure = failure_of(make_video(kind), clip_at([probe_video(make_video(kind)).pts_s[5]]), sampling(1), "decord")
    assert "decord is not exact on such a file" in failure.reason
    assert "decode.decoder=auto or pyav reads it" in failure.reason


def test_pyav_takes_over_where_decord_errs(make_video: Callable, ffmpeg_frames: Callable) -> None:
    path = make_video("mkv_without_duration")
    assert failure_of(path, clip_at([0.0]), sampling(1), "decord").reason.startswith("decord: ")
    (found,) = decode_all(path, [clip_at([0.0])], sampling(1))
    # The row names the decoder that the video was routed to: how far it comes depends on its threads.
    assert found.decoder.startswith("decord-")
    np.testing.assert_array_equal(found.frames_THWC[0], ffmpeg_frames(path)[0])


@pytest.fixture
def damaged_video(make_video: Callable, tmp_path: Path) -> str:
    """A video whose frame 17 in file order, in the second of five groups of pictures, is no picture."""
    path = shutil.copy(make_video("h264", num_frames=60), tmp_path)
    with av.open(path) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][17]
    with open(path, "r+b") as stream:
        assert packet.pos is not None
        stream.seek(packet.pos)
        stream.write(b"\xff" * packet.size)
    return path


@pytest.mark.parametrize("decoder", ["auto", "pyav"])
def test_damage_costs_the_clips_that_need_the_damaged_part(
    decoder: str, damaged_video: str, make_video: Callable, ffmpeg_frames: Callable
) -> None:
    clips = windows(probe_video(damaged_video).pts_s, GROUP)
    results = list(VideoDecoder(sampling(GROUP), decoder).decode(damaged_video, clips))  # pyright: ignore
    found = {one.clip.clip_id: one for one in results if isinstance(one, ClipFrames)}
    (failure,) = [one for one in results if isinstance(one, ClipFailure)]
    assert failure.clip_id == str(GROUP)
    assert "cannot be read: damaged at 0." in failure.reason
    expected_NHWC = ffmpeg_frames(make_video("h264", num_frames=60))
    assert sorted(found) == ["0", "24", "36", "48"]
    for clip_id, one in found.items():
        np.testing.assert_array_equal(one.frames_THWC, expected_NHWC[int(clip_id) : int(clip_id) + GROUP])


@pytest.mark.parametrize("kind", ["fragmented", "faststart", "mpeg_ts", "mpeg4_avi"])
def test_a_file_that_breaks_off_gives_its_intact_clips_and_a_failure(
    kind: str, make_video: Callable, ffmpeg_frames: Callable, tmp_path: Path
) -> None:
    whole = Path(make_video(kind))
    path = tmp_path / whole.name
    path.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * 0.7)])
    clips = windows(probe_video(str(path)).pts_s, 1)
    results = list(VideoDecoder(sampling(1), "auto").decode(str(path), clips))
    found = [one for one in results if isinstance(one, ClipFrames)]
    failures = [one for one in results if isinstance(one, ClipFailure)]
    assert len(found) >= GROUP
    assert failures
    assert all("cannot be read: damaged" in failure.reason for failure in failures)
    expected_NHWC = ffmpeg_frames(str(whole))
    for one in found[:GROUP]:
        np.testing.assert_array_equal(one.frames_THWC[0], expected_NHWC[int(one.clip.clip_id)])


def test_a_file_that_changes_is_probed_again(make_video: Callable, tmp_path: Path) -> None:
    path = str(tmp_path / "video.mp4")
    decoder = VideoDecoder(sampling(1), "auto")
    shutil.copy(make_video("h264"), path)
    assert isinstance(next(decoder.decode(path, [clip_at([2.5])])), ClipFailure)
    shutil.copy(make_video("h264", num_frames=75), path)
    assert isinstance(next(decoder.decode(path, [clip_at([2.5])])), ClipFrames)


@pytest.mark.parametrize("decoder", ["decord", "pyav"])
def test_memory_is_bounded_by_open_clips_not_by_the_video(decoder: str, make_video: Callable) -> None:
    path, settings = make_video("h264", num_frames=240), sampling(8, 128, 128)
    clips = windows(probe_video(path).pts_s, 8)
    clip_bytes = 8 * 128 * 128 * 3
    decode = VideoDecoder(settings, decoder).decode(path, clips)  # pyright: ignore[reportArgumentType]
    next(decode)
    tracemalloc.start()
    try:
        assert sum(isinstance(result, ClipFrames) for result in decode) == len(clips) - 1
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert clip_bytes <= peak_bytes < 4 * clip_bytes


def numbered_frames(indices: Sequence[int], taken: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    for index in indices:
        taken.append(index)
        yield index, np.full((64, 96, 3), index, np.uint8)


def wants(*frames: Sequence[int]) -> list[ClipWant]:
    return [ClipWant(clip=clip_at([0.0] * len(some), str(i)), frames=tuple(some)) for i, some in enumerate(frames)]


def test_overlapping_clips_want_each_frame_once() -> None:
    assert wanted_frames(wants([0, 1, 2, 3], [2, 3, 4, 5], [3, 3, 4, 4])) == [0, 1, 2, 3, 4, 5]


def test_clips_come_out_as_soon_as_their_last_frame_is_read() -> None:
    taken: list[int] = []
    clips = wants([0, 1, 2, 3], [2, 3, 4, 5])
    assembled = assemble(clips, numbered_frames(range(6), taken), np.arange(6.0), sampling(4), "test")
    for num_taken, values in ((4, [0, 1, 2, 3]), (6, [2, 3, 4, 5])):
        result = next(assembled)
        assert isinstance(result, ClipFrames)
        assert result.frames_THWC[:, 0, 0, 0].tolist() == values
        assert len(taken) == num_taken


def test_a_frame_that_is_missing_fails_only_the_clips_that_want_it() -> None:
    frames = [(0, np.zeros((64, 96, 3), np.uint8)), (1, "torn"), (2, np.zeros((64, 96, 3), np.uint8))]
    results = list(assemble(wants([0, 1], [0, 2], [1, 2]), frames, np.arange(3.0), sampling(2), "test"))
    assert [result.clip_id for result in results if isinstance(result, ClipFailure)] == ["0", "2"]
    assert [result.clip.clip_id for result in results if isinstance(result, ClipFrames)] == ["1"]
    assert results[0] == ClipFailure(clip_id="0", step="decode", reason="the frame at 1.000 s cannot be read: torn")


def test_the_identity_tells_choices_and_versions_apart() -> None:
    identities = {VideoDecoder(sampling(1), choice).identity for choice in ("auto", "decord", "pyav")}
    assert len(identities) == 3
    assert all(f"av-{av.__version__}" in identity and "decord-" in identity for identity in identities)


def test_the_fake_makes_the_same_frames_from_the_same_times() -> None:
    fake = FakeDecoder(sampling(3, 8, 16))
    first, again, other = fake.decode("", [clip_at([0.0, 0.04]), clip_at([0.0, 0.04]), clip_at([0.0, 0.05])])
    assert isinstance(first, ClipFrames)
    assert isinstance(again, ClipFrames)
    assert isinstance(other, ClipFrames)
    assert first.frames_THWC.shape == (3, 8, 16, 3)
    np.testing.assert_array_equal(first.frames_THWC, again.frames_THWC)
    np.testing.assert_array_equal(first.frames_THWC[1], first.frames_THWC[2])
    assert (first.frames_THWC[1] != other.frames_THWC[1]).all()
