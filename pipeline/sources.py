"""Sources: what a recipe's sources hold, as one table of videos in a fixed order."""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at run time, where type checkers do not see them)

import json
import logging
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ..schemas.errors import SourceError
from ..schemas.recipe import BytesSource, FilesSource, Source, TableSource, WebDatasetSource
from ..schemas.tables import SOURCE_SCHEMA
from .fetch import open_for_reading
from .places import StoredFile, TarMember, files_at, read_errors
from .source_tables import TABLE_EXTENSIONS, list_bytes, list_table

log = logging.getLogger(__name__)

COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
TAR_EXTENSIONS = ("tar", "tgz", "tar.gz", "tar.bz2", "tar.xz", "tar.zst")
TAR_THREADS = 16
HEADER_BLOCK_BYTES = 1 << 16


def list_sources(sources: Sequence[Source]) -> pa.Table:
    """The videos of all `sources` in SOURCE_SCHEMA, sorted by URI, each URI once.

    Where a URI is listed several times the first source's row stands, and within a source the first row.
    SourceError: a source is absent, cannot be read, or holds no video.
    """
    videos = pa.concat_tables(_list(source) for source in sources)
    order = _first_of_each(videos["uri"])
    if len(order) < videos.num_rows:
        log.info("event=listed_twice num_rows=%d num_videos=%d", videos.num_rows, len(order))
    columns = dict(zip(videos.column_names, videos.columns, strict=True))
    del videos  # so that each column goes as soon as its sorted copy is there
    return pa.table([columns.pop(name).take(order) for name in SOURCE_SCHEMA.names], schema=SOURCE_SCHEMA)


def _list(source: Source) -> pa.Table:
    match source:
        case FilesSource():
            return _list_files(source)
        case TableSource():
            return list_table(source)
        case BytesSource():
            return list_bytes(source)
        case WebDatasetSource():
            return _list_webdataset(source)


def _first_of_each(uris: pa.ChunkedArray) -> pa.Array:
    """The rows in the order of their URIs; of several with one URI the first."""
    keys = pa.table({"uri": uris, "row": pa.array(range(len(uris)), pa.int64())})
    order = pc.sort_indices(keys, sort_keys=[("uri", "ascending"), ("row", "ascending")])
    ordered = uris.take(order)
    is_first = pa.concat_arrays([pa.array([True]), *pc.not_equal(ordered[1:], ordered[:-1]).chunks])
    return order.filter(is_first)


def _list_files(source: FilesSource) -> pa.Table:
    files = files_at(source.path, source.extensions)
    for file in files:
        extension = file.uri.rpartition(".")[2].lower()
        if extension in (*TABLE_EXTENSIONS, "tar") and extension not in source.extensions:
            kind = "webdataset" if extension == "tar" else "table"
            raise SourceError(f"{file.uri}: not a video: to read what it lists write kind: {kind} beside the path")
    return _source_table(
        {
            "uri": [file.uri for file in files],
            "stamp": [file.stamp for file in files],
            "size_bytes": [file.size_bytes for file in files],
        }
    )


