"""The commit: of those who race for a shard one stands, and what is interrupted is made again."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tokenmill.pipeline.commit import commit_manifests, commit_shard, publish_shard
from tokenmill.pipeline.decode import FakeDecoder
from tokenmill.pipeline.decoders import DirectDecoder
from tokenmill.pipeline.encode import VALUES, BatchEncoder, EncodedBatch
from tokenmill.pipeline.manifests import committed_names, missing_products, read_manifests
from tokenmill.pipeline.storage import Folder
from tokenmill.pipeline.store import ShardRows
from tokenmill.pipeline.worker import ShardsFormat, Worker, fingerprints_of
from tokenmill.schemas.clip import Clip, ClipFailure, ClipFrames, Sampling, Video
from tokenmill.schemas.errors import CacheError, StorageError
from tokenmill.schemas.shard import ShardManifest, ShardPlan, ShardTask, VideoText
from tokenmill.tokenizers.base import FakeTokenizer

from ..conftest import Store
from .test_webdataset_output import read_back

SAMPLING = Sampling(fps=None, num_frames=4, height=8, width=16, resize="squash/bilinear", tail="pad")


def worker_for(url: str, format: ShardsFormat = "parquet", names: Sequence[str] = ("fake",)) -> Worker:
    encoders = {
        f"tokens/{name}": BatchEncoder(tokenizer=FakeTokenizer(), batch_size=4, sampling=SAMPLING) for name in names
    }
    decoder = FakeDecoder(SAMPLING)
    return Worker(
        folder=Folder(url),
        decoders=(DirectDecoder(decoder),),
        encoders=encoders,
        fingerprints=fingerprints_of(decoder, encoders, format=format),
    )


def clips_of(num_clips: int) -> list[Clip]:
    video = Video(uri="/videos/a.mp4", size_bytes=-1, digest="uri:a")
    return [
        Clip(clip_id=f"{i * 7 % 10:032x}", video=video, start_s=i, end_s=i + 1.0, frame_pts_s=(i, i + 0.25))
        for i in range(num_clips)
    ]


def task_for(worker: Worker, num_clips: int = 5) -> ShardTask:
    plan = ShardPlan(shard_id="shard0", clips=tuple(clips_of(num_clips)))
    return ShardTask(
        plan=plan, products=tuple(worker.fingerprints), texts={"uri:a": VideoText(caption="a cat", metadata='{"n": 1}')}
    )


def rows_of(worker: Worker, value: int = 0, num_clips: int = 5, at_once: int = 5) -> ShardRows:
    """Rows of a shard whose tokens are all `value`, added `at_once` clips at a time."""
    rows, clips = ShardRows(), clips_of(num_clips)
    for start in range(0, num_clips, at_once):
        chosen = clips[start : start + at_once]
        frames_THWC = np.zeros((4, 8, 16, 3), np.uint8)
        decoded = [
            ClipFrames(
                clip=clip, frames_THWC=frames_THWC, decoded_pts_s=clip.frame_pts_s, frame_numbers=(0,), decoder="fake"
            )
            for clip in chosen
        ]
        tokens = torch.full((len(chosen), 1, 1, 2), value)
        batch = EncodedBatch({VALUES: tokens}, (1,) * len(decoded), num_splits=value % 2)
        rows.add_clips(decoded)
        rows.add_tokens(dict.fromkeys(worker.encoders, batch))
    return rows


def data_files(folder: Folder) -> list[str]:
    return [name for name in folder.list("") if not name.startswith(("manifests/", "."))]


def named_files(worker: Worker) -> list[str]:
    return sorted(file.name for m in read_manifests(worker.folder, worker.fingerprints) for file in m.files)


def published(worker: Worker, value: int, decode_s: float) -> list[ShardManifest]:
    """The manifests of published files; timings differ between workers, so no two manifests are the same bytes."""
    return list(publish_shard(task_for(worker), worker, rows_of(worker, value), {"decode": decode_s}))


@pytest.mark.parametrize("format", ["parquet", "webdataset", "both"])
def test_the_format_says_which_products_are_made(tmp_path: Path, format: ShardsFormat) -> None:
    worker = worker_for(str(tmp_path), format)
    receipt = commit_shard(task_for(worker), worker, rows_of(worker), {})
    tokens, tars = ["clips", "tokens/fake"], ["webdataset", "clips"]
    expected = {"parquet": tokens, "webdataset": tars, "both": [*tars, "tokens/fake"]}[format]
    assert [manifest.product for manifest in receipt.manifests] == expected
    assert [manifest.num_rows for manifest in receipt.manifests] == [5] * len(expected)
    assert data_files(worker.folder) == named_files(worker)
    assert missing_products(committed_names(worker.folder), "shard0", worker.fingerprints) == ()


def test_a_tar_has_all_tokens_and_texts_in_the_order_of_clip_ids(tmp_path: Path) -> None:
    worker = worker_for(str(tmp_path), "webdataset", ["a", "b"])
    receipt = commit_shard(task_for(worker), worker, rows_of(worker, 7), {})
    tar, index = receipt.manifests[0].files
    assert (tar.num_rows, index.num_rows) == (5, 0)
    assert pq.read_metadata(tmp_path / index.name).num_rows == 5 * 3
    samples = read_back(tmp_path / tar.name)
    assert [one["__key__"] for one in samples] == sorted(clip.clip_id for clip in clips_of(5))
    for one in samples:
        assert one["a.npy"].tolist() == one["b.npy"].tolist() == [[[7, 7]]]
        assert (one["json"]["caption"], one["json"]["metadata"]) == ("a cat", {"n": 1})
        assert one["json"]["fingerprint"] == worker.fingerprints["webdataset"]
        assert one["json"]["uri"] == "/videos/a.mp4"


def test_tars_take_the_tokens_of_every_product() -> None:
    worker = worker_for("memory://encoders", "both", ["a", "b"])
    assert set(worker.encoders_for(["clips"])) == set()
    assert set(worker.encoders_for(["clips", "tokens/a"])) == {"tokens/a"}
    assert set(worker.encoders_for(["webdataset"])) == {"tokens/a", "tokens/b"}


def test_another_tokenizer_is_another_version_of_the_tars() -> None:
    one, two = (worker_for("memory://versions", "both", names) for names in (["a"], ["a", "b"]))
    assert one.fingerprints["tokens/a"] == two.fingerprints["tokens/a"]
    assert one.fingerprints["webdataset"] != two.fingerprints["webdataset"]


def test_how_clips_came_together_does_not_change_the_files(tmp_path: Path) -> None:
    names = []
    for at_once in (1, 2, 5):
        worker = worker_for(str(tmp_path / str(at_once)), "both")
        commit_shard(task_for(worker), worker, rows_of(worker, at_once=at_once), {})
        names.append(data_files(worker.folder))
    assert names[0] == names[1] == names[2]  # named by content


def test_a_shard_of_failures_has_no_tar(tmp_path: Path) -> None:
    worker = worker_for(str(tmp_path), "both")
    rows = ShardRows(failures=[ClipFailure(clip_id=clip.clip_id, step="decode", reason="x") for clip in clips_of(5)])
    receipt = commit_shard(task_for(worker), worker, rows, {})
    assert [manifest.files for manifest in receipt.manifests] == [(), (), ()]
    assert [len(manifest.failures) for manifest in receipt.manifests] == [5, 5, 5]


def test_the_loser_of_a_race_removes_its_files(store: Store) -> None:
    worker = worker_for(store.url, "both")
    first, second = published(worker, 1, 1.5), published(worker, 2, 2.5)
    assert commit_manifests(worker.folder, second) == 0
    assert commit_manifests(worker.folder, first) == 3
    stored = read_manifests(worker.folder, worker.fingerprints)
    assert {m.product: m.files for m in stored} == {m.product: m.files for m in second}
    assert data_files(worker.folder) == named_files(worker)


def test_the_loser_with_the_same_bytes_removes_nothing(store: Store) -> None:
    worker = worker_for(store.url, "both")
    first, second = published(worker, 1, 1.5), published(worker, 1, 2.5)
    assert commit_manifests(worker.folder, first) == 0
    before = data_files(worker.folder)
    assert commit_manifests(worker.folder, second) == 3
    assert data_files(worker.folder) == before == named_files(worker)


def test_of_many_racing_workers_one_stands_without_an_orphan(tmp_path: Path) -> None:
    worker = worker_for(str(tmp_path), "both")

    def race(value: int) -> int:
        return commit_shard(task_for(worker), worker, rows_of(worker, value % 4), {}).num_lost_races

    with ThreadPoolExecutor(8) as pool:
        lost = list(pool.map(race, range(16)))
    assert sum(lost) == 3 * 15
    assert data_files(worker.folder) == named_files(worker)


def test_a_receipt_counts_every_lost_race(tmp_path: Path) -> None:
    worker = worker_for(str(tmp_path), "both")
    task = task_for(worker)
    assert commit_shard(replace(task, products=("clips",)), worker, rows_of(worker), {}).num_lost_races == 0
    receipt = commit_shard(task, worker, rows_of(worker), {})
    assert (receipt.num_lost_races, receipt.is_committed) == (1, True)


def test_where_a_worker_may_not_commit_the_driver_does(store: Store) -> None:
    worker = replace(worker_for(store.url, "both"), commits=False)
    receipts = [commit_shard(task_for(worker), worker, rows_of(worker, value), {}) for value in (1, 2)]
    assert [receipt.is_committed for receipt in receipts] == [False, False]
    assert committed_names(worker.folder) == frozenset()
    lost = [commit_manifests(worker.folder, receipt.manifests, guarded=False) for receipt in receipts]
    assert lost == [0, 3]
    assert data_files(worker.folder) == named_files(worker)
    assert missing_products(committed_names(worker.folder), "shard0", worker.fingerprints) == ()


def test_a_product_is_committed_before_the_next_is_published(tmp_path: Path) -> None:
    worker = worker_for(str(tmp_path), "both")
    (tmp_path / "tokens").write_text("in the way")
    with pytest.raises(StorageError, match="a part of the path is a file, not a folder"):
        commit_shard(task_for(worker), worker, rows_of(worker), {})
    assert missing_products(committed_names(worker.folder), "shard0", worker.fingerprints) == ("tokens/fake",)
    (tmp_path / "tokens").unlink()
    assert commit_shard(task_for(worker), worker, rows_of(worker), {}).num_lost_races == 2
    assert data_files(worker.folder) == named_files(worker)


def test_a_crash_between_publish_and_commit_leaves_files_that_the_next_run_names(tmp_path: Path) -> None:
    worker = worker_for(str(tmp_path), "both")
    next(publish_shard(task_for(worker), worker, rows_of(worker), {}))
    orphans = data_files(worker.folder)
    assert [name.partition("/")[0] for name in orphans] == ["webdataset", "webdataset"]
    assert committed_names(worker.folder) == frozenset()
    assert commit_shard(task_for(worker), worker, rows_of(worker), {}).num_lost_races == 0
    assert set(orphans) < set(named_files(worker))
    assert data_files(worker.folder) == named_files(worker)


def test_a_winner_that_cannot_be_read_keeps_the_files_of_the_loser(tmp_path: Path) -> None:
    worker = worker_for(str(tmp_path))
    manifests = published(worker, 1, 1.5)
    worker.folder.replace(manifests[0].name, b"{")
    before = data_files(worker.folder)
    with pytest.raises(CacheError, match="damaged manifest"):
        commit_manifests(worker.folder, manifests)
    assert data_files(worker.folder) == before


def test_a_manifest_says_how_often_memory_was_short(tmp_path: Path) -> None:
    worker = worker_for(str(tmp_path))
    splits = [{m.product: m.batch_splits for m in published(worker, value, 0.1)} for value in (0, 1)]
    assert splits == [dict.fromkeys(splits[0], 0), {p: int(p.startswith(("tokens", "webdataset"))) for p in splits[1]}]
