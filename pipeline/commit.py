"""The commit of a shard: every product's file is published, then its manifest is created if it is absent."""

import socket
import time
from collections import Counter
from collections.abc import Mapping

from ..schemas.shard import ShardManifest, ShardReceipt, ShardTask
from .storage import storage_errors
from .store import ShardRows, write_product
from .worker import Worker


def commit_shard(task: ShardTask, worker: Worker, rows: ShardRows, timings_s: Mapping[str, float]) -> ShardReceipt:
    """Publish every product's file, then its manifest; a manifest that is there already wins."""
    shard_id = task.plan.shard_id
    start_s = time.perf_counter()
    manifests, num_lost = [], 0
    with worker.folder.staging() as staging:
        for product in task.products:
            version = worker.fingerprints[product]
            with storage_errors(staging):
                path = write_product(staging, product, rows, worker.encoders.get(product), version)
            files = (worker.folder.publish(path, f"{product}/{shard_id}", len(rows.clips)),) if path else ()
            manifest = ShardManifest(
                shard_id=shard_id,
                product=product,
                fingerprint=version,
                files=files,
                failures=tuple(sorted(rows.failures, key=lambda failure: failure.clip_id)),
                clips_per_video=dict(sorted(Counter(row["video_id"] for row in rows.clips).items())),
                host=socket.gethostname(),
                timings_s={**timings_s, "write": round(time.perf_counter() - start_s, 3)},
            )
            manifests.append(manifest)
            num_lost += not worker.folder.create(manifest.name, manifest.to_json())
    return ShardReceipt(shard_id=shard_id, manifests=tuple(manifests), num_lost_races=num_lost)
