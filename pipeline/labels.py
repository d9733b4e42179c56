"""Labels that come from elsewhere and go there: which frames a query needs, and which policy, as JSON lines.

``{"video": ..., "query": ..., "times_s": [...]}`` labels frames, ``{"query": ..., "policy": "fragment"}`` a query. A
video is named by its URI, the end of its path, or the first digits of its id; ``source`` says who labelled it.
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ..schemas.errors import RecipeError
from ..schemas.queries import query_id_of
from ..schemas.tables import LABEL_SCHEMA, POLICY_SCHEMA, QUERY_SCHEMA
from .appended import Keys, names_in, read_rows, read_table
from .label_places import CandidateFrames, LabelledCache, Videos, frames_of
from .queries import QUERIES, add_lacking_queries, known_queries
from .storage import Folder

LABELS, POLICIES = "relevance/labels", "relevance/policies"
ONCE = ["query_id", "source", "video_id"]  # what is labelled once
HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # which JSON can hold and files cannot
LARGEST = 1e15  # of numbers that are seconds or frames
ROWS_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What a file brought: how many queries its good lines name, rows were added, and lines were there already; and
    what is wrong with others.
    """

    num_queries: int
    num_labels: int
    num_known: int
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    """A line that names a query, and perhaps a video of the cache."""

    number: int
    query: str
    source: str
    video_id: str | None
    data: Mapping[str, Any]

    @property
    def key(self) -> dict[str, Any]:
        """The columns ONCE."""
        return {"query_id": query_id_of(self.query), "source": self.source, "video_id": self.video_id}


class _Problems:
    """What is wrong with the lines of the file called `name`."""

    def __init__(self, name: str) -> None:
        self.name, self.told = name, []

    def tell(self, number: int, problem: object) -> None:
        self.told.append(f"{self.name}, line {number}: {problem}")

    @contextlib.contextmanager
    def of(self, number: int) -> Iterator[None]:
        """A RecipeError inside is a problem of line `number`."""
        try:
            yield
        except RecipeError as error:
            self.tell(number, error)


def import_frame_labels(cache: LabelledCache, lines: Iterable[str], name: str, source: str) -> Imported:
    """Store labels of candidate frames from JSON lines of the file called `name`; as `source` where a line says none.

    The candidates nearest to ``times_s`` (seconds) or ``frame_numbers`` (of the video, from 0), and those in
    ``spans_s`` (half-open), have label 1, the others of the video 0. What a query, source and video have already stays.
    A time farther from all candidates than half of what is between them, and than 0.5 s, is a problem; a line of such
    times alone is left out.
    """
    problems = _Problems(name)
    read = _read_lines(cache, lines, source, problems, needs_video=True)
    frames = frames_of(cache, {line.video_id for line in read if line.video_id})

    def labelled(line: _Line) -> pa.Table | None:
        of_video = frames.get(line.video_id or "")
        if of_video is None:
            raise RecipeError("its video has no candidate frames in the cache: run a recipe with frames")
        label_K = _labels_of(line, of_video, lambda told: problems.tell(line.number, told))
        return None if label_K is None else _label_rows(line, of_video, label_K)

    return _import(known_labels(cache.folder), read, labelled, problems)


def import_policies(cache: LabelledCache, lines: Iterable[str], name: str, source: str) -> Imported:
    """Store which policy queries need, as JSON lines of the file called `name` say; as `import_frame_labels`.

    Without ``p_fragment`` it is 1 or 0, without ``video`` the policy is of all videos.
    """
    problems = _Problems(name)
    read = _read_lines(cache, lines, source, problems, needs_video=False)

    def labelled(line: _Line) -> pa.Table:
        policy = line.data.get("policy")
        if policy not in ("global", "fragment"):
            raise RecipeError(f"policy: found {policy!r}; accepted: global, fragment")
        p_fragment = line.data.get("p_fragment", float(policy == "fragment"))
        if not _is_number(p_fragment) or not 0 <= p_fragment <= 1:
            raise RecipeError(f"p_fragment: found {p_fragment!r}; accepted: a number from 0 to 1")
        return pa.Table.from_pylist([{**line.key, "policy": policy, "p_fragment": p_fragment}], POLICY_SCHEMA)

    return _import(known_policies(cache.folder), read, labelled, problems)


