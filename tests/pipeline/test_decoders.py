"""Decoders that may die: good clips come out, poison is quarantined with its reason, and the next video is fine."""

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tokenmill.pipeline.decode import FakeDecoder, VideoDecoder
from tokenmill.pipeline.decoders import DirectDecoder, IsolatedDecoder, decode_ahead
from tokenmill.schemas.clip import Clip, ClipFailure, ClipFrames, Sampling, Video

SAMPLING = Sampling(fps=None, num_frames=4, height=16, width=24, resize="squash/bilinear", tail="pad")
POISON = str(Path(__file__).parents[1] / "faults" / "poison")


@pytest.fixture
def isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., IsolatedDecoder]]:
    """isolated(timeout_s=..., memory_mb=...): a decoder whose child heeds poison."""
    (tmp_path / "serving.py").write_text(
        "from functools import partial\n"
        "from tokenmill.pipeline.decode import VideoDecoder\n"
        "from tokenmill.pipeline.decode_clips import decode_clips\n"
        "def serve(sampling):\n    return partial(decode_clips, decoder=VideoDecoder(sampling, 'auto'))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", POISON)
    from serving import serve as make_serve  # pyright: ignore[reportMissingImports]

    made = []

    def make(timeout_s: float = 60, memory_mb: int = 2048) -> IsolatedDecoder:
        made.append(IsolatedDecoder(partial(make_serve, SAMPLING), SAMPLING, timeout_s, memory_mb))
        return made[-1]

    yield make
    for decoder in made:
        decoder.close()
    del sys.modules["serving"]


def clips_of(path: str, num_clips: int = 3) -> list[Clip]:
    video = Video(uri=path, size_bytes=-1, digest=f"uri:{path}")
    times = [tuple(round((4 * i + k) / 25, 6) for k in range(4)) for i in range(num_clips)]
    return [
        Clip(clip_id=f"{Path(path).stem}{i}", video=video, start_s=t[0], end_s=t[-1] + 0.04, frame_pts_s=t)
        for i, t in enumerate(times)
    ]


@pytest.fixture
def poison(make_video: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """poison("segfault"): the path of a video that does so to its decoder."""
    monkeypatch.syspath_prepend(POISON)
    from poison import append  # pyright: ignore[reportMissingImports]

    def make(what: str) -> str:
        path = f"{tmp_path}/{what}.mp4"
        shutil.copy(make_video(), path)
        append(path, f"decode {what}")
        return path

    return make


def failures_in(results: Sequence[ClipFrames | ClipFailure]) -> list[ClipFailure]:
    return [one for one in results if isinstance(one, ClipFailure)]


def test_frames_are_those_of_this_process(isolated: Callable[..., IsolatedDecoder], real_video: str) -> None:
    clips = clips_of(real_video)
    here = list(DirectDecoder(VideoDecoder(SAMPLING, "auto")).decode(clips))
    there = list(isolated().decode(clips))
    for one, other in zip(here, there, strict=True):
        assert isinstance(one, ClipFrames)
        assert isinstance(other, ClipFrames)
        assert np.array_equal(one.frames_THWC, other.frames_THWC)
        assert (one.clip, one.decoded_pts_s, one.decoder) == (other.clip, other.decoded_pts_s, other.decoder)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("segfault", "signal: died of SIGSEGV"),
        ("abort", "signal: died of SIGABRT"),
        ("hang", "time-out: killed after the time that one video may take (decode.timeout_s)"),
        ("memory", "memory: killed with more than 600 MB (decode.memory_mb)"),
        ("raise", "the decoder raised RuntimeError: a bug of the decoder"),
    ],
)
def test_poison_is_quarantined_and_the_next_video_is_fine(
    isolated: Callable[..., IsolatedDecoder],
    poison: Callable[[str], str],
    make_video: Callable[..., str],
    what: str,
    reason: str,
) -> None:
    decoder = isolated(timeout_s=1.5, memory_mb=600)
    failures = failures_in(list(decoder.decode(clips_of(poison(what)))))
    assert [failure.clip_id for failure in failures] == [f"{what}{i}" for i in range(3)]
    assert {(f.status, f.step, f.reason, f.attempts) for f in failures} == {("quarantined", "decode", reason, 2)}
    if what not in ("raise", "memory"):
        assert f"about to {what}" in failures[0].log_tail
    assert [type(one) for one in decoder.decode(clips_of(make_video()))] == [ClipFrames] * 3


def test_frames_of_another_shape_are_garbage(
    isolated: Callable[..., IsolatedDecoder], poison: Callable[[str], str]
) -> None:
    failures = failures_in(list(isolated().decode(clips_of(poison("garbage")))))
    assert {(f.status, f.reason) for f in failures} == {
        ("quarantined", "garbage: the decoder gave frames of shape (4, 1, 24, 3)")
    }


def test_a_decoder_that_dies_once_is_forgiven(
    isolated: Callable[..., IsolatedDecoder], poison: Callable[[str], str]
) -> None:
    path = poison("once")
    assert [type(one) for one in isolated().decode(clips_of(path))] == [ClipFrames] * 3
    assert Path(f"{path}.died").exists()


def test_several_decoders_share_the_videos(make_video: Callable[..., str], tmp_path: Path) -> None:
    class Counting(FakeDecoder):
        num_videos = 0

        def decode(self, path: str, clips: Sequence[Clip]) -> Iterator[ClipFrames | ClipFailure]:
            self.num_videos += 1
            return super().decode(path, clips)

    paths = [shutil.copy(make_video(), f"{tmp_path}/v{i}.mp4") for i in range(12)]
    clips = [clip for path in paths for clip in clips_of(path)]
    decoders = [Counting(SAMPLING) for _ in range(3)]
    ahead = decode_ahead(clips, [DirectDecoder(decoder) for decoder in decoders])
    found = [one.clip.clip_id for one in ahead if isinstance(one, ClipFrames)]
    ahead.close()
    assert sorted(found) == sorted(clip.clip_id for clip in clips)
    assert sum(decoder.num_videos for decoder in decoders) == 12


def test_closing_does_not_wait_for_a_video_that_hangs(
    isolated: Callable[..., IsolatedDecoder], poison: Callable[[str], str], make_video: Callable[..., str]
) -> None:
    clips = [*clips_of(make_video()), *clips_of(poison("hang"))]
    ahead = decode_ahead(clips, [isolated(timeout_s=3600)])
    assert isinstance(next(iter(ahead)), ClipFrames)
    ahead.close()
