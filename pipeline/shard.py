"""One shard from its plan to its manifests: the whole line that a clip goes through."""

import contextlib
import time
from collections.abc import Generator, Iterable, Iterator, Sequence

from ..schemas.clip import ClipFailure, ClipFrames, FrameBatch
from ..schemas.shard import FRAMES, ShardProgress, ShardReceipt, ShardTask
from .commit import commit_shard
from .decoders import decode_ahead
from .encode import EncodedBatch
from .frames import EmbeddedFrames, FrameRows
from .retries import retry_counts
from .segment import SegmentedClip
from .store import ShardRows
from .worker import Worker


def process_shard(task: ShardTask, worker: Worker) -> Generator[ShardProgress | ShardReceipt, None, None]:
    """Decode, tokenize, store and commit the products that a shard lacks; the last value is its receipt."""
    shard_id, rows, clock = task.plan.shard_id, ShardRows(), _Clock()
    num_retries = retry_counts().total()
    with contextlib.closing(decode_ahead(task.plan.clips, worker.decoders)) as decoded:
        for clips, failures in batches(decoded, worker.batch_size):
            clock.lap("decode")
            rows.failures.extend(failures)
            rows.add_clips(clips)
            masks = segment(clips, task.products, worker)
            rows.add_masks(masks)
            failures += [one for made in masks.values() for one in made if isinstance(one, ClipFailure)]
            clock.lap("segment")
            rows.add_frames(*embed(clips, task.products, worker))
            clock.lap("embed")
            tokens = tokenize(FrameBatch.stack(clips), task.products, worker) if clips else {}
            rows.add_tokens(tokens)
            clock.lap("tokenize")
            num_before, num_retries = num_retries, retry_counts().total()
            yield ShardProgress(
                shard_id=shard_id,
                num_clips=len(clips),
                num_frames=sum(one.clip.num_valid for one in clips),
                num_tokens=sum(batch.num_tokens for batch in tokens.values()),
                failures=tuple(failures),
                timings_s=clock.take(),
                queue_bytes=decoded.waiting_bytes,
                num_retries=num_retries - num_before,
            )
    clock.lap("decode")
    yield commit_shard(task, worker, rows, clock.laps_s())


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


def segment(
    clips: Sequence[ClipFrames], products: Sequence[str], worker: Worker
) -> dict[str, list[SegmentedClip | ClipFailure]]:
    """The masks that making `products` takes, all from the same frames."""
    return {p: [maker.make(one) for one in clips] for p, maker in worker.mask_makers_for(products).items()}


def embed(
    clips: Sequence[ClipFrames], products: Sequence[str], worker: Worker
) -> tuple[list[FrameRows], dict[str, list[EmbeddedFrames]]]:
    """The candidate frames of each clip where `products` take them, and their embeddings by product."""
    maker, embedders = worker.frame_maker, worker.frame_embedders_for(products)
    described = [maker.describe(one) for one in clips] if maker and FRAMES in products else []
    if not maker or not embedders or not clips:
        return described, {}
    chosen = [maker.candidates(one) for one in clips]
    return described, {product: embedder.embed(clips, chosen) for product, embedder in embedders.items()}


def tokenize(batch: FrameBatch, products: Sequence[str], worker: Worker) -> dict[str, EncodedBatch]:
    """The tokens that making `products` takes, all from the same frames."""
    return {product: encoder.encode(batch) for product, encoder in worker.encoders_for(products).items()}


class _Clock:
    """Seconds spent by the worker on each step, waiting for decoded frames included."""

    def __init__(self) -> None:
        self._last_s = time.perf_counter()
        self._laps_s: dict[str, float] = {step: 0.0 for step in ("decode", "segment", "embed", "tokenize")}
        self._taken_s: dict[str, float] = {}

    def lap(self, step: str) -> None:
        now_s = time.perf_counter()
        self._laps_s[step] += now_s - self._last_s
        self._last_s = now_s

    def take(self) -> dict[str, float]:
        """The seconds since the last time."""
        before_s, self._taken_s = self._taken_s, dict(self._laps_s)
        return {step: seconds - before_s.get(step, 0.0) for step, seconds in self._laps_s.items()}

    def laps_s(self) -> dict[str, float]:
        return {step: round(seconds, 3) for step, seconds in self._laps_s.items()}
