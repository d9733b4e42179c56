"""Manifests of a cache: what has been committed, and how to read very many of them.

Each manifest is a small file, the commit point of its shard. Packed files hold copies of many, with the stamps that
the store gave them; they are derived, and may be absent, damaged or out of date: that costs time, never a manifest.
"""

import io
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq

from ..schemas.digest import digest_of_stream
from ..schemas.errors import StorageError
from ..schemas.shard import SHORT_DIGEST, ShardManifest, manifest_name
from .storage import Folder, FoundFile, storage_errors

log = logging.getLogger(__name__)

MANIFESTS = "manifests"
PACKED = f"{MANIFESTS}/packed"
READ_THREADS = 32
PACKED_SCHEMA = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("modified_s", pa.float64(), nullable=False),
        pa.field("data", pa.large_binary(), nullable=False),
    ]
)


def committed_names(folder: Folder) -> frozenset[str]:
    """The names of all manifests of a cache, of every product and version."""
    return frozenset(filter(is_manifest, folder.list(MANIFESTS)))


def is_manifest(name: str) -> bool:
    """Whether `name`, listed below the manifests, is one: packed files are not."""
    return name.endswith(".json")


def missing_products(committed: frozenset[str], shard_id: str, fingerprints: Mapping[str, str]) -> tuple[str, ...]:
    """The products of a shard that no manifest names yet in the version of `fingerprints`."""
    return tuple(
        product
        for product, version in fingerprints.items()
        if manifest_name(shard_id, product, version) not in committed
    )


def read_manifests(folder: Folder, fingerprints: Mapping[str, str]) -> list[ShardManifest]:
    """All manifests of the given product versions, by product and shard."""
    return _read_listed(folder, lambda name: _is_version(name, fingerprints))


def read_all(folder: Folder) -> list[ShardManifest]:
    """All manifests of every product and version, by name."""
    return _read_listed(folder, is_manifest)


def read_named(folder: Folder, names: Sequence[str]) -> list[ShardManifest]:
    """The manifests called `names`, in their order; StorageError where one is absent."""
    held: dict[str, bytes] = {}
    if len(names) > READ_THREADS:  # fewer are read sooner than listed
        wanted = frozenset(names)
        found = folder.find(MANIFESTS)
        held = _held(folder, [file for file in found if file.name in wanted], _packs(found))
    return _parsed(folder, names, held)


def compact_manifests(folder: Folder, at_least: int = 1000) -> int:
    """Pack all manifests anew if `at_least` so many are not packed yet; returns how many of those it packed."""
    found = folder.find(MANIFESTS)
    manifests, packs = [file for file in found if is_manifest(file.name)], _packs(found)
    held = _held(folder, manifests, packs)
    num_new = len(manifests) - len(held)
    if num_new < max(at_least, 1):
        return 0
    held |= _singly(folder, [file.name for file in manifests if file.name not in held])
    with folder.staging() as staging:
        path = f"{staging}/packed.parquet"
        columns = {
            "name": [file.name for file in manifests],
            "size_bytes": [file.size_bytes for file in manifests],
            "modified_s": [file.modified_s for file in manifests],
            "data": [held[file.name] for file in manifests],
        }
        with storage_errors(staging):
            pq.write_table(pa.table(columns, schema=PACKED_SCHEMA), path, compression="zstd")
        packed = folder.publish(path, PACKED, len(manifests))
    for name in packs:
        if name != packed.name:
            folder.remove(name)
    return num_new


def _is_version(name: str, fingerprints: Mapping[str, str]) -> bool:
    product, _, file = name.removeprefix(f"{MANIFESTS}/").rpartition("/")
    version = file.removesuffix(".json").rpartition("-")[2]
    return product in fingerprints and fingerprints[product][:SHORT_DIGEST] == version


def _read_listed(folder: Folder, is_wanted: Callable[[str], bool]) -> list[ShardManifest]:
    found = folder.find(MANIFESTS)
    wanted = [file for file in found if is_wanted(file.name)]
    return _parsed(folder, [file.name for file in wanted], _held(folder, wanted, _packs(found)))


def _packs(found: Iterable[FoundFile]) -> list[str]:
    return [file.name for file in found if file.name.startswith(f"{PACKED}-") and file.name.endswith(".parquet")]


def _parsed(folder: Folder, names: Sequence[str], held: Mapping[str, bytes]) -> list[ShardManifest]:
    """The manifests called `names`; those that are not in `held` are read."""
    contents = {**held, **_singly(folder, [name for name in names if name not in held])}
    return [ShardManifest.from_json(contents[name], folder.uri(name)) for name in names]


def _singly(folder: Folder, names: Sequence[str]) -> dict[str, bytes]:
    with ThreadPoolExecutor(READ_THREADS) as pool:
        return dict(zip(names, pool.map(folder.read, names), strict=True))


def _held(folder: Folder, wanted: Sequence[FoundFile], packs: Iterable[str]) -> dict[str, bytes]:
    """The contents of those `wanted` that packed files hold with the same stamp.

    A manifest never changes, but one that was deleted may be made again under its name: its stamp is another then.
    """
    stamps = {file.name: (file.size_bytes, file.modified_s) for file in wanted}
    held: dict[str, bytes] = {}
    for pack in packs:
        try:
            data = folder.read(pack)
            if f"{PACKED}-{digest_of_stream(io.BytesIO(data))[0][:SHORT_DIGEST]}.parquet" != pack:
                raise ValueError("its content is not what its name says")
            columns = pq.read_table(pa.BufferReader(data), schema=PACKED_SCHEMA).to_pydict()
        except (StorageError, ValueError, pa.ArrowException) as error:
            log.warning("event=packed_manifests_ignored file=%s reason=%r", folder.uri(pack), str(error))
            continue
        rows = zip(columns["name"], columns["size_bytes"], columns["modified_s"], columns["data"], strict=True)
        held |= {name: content for name, size, modified_s, content in rows if stamps.get(name) == (size, modified_s)}
    return held
