"""Scoring frames: texts and examples against the frames of a cache, in SQL, without their videos."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..schemas.errors import CacheError, did_you_mean
from ..schemas.queries import query_id_of
from ..schemas.shard import FRAMES
from ..schemas.tables import QUERY_EMBEDDING_SCHEMA
from .appended import append, names_in
from .relevance import calibrated, encoders_of, unit
from .relevance_views import RELEVANCE
from .storage import Folder
from .views import CLIPS_WITH_VIDEOS

if TYPE_CHECKING:
    from .cache import TokenCache

QUERY_EMBEDDINGS = f"{RELEVANCE}/query_embeddings"
TEXTS_AT_ONCE = 64  # that are embedded before they are kept


def encoder_name(cache: "TokenCache", name: str | None, *, for_text: bool) -> str:
    """The encoder of frames called `name`, or the only one that can; CacheError says which there are, and how to add
    one.
    """
    encoders = encoders_of(cache.info)
    known = {one: encoder.spec for one, encoder in encoders.items()}
    able = [one for one, spec in known.items() if spec["takes_texts"] or not for_text]
    if name is None:  # codes are asked where nothing else can answer, or by name
        able = [one for one in able if encoders[one].has_embeddings] or able
    if name is not None and name not in known:
        raise CacheError(
            f"{cache.folder.url}: no encoder {name!r}{did_you_mean(name, list(known))}: there are"
            f" {', '.join(known) or 'none'}"
        )
    if name is not None and name not in able:
        raise CacheError(
            f"{cache.folder.url}: encoder {name} ({known[name]['name']}) takes no texts:"
            f" {_how_to_add(able, for_text=True)}"
        )
    if name is None and not able:
        there = ", ".join(f"{one} ({spec['name']})" for one, spec in known.items())
        lacks = "no encoder of its frames takes texts" if for_text else "it has no embeddings of frames"
        raise CacheError(
            f"{cache.folder.url}: {lacks} (its encoders: {there or 'none'}): {_how_to_add([], for_text=for_text)}"
        )
    if name is None and len(able) > 1:
        raise CacheError(f"{cache.folder.url}: give one encoder of {', '.join(able)} (--scorer NAME, scorer=)")
    chosen = encoders[name or able[0]]
    done = cache.answer("select sum(num_clips) as n from shards where product = ?", [chosen.product])["n"][0].as_py()
    if not done:
        raise CacheError(
            f"{cache.folder.url}: no frame is embedded by the current version of {chosen.product} yet: run the recipe"
        )
    return chosen.name


def check_where(cache: "TokenCache", where: str) -> None:
    """CacheError for a condition on clips and videos that cannot be, or that holds for no clip."""
    if not cache.sql(f"select clip_id from {CLIPS_WITH_VIDEOS} where ({where}\n) limit 1").num_rows:
        raise CacheError(f"{cache.folder.url}: no clip where {where}: give another condition on clips and videos")


def _how_to_add(able: Sequence[str], *, for_text: bool) -> str:
    if able:
        return f"{', '.join(able)} can"
    weights = "hf://google/siglip-base-patch16-224"
    example = f"siglip: {{encoder: transformers, weights: {weights}}}" if for_text else "look: {encoder: look}"
    return (
        f"add one to the recipe, for instance frames: {{encoders: {{{example}}}}}, and run it again: that makes the new"
        f" embeddings alone"
    )


def text_vectors(cache: "TokenCache", name: str, texts: Sequence[str], *, store: bool = True) -> np.ndarray:
    """float32 embeddings (N,D) of texts by the encoder `name`; those that the cache has are not made again, and with
    `store` it has them afterwards.

    Texts are embedded one by one: an embedding that is kept must not depend on those beside it.
    """
    version = encoders_of(cache.info)[name].version
    by_id = {query_id_of(text): text for text in texts}
    known = _known_vectors(cache.folder, name, version, list(by_id))
    lacking = [i for i in by_id if i not in known]
    for start in range(0, len(lacking), TEXTS_AT_ONCE):
        made = {i: cache.encoder(name).embed_texts([by_id[i]])[0] for i in lacking[start : start + TEXTS_AT_ONCE]}
        known |= made
        if store:
            _keep_vectors(cache.folder, name, version, made)
    return np.stack([known[query_id_of(text)] for text in texts]) if texts else np.zeros((0, 1), np.float32)


def _keep_vectors(folder: Folder, name: str, version: str, made: Mapping[str, np.ndarray]) -> None:
    def lacking() -> pa.Table:
        there = _known_vectors(folder, name, version, list(made))
        rows = [{"query_id": i, "embedding": vector_D} for i, vector_D in made.items() if i not in there]
        return pa.Table.from_pylist(
            [{**row, "scorer": name, "version": version} for row in rows], schema=QUERY_EMBEDDING_SCHEMA
        )

    append(folder, QUERY_EMBEDDINGS, lacking)


def _known_vectors(folder: Folder, name: str, version: str, query_ids: Sequence[str]) -> dict[str, np.ndarray]:
    """Those of these queries' embeddings that are kept, by query."""
    found: dict[str, np.ndarray] = {}
    chosen = [("query_id", "in", list(query_ids)), ("scorer", "=", name), ("version", "=", version)]
    for file in names_in(folder, QUERY_EMBEDDINGS) if query_ids else []:
        with folder.open(file) as stream:
            rows = pq.read_table(stream, filters=chosen).cast(QUERY_EMBEDDING_SCHEMA)
        vectors = rows["embedding"].combine_chunks()
        for row, i in enumerate(rows["query_id"].to_pylist()):
            found[i] = vectors[row].values.to_numpy()
    return found


