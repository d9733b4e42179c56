"""One shard from its plan to its manifests: the whole line that a clip goes through."""

import itertools
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch

from ..schemas.clip import Clip, ClipFailure, ClipFrames, FrameBatch
from ..schemas.digest import digest_of_stream
from ..schemas.errors import DecodeError, SourceError, StorageError, TokenmillError
from ..schemas.shard import ShardProgress, ShardReceipt, ShardTask
from .commit import commit_shard
from .decode import FrameDecoder
from .fetch import local_file
from .places import local_path
from .prefetch import prefetch
from .store import ShardRows
from .worker import Worker

DECODE_AHEAD_BYTES = 256 << 20


def process_shard(task: ShardTask, worker: Worker) -> Iterator[ShardProgress | ShardReceipt]:
    """Decode, tokenize, store and commit the products that a shard lacks; the last value is its receipt."""
    shard_id, rows, clock = task.plan.shard_id, ShardRows(), _Clock()
    counted = _Counted(decode_clips(task.plan.clips, worker.decoder))
    decoded = prefetch(counted, _num_bytes, DECODE_AHEAD_BYTES)
    for clips, failures in batches(decoded, worker.batch_size):
        clock.lap("decode")
        if clips:
            rows.add(clips, tokenize(FrameBatch.stack(clips), task.products, worker))
        clock.lap("tokenize")
        rows.failures.extend(failures)
        num_frames = sum(one.clip.num_valid for one in clips)
        yield ShardProgress(
            shard_id=shard_id,
            num_decoded=counted.take(),
            num_tokenized=len(clips),
            num_frames=num_frames,
            failures=tuple(failures),
        )
    clock.lap("decode")
    yield commit_shard(task, worker, rows, clock.laps_s())


def decode_clips(clips: Sequence[Clip], decoder: FrameDecoder) -> Iterator[ClipFrames | ClipFailure]:
    """Frames or a failure for every clip, opening each video once."""
    for video, group in itertools.groupby(clips, key=lambda clip: clip.video):
        waiting = {clip.clip_id: clip for clip in group}
        try:
            with local_file(video.uri) as path:
                if video.has_content_digest:
                    _check_content(path, video.digest)
                for result in decoder.decode(path, list(waiting.values())):
                    waiting.pop(result.clip_id if isinstance(result, ClipFailure) else result.clip.clip_id)
                    yield result
        except StorageError:
            raise  # our own disk, not the video
        except SourceError as error:
            if may_pass(video.uri, error):
                raise SourceError(f"{error}: what was committed is kept, run the recipe again to resume") from error
            yield from (ClipFailure(clip_id=clip_id, step="fetch", reason=str(error)) for clip_id in waiting)
        except (TokenmillError, OSError) as error:
            yield from (ClipFailure(clip_id=clip_id, step="decode", reason=str(error)) for clip_id in waiting)


def may_pass(uri: str, error: SourceError) -> bool:
    """Whether a store is out of reach rather than without the video: failure rows would outlast an outage."""
    absent = isinstance(error.__cause__, FileNotFoundError | PermissionError | IsADirectoryError)
    return local_path(uri) is None and error.__cause__ is not None and not absent


def _check_content(path: str, digest: str) -> None:
    """Tokens of other bytes than were planned would carry the wrong name."""
    with open(path, "rb") as stream:
        found, _ = digest_of_stream(stream)
    if found != digest:
        raise DecodeError(
            f"the file has changed since it was planned (SHA-256 {found[:12]}, planned {digest[:12]}):"
            f" each run plans what is there when it begins"
        )


def batches(
    decoded: Iterable[ClipFrames | ClipFailure], batch_size: int
) -> Iterator[tuple[list[ClipFrames], list[ClipFailure]]]:
    """Up to `batch_size` clips at a time, with the failures met on the way."""
    batch: list[ClipFrames] = []
    failures: list[ClipFailure] = []
    for result in decoded:
        if isinstance(result, ClipFailure):
            failures.append(result)
            continue
        batch.append(result)
        if len(batch) == batch_size:
            yield batch, failures
            batch, failures = [], []
    if batch or failures:
        yield batch, failures


def tokenize(batch: FrameBatch, products: Sequence[str], worker: Worker) -> dict[str, torch.Tensor]:
    """The tokens of every token product among `products`, all from the same frames."""
    return {product: worker.encoders[product].encode(batch) for product in products if product in worker.encoders}


def _num_bytes(result: ClipFrames | ClipFailure) -> int:
    return result.frames_THWC.nbytes if isinstance(result, ClipFrames) else 0


class _Counted:
    """Passes results on and counts the decoded ones, which the thread that reads ahead has more of."""

    def __init__(self, results: Iterable[ClipFrames | ClipFailure]) -> None:
        self._results = results
        self._num_decoded = self._num_taken = 0

    def __iter__(self) -> Iterator[ClipFrames | ClipFailure]:
        for result in self._results:
            self._num_decoded += isinstance(result, ClipFrames)
            yield result

    def take(self) -> int:
        """How many were decoded since the last time."""
        num_new = self._num_decoded - self._num_taken
        self._num_taken += num_new
        return num_new


class _Clock:
    """Seconds spent by the worker on each step, waiting for decoded frames included."""

    def __init__(self) -> None:
        self._last_s = time.perf_counter()
        self._laps_s: Counter[str] = Counter()

    def lap(self, step: str) -> None:
        now_s = time.perf_counter()
        self._laps_s[step] += now_s - self._last_s  # pyright: ignore[reportArgumentType]
        self._last_s = now_s

    def laps_s(self) -> dict[str, float]:
        return {step: round(seconds, 3) for step, seconds in self._laps_s.items()}
