"""Rows of a shard as local files."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tokenmill.pipeline.encode import VALUES, BatchEncoder, EncodedBatch, bits_of
from tokenmill.pipeline.shard_tar import write_shard_tar
from tokenmill.pipeline.storage import Folder
from tokenmill.pipeline.store import ShardRows, write_clips, write_tokens
from tokenmill.pipeline.token_file import TokenFile
from tokenmill.pipeline.worker import Worker
from tokenmill.schemas.clip import Clip, ClipFrames, Sampling, Video
from tokenmill.schemas.shard import VideoText
from tokenmill.schemas.tables import CLIP_SCHEMA
from tokenmill.tokenizers.base import FakeTokenizer

from .test_webdataset_output import read_back

SAMPLING = Sampling(fps=None, num_frames=4, height=8, width=8, resize="squash/bilinear", tail="pad")
ENCODER = BatchEncoder(tokenizer=FakeTokenizer(), batch_size=2, sampling=SAMPLING)


def decoded(number: int) -> ClipFrames:
    video = Video(uri=f"/videos/{number}.mp4", size_bytes=-1, digest=f"uri:{number}")
    clip = Clip(clip_id=f"{number:032x}", video=video, start_s=0, end_s=1, frame_pts_s=(0.0, 0.5))
    frames_THWC = np.zeros((4, 8, 8, 3), np.uint8)
    return ClipFrames(
        clip=clip, frames_THWC=frames_THWC, decoded_pts_s=(0.0, 0.48), frame_numbers=(0, 1), decoder="fake"
    )


def encoded(numbers: list[int]) -> EncodedBatch:
    tokens = torch.tensor(numbers).reshape(-1, 1, 1, 1)
    return EncodedBatch({VALUES: tokens}, (2,) * len(numbers), num_splits=len(numbers))


def worker(tmp_path: Path) -> Worker:
    folder = Folder(str(tmp_path / "cache"))
    return Worker(folder=folder, decoders=(), encoders={"tokens/fake": ENCODER}, fingerprints={})


@pytest.fixture
def rows() -> ShardRows:
    """Clips 3, 1 and 2, in two batches; the one token of each is its number."""
    rows = ShardRows()
    for batch in ([3, 1], [2]):
        rows.add_clips([decoded(n) for n in batch])
        rows.add_tokens({"tokens/fake": encoded(batch)})
    return rows


def test_every_file_has_its_rows_in_the_order_of_clip_ids(tmp_path: Path, rows: ShardRows) -> None:
    expected = [f"{n:032x}" for n in (1, 2, 3)]
    clips = write_clips(str(tmp_path), rows, "v")
    tokens = write_tokens(str(tmp_path), rows, "tokens/fake", ENCODER, "v")
    tar = write_shard_tar(str(tmp_path), rows, {}, worker(tmp_path), "v")
    assert pq.read_table(clips)["clip_id"].to_pylist() == expected
    assert pq.read_table(tokens)["clip_id"].to_pylist() == expected
    assert TokenFile(Path(tokens).read_bytes(), tokens).read([0, 1, 2]).reshape(-1).tolist() == [1, 2, 3]
    samples = read_back(Path(tar))
    assert [one["__key__"] for one in samples] == expected
    assert [int(one["fake.npy"][0, 0, 0]) for one in samples] == [1, 2, 3]


def test_clips_keep_the_times_that_were_found_and_no_other_columns(tmp_path: Path, rows: ShardRows) -> None:
    table = pq.read_table(write_clips(str(tmp_path), rows, "v"))
    assert table.schema.names == CLIP_SCHEMA.names
    assert table["frame_pts_s"][0].as_py() == [0.0, 0.48]
    assert table.schema.metadata[b"tokenmill.fingerprint"] == b"v"


def test_each_sample_has_the_text_of_its_own_video(tmp_path: Path, rows: ShardRows) -> None:
    texts = {"uri:2": VideoText(caption="two"), "uri:3": VideoText(metadata='{"n": 3}')}
    samples = read_back(Path(write_shard_tar(str(tmp_path), rows, texts, worker(tmp_path), "v")))
    found = [(one["json"]["uri"], one["json"]["caption"], one["json"]["metadata"]) for one in samples]
    assert found == [
        ("/videos/1.mp4", None, None),
        ("/videos/2.mp4", "two", None),
        ("/videos/3.mp4", None, {"n": 3}),
    ]


def test_bfloat16_travels_as_its_bits() -> None:
    latents = torch.tensor([1.0, -2.5]).to(torch.bfloat16)
    assert torch.equal(torch.from_numpy(bits_of(latents)).view(torch.bfloat16), latents)
    assert bits_of(latents.float()).dtype == np.float32
