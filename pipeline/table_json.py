"""JSON in tables: rows as JSON objects, and JSON lines as rows."""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at run time, where type checkers do not see them)

import json
from collections.abc import Iterable
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from ..schemas.errors import SourceError

READ_BYTES = 16 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
DUCKDB_CONFIG: dict[str, str | bool | int | float | list[str]] = {
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
}


def json_of_rows(rows: pa.Table, place: str) -> pa.ChunkedArray:
    """Every row of `rows` as a JSON object without its nulls, null where nothing is left.

    Dates and times become texts, times with a zone in UTC. Numbers that JSON lacks (NaN, infinity) count as
    nulls. SourceError: a column of a type that JSON cannot hold.
    """
    if not rows.num_columns:
        return pa.chunked_array([pa.nulls(rows.num_rows, pa.string())])
    records = pa.table({"record": rows.to_struct_array()})
    texts = _select("json_merge_patch('{}', to_json(record))", records, f"{place}: the columns {rows.column_names}")
    return _empty_as_null(_without_nan(texts))


def json_lines(path: str, place: str) -> pa.ChunkedArray:
    """The lines of a file of JSON objects, blank ones left out; SourceError names the first that is none."""
    chunks = []
    with open(path, "rb") as stream:
        while lines := stream.readlines(READ_BYTES):
            if not chunks:
                lines[0] = lines[0].removeprefix(BYTE_ORDER_MARK)
            chunks.append(pa.array([text for line in lines if (text := line.strip())], pa.binary()))
    lines = _without_nan(pa.chunked_array(chunks, pa.binary()).cast(pa.string()))
    is_object = _select("case when json_valid(record) then json_type(record) = 'OBJECT' else false end", lines, place)
    wrong = pc.index(is_object, False).as_py()
    if wrong >= 0:
        shown = repr(lines[wrong].as_py())[:60]
        raise SourceError(f"{place}: row {wrong + 1}: not a JSON object: {shown}: every line holds one object")
    return lines


def values_of_json(lines: pa.ChunkedArray, key: str) -> pa.ChunkedArray:
    """What every JSON object has under `key`, as text: null where it has nothing."""
    pointer = "/" + key.replace("~", "~0").replace("/", "~1")
    return _select(f"json_extract_string(record, {_quoted(pointer)})", lines, key)


def json_without(lines: pa.ChunkedArray, keys: Iterable[str]) -> pa.ChunkedArray:
    """Every JSON object without `keys` and without its nulls; null where nothing is left."""
    patch = _quoted(json.dumps(dict.fromkeys(keys)))
    return _empty_as_null(_select(f"json_merge_patch('{{}}', json_merge_patch(record, {patch}))", lines, "metadata"))


def _select(expression: str, records: pa.Table | pa.ChunkedArray, what: str) -> pa.ChunkedArray:
    """`expression` of every record, in order."""
    table = records if isinstance(records, pa.Table) else pa.table({"record": records})
    with duckdb.connect(config=DUCKDB_CONFIG) as connection:
        connection.execute("set TimeZone = 'UTC'")  # the same text on every machine
        try:
            connection.register("records", table)
            result = connection.sql(f"select {expression} as value from records").to_arrow_table()
        except duckdb.Error as error:
            reason = " ".join(str(error).split())
            raise SourceError(f"{what} cannot become JSON ({reason}): remove or convert them") from None
    value = result["value"]
    return value if pa.types.is_boolean(value.type) else value.cast(pa.string())


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _empty_as_null(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.if_else(pc.equal(texts, "{}"), pa.scalar(None, pa.string()), texts)


def _without_nan(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """JSON texts in which NaN and infinities, which writers emit but JSON does not have, became null."""
    suspect = pc.match_substring_regex(texts, r"\b(NaN|Infinity)\b")
    if not pc.any(suspect).as_py():
        return texts
    repaired = pa.array([_repaired(text) for text in pc.filter(texts, suspect).to_pylist()], pa.string())
    return pc.replace_with_mask(texts, suspect.combine_chunks(), repaired)


def _repaired(text: str) -> str:
    try:
        value: Any = json.loads(text, parse_constant=lambda _: None)
    except ValueError:
        return text  # the caller refuses it with its row
    if isinstance(value, dict):
        value = {key: item for key, item in value.items() if item is not None}
    return json.dumps(value, ensure_ascii=False)
