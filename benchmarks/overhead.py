"""What it costs to pass a clip on: milliseconds per clip of 17x256x256 through each way that frames can take.

`python benchmarks/overhead.py [--shards 6] [--clips 60] [--rounds 3]`: the decoder fills frames with a grey and the
tokenizer takes a pixel of each block, so that what is left is the passing on. The first shard of every run is not
counted, since processes start in it. All ways in one run, in turns; medians.
"""

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch

from tokenmill.pipeline.decode import FakeDecoder
from tokenmill.pipeline.decoders import DirectDecoder, IsolatedDecoder
from tokenmill.pipeline.encode import BatchEncoder
from tokenmill.pipeline.executors import Executor, LocalExecutor
from tokenmill.pipeline.isolation import Serve
from tokenmill.pipeline.ray_executor import RayExecutor
from tokenmill.pipeline.storage import Folder
from tokenmill.pipeline.worker import Worker, fingerprints_of
from tokenmill.schemas.clip import Clip, ClipFailure, ClipFrames, Sampling, Video
from tokenmill.schemas.recipe import ExecutorSection
from tokenmill.schemas.shard import ShardPlan, ShardReceipt, ShardTask
from tokenmill.tokenizers.base import FakeTokenizer

SAMPLING = Sampling(fps=None, num_frames=17, height=256, width=256, resize="squash/bilinear", tail="pad")


def decode_nothing(clips: Sequence[Clip]) -> Iterator[ClipFrames | ClipFailure | None]:
    """Frames of one grey each."""
    yield None
    for i, clip in enumerate(clips):
        frames_THWC = np.full((17, 256, 256, 3), i % 256, np.uint8)
        yield ClipFrames(
            clip=clip, frames_THWC=frames_THWC, decoded_pts_s=clip.frame_pts_s, frame_numbers=(0,), decoder="nothing"
        )


def serve() -> Serve:
    return decode_nothing


class Direct(DirectDecoder):
    """The same in this process."""

    def __init__(self) -> None:
        super().__init__(FakeDecoder(SAMPLING))

    def decode(self, clips: Sequence[Clip]) -> Iterator[ClipFrames | ClipFailure]:
        return (result for result in decode_nothing(clips) if result is not None)


class Corners(FakeTokenizer):
    """One pixel of each block of the first 16 frames."""

    def grid_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        return super().grid_shape(num_frames - 1, height, width)

    def encode(self, frames_BTHWC: torch.Tensor) -> torch.Tensor:
        return frames_BTHWC[:, :16:4, ::8, ::8, 0].to(torch.int32)


def isolated() -> IsolatedDecoder:
    return IsolatedDecoder(serve, SAMPLING, 60, memory_mb=2048)


def make_worker(cache: str, *, direct: bool = False) -> Worker:
    torch.set_num_threads(1)
    encoders = {"tokens/fake": BatchEncoder(tokenizer=Corners(), batch_size=8, sampling=SAMPLING)}
    return Worker(
        folder=Folder(cache),
        decoders=(Direct() if direct else isolated(),),
        encoders=encoders,
        fingerprints=fingerprints_of(FakeDecoder(SAMPLING), encoders),
    )


def tasks(num_shards: int, num_clips: int, products: Sequence[str]) -> Iterator[ShardTask]:
    for shard in range(num_shards):
        video = Video(uri=f"video{shard}", size_bytes=-1, digest=f"uri:{shard}")
        clips = tuple(
            Clip(
                clip_id=f"{shard:016x}{i:016x}",
                video=video,
                start_s=i,
                end_s=i + 1,
                frame_pts_s=tuple(i + k / 17 for k in range(17)),
            )
            for i in range(num_clips)
        )
        yield ShardTask(plan=ShardPlan(shard_id=f"{shard:016x}", clips=clips), products=tuple(products))


def ms_per_clip(way: str, num_shards: int, num_clips: int) -> float:
    """Wall-clock milliseconds per clip once the first shard is done."""
    with tempfile.TemporaryDirectory() as folder:
        worker = make_worker(folder, direct=way == "local, decoder in its thread")
        executors: dict[str, Executor] = {
            "ray": RayExecutor(ExecutorSection()),
            "ray, decode actor": RayExecutor(ExecutorSection(), isolated, 1),
        }
        reports = executors.get(way, LocalExecutor(worker)).run(
            tasks(num_shards + 1, num_clips, list(worker.fingerprints)), partial(make_worker, folder), threading.Event()
        )
        first_s = last_s = 0.0
        for report in reports:
            if isinstance(report, ShardReceipt):
                last_s = time.perf_counter()
                first_s = first_s or last_s
        return (last_s - first_s) / (num_shards * num_clips) * 1e3


WAYS = ("local, decoder in its thread", "local", "ray", "ray, decode actor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=6)
    parser.add_argument("--clips", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    # Ray's workers and the decoders' processes import this file by its name.
    os.environ["PYTHONPATH"] = os.path.dirname(os.path.abspath(__file__))
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(options.rounds):
        for way in WAYS:
            found[way].append(ms_per_clip(way, options.shards, options.clips))
    medians = {way: statistics.median(values) for way, values in found.items()}
    print("| way | ms per clip (median) | more than local |\n|---|---|---|")
    for way, ms in medians.items():
        print(f"| {way} | {ms:.2f} | {ms - medians['local']:+.2f} |")


if __name__ == "__main__":
    import overhead  # as the other processes know it

    overhead.main()