def _source_table(columns: dict[str, list[Any]]) -> pa.Table:
    """`columns` in SOURCE_SCHEMA, the others null."""
    num_rows = len(columns["uri"])
    return pa.table(
        [
            pa.array(columns[field.name], field.type) if field.name in columns else pa.nulls(num_rows, field.type)
            for field in SOURCE_SCHEMA
        ],
        schema=SOURCE_SCHEMA,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shard:
    """The videos of one tar, and the sidecars of their keys."""

    file: StoredFile
    videos: dict[str, TarMember]
    captions: dict[str, str]
    metadata: dict[str, dict[str, Any]]


def _list_webdataset(source: WebDatasetSource) -> pa.Table:
    """The videos of tar shards, with the JSON and the text of the same key.

    A key is a member's path up to the first dot of its name. Of two members with one name the last counts, as
    when a tar is unpacked.
    """
    extensions = tuple(extension.lstrip(".").lower() for extension in source.extensions)
    tars = files_at(source.path, TAR_EXTENSIONS)
    with ThreadPoolExecutor(TAR_THREADS) as threads:
        shards = list(threads.map(lambda tar: _read_shard(tar, extensions), tars))
    if not any(shard.videos for shard in shards):
        raise SourceError(
            f"{source.path}: {len(tars)} tars hold no member ending in .{', .'.join(extensions)}:"
            f" name other tars, or other extensions"
        )
    columns: dict[str, list[Any]] = {name: [] for name in ("uri", "stamp", "size_bytes", "caption", "metadata")}
    for shard in shards:
        for member in shard.videos.values():
            key = _key_and_suffix(member.name)[0]
            metadata = dict(shard.metadata.get(key, {}))
            caption = shard.captions.get(key)
            if caption is None and isinstance(metadata.get("caption"), str):
                caption = metadata.pop("caption")
            columns["uri"].append(member.uri)
            columns["stamp"].append(shard.file.stamp)
            columns["size_bytes"].append(member.size_bytes)
            columns["caption"].append(caption)
            columns["metadata"].append(json.dumps(metadata, ensure_ascii=False) if metadata else None)
    return _source_table(columns)


def _read_shard(file: StoredFile, extensions: tuple[str, ...]) -> _Shard:
    """What the headers of a tar say, and its sidecars; videos are not read."""
    shard = _Shard(file=file, videos={}, captions={}, metadata={})
    with open_for_reading(file.uri, block_size=HEADER_BLOCK_BYTES) as stream, read_errors(file.uri):
        _refuse_compressed(stream.read(8), file.uri)
        stream.seek(0)
        try:
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                for member in tar:
                    _note_member(shard, tar, member, extensions)
                stream.seek(tar.offset)
                # tarfile takes a damaged header after the first for the end, which two blocks of zeros mark.
                if stream.read(tarfile.BLOCKSIZE).strip(b"\0"):
                    raise tarfile.ReadError(f"no header at byte {tar.offset}")
        except tarfile.TarError as error:
            raise SourceError(f"{file.uri}: truncated, damaged or no tar ({error}): copy it again") from None
    return shard


def _refuse_compressed(start: bytes, place: str) -> None:
    for magic, name in COMPRESSIONS.items():
        if start.startswith(magic):
            raise SourceError(
                f"{place}: compressed with {name}; members of a tar are read in place, which needs a"
                f" plain .tar: decompress it"
            )


def _note_member(shard: _Shard, tar: tarfile.TarFile, member: tarfile.TarInfo, extensions: tuple[str, ...]) -> None:
    """Put a member where it belongs: a video, a sidecar, or neither."""
    key, suffix = _key_and_suffix(member.name)
    if not key or not member.isreg() or member.issparse():
        return
    if suffix.rpartition(".")[2] in extensions:
        shard.videos[member.name] = TarMember(
            file_uri=shard.file.uri, name=member.name, offset=member.offset_data, size_bytes=member.size
        )
    elif suffix in ("txt", "json"):
        stream = tar.extractfile(member)
        text = stream.read() if stream else b""
        try:
            if suffix == "txt":
                shard.captions[key] = text.decode().strip()
            else:
                shard.metadata[key] = _object(text)
        except ValueError as error:
            log.warning("event=sidecar_ignored tar=%s member=%s reason=%s", shard.file.uri, member.name, error)


def _object(text: bytes) -> dict[str, Any]:
    """The JSON object in `text` without its nulls and NaNs; ValueError where it holds something else."""
    value = json.loads(text, parse_constant=lambda _: None)
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object was expected, found {type(value).__name__}")
    return {name: item for name, item in value.items() if item is not None}


def _key_and_suffix(name: str) -> tuple[str, str]:
    """A member's key and its extensions in small letters; an empty key for hidden members and folders."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    return (folder + slash + stem, suffix.lower()) if stem and dot else ("", "")