def export_frame_labels(cache: LabelledCache, source: str | None = None) -> Iterator[str]:
    """The labels of frames, of one source or all, as JSON lines that `import_frame_labels` makes the same labels of."""
    videos, texts = Videos(cache), _texts(cache)
    for name in names_in(cache.folder, LABELS):
        rows = _of_source(read_rows(cache.folder, name, LABEL_SCHEMA), source)
        needed: dict[tuple[str, ...], set[tuple[str, int]]] = {
            tuple(one[column] for column in ONCE): set()
            for one in rows.group_by(ONCE, use_threads=False).aggregate([]).to_pylist()
        }
        for row in rows.filter(pa.array(rows["label"].to_numpy() == 1)).to_pylist():
            needed[tuple(row[column] for column in ONCE)].add((row["clip_id"], row["frame"]))
        frames = frames_of(cache, {video_id for _, _, video_id in needed})
        for (query_id, labelled_by, video_id), places in needed.items():
            if query_id in texts and video_id in frames:
                line = {"video": videos.name_of(video_id), "query": texts[query_id], "source": labelled_by}
                yield _json({**line, "times_s": frames[video_id].times_of(places)})


def export_policies(cache: LabelledCache, source: str | None = None) -> Iterator[str]:
    """The policies of queries, of one source or all, as JSON lines that `import_policies` makes the same of."""
    videos, texts = Videos(cache), _texts(cache)
    for row in _of_source(read_table(cache.folder, POLICIES, POLICY_SCHEMA), source).to_pylist():
        if row["query_id"] in texts:
            video = {"video": videos.name_of(row["video_id"])} if row["video_id"] else {}
            line = {**video, "query": texts[row["query_id"]], "source": row["source"], "policy": row["policy"]}
            yield _json({**line, "p_fragment": float(str(np.float32(row["p_fragment"])))})


def add_policies(folder: Folder, rows: Sequence[Mapping[str, Any]]) -> int:
    """Add policies, rows as POLICY_SCHEMA has them, to the cache in `folder`; returns how many.

    What a query, source and video (None for all videos) have already stays.
    """
    return add_lacking_policies(known_policies(folder), rows)


def known_labels(folder: Folder) -> Keys:
    """What has labels of frames."""
    return Keys(folder, LABELS, LABEL_SCHEMA, ONCE)


def known_policies(folder: Folder) -> Keys:
    """What has policies."""
    return Keys(folder, POLICIES, POLICY_SCHEMA, ONCE)


def add_lacking_policies(known: Keys, rows: Sequence[Mapping[str, Any]]) -> int:
    """As `add_policies`, for who adds often: `known` reads no file of policies twice."""
    return len(add_lacking(known, [pa.Table.from_pylist([dict(row)], POLICY_SCHEMA) for row in rows]))


def add_lacking(known: Keys, tables: Sequence[pa.Table]) -> list[pa.Table]:
    """Add those of `tables`, each of one query, source and video, that are not `known`; returns them."""
    different = {tuple(table[column][0].as_py() for column in ONCE): table for table in reversed(tables)}
    new: list[pa.Table] = []

    def lacking() -> pa.Table | None:
        new[:] = [table for key, table in reversed(different.items()) if key not in known]
        return pa.concat_tables(new) if new else None

    known.append(lacking)
    return new


def _import(
    known: Keys, lines: Sequence[_Line], labelled: Callable[[_Line], pa.Table | None], problems: _Problems
) -> Imported:
    """Add what the lines say, many of them at once."""
    queries, named = known_queries(known.folder), set()
    num_labels, num_known, num_waiting = 0, 0, 0
    waiting: dict[int, tuple[_Line, pa.Table]] = {}

    def add_waiting() -> tuple[int, int]:
        named.update(add_lacking_queries(queries, [line.query for line, _ in waiting.values()]))
        added = add_lacking(known, [table for _, table in waiting.values()])
        return sum(table.num_rows for table in added), len(waiting) - len(added)

    for line in lines:
        with problems.of(line.number):
            if (table := labelled(line)) is not None:
                waiting[line.number] = line, table
                num_waiting += table.num_rows
        if line is lines[-1] or num_waiting >= ROWS_AT_ONCE:
            counts = add_waiting()
            num_labels, num_known, num_waiting = num_labels + counts[0], num_known + counts[1], 0
            waiting.clear()
    return Imported(num_queries=len(named), num_labels=num_labels, num_known=num_known, problems=tuple(problems.told))


