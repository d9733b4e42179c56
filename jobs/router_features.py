"""Features of a router's training: made once of a cache's labels, kept in the output folder, mapped into memory.

They are made in chunks, each a file of its own until all are there: a run that was killed goes on with the next.
An embedding is there once, however many labels its frame or query has.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ..pipeline.cache import TokenCache
from ..pipeline.storage import Folder, storage_errors
from ..schemas.digest import digest_of
from ..schemas.errors import CacheError, RecipeError, did_you_mean
from ..schemas.router_training import RouterTrainingRecipe
from ..tokenizers.router import pair_features
from .display import Display
from .interruption import raise_if_interrupted
from .router_feature_makers import FeatureMaker, FeatureRows, Labels, Part, maker_of, maker_version
from .training_output import write_whole

FEATURES = "features"
ABOUT, CHUNKS = f"{FEATURES}/about.json", f"{FEATURES}/chunks"
IMPORT = "tokenmill labels import CACHE FILE.jsonl"
LEFT_OUT = {
    "relevance": f"labels of embedded frames for queries with a text are learned from: {IMPORT}",
    "policy": f"global and fragment for queries with a text are learned from: {IMPORT}",
}

Split = Literal["video", "query", "nothing"]

# Frames without an embedding, and queries without a text, are left out: nothing can be learned from them.
LABELS = """from labels l join {queries} q using (query_id) {embedded}
    where q.text is not null and (?::varchar is null or l.source = ?)"""
EMBEDDED = "semi join frames_{name} f on f.clip_id = l.clip_id and f.frame = l.frame"
POLICIES = """from policies p join {queries} q using (query_id)
    where q.text is not null and p.policy in ('global', 'fragment') and (?::varchar is null or p.source = ?)"""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Examples:
    """What a head learns from: `places_NK` are the rows of each example in K arrays (M,D), mapped, that its features
    are put together of; the targets (N,) are true and false.

    Those held out only measure; `split` says of what they are all or none.
    """

    arrays: Sequence[np.ndarray]
    places_NK: np.ndarray
    targets_N: np.ndarray
    is_held_out_N: np.ndarray
    split: Split

    @property
    def dim(self) -> int:
        """How many features an example has."""
        return self.features(np.zeros(1, np.int64)).shape[1]

    def numbers(self, *, held_out: bool) -> np.ndarray:
        """Which examples are held out, or which are learned from."""
        return np.flatnonzero(self.is_held_out_N == held_out)

    def features(self, numbers_N: np.ndarray) -> torch.Tensor:
        """float32 features (N,F) of these examples."""
        places_KN = self.places_NK[numbers_N].T
        first, *second = (torch.from_numpy(one[rows]) for one, rows in zip(self.arrays, places_KN, strict=True))
        return pair_features(first, second[0]) if second else first


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterExamples:
    """The examples of each head that has any, what their features are `of`, and a digest of all that decides them."""

    of: str
    digest: str
    parts: Mapping[Part, Examples]


def router_examples(
    recipe: RouterTrainingRecipe, cache: TokenCache, folder: Folder, display: Display, *, is_begun: bool
) -> RouterExamples:
    """The examples of the recipe's labels, whose features are made where the folder does not have them.

    Those of a training that has begun stay, whatever labels the cache has since. RecipeError where the cache has no
    labels, or not the encoder.
    """
    version = maker_version(recipe, cache)
    labels = _labels(recipe, cache)
    _check(recipe, cache, labels, display)
    identity = {"version": version, "held_out": recipe.training.held_out, "labels": labels.digest()}
    kept = _kept(folder)
    if not (kept and kept["is_done"] and (is_begun or kept["identity"] == identity)):
        kept = _make(labels, identity, maker_of(recipe, cache, labels, display), folder, display)
    elif kept["identity"] != identity:
        display.event(
            "labels_changed",
            reason="the cache has other labels or embeddings than this training has begun with, which stay",
            remedy="give output: another folder to learn from those that the cache has now",
        )
    for name in folder.list(CHUNKS):
        folder.remove(name)
    parts = {part: _read(folder, part, kept["rows"][part], split) for part, split in kept["split"].items()}
    return RouterExamples(of=kept["of"], digest=digest_of(kept), parts=parts)


def _labels(recipe: RouterTrainingRecipe, cache: TokenCache) -> Labels:
    """Those that can be learned from; of a clip together, so that it is decoded once, then of a query."""
    embedded = EMBEDDED.format(name=recipe.features) if recipe.features else ""
    of_frames, of_queries = [recipe.labels] * 2, [recipe.policies] * 2
    labels, policies = LABELS.format(queries="queries", embedded=embedded), POLICIES.format(queries="queries")
    clips = cache.sql(f"select distinct l.video_id, l.clip_id {labels} order by all", of_frames)
    queries = cache.sql(
        f"select query_id, text {labels} union select query_id, text {policies} order by all", of_frames + of_queries
    )
    numbered = {"asked_queries": _numbered(queries), "asked_clips": _numbered(clips)}
    of_clips = f"join asked_clips c on c.video_id = l.video_id and c.clip_id = l.clip_id {embedded}"
    found = cache.answer(
        f"""select c.number as clip, q.number as query, l.frame, (l.label > 0)::int as label
            {LABELS.format(queries="asked_queries", embedded=of_clips)} order by all""",
        of_frames,
        **numbered,
    )
    clip_N, query_N, frame_N, label_N = (column.to_numpy() for column in found.columns)
    keys_M, number_N = np.unique(clip_N.astype(np.int64) << 32 | frame_N, return_inverse=True)
    found = cache.answer(
        f"""select q.number as query, (p.policy = 'fragment')::int as label
            {POLICIES.format(queries="asked_queries")} order by all""",
        of_queries,
        **numbered,
    )
    parts: dict[Part, np.ndarray] = {
        "relevance": np.stack((number_N.astype(np.int32), query_N, label_N), axis=1),
        "policy": np.stack([column.to_numpy() for column in found.columns], axis=1),
    }
    return Labels(
        clips=clips,
        queries=queries,
        frames_M2=np.stack((keys_M >> 32, keys_M & 0xFFFFFFFF), axis=1).astype(np.int32),
        parts={part: values_NK for part, values_NK in parts.items() if len(values_NK)},
    )


def _numbered(rows: pa.Table) -> pa.Table:
    return rows.append_column("number", pa.array(np.arange(rows.num_rows, dtype=np.int32)))


def _check(recipe: RouterTrainingRecipe, cache: TokenCache, labels: Labels, display: Display) -> None:
    """Say which labels are left out; RecipeError where nothing is left, or where a source has none."""
    heads: tuple[tuple[Part, str, str | None], ...] = (
        ("relevance", "labels", recipe.labels),
        ("policy", "policies", recipe.policies),
    )
    for part, table, source in heads:
        counts = {
            one["source"]: one["n"]
            for one in cache.sql(f"select source, count(*) n from {table} group by 1").to_pylist()
        }
        if source is not None and source not in counts:
            accepted = ", ".join(sorted(counts)) or f"null: the cache has no {table}"
            raise RecipeError(f"{table}: found {source!r}{did_you_mean(source, list(counts))}; accepted: {accepted}")
        total = sum(counts.values()) if source is None else counts[source]
        used = len(labels.parts.get(part, ()))
        if not used or used < total:
            display.event("left_out", head=part, of=table, used=used, total=total, reason=LEFT_OUT[part])
    if not labels.parts:
        raise RecipeError(
            f"cache: {cache.folder.url} has neither labels of frames nor policies of queries that can be learned from:"
            f" add some: {IMPORT}"
        )


def held_out(groups: pa.ChunkedArray, share: float) -> np.ndarray:
    """Which of examples are held out (N,): `share` of their groups, at least one where there are more, by digest."""
    names = sorted(groups.unique().to_pylist(), key=lambda name: digest_of([name]))
    count = min(len(names) - 1, max(1, round(share * len(names)))) if share else 0
    chosen = pa.array(names[:count], pa.string())
    return pc.is_in(groups, value_set=chosen).to_numpy()  # pyright: ignore[reportAttributeAccessIssue]


def _held_out(labels: Labels, part: Part, share: float) -> tuple[np.ndarray, Split]:
    """Frames are held out by video, of one video alone by query; queries by query, since their head sees no video."""
    values_NK = labels.parts[part]
    if part == "relevance" and len(labels.clips["video_id"].unique()) > 1:
        return held_out(labels.clips["video_id"], share)[labels.frames_M2[values_NK[:, 0], 0]], "video"
    queries, number_N = np.unique(values_NK[:, -2], return_inverse=True)
    is_out_N = held_out(labels.queries["query_id"].take(pa.array(queries)), share)[number_N]
    return is_out_N, "query" if len(queries) > 1 else "nothing"


def _kept(folder: Folder) -> dict[str, Any] | None:
    """What the features that are there are of; None without any."""
    if not folder.exists(ABOUT):
        return None
    try:
        found = json.loads(folder.read(ABOUT))
        return {key: found[key] for key in ("identity", "of", "rows", "split", "is_done")}
    except (ValueError, KeyError, TypeError):
        return None


def _make(
    labels: Labels, identity: Mapping[str, Any], maker: FeatureMaker, folder: Folder, display: Display
) -> dict[str, Any]:
    """Make the features that are lacking; returns what is then kept of them."""
    sides = {part: _held_out(labels, part, identity["held_out"]) for part in labels.parts}
    about = {
        "identity": identity,
        "of": maker.of,
        "rows": {part: list(places) for part, places in maker.places.items()},
        "split": {part: split for part, (_, split) in sides.items()},
        "is_done": False,
    }
    if _kept(folder) != json.loads(json.dumps(about)):
        for name in folder.list(FEATURES):  # about.json first: what is left by a kill is of nothing
            folder.remove(name)
        folder.replace(ABOUT, _stored(about))
    is_there = _make_rows(maker.rows, folder, display)
    for part, places in maker.places.items():
        is_there_N = np.logical_and.reduce([is_there[name][rows_N] for name, rows_N in places.items()])
        if not is_there_N.any():
            raise CacheError(f"{folder.url}: none of the labelled frames can be read again, for the reasons above")
        places_NK = np.stack([rows_N.astype(np.int32) for rows_N in places.values()], axis=1)[is_there_N]
        about_N2 = np.stack((labels.parts[part][:, -1] > 0, sides[part][0]), axis=1)[is_there_N]
        for name, values in ((f"{part}_targets", about_N2), (part, places_NK)):
            write_whole(folder, _file(name), lambda path, values=values: np.save(path, values))
    folder.replace(ABOUT, _stored({**about, "is_done": True}))
    return _kept(folder) or {}


def _make_rows(made: Mapping[str, FeatureRows], folder: Folder, display: Display) -> dict[str, np.ndarray]:
    """Make what is lacking of every file of rows; returns which rows (M,) of each could be had."""
    total, done = sum(rows.count for rows in made.values()), 0
    is_there: dict[str, np.ndarray] = {}
    for name, rows in made.items():
        for first in range(0, rows.count, rows.at_once):
            raise_if_interrupted()
            display.progress("features", done, total, {})
            end = min(first + rows.at_once, rows.count)
            if not folder.exists(_chunk(name, first)):
                values_ND = rows.make(first, end)
                write_whole(folder, _chunk(name, first), lambda path, values_ND=values_ND: np.save(path, values_ND))
            done += end - first
        if rows.count:
            is_there[name] = _join(folder, name, rows)
    display.progress("features", total, total, {})
    return is_there


def _join(folder: Folder, name: str, rows: FeatureRows) -> np.ndarray:
    """Make one file of all chunks; returns which rows (M,) are numbers."""
    is_there: list[np.ndarray] = []

    def save(path: str) -> None:
        with open(path, "wb") as file:
            for first in range(0, rows.count, rows.at_once):
                chunk_ND = np.load(folder.path(_chunk(name, first)))
                if not first:
                    header = {"descr": chunk_ND.dtype.str, "fortran_order": False}
                    np.lib.format.write_array_header_1_0(file, {**header, "shape": (rows.count, chunk_ND.shape[1])})
                chunk_ND.tofile(file)
                is_there.append(~np.isnan(chunk_ND[:, 0]))

    write_whole(folder, _file(name), save)
    return np.concatenate(is_there)


def _chunk(name: str, first: int) -> str:
    return f"{CHUNKS}/{name}-{first:09d}.npy"


def _file(name: str) -> str:
    return f"{FEATURES}/{name}.npy"


def _stored(about: Mapping[str, Any]) -> bytes:
    return json.dumps(about, indent=1).encode() + b"\n"


def _read(folder: Folder, part: Part, names: Sequence[str], split: Split) -> Examples:
    """The examples of a part; CacheError where their files are damaged."""
    places_NK, about_N2, *arrays = (_mapped(folder, name) for name in (part, f"{part}_targets", *names))
    lengths = [len(one) for one in arrays]
    if (
        places_NK.shape != (len(about_N2), len(names))
        or about_N2.shape[1:] != (2,)
        or (places_NK.max(0, initial=-1) >= lengths).any()
    ):
        raise _damaged(folder, part, f"shapes {places_NK.shape} and {about_N2.shape}, of {names} {lengths}")
    return Examples(
        arrays=arrays,
        places_NK=places_NK,
        targets_N=about_N2[:, 0].copy(),
        is_held_out_N=about_N2[:, 1].copy(),
        split=split,
    )


def _mapped(folder: Folder, name: str) -> np.ndarray:
    try:
        with storage_errors(folder.uri(_file(name))):
            return np.load(folder.path(_file(name)), mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise _damaged(folder, name, str(error)) from None


def _damaged(folder: Folder, name: str, fault: str) -> CacheError:
    return CacheError(
        f"{folder.uri(_file(name))}: damaged ({fault}): remove {folder.uri(ABOUT)} and checkpoint.pt to begin anew"
    )
