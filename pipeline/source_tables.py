"""Sources that are tables: videos by URI, or videos in a binary column."""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at run time, where type checkers do not see them)

import hashlib
import json
import os
import posixpath
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import csv

from ..schemas.errors import SourceError, did_you_mean
from ..schemas.recipe import BytesSource, TableSource
from ..schemas.tables import SOURCE_SCHEMA
from .fetch import local_file, open_for_reading
from .places import URL, StoredFile, cell_uri_prefix, files_at, folder_of, read_errors, stored_file
from .table_json import json_lines, json_of_rows, json_without, values_of_json

TABLE_EXTENSIONS = ("csv", "tsv", "jsonl", "ndjson", "parquet")
NUMBERS = ("size_bytes", "num_frames", "fps", "width", "height")
SHA256 = "^[0-9a-fA-F]{64}$"
STAT_THREADS = 16
STAT_BATCH = 100
CSV_BLOCK_BYTES = 16 << 20


def list_table(source: TableSource) -> pa.Table:
    """The videos that the rows of a table name, in SOURCE_SCHEMA.

    A relative URI is relative to the folder of its table. A row without a digest gets the stamp of its file;
    a file that is not there does not end the listing, its stamp is ``missing``. Binary columns are left out.
    """
    return pa.concat_tables(_table_rows(file.uri, source) for file in files_at(source.path, TABLE_EXTENSIONS))


def list_bytes(source: BytesSource) -> pa.Table:
    """The videos in a binary column of Parquet files, in SOURCE_SCHEMA, without reading the videos."""
    videos = pa.concat_tables(_cell_rows(file, source) for file in files_at(source.path, ("parquet",)))
    if not videos.num_rows:
        raise SourceError(f"{source.path}: the Parquet files have no rows: name others, or fill them")
    return videos


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """A table that was read: the columns that tokenmill knows, the others as JSON, and all names it had."""

    known: pa.Table
    metadata: pa.ChunkedArray
    names: list[str]


def _table_rows(place: str, source: TableSource) -> pa.Table:
    known = (source.uri_column, source.caption_column, "sha256", *NUMBERS)
    rows = _read_table(place, tuple(dict.fromkeys(known)))
    _check_columns(rows.names, place, source.uri_column)
    written = _typed(rows.known, source.uri_column, pa.string(), place)
    blank = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(written), ""), True)
    _refuse(blank, written, place, source.uri_column, "the path or URL of a video")
    uris = _absolute(written, folder_of(place))
    columns = _described(rows, place, source.caption_column)
    if source.identity == "uri":
        columns["digest"] = pc.coalesce(columns["digest"], _uri_digests(uris))
    unknown = pc.is_null(columns["digest"]).combine_chunks()
    files = _stored_files(pc.filter(uris, unknown).to_pylist())
    stamps, sizes = (
        pc.replace_with_mask(pa.chunked_array([absent]), unknown, pa.array(values, absent.type))
        for absent, values in (
            # A digest that the source declares is as good a sign that nothing changed.
            (pc.fill_null(columns["digest"], "").combine_chunks(), [file.stamp for file in files]),
            (pa.nulls(len(uris), pa.int64()), [file.size_bytes for file in files]),
        )
    )
    columns["size_bytes"] = pc.coalesce(columns["size_bytes"], sizes)
    return _source_table({"uri": uris, "stamp": stamps, **columns})


def _cell_rows(file: StoredFile, source: BytesSource) -> pa.Table:
    with open_for_reading(file.uri) as stream, read_errors(file.uri):
        parquet = _open_parquet(stream, file.uri)
        schema, num_rows = parquet.schema_arrow, parquet.metadata.num_rows
        _check_columns(schema.names, file.uri, source.video_column)
        kind = schema.field(source.video_column).type
        if not _is_binary(kind):
            raise SourceError(
                f"{file.uri}: column {source.video_column!r} is {kind}, whole videos are binary:"
                f" name another video_column, or use kind: table for a column of paths"
            )
        rows = _split(parquet.read(columns=_readable(schema)), (source.caption_column, "sha256", *NUMBERS), file.uri)
    # Padded, so that the order of URIs is the order of rows, and neighbours are read from one row group.
    numbers = pc.utf8_lpad(pa.array(range(num_rows), pa.int64()).cast(pa.string()), len(str(num_rows)), "0")
    uris = pc.binary_join_element_wise(cell_uri_prefix(file.uri, source.video_column), numbers, "")
    columns = _described(rows, file.uri, source.caption_column)
    return _source_table({"uri": uris, "stamp": pa.repeat(file.stamp, num_rows), **columns})


