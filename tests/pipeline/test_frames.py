"""Candidate frames: which they are, what is stored of them, and that batches do not change embeddings."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tokenmill.pipeline.frame_file import read_embedded_rows, write_embedded_frames, write_frames
from tokenmill.pipeline.frame_scores import score_frames
from tokenmill.pipeline.frames import EmbeddedFrames, FrameEmbedder, FrameMaker, candidates_of
from tokenmill.pipeline.relevance import FakeEncoder
from tokenmill.schemas.clip import Clip, ClipFrames, Sampling, Video
from tokenmill.schemas.errors import TokenizerError
from tokenmill.schemas.relevance import ScorerSpec

SAMPLING = Sampling(fps=None, num_frames=8, height=32, width=32, resize="squash/bilinear", tail="pad")


def clip_of(frames_THWC: np.ndarray, start_s: float = 0.0, fps: float = 4.0) -> ClipFrames:
    times = tuple(start_s + i / fps for i in range(len(frames_THWC)))
    video = Video(uri="v", size_bytes=-1, digest="uri:v")
    clip = Clip(clip_id=f"{start_s}", video=video, start_s=start_s, end_s=times[-1] + 1 / fps, frame_pts_s=times)
    first = round(start_s * fps)
    return ClipFrames(
        clip=clip,
        frames_THWC=frames_THWC,
        decoded_pts_s=times,
        frame_numbers=tuple(range(first, first + len(times))),
        decoder="none",
        is_key_frame=tuple(i == 0 for i in range(len(times))),
    )


def noise(seed: int, num_frames: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num_frames, 32, 32, 3), np.uint8)


@pytest.mark.parametrize(
    ("pts_s", "first_number", "start_s", "fps", "wanted"),
    [
        ([0, 0.25, 0.5, 0.75, 1.0, 1.25], 0, 0.0, 1.0, [0, 4]),
        ([0, 0.25, 0.5, 0.75, 1.0, 1.25], 0, 0.0, 2.0, [0, 2, 4]),
        ([1.5, 1.75, 2.0, 2.25], 6, 1.5, 1.0, [2]),  # the frame of the second begun before is in the clip before
        ([2.0, 2.25, 2.5], 8, 2.0, 1.0, [0]),
        ([1.25, 1.5, 1.75], 5, 1.25, 1.0, [0]),  # no time of the grid: its first frame
        ([0.08, 0.28, 1.08], 0, 0.08, 1.0, [0, 2]),  # a video that begins late
        ([0, 5, 5.1, 9], 0, 0.0, 1.0, [0, 1, 3]),
        ([0.3, 0.4, 0.5], 9, 0.3, None, [0, 1, 2]),
        ([29.97 / 30 * i for i in range(31)], 0, 0.0, 1.0, [0, *range(2, 31)]),
    ],
)
def test_candidates_lie_on_a_grid_of_the_whole_video(
    pts_s: list[float], first_number: int, start_s: float, fps: float | None, wanted: list[int]
) -> None:
    assert candidates_of(pts_s, first_number, start_s, fps) == wanted


@pytest.mark.parametrize("fps", [0.5, 1.0, 3.0])
def test_clips_cut_anywhere_have_the_candidates_of_the_whole(fps: float) -> None:
    times = np.arange(0, 60, 1 / 24)
    whole = {float(times[i]) for i in candidates_of(times.tolist(), 0, 0.0, fps)}
    for size in (17, 48, 100):
        found, extra = set(), 0
        for start in range(0, len(times), size):
            part = times[start : start + size].tolist()
            chosen = [part[i] for i in candidates_of(part, start, part[0], fps)]
            assert chosen
            extra += len(set(chosen) - whole)
            found |= set(chosen)
        assert whole <= found
        assert extra <= 1 or size < 24 / fps  # clips shorter than the grid's step, as the last, have their first frame


def test_scores_tell_motion_novelty_sharpness_and_cuts() -> None:
    frames = np.full((8, 32, 32, 3), 60, np.uint8)
    frames[4:] = (200, 30, 30)
    frames[6, 8:24, 8:24] = np.indices((16, 16)).sum(0)[..., None] % 2 * 255
    scores = score_frames(frames)
    assert scores.is_shot_start.nonzero()[0].tolist() == [4]
    assert scores.shot_change.argmax() == 4
    assert scores.motion[0] == scores.motion[2] == 0
    assert scores.motion[4] > 0.05
    assert scores.sharpness.argmax() == 6
    assert scores.sharpness[0] == pytest.approx(0)
    odd = np.concatenate((frames[:3], frames[6:7], frames[:2]))
    assert score_frames(odd).novelty.argmax() == 3
    alone = score_frames(frames[:1])
    assert [float(values[0]) for values in (alone.motion, alone.novelty, alone.shot_change)] == [0, 0, 0]


def test_what_is_stored_of_a_frame() -> None:
    one = clip_of(noise(0), start_s=2.0)
    rows = FrameMaker(sampling=SAMPLING, fps=2.0).describe(one)
    assert [row["frame"] for row in rows] == [0, 2, 4, 6]
    assert [row["frame_number"] for row in rows] == [8, 10, 12, 14]
    assert [row["pts_s"] for row in rows] == [2.0, 2.5, 3.0, 3.5]
    assert [row["is_key_frame"] for row in rows] == [True, False, False, False]


class Shapes:
    """Embeddings that are the sum of a frame's channels, and a note of every batch."""

    def __init__(self) -> None:
        self.spec = ScorerSpec(name="shapes", dim=3, weights_sha256=None)
        self.batches: list[int] = []

    def embed_frames(self, frames_NHWC: np.ndarray) -> np.ndarray:
        self.batches.append(len(frames_NHWC))
        return FakeEncoder().embed_frames(frames_NHWC)

    def embed_texts(self, texts: list[str]) -> np.ndarray:
        raise AssertionError


