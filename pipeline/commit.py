"""The commit of a shard: the files of a product are published, then its manifest is created if it is absent."""

import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ..schemas.shard import (
    CLIPS,
    EMBEDDINGS,
    FRAMES,
    MASKS,
    WEBDATASET,
    FileEntry,
    ShardManifest,
    ShardReceipt,
    ShardTask,
    holds_values,
)
from .row_groups import rest_digest
from .shard_tar import write_shard_tar
from .storage import Folder, storage_errors
from .store import (
    ShardRows,
    write_candidate_frames,
    write_clips,
    write_embeddings,
    write_frame_embeddings,
    write_masks,
    write_tokens,
)
from .webdataset_output import index_path
from .worker import Worker

log = logging.getLogger(__name__)


def commit_shard(task: ShardTask, worker: Worker, rows: ShardRows, timings_s: Mapping[str, float]) -> ShardReceipt:
    """Publish and commit what a shard has made, or leave the commit to the driver where the worker cannot.

    One product after the other: whoever dies on the way, or finds the disk full, loses the products that are not
    committed yet and leaves the files of one product at most.
    """
    manifests, num_lost = [], 0
    for manifest in publish_shard(task, worker, rows, timings_s):
        manifests.append(manifest)
        if worker.commits:
            num_lost += commit_manifests(worker.folder, [manifest])
    return ShardReceipt(
        shard_id=task.plan.shard_id,
        manifests=tuple(manifests),
        num_lost_races=num_lost,
        is_committed=worker.commits,
    )


def publish_shard(
    task: ShardTask, worker: Worker, rows: ShardRows, timings_s: Mapping[str, float]
) -> Iterator[ShardManifest]:
    """Publish the files of one product after the other; yields its manifest before it goes on to the next."""
    with worker.folder.staging() as staging:
        for product in task.products:
            start_s = time.perf_counter()
            prefix = f"{product}/{task.plan.shard_id}"
            with storage_errors(staging):
                is_any = bool(rows.sorted_clips(product))
                written = _write_product(staging, product, task, worker, rows) if is_any else {}
            files = tuple(publish_file(worker.folder, path, prefix, num_rows) for path, num_rows in written.items())
            yield ShardManifest(
                shard_id=task.plan.shard_id,
                product=product,
                fingerprint=worker.fingerprints[product],
                files=files,
                failures=rows.failures_of(product),
                clips_per_video=dict(sorted(Counter(row["video_id"] for row in rows.sorted_clips(product)).items())),
                host=socket.gethostname(),
                timings_s={**timings_s, "write": round(time.perf_counter() - start_s, 3)},
                batch_splits=rows.num_splits(product),
            )


def publish_file(folder: Folder, path: str, prefix: str, num_rows: int) -> FileEntry:
    """Publish a finished local file of a shard; `prefix` is ``<product>/<shard>``."""
    rest_sha256 = rest_digest(path) if holds_values(os.path.dirname(prefix)) else None
    return replace(folder.publish(path, prefix, num_rows), rest_sha256=rest_sha256)


def _write_product(staging: str, product: str, task: ShardTask, worker: Worker, rows: ShardRows) -> dict[str, int]:
    """The paths of a product's local files, with how many clips each counts for."""
    version = worker.fingerprints[product]
    if product == CLIPS:
        return {write_clips(staging, rows, version): len(rows.clips)}
    if product == WEBDATASET:
        path = write_shard_tar(staging, rows, task.texts, worker, version)
        return {path: len(rows.sorted_clips(product)), index_path(path): 0}
    if product == FRAMES:
        return {write_candidate_frames(staging, rows, version): len(rows.clips)}
    if worker.frame_maker and product in worker.frame_maker.embedders:
        embedder = worker.frame_maker.embedders[product]
        return {write_frame_embeddings(staging, rows, product, embedder, version): len(rows.clips)}
    if product.startswith(MASKS):
        path = write_masks(staging, rows, product, worker.mask_makers[product], version)
        return {path: len(rows.sorted_clips(product))}
    if product.startswith(EMBEDDINGS):
        return {write_embeddings(staging, rows, product, version): len(rows.clips)}
    return {write_tokens(staging, rows, product, worker.encoders[product], version): len(rows.clips)}


def commit_manifests(folder: Folder, manifests: Sequence[ShardManifest], *, guarded: bool = True) -> int:
    """Create every manifest that is absent; returns how many were there already, and stand.

    Without `guarded` only one process may commit: for stores that cannot create a file only if it is absent.
    """
    create = folder.create if guarded else folder.create_unguarded
    num_lost = 0
    for manifest in manifests:
        if not create(manifest.name, manifest.to_json()):
            num_lost += 1
            _remove_loser(folder, manifest)
    return num_lost


def _remove_loser(folder: Folder, manifest: ShardManifest) -> None:
    """Remove files that only the losing manifest names.

    No third manifest can name them: a file's name holds its shard, and its bytes the version of its product.
    """
    winner = ShardManifest.from_json(folder.read(manifest.name), folder.uri(manifest.name))
    kept = {file.name for file in winner.files}
    lost = [file.name for file in manifest.files if file.name not in kept]
    for name in lost:
        folder.remove(name)
    log.info(
        "event=lost_race shard=%s product=%s winner=%s removed=%d",
        manifest.shard_id, manifest.product, winner.host, len(lost),
    )  # fmt: skip
