"""One shard: what is committed, what fails, and who wins a race."""

import hashlib
import socket
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event

import pyarrow.parquet as pq
import pytest
import s3fs
import torch

from tokenmill.pipeline.decode import FakeDecoder
from tokenmill.pipeline.decoders import DirectDecoder
from tokenmill.pipeline.encode import BatchEncoder
from tokenmill.pipeline.executors import FakeExecutor, LocalExecutor
from tokenmill.pipeline.manifests import committed_names, missing_products, read_manifests
from tokenmill.pipeline.retries import RetryPolicy
from tokenmill.pipeline.segment import FakeSegmenter, MaskMaker
from tokenmill.pipeline.shard import process_shard
from tokenmill.pipeline.storage import Folder
from tokenmill.pipeline.worker import Worker, fingerprints_of
from tokenmill.schemas.clip import Clip, ClipFailure, ClipFrames, Sampling, Video
from tokenmill.schemas.errors import CacheError, DecodeError, SourceError, StorageError
from tokenmill.schemas.shard import ShardManifest, ShardPlan, ShardProgress, ShardReceipt, ShardTask
from tokenmill.tokenizers.base import FakeTokenizer

SAMPLING = Sampling(fps=None, num_frames=4, height=16, width=16, resize="squash/bilinear", tail="pad")


class SomeBroken(FakeDecoder):
    """Fails the clips of a set of ids, and gives up on the rest of the video at another."""

    def __init__(self, failing: Sequence[str] = (), breaking: str = "") -> None:
        super().__init__(SAMPLING)
        self._failing, self._breaking = failing, breaking

    def decode(self, path: str, clips: Sequence[Clip]) -> Iterator[ClipFrames | ClipFailure]:
        for clip in clips:
            if clip.clip_id == self._breaking:
                raise DecodeError("the decoder gave up")
            if clip.clip_id in self._failing:
                yield ClipFailure(clip_id=clip.clip_id, step="decode", reason="broken on purpose")
            else:
                yield from super().decode(path, [clip])


class Counting(FakeTokenizer):
    """Remembers the shape of every batch."""

    is_batched = True

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def encode(self, frames_BTHWC: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(frames_BTHWC.shape))
        return super().encode(frames_BTHWC)


def plan_of(num_clips: int, uri: str = __file__, digest: str = "uri:x") -> ShardPlan:
    video = Video(uri=uri, size_bytes=-1, digest=digest)
    clips = [
        Clip(clip_id=f"{i:032x}", video=video, start_s=i / 10, end_s=(i + 1) / 10, frame_pts_s=(i / 10, i / 10 + 0.05))
        for i in range(num_clips)
    ]
    return ShardPlan(shard_id="shard0", clips=tuple(clips))


def test_failures_behind_the_last_full_batch_leave_masks_as_they_are(tmp_path: Path) -> None:
    plan = plan_of(5)
    worker = worker_for(tmp_path, SomeBroken(failing=[plan.clips[-1].clip_id]))
    maker = MaskMaker(segmenter=FakeSegmenter(), sampling=SAMPLING, max_trajectories=128)
    worker = replace(worker, mask_makers={"masks/fake": maker}, fingerprints={"masks/fake": "f"})
    *_, receipt = process_shard(ShardTask(plan=plan, products=("masks/fake",)), worker)
    assert isinstance(receipt, ShardReceipt)
    (manifest,) = receipt.manifests
    assert (manifest.num_rows, [one.clip_id for one in manifest.failures]) == (4, [plan.clips[-1].clip_id])


def worker_for(tmp_path: Path, decoder: FakeDecoder | None = None, tokenizer: FakeTokenizer | None = None) -> Worker:
    encoder = BatchEncoder(tokenizer=tokenizer or FakeTokenizer(), batch_size=4, sampling=SAMPLING)
    encoders = {"tokens/fake": encoder}
    decoder = decoder or FakeDecoder(SAMPLING)
    return Worker(
        folder=Folder(str(tmp_path / "cache")),
        decoders=(DirectDecoder(decoder),),
        encoders=encoders,
        fingerprints=fingerprints_of(decoder, encoders),
    )


def task_of(plan: ShardPlan) -> ShardTask:
    return ShardTask(plan=plan, products=("clips", "tokens/fake"))


def receipt_of(task: ShardTask, worker: Worker) -> ShardReceipt:
    *_, receipt = process_shard(task, worker)
    assert isinstance(receipt, ShardReceipt)
    return receipt