def test_frames_of_several_clips_are_embedded_in_batches_of_one_size() -> None:
    clips, encoder = [clip_of(noise(i)) for i in range(3)], Shapes()
    found = FrameEmbedder(encoder=encoder, batch_size=4).embed(clips, [[0, 3], [1, 2, 7], [5]])
    assert encoder.batches == [4, 4]
    assert [one.frames for one in found] == [(0, 3), (1, 2, 7), (5,)]
    assert found[1].pts_s == (0.25, 0.5, 1.75)
    for clip, one in zip(clips, found, strict=True):
        wanted = FakeEncoder().embed_frames(clip.frames_THWC[list(one.frames)])
        assert np.array_equal(one.embeddings_KD, wanted.astype("<f2"))


def test_embeddings_that_are_not_numbers_are_refused() -> None:
    class Broken(FakeEncoder):
        def embed_frames(self, frames_NHWC: np.ndarray) -> np.ndarray:
            return np.full((len(frames_NHWC), 3), np.nan, np.float32)

    with pytest.raises(TokenizerError, match="fake gives embeddings that are not numbers: set dtype to float32"):
        FrameEmbedder(encoder=Broken(), batch_size=2).embed([clip_of(noise(0))], [[0]])


def test_files_of_frames_are_read_back_as_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    counts = [3, 1, 40, 2]
    embedded = [
        EmbeddedFrames(
            frames=tuple(range(count)),
            pts_s=tuple(i / 4 for i in range(count)),
            embeddings_KD=rng.standard_normal((count, 5)).astype("<f2"),
        )
        for count in counts
    ]
    clips = [{"clip_id": str(i), "video_id": "v"} for i in range(4)]
    path = str(tmp_path / "e.parquet")
    write_embedded_frames(path, clips, embedded, {"dim": 5, "name": "n"}, {"tokenmill.fingerprint": "f"})
    read = pq.read_table(path)
    assert [len(frames) for frames in read["frames"].to_pylist()] == counts
    for (clip_id, values_KD), clip, one in zip(read_embedded_rows(read, 5), clips, embedded, strict=True):
        assert clip_id == clip["clip_id"]
        assert values_KD.tobytes() == one.embeddings_KD.tobytes()
    column = pq.read_metadata(path).row_group(0).column(4)
    assert (column.path_in_schema, column.compression) == ("embeddings.list.element", "UNCOMPRESSED")
    rows = [
        {"clip_id": "a", "video_id": "v", "frames": FrameMaker(sampling=SAMPLING, fps=None).describe(clip_of(noise(1)))}
    ]
    write_frames(str(tmp_path / "f.parquet"), rows, {})
    table = pq.read_table(tmp_path / "f.parquet")
    assert table["frames"].to_pylist()[0][3]["frame_number"] == 3
    assert table.schema.metadata[b"tokenmill.format"] == b"1"
    assert pa.types.is_list(table.schema.field("frames").type)