def example_vector(cache: "TokenCache", name: str, example: str) -> np.ndarray:
    """float32 embedding (D,) of what frames are to be like: a clip, by its id or the first digits of it, or its
    candidate frame ``<clip>:<frame>``; that of a clip is the mean of its frames.
    """
    prefix, _, frame = example.partition(":")
    clip_id = cache.clip_id(prefix)
    rows = cache.sql(f"select frame, embedding from frames_{name} where clip_id = ? order by frame", [clip_id])
    frames = rows["frame"].to_pylist()
    chosen = [i for i, one in enumerate(frames) if not frame or str(one) == frame]
    if not chosen:
        there = f"; accepted: {', '.join(map(str, frames))}" if frames else " in this cache"
        raise CacheError(f"{cache.folder.url}: clip {clip_id} has no candidate frame {frame or ''}{there}")
    vectors_ND = np.stack([np.array(rows["embedding"][i].as_py(), np.float32) for i in chosen])
    return unit(vectors_ND.mean(0, keepdims=True))[0]


def raw_scores(cache: "TokenCache", name: str, vector_D: np.ndarray, where: str = "true") -> pa.Table:
    """video_id, clip_id, frame, pts_s and raw of every candidate frame of the clips where a condition holds."""
    scored, parameters = _scored(cache, name, vector_D, where)
    return cache.answer(f"{scored} order by video_id, pts_s, clip_id", parameters, vector_D=vector_D)


def probabilities(cache: "TokenCache", name: str, vector_D: np.ndarray, where: str = "true") -> pa.Table:
    """As `raw_scores`, with p, calibrated over the whole videos that these clips are of."""
    whole = f"video_id in (select video_id from {CLIPS_WITH_VIDEOS} where ({where}\n))"
    rows = raw_scores(cache, name, vector_D, whole)
    videos_N = rows["video_id"].to_numpy(zero_copy_only=False)
    p_N = calibrated(rows["raw"].to_numpy(), videos_N, encoders_of(cache.info)[name].calibration)
    rows = rows.append_column("p", pa.array(p_N))
    if where == "true":
        return rows
    return cache.answer(
        f"from scored where clip_id in (select clip_id from {CLIPS_WITH_VIDEOS} where ({where}\n))", [], scored=rows
    )


def scores_for(cache: "TokenCache", query: str, scorer: str | None, where: str) -> pa.Table:
    """clip_id, frame and p of the candidate frames of the clips where a condition holds, by an encoder, or by another
    scorer as `relevance` has them: frames that it has not scored have p = 0. CacheError where it has scored none.
    """
    check_where(cache, where)
    encoders = encoders_of(cache.info)
    if scorer is None or scorer in encoders or FRAMES not in cache.info.products:
        name = encoder_name(cache, scorer, for_text=True)
        return probabilities(cache, name, text_vectors(cache, name, [query], store=False)[0], where)
    scored = "select clip_id, frame, p from relevance where query_id = ? and scorer = ?"
    found = cache.sql(
        f"""select clip_id, frame, coalesce(max(p), 0)::double as p, count(p) > 0 as is_scored
            from (select clip_id, frame, null as p from frames union all by name {scored})
            where clip_id in (select clip_id from {CLIPS_WITH_VIDEOS} where ({where}\n)) group by clip_id, frame""",
        [query_id_of(query), scorer],
    )
    if not any(found["is_scored"].to_pylist()):
        known = cache.sql("select distinct scorer from relevance where query_id = ?", [query_id_of(query)])
        there = ", ".join(known["scorer"].to_pylist()) or "none"
        raise CacheError(
            f"{cache.folder.url}: {scorer} has scored no frame of these clips for {query!r}: scorers that have:"
            f" {there}; encoders: {', '.join(encoders) or 'none'}: tokenmill score CACHE --query ... --router FILE"
        )
    return found


def best_frames(
    cache: "TokenCache", name: str, vector_D: np.ndarray, k: int, *, by: Literal["frame", "clip"], where: str = "true"
) -> pa.Table:
    """The `k` frames of the highest raw scores, or the best frame of each of the `k` best clips, the best first."""
    scored, parameters = _scored(cache, name, vector_D, where)
    if by == "clip":
        scored = f"""
            select any_value(video_id) as video_id, clip_id, arg_max(frame, raw) as frame,
                   arg_max(pts_s, raw) as pts_s, max(raw) as raw from ({scored}) group by clip_id"""
    return cache.answer(
        f"""select b.video_id, v.uri, b.clip_id, b.frame, b.pts_s, b.raw
            from (from ({scored}) order by raw desc, clip_id, frame limit {int(k)}) b
            left join videos v using (video_id) order by raw desc, clip_id, frame""",
        parameters,
        vector_D=vector_D,
    )


def _scored(cache: "TokenCache", name: str, vector_D: np.ndarray, where: str) -> tuple[str, list[Any]]:
    """A query for all candidate frames with their raw scores by a vector, and its parameters."""
    encoder = encoders_of(cache.info)[name]
    of = "" if where == "true" else f" where clip_id in (select clip_id from {CLIPS_WITH_VIDEOS} where ({where}\n))"
    if encoder.has_embeddings:
        return f"select video_id, clip_id, frame, pts_s, raw from scored_{name}{of}", []
    raw = f"array_inner_product(embedding, ?::FLOAT[{encoder.spec['dim']}])"
    return f"select video_id, clip_id, frame, pts_s, {raw} as raw from frames_{name}{of}", [vector_D.tolist()]
