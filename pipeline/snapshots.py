"""The state of a cache: as it is now, or as a snapshot pinned it."""

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq

from ..schemas.cache_info import CacheInfo
from ..schemas.digest import digest_of
from ..schemas.errors import CacheError
from ..schemas.shard import ShardManifest
from ..schemas.snapshot import SNAPSHOTS, Snapshot, snapshot_name, snapshot_number
from .cache_head import read_info
from .manifests import read_manifests
from .plan_file import Plan, plans_of, read_plans
from .storage import Folder, storage_errors

PINNED_PREFIX = f"{SNAPSHOTS}/manifests"
PINNED_SCHEMA = pa.schema([pa.field("name", pa.string()), pa.field("data", pa.binary())])


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheState:
    """All that reading a cache depends on: products, plans, and the manifests of planned shards in current versions."""

    info: CacheInfo
    plans: Sequence[Plan]
    manifests: Sequence[ShardManifest]


def live_state(folder: Folder) -> CacheState:
    """What is committed now."""
    info = read_info(folder)
    # Manifests before plans: what is found committed was planned before.
    manifests = read_manifests(folder, info.fingerprints)
    plans = plans_of(folder)
    planned = {shard_id for plan in plans for shard_id, _ in plan.shards()}
    return CacheState(info=info, plans=plans, manifests=[m for m in manifests if m.shard_id in planned])


def state_at(folder: Folder, snapshot: Snapshot | None) -> CacheState:
    """What `snapshot` pins, or what is committed now."""
    if snapshot is None:
        return live_state(folder)
    plans = read_plans(folder, snapshot.plans)
    return CacheState(info=snapshot.info, plans=plans, manifests=pinned_manifests(folder, snapshot))


def pinned_manifests(folder: Folder, snapshot: Snapshot) -> list[ShardManifest]:
    """The manifests that a snapshot pins, by name; CacheError where their file is damaged."""
    try:
        with folder.open(snapshot.manifests) as stream:
            rows = pq.read_table(stream).to_pylist()
        return [ShardManifest.from_json(row["data"], row["name"]) for row in rows]
    except (pa.ArrowException, KeyError) as error:
        reason = " ".join(str(error).split())
        raise CacheError(
            f"{folder.uri(snapshot.manifests)}: damaged ({reason}): snapshot {snapshot.number} can no longer be read,"
            f" take a new one"
        ) from None


def take_snapshot(folder: Folder) -> tuple[Snapshot, bool]:
    """Pin what is committed now: the snapshot, and whether it is new rather than the newest one, of the same state."""
    while True:
        newest = max(snapshot_numbers(folder), default=0)
        state = live_state(folder)
        rows = [{"name": m.name, "data": m.to_json()} for m in sorted(state.manifests, key=lambda m: m.name)]
        plans = tuple(plan.record.name for plan in state.plans)
        contents = [hashlib.sha256(row["data"]).hexdigest() for row in rows]
        digest = digest_of([state.info.values(), plans, contents])
        with contextlib.suppress(CacheError):  # none yet, or damaged
            before = read_snapshot(folder, newest)
            if before.state == digest:
                return before, False
        snapshot = Snapshot(
            number=newest + 1,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            state=digest,
            info=state.info,
            plans=plans,
            manifests=_publish_manifests(folder, rows),
            num_manifests=len(rows),
        )
        if folder.create(snapshot.name, snapshot.to_json()):  # else another was first, perhaps with a later state
            return snapshot, True


def _publish_manifests(folder: Folder, rows: list[dict]) -> str:
    with folder.staging() as staging, storage_errors(staging):
        path = f"{staging}/manifests.parquet"
        pq.write_table(pa.Table.from_pylist(rows, schema=PINNED_SCHEMA), path, compression="zstd")
        return folder.publish(path, PINNED_PREFIX, len(rows)).name


def snapshot_numbers(folder: Folder) -> list[int]:
    """The numbers of all snapshots of a cache, rising."""
    return sorted(number for name in folder.list(SNAPSHOTS) if (number := snapshot_number(name)))


def read_snapshot(folder: Folder, number: int) -> Snapshot:
    """Snapshot `number`; CacheError names those that exist where there is none of that number."""
    numbers = snapshot_numbers(folder)
    if number not in numbers:
        there_are = f"there are {', '.join(map(str, numbers))}" if numbers else "it has none: tokenmill snapshot CACHE"
        raise CacheError(f"{folder.url}: no snapshot {number}; {there_are}")
    name = snapshot_name(number)
    return Snapshot.from_json(folder.read(name), folder.uri(name))