def files_in(worker: Worker) -> dict[str, str]:
    return {name: hashlib.sha256(worker.folder.read(name)).hexdigest() for name in worker.folder.list("")}


def test_every_clip_is_committed_or_named_as_failed(tmp_path: Path) -> None:
    plan = plan_of(11)
    failing = [plan.clips[i].clip_id for i in (0, 5)]
    receipt = receipt_of(task_of(plan), worker_for(tmp_path, SomeBroken(failing)))
    for manifest in receipt.manifests:
        assert manifest.num_rows == 9
        assert [failure.clip_id for failure in manifest.failures] == failing
        assert manifest.clips_per_video == {"uri:x": 9}


def test_a_decoder_that_gives_up_fails_the_rest_of_the_video_only(tmp_path: Path) -> None:
    first, second = plan_of(5), plan_of(3, digest="uri:y")
    renamed = [
        Clip(**{f: getattr(c, f) for f in c.__slots__} | {"clip_id": f"b{i:031x}"}) for i, c in enumerate(second.clips)
    ]
    plan = ShardPlan(shard_id="shard0", clips=(*first.clips, *renamed))
    receipt = receipt_of(task_of(plan), worker_for(tmp_path, SomeBroken(breaking=first.clips[2].clip_id)))
    assert [f.clip_id for f in receipt.manifests[0].failures] == [clip.clip_id for clip in first.clips[2:]]
    assert {f.reason for f in receipt.manifests[0].failures} == {"the decoder gave up"}
    assert receipt.manifests[0].clips_per_video == {"uri:x": 2, "uri:y": 3}


def test_a_shard_of_failures_commits_no_file_and_is_done(tmp_path: Path) -> None:
    plan, worker = plan_of(3), worker_for(tmp_path, SomeBroken(breaking=f"{0:032x}"))
    receipt = receipt_of(task_of(plan), worker)
    assert [manifest.files for manifest in receipt.manifests] == [(), ()]
    assert missing_products(committed_names(worker.folder), "shard0", worker.fingerprints) == ()


def test_progress_counts_what_the_receipt_says(tmp_path: Path) -> None:
    plan = plan_of(11)
    *progress, _ = process_shard(task_of(plan), worker_for(tmp_path, SomeBroken([plan.clips[10].clip_id])))
    reports = [one for one in progress if isinstance(one, ShardProgress)]
    assert sum(one.num_clips for one in reports) == 10
    assert sum(one.num_frames for one in reports) == 20
    assert [f.clip_id for one in reports for f in one.failures] == [plan.clips[10].clip_id]


def test_models_see_one_batch_shape_only(tmp_path: Path) -> None:
    tokenizer = Counting()
    receipt_of(task_of(plan_of(10)), worker_for(tmp_path, tokenizer=tokenizer))
    assert tokenizer.shapes == [(4, 4, 16, 16, 3)] * 3


def test_who_comes_second_changes_nothing(tmp_path: Path) -> None:
    worker, task = worker_for(tmp_path), task_of(plan_of(6))
    assert receipt_of(task, worker).num_lost_races == 0
    before = files_in(worker)
    assert receipt_of(task, worker).num_lost_races == 2
    assert files_in(worker) == before


def test_rows_lie_in_the_order_of_clip_ids_whatever_the_plan(tmp_path: Path) -> None:
    plan = plan_of(6)
    shuffled = ShardPlan(shard_id="shard0", clips=tuple(plan.clips[i] for i in (3, 1, 5, 0, 4, 2)))
    receipt = receipt_of(task_of(shuffled), worker_for(tmp_path))
    for manifest in receipt.manifests:
        rows = pq.read_table(tmp_path / "cache" / manifest.files[0].name)["clip_id"].to_pylist()
        assert rows == [clip.clip_id for clip in plan.clips]


def test_our_own_disk_ends_the_job_and_is_not_a_failure_row(tmp_path: Path) -> None:
    class FullDisk(FakeDecoder):
        def decode(self, path: str, clips: Sequence[Clip]) -> Iterator[ClipFrames | ClipFailure]:
            raise StorageError("scratch: the disk is full")
            yield

    with pytest.raises(StorageError, match="the disk is full"):
        receipt_of(task_of(plan_of(2)), worker_for(tmp_path, FullDisk(SAMPLING)))
    assert not (tmp_path / "cache" / "manifests").exists()