def _source_table(columns: dict[str, Any]) -> pa.Table:
    return pa.table({name: columns[name] for name in SOURCE_SCHEMA.names}).cast(SOURCE_SCHEMA)


def _read_table(place: str, known: tuple[str, ...]) -> _Rows:
    """The table at `place`, without binary columns."""
    extension = os.path.splitext(place)[1].lower().lstrip(".")
    if extension not in TABLE_EXTENSIONS:
        raise SourceError(f"{place}: not a table: accepted are files ending in .{', .'.join(TABLE_EXTENSIONS)}")
    with local_file(place) as path, read_errors(place):
        if extension == "parquet":
            parquet = _open_parquet(path, place)
            rows = _split(parquet.read(columns=_readable(parquet.schema_arrow)), known, place)
        elif extension in ("jsonl", "ndjson"):
            rows = _read_json_lines(path, place, known)
        else:
            rows = _split(_read_csv(path, "\t" if extension == "tsv" else ",", known), known, place)
    if not len(rows.metadata):
        raise SourceError(f"{place}: the table has no rows: name another, or fill it")
    return rows


def _split(table: pa.Table, known: tuple[str, ...], place: str) -> _Rows:
    """The known columns of a table, and the others as JSON."""
    names = table.column_names
    _check_names(names, place)
    metadata = json_of_rows(table.drop_columns([name for name in names if name in known]), place)
    return _Rows(known=table.select([name for name in names if name in known]), metadata=metadata, names=names)


def _read_json_lines(path: str, place: str, known: tuple[str, ...]) -> _Rows:
    lines = json_lines(path, place)
    columns = {name: values_of_json(lines, name) for name in known}
    there = {name: column for name, column in columns.items() if column.null_count < len(lines)}
    names = list(json.loads(lines[0].as_py())) if len(lines) else []
    metadata = json_without(lines, known)
    return _Rows(known=pa.table(there), metadata=metadata, names=[*there, *(n for n in names if n not in columns)])


def _read_csv(path: str, delimiter: str, known: tuple[str, ...]) -> pa.Table:
    """A CSV table whose empty cells are null and whose columns are texts, or numbers where every cell is one.

    The reader's own guess looks at the first block alone, and fails where a later block differs.
    """
    read = csv.ReadOptions(block_size=CSV_BLOCK_BYTES)
    parse = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    with csv.open_csv(path, read_options=read, parse_options=parse) as stream:
        names = stream.schema.names
    convert = csv.ConvertOptions(
        column_types={name: pa.string() for name in names}, null_values=[""], strings_can_be_null=True
    )
    rows = csv.read_csv(path, read_options=read, parse_options=parse, convert_options=convert)
    columns = [c if name in known else _as_numbers(c) for name, c in zip(names, rows.columns, strict=True)]
    return pa.table(columns, names=names)


