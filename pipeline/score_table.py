"""The scores of frames for queries that a cache keeps: each (query, frame, scorer, version) once, whoever is killed."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..schemas.errors import CacheError
from ..schemas.relevance import Calibration, ScorerSpec
from ..schemas.tables import SCORE_SCHEMA, SCORER_SCHEMA
from .appended import append, names_in, read_table
from .relevance import encoders_of
from .relevance_views import SCORERS, SCORES
from .storage import Folder
from .views import CLIPS_WITH_VIDEOS

if TYPE_CHECKING:
    from .cache import TokenCache

FILE_ROWS = 1 << 20  # scores that are made, held and written at a time, about
FEWEST_QUERIES, MOST_QUERIES = 64, 4096  # that are scored in one scan
KEY = ["query_id", "clip_id", "frame"]
KEY_SCHEMA = pa.schema([SCORE_SCHEMA.field(name) for name in KEY])
Span = tuple[str, str]  # clip ids from the first one on, before the second


def store_scores(cache: "TokenCache", name: str, vectors: Mapping[str, np.ndarray], where: str = "true") -> int:
    """Add the scores by the encoder `name` that `relevance` lacks, for queries with these `vectors`, of all candidate
    frames of the videos that clips are of where a condition holds; returns how many. What others have added meanwhile,
    or a killed process before, is not made again.
    """
    encoder = encoders_of(cache.info)[name]
    register_scorer(cache.folder, name, encoder.version, encoder.spec, encoder.calibration)
    num_frames = cache.sql(f"select coalesce(sum(1), 0)::bigint as n from frames_{name}")["n"][0].as_py()
    table, num_added = _ScoreTable(cache.folder, name, encoder.version), 0
    query_ids = sorted(vectors)  # then files of other parts need not be read
    at_once = min(MOST_QUERIES, max(FEWEST_QUERIES, FILE_ROWS // max(1, num_frames)))
    for start in range(0, len(query_ids), at_once):
        ids = query_ids[start : start + at_once]
        embedded = pa.array([vectors[one] for one in ids], pa.list_(pa.float32()))
        asked = pa.table({"query_id": ids, "embedding": embedded})
        for span in spans(-(-num_frames * len(ids) // FILE_ROWS)):

            def lacking(asked: pa.Table = asked, ids: Sequence[str] = ids, span: Span = span) -> pa.Table:
                scores = _scores(cache, name, where, span)
                return cache.answer(scores, [name, encoder.version, *span], asked=asked, known=table.known(ids, span))

            num_added += append(cache.folder, table.folder_name, lacking)
    return num_added


def add_scores(folder: Folder, name: str, version: str, rows: pa.Table) -> int:
    """Add those of the scores in `rows` (SCORE_SCHEMA) that are lacking; returns how many."""
    ids = sorted(set(rows["query_id"].to_pylist()))

    def lacking() -> pa.Table:
        known = known_scores(folder, name, version, ids)
        new = [row for row in rows.to_pylist() if tuple(row[key] for key in KEY) not in known]
        return pa.Table.from_pylist(new, schema=SCORE_SCHEMA)

    return append(folder, f"{SCORES}/{name}", lacking)


def known_scores(folder: Folder, name: str, version: str, query_ids: Sequence[str]) -> set[tuple[str, str, int]]:
    """Query, clip and frame of all scores by a version of a scorer for these queries."""
    known = _ScoreTable(folder, name, version).known(query_ids, ("", "~"))
    return {tuple(row[key] for key in KEY) for row in known.to_pylist()}


def spans(count: int) -> Iterator[Span]:
    """`count` parts of all clip ids (one at least), about equal: ids are digests, and files are in their order."""
    bounds = [f"{(i << 32) // max(1, count):08x}" for i in range(max(1, count))]
    yield from zip(bounds, [*bounds[1:], "~"], strict=True)


def _scores(cache: "TokenCache", name: str, where: str, span: Span) -> str:
    """A query for the rows of SCORE_SCHEMA that the table `known` lacks, for the queries in the table `asked`."""
    dim = encoders_of(cache.info)[name].spec["dim"]
    # Whole videos: p is of a frame among those of its video.
    of = "" if where == "true" else f"and f.video_id in (select video_id from {CLIPS_WITH_VIDEOS} where ({where}\n))"
    return f"""
        select q.query_id, ?::varchar as scorer, ?::varchar as version, f.video_id, f.clip_id, f.frame,
               array_inner_product(f.embedding, q.embedding::FLOAT[{dim}])::float as raw
        from frames_{name} f cross join asked q
        where f.clip_id >= ? and f.clip_id < ? {of}
          and not exists (select 1 from known k
                          where k.query_id = q.query_id and k.clip_id = f.clip_id and k.frame = f.frame)
        order by q.query_id, f.clip_id, f.frame"""


class _ScoreTable:
    """The files of one scorer's scores, and of which queries and clips each of them can be."""

    def __init__(self, folder: Folder, name: str, version: str) -> None:
        self.folder_name = f"{SCORES}/{name}"
        self._folder, self._version = folder, version
        self._bounds: dict[str, dict[str, tuple[str, str]]] = {}

    def known(self, query_ids: Sequence[str], span: Span) -> pa.Table:
        """The KEY of all scores of this version for these queries and clips, as the files are now."""
        parts = [KEY_SCHEMA.empty_table()]
        for name in names_in(self._folder, self.folder_name):
            bounds = self._bounds.get(name) or self._bounds.setdefault(name, self._read_bounds(name))
            low, high = bounds["clip_id"]
            if low >= span[1] or high < span[0]:
                continue
            if max(query_ids) < bounds["query_id"][0] or min(query_ids) > bounds["query_id"][1]:
                continue
            chosen = [("query_id", "in", list(query_ids)), ("version", "=", self._version)]
            chosen += [("clip_id", ">=", span[0]), ("clip_id", "<", span[1])]
            with self._folder.open(name) as stream:
                parts.append(pq.read_table(stream, columns=KEY, filters=chosen).cast(KEY_SCHEMA))
        return pa.concat_tables(parts)

    def _read_bounds(self, name: str) -> dict[str, tuple[str, str]]:
        try:
            with self._folder.open(name) as stream:
                metadata = pq.read_metadata(stream)
        except (pa.ArrowException, OSError) as error:
            raise CacheError(
                f"{self._folder.uri(name)}: damaged ({error}): delete it, and score again what it held"
            ) from None
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        found = {}
        for column, field in enumerate(SCORE_SCHEMA):
            if field.name in KEY[:2]:
                statistics = [group.column(column).statistics for group in groups]
                found[field.name] = (min(one.min for one in statistics), max(one.max for one in statistics))
        return found


def register_scorer(
    folder: Folder, name: str, version: str, spec: Mapping[str, Any] | ScorerSpec, calibration: Calibration
) -> None:
    """Say once what a version of a scorer is."""
    plain = asdict(spec) if isinstance(spec, ScorerSpec) else dict(spec)

    def lacking() -> pa.Table:
        there = read_table(folder, SCORERS, SCORER_SCHEMA, ["scorer", "version"]).to_pylist()
        rows = [{"scorer": name, "version": version, "rule": calibration.rule, "scale": calibration.scale}]
        rows = [{**row, "bias": calibration.bias, "spec": json.dumps(plain, sort_keys=True)} for row in rows]
        is_new = {"scorer": name, "version": version} not in there
        return pa.Table.from_pylist(rows if is_new else [], schema=SCORER_SCHEMA)

    append(folder, SCORERS, lacking)