def _read_lines(
    cache: LabelledCache, lines: Iterable[str], source: str, problems: _Problems, *, needs_video: bool
) -> list[_Line]:
    """The lines that name a query, and a video of the cache where they must; empty ones are skipped."""
    videos, read = Videos(cache), []
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        with problems.of(number):
            try:
                data = json.loads(text)
            except ValueError:
                data = None
            if not isinstance(data, dict):
                raise RecipeError(
                    f'found {text.strip()[:60]!r}; accepted: a JSON object such as {{"query": "some text"}}'
                )
            names = {
                "query": _text_of(data, "query"),
                "source": _text_of(data, "source") if "source" in data else source,
                "video_id": videos.find(_text_of(data, "video")) if needs_video or data.get("video") else None,
            }
            read.append(_Line(number=number, data=data, **names))
    return read


def _text_of(data: Mapping[str, Any], key: str) -> str:
    found = data.get(key)
    if not isinstance(found, str) or not found.strip() or HALF_CHARACTER.search(found):
        raise RecipeError(f"{key}: found {found!r}; accepted: a text")
    return found.strip()


def _labels_of(line: _Line, frames: CandidateFrames, tell: Callable[[str], None]) -> np.ndarray | None:
    """int8 labels (K,) of the different frames of a video; None where a line has times, and none is of a candidate."""
    times_s = _times_asked(line.data, frames)
    spans_s = _list_of(line.data, "spans_s", _is_span, "[from, to] in seconds")
    label_K = np.zeros(len(frames.pts_K), np.int8)
    for time_s in times_s:
        if (k := frames.nearest(time_s)) is None:
            tell(
                f"no candidate frame is near {time_s:g} s: they are from {frames.pts_K[0]:g} to {frames.pts_K[-1]:g} s"
            )
        else:
            label_K[k] = 1
    for begin_s, end_s in spans_s:
        inside_K = (frames.pts_K >= begin_s) & (frames.pts_K < end_s)
        if not inside_K.any():
            tell(f"no candidate frame is from {begin_s:g} to {end_s:g} s")
        label_K[inside_K] = 1
    return label_K if label_K.any() or not (times_s or spans_s) else None


def _times_asked(data: Mapping[str, Any], frames: CandidateFrames) -> list[float]:
    """The times of a line in seconds; RecipeError where it has none of the keys, or two that say the same."""
    given = [key for key in ("times_s", "frame_numbers") if key in data]
    if len(given) == 2 or not (given or "spans_s" in data):
        raise RecipeError(f"found the keys {', '.join(data)}; accepted: times_s or frame_numbers, spans_s, or both")
    numbers = _list_of(data, "frame_numbers", _is_frame_number, "frames from 0")
    return _list_of(data, "times_s", _is_number, "seconds") + [frames.time_of(number) for number in numbers]


def _list_of(data: Mapping[str, Any], key: str, is_one: Callable[[Any], bool], accepted: str) -> list[Any]:
    found = data.get(key, [])
    if not isinstance(found, list) or not all(is_one(value) for value in found):
        raise RecipeError(f"{key}: found {str(found)[:60]}; accepted: a list of {accepted}")
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST < value < LARGEST


def _is_frame_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST


def _is_span(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)) and value[0] < value[1]


def _label_rows(line: _Line, frames: CandidateFrames, label_K: np.ndarray) -> pa.Table:
    same = {column: pa.repeat(pa.scalar(value), len(frames.frame_N)) for column, value in line.key.items()}
    columns = {**same, "clip_id": frames.places["clip_id"], "frame": frames.places["frame"]}
    return pa.table({**columns, "label": label_K[frames.frame_N]}).select(LABEL_SCHEMA.names).cast(LABEL_SCHEMA)


def _of_source(rows: pa.Table, source: str | None) -> pa.Table:
    if source is None:
        return rows
    return rows.filter(pa.array([one == source for one in rows["source"].to_pylist()], pa.bool_()))


def _texts(cache: LabelledCache) -> dict[str, str]:
    """The queries by id."""
    rows = read_table(cache.folder, QUERIES, QUERY_SCHEMA).to_pylist()
    return {row["query_id"]: row["text"] for row in rows}


def _json(line: Mapping[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False)