def test_a_bug_in_a_tokenizer_is_a_crash_that_commits_nothing(tmp_path: Path) -> None:
    class Buggy(FakeTokenizer):
        def encode(self, frames_BTHWC: torch.Tensor) -> torch.Tensor:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        receipt_of(task_of(plan_of(2)), worker_for(tmp_path, tokenizer=Buggy()))
    assert not (tmp_path / "cache" / "manifests").exists()


def test_fingerprints_follow_whatever_decides_the_bytes(tmp_path: Path) -> None:
    decoder = FakeDecoder(SAMPLING)
    smaller = Sampling(fps=None, num_frames=4, height=8, width=16, resize="squash/bilinear", tail="pad")
    settings = [(4, SAMPLING), (5, SAMPLING), (4, smaller)]
    prints = [
        fingerprints_of(
            decoder, {"tokens/a": BatchEncoder(tokenizer=FakeTokenizer(), batch_size=size, sampling=sampling)}
        )["tokens/a"]
        for size, sampling in settings
    ]
    assert len(set(prints)) == 3


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    worker = worker_for(tmp_path)
    receipt_of(task_of(plan_of(2)), worker)
    (read, _) = read_manifests(worker.folder, worker.fingerprints)
    assert ShardManifest.from_json(read.to_json(), "x") == read
    worker.folder.replace(read.name, b'{"format_version": 99}')
    with pytest.raises(CacheError, match=r"clips/shard0.*: format version 99, this tokenmill reads 1"):
        read_manifests(worker.folder, worker.fingerprints)
    worker.folder.replace(read.name, b"{")
    with pytest.raises(CacheError, match="damaged manifest"):
        read_manifests(worker.folder, worker.fingerprints)


def test_executors_take_every_task_once(tmp_path: Path) -> None:
    tasks = [task_of(plan_of(2))]
    fake = FakeExecutor()
    assert [receipt.shard_id for receipt in fake.run(tasks, lambda: worker_for(tmp_path), Event())] == ["shard0"]  # pyright: ignore
    assert fake.tasks == tasks
    worker = worker_for(tmp_path)
    events = list(LocalExecutor(worker).run(tasks, lambda: worker, Event()))
    assert [type(event) for event in events] == [ShardProgress, ShardReceipt]
    stopped = Event()
    stopped.set()
    assert list(LocalExecutor(worker).run(tasks, lambda: worker, stopped)) == []


def test_two_products_share_one_decode(tmp_path: Path) -> None:
    class Counted(FakeDecoder):
        num_decoded = 0

        def decode(self, path: str, clips: Sequence[Clip]) -> Iterator[ClipFrames | ClipFailure]:
            self.num_decoded += len(clips)
            yield from super().decode(path, clips)

    decoder = Counted(SAMPLING)
    tokenizers = {"tokens/a": FakeTokenizer(), "tokens/b": FakeTokenizer()}
    encoders = {p: BatchEncoder(tokenizer=t, batch_size=4, sampling=SAMPLING) for p, t in tokenizers.items()}
    worker = Worker(
        folder=Folder(str(tmp_path / "cache")),
        decoders=(DirectDecoder(decoder),),
        encoders=encoders,
        fingerprints=fingerprints_of(decoder, encoders),
    )
    receipt = receipt_of(ShardTask(plan=plan_of(6), products=("clips", *tokenizers)), worker)
    assert decoder.num_decoded == 6
    assert [manifest.num_rows for manifest in receipt.manifests] == [6, 6, 6]


def test_a_store_out_of_reach_ends_the_job_and_commits_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RetryPolicy, "wait_s", lambda policy, attempt: 0.01)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        s3fs.S3FileSystem.clear_instance_cache()
        plan = plan_of(2, uri="s3://bucket/gone.mp4")
        with pytest.raises(SourceError, match="what was committed is kept, run the recipe again to resume"):
            receipt_of(task_of(plan), worker_for(tmp_path))
        s3fs.S3FileSystem.clear_instance_cache()
    assert not (tmp_path / "cache" / "manifests").exists()


def test_a_local_video_that_is_gone_is_a_failure_of_its_clips(tmp_path: Path) -> None:
    receipt = receipt_of(task_of(plan_of(3, uri="/no/such/video.mp4")), worker_for(tmp_path))
    assert {(f.step, f.reason) for f in receipt.manifests[0].failures} == {
        ("fetch", "/no/such/video.mp4: it does not exist: check the path")
    }
