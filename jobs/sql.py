"""tokenmill sql: ask a cache."""

import sys
import tempfile
from collections.abc import Sequence

import duckdb
import pyarrow as pa
from rich.markup import escape

from ..pipeline.cache import open_cache
from ..pipeline.named_queries import named_query
from ..pipeline.storage import written_aside
from ..schemas.errors import RecipeError, TokenmillError
from .printing import new_table, output_console


def print_answer(
    cache: str,
    query: str | None,
    format: str,
    output: str | None,
    *,
    named: str | None = None,
    parameters: Sequence[str] = (),
    max_rows: int,
    snapshot: int | None = None,
) -> None:
    """Print the answer of one query as `format` (table, csv, json, parquet), or write it to the file `output`.

    The query is `query`, or the saved one called `named` with `parameters` (``key=value``).
    """
    if format == "parquet" and output is None and sys.stdout.isatty():
        raise TokenmillError("--format parquet writes bytes: give --output FILE, or redirect the output")
    opened = open_cache(cache, snapshot)
    answer = named_query(opened, named, **_parsed(parameters)) if named is not None else opened.sql(query or "")
    if format == "table" and output is None:
        _print_table(answer, max_rows)
        return
    data = _encoded(answer, "csv" if format == "table" else format)
    if output is None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    else:
        with written_aside(output) as aside, open(aside, "wb") as stream:
            stream.write(data)


def _parsed(parameters: Sequence[str]) -> dict[str, str]:
    for one in parameters:
        if not one.partition("=")[0] or "=" not in one:
            raise RecipeError(f"--param {one!r}: accepted is key=value, for instance limit=50")
    return {key: value for key, _, value in (one.partition("=") for one in parameters)}


def _encoded(answer: pa.Table, format: str) -> bytes:
    """The answer as CSV, JSON lines or Parquet; DuckDB writes nested values as each format can."""

    options = {
        "csv": "format csv, header",
        "json": "format json",
        "parquet": "format parquet, compression zstd",
    }
    with tempfile.NamedTemporaryFile(suffix=f".{format}") as file, duckdb.connect() as connection:
        connection.register("answer", answer)
        connection.execute(f"copy answer to '{file.name}' ({options[format]})")
        with open(file.name, "rb") as written:
            return written.read()


def _print_table(answer: pa.Table, max_rows: int) -> None:
    kinds = ("int", "uint", "float", "double", "decimal")
    numbers = tuple(field.name for field in answer.schema if str(field.type).startswith(kinds))
    table = new_table(*answer.schema.names, numbers=numbers)
    for row in zip(*(column.to_pylist() for column in answer.slice(0, max_rows).columns), strict=True):
        table.add_row(*(escape(_cell(value)) for value in row))
    console = output_console()
    console.print(table)
    shown = f", the first {max_rows} shown" if answer.num_rows > max_rows else ""
    console.print(f"{answer.num_rows} rows{shown}")


def _cell(value: object) -> str:
    if isinstance(value, list) and len(value) > 8:
        return f"[{', '.join(map(str, value[:8]))}, … {len(value)} in all]"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else str(value)