def _as_numbers(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column as numbers where every text is one, and none is written otherwise (``007``, ``1.10``: names)."""
    for kind in (pa.int64(), pa.float64()):
        try:
            numbers = texts.cast(kind)
        except pa.ArrowInvalid:
            continue
        if pc.all(pc.equal(numbers.cast(pa.string()), texts)).as_py():
            return numbers
    return texts


def _open_parquet(file: Any, place: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise SourceError(f"{place}: not a Parquet file, or truncated ({error}): write it again") from None


def _is_binary(kind: pa.DataType) -> bool:
    types = pa.types
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)


def _readable(schema: pa.Schema) -> list[str]:
    return [field.name for field in schema if not _is_binary(field.type)]


def _check_names(names: list[str], place: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SourceError(f"{place}: several columns are called {twice[0]!r}: rename all but one")


def _check_columns(names: list[str], place: str, needed: str) -> None:
    if needed not in names:
        raise SourceError(
            f"{place}: no column {needed!r}{did_you_mean(needed, names)}; found {', '.join(names)}:"
            f" name the column in the source's settings"
        )


def _described(rows: _Rows, place: str, caption_column: str) -> dict[str, Any]:
    """What the rows say themselves: the columns of SOURCE_SCHEMA from caption on."""
    digest = _typed(rows.known, "sha256", pa.string(), place)
    _refuse(pc.invert(pc.match_substring_regex(digest, SHA256)), digest, place, "sha256", "64 hex digits")
    columns: dict[str, Any] = {"digest": pc.ascii_lower(digest), "metadata": rows.metadata}
    for name in NUMBERS:
        numbers = _typed(rows.known, name, SOURCE_SCHEMA.field(name).type, place)
        may_be_zero = name in ("size_bytes", "num_frames")
        wrong = pc.less(numbers, 0) if may_be_zero else pc.less_equal(numbers, 0)
        _refuse(wrong, numbers, place, name, "0 or more" if may_be_zero else "more than 0")
        columns[name] = numbers
    columns["caption"] = _typed(rows.known, caption_column, pa.string(), place)
    return columns


def _typed(rows: pa.Table, name: str, kind: pa.DataType, place: str) -> pa.ChunkedArray:
    """Column `name` as `kind`, null where there is no such column; SourceError names the first wrong row."""
    if name not in rows.column_names:
        return pa.chunked_array([pa.nulls(rows.num_rows, kind)])
    column = rows[name]
    if pa.types.is_floating(column.type):  # what an absent number often becomes on its way through a data frame
        column = pc.if_else(pc.is_nan(column), None, column)
    try:
        return column.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        for number, value in enumerate(column, 1):
            try:
                value.cast(kind)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                shown = repr(value.as_py())[:60]
                raise SourceError(f"{place}: row {number}: {name} is {shown}, accepted is {kind}") from None
        raise


def _refuse(wrong: Any, column: pa.ChunkedArray, place: str, name: str, accepted: str) -> None:
    """SourceError for the first row that is marked in `wrong`."""
    row = pc.index(wrong, True).as_py()
    if row >= 0:
        shown = repr(column[row].as_py())[:60]
        raise SourceError(f"{place}: row {row + 1}: {name} is {shown}, accepted is {accepted}: correct the table")


def _absolute(written: pa.ChunkedArray, folder: str) -> pa.ChunkedArray:
    """URIs as absolute paths or URLs: relative ones begin in `folder`, and local ones have one spelling."""
    has_scheme = pc.match_substring_regex(written, f"^{URL.pattern}")
    is_relative = pc.invert(pc.or_(has_scheme, pc.starts_with(written, "/")))
    uris = pc.if_else(is_relative, pc.binary_join_element_wise(folder, written, "/"), written)
    is_file = pc.match_substring_regex(uris, r"^(file|local)://")
    uris = pc.replace_substring_regex(uris, r"^(file|local)://", "")
    may_change = pc.or_(pc.invert(has_scheme), is_file)
    untidy = pc.and_(may_change, pc.match_substring_regex(uris, r"[^:]//|^//|/\.\.?(/|$)"))
    if pc.any(untidy).as_py():
        tidy = pa.array(map(_tidy, pc.filter(uris, untidy).to_pylist()), pa.string())
        uris = pc.replace_with_mask(uris, untidy.combine_chunks(), tidy)
    return uris


def _tidy(uri: str) -> str:
    scheme, separator, path = uri.rpartition("://")
    return scheme + separator + posixpath.normpath(path).replace("//", "/", 1)


def _uri_digests(uris: pa.ChunkedArray) -> pa.ChunkedArray:
    """The digests of videos whose URIs never change their content."""
    return pa.chunked_array(
        [
            pa.array(["uri:" + hashlib.sha256(uri.encode()).hexdigest() for uri in chunk.to_pylist()], pa.string())
            for chunk in uris.chunks
        ],
        pa.string(),
    )


def _stored_files(uris: list[str]) -> list[StoredFile]:
    """What the stores say of every file, many asked at once."""
    batches = [uris[start : start + STAT_BATCH] for start in range(0, len(uris), STAT_BATCH)]
    with ThreadPoolExecutor(STAT_THREADS) as threads:
        return [file for batch in threads.map(_stored_batch, batches) for file in batch]


def _stored_batch(uris: list[str]) -> list[StoredFile]:
    return [stored_file(uri) for uri in uris]
