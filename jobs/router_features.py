"""Features of a router's training: made once of a cache's labels, kept in the output folder, mapped into memory.

They are made in chunks, each a file of its own until all are there: a run that was killed goes on with the next.
"""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ..pipeline.cache import TokenCache
from ..pipeline.relevance import KnownEncoder, check_same_encoder, encoders_of
from ..pipeline.storage import Folder, storage_errors
from ..schemas.digest import digest_of
from ..schemas.errors import CacheError, DecodeError, RecipeError, TokenizerError, did_you_mean
from ..schemas.router_training import EarlyLayersSection, RouterTrainingRecipe
from ..tokenizers.early_layers import EarlyLayers
from ..tokenizers.load import check_device
from ..tokenizers.router import pair_features
from .display import Display
from .interruption import raise_if_interrupted
from .opening import load_encoder_of
from .reconstruct import source_of
from .training_output import write_whole

FEATURES = "features"
ABOUT, CHUNKS = f"{FEATURES}/about.json", f"{FEATURES}/chunks"
CHUNK = 4096  # examples in a file until all are there
TEXTS_AT_ONCE = 64
IMPORT = "tokenmill labels import CACHE FILE.jsonl"
LEFT_OUT = {
    "relevance": f"labels of embedded frames for queries with a text are learned from: {IMPORT}",
    "policy": f"global and fragment for queries with a text are learned from: {IMPORT}",
}

Part = Literal["relevance", "policy"]
Row = dict[str, Any]
Split = Literal["video", "query", "nothing"]

# Frames without an embedding, and queries without a text, are left out: nothing can be learned from them.
LABELS = """from labels l join queries q using (query_id) {embedded}
    where q.text is not null and (?::varchar is null or l.source = ?)"""
EMBEDDED = "semi join frames_{name} f on f.clip_id = l.clip_id and f.frame = l.frame"
POLICIES = """from policies p join queries q using (query_id)
    where q.text is not null and p.policy in ('global', 'fragment') and (?::varchar is null or p.source = ?)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """What a head learns from: float32 features (N,F), mapped, and the targets (N,) of 0 and 1.

    Those held out only measure; `split` says of what they are all or none.
    """

    features_NF: np.ndarray
    targets_N: np.ndarray
    is_held_out_N: np.ndarray
    split: Split

    def numbers(self, *, held_out: bool) -> np.ndarray:
        """Which examples are held out, or which are learned from."""
        return np.flatnonzero(self.is_held_out_N == held_out)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterExamples:
    """The examples of each head that has any, what their features are `of`, and a digest of all that decides them."""

    of: str
    digest: str
    parts: Mapping[Part, Examples]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """The labels of one head, one row for each row of features; those of one `group` are held out together."""

    rows: pa.Table
    group: str
    split: Split


class FeatureMaker(Protocol):
    """Makes what the heads take. `of` names the weights that it does it with."""

    of: str

    def of_frames(self, rows: Sequence[Row]) -> np.ndarray:
        """float32 (N,F) of frames (clip_id, frame) and queries (query_id, text); not a number where a frame is gone."""
        ...

    def of_texts(self, texts: Sequence[str]) -> np.ndarray:
        """float32 (N,F) of queries alone."""
        ...


def router_examples(
    recipe: RouterTrainingRecipe, cache: TokenCache, folder: Folder, display: Display, *, is_begun: bool
) -> RouterExamples:
    """The examples of the recipe's labels, whose features are made where the folder does not have them.

    Those of a training that has begun stay, whatever labels the cache has since. RecipeError where the cache has no
    labels, or not the encoder.
    """
    version = _version(recipe, cache)
    asked = _asked(recipe, cache, display)
    identity = {
        "version": version,
        "held_out": recipe.training.held_out,
        "labels": {part: digest_of(one.rows.drop_columns(["text"]).to_pydict()) for part, one in asked.items()},
    }
    kept = _kept(folder)
    if not (kept and kept["is_done"] and (is_begun or kept["identity"] == identity)):
        kept = _make(asked, identity, _maker(recipe, cache, display), folder, display)
    elif kept["identity"] != identity:
        display.event(
            "labels_changed",
            reason="the cache has other labels or embeddings than this training has begun with, which stay",
            remedy="give output: another folder to learn from those that the cache has now",
        )
    for name in folder.list(CHUNKS):
        folder.remove(name)
    parts = {part: _read(folder, part, split) for part, split in kept["split"].items()}
    return RouterExamples(of=kept["of"], digest=digest_of(kept), parts=parts)


def _version(recipe: RouterTrainingRecipe, cache: TokenCache) -> Any:
    """What features are made by, as plain values; RecipeError for an encoder that the cache does not have."""
    if recipe.early_layers:
        return recipe.early_layers.model_dump(mode="json", exclude={"device"})
    return [recipe.features, _encoder(recipe, cache).version]


def _encoder(recipe: RouterTrainingRecipe, cache: TokenCache) -> KnownEncoder:
    """The encoder of frames that the recipe names, which takes texts."""
    name, encoders = recipe.features or "", encoders_of(cache.info)
    known = [one for one, encoder in encoders.items() if encoder.spec["takes_texts"]]
    if name in known:
        return encoders[name]
    no_texts = ", which takes no texts," if name in encoders else ""
    raise RecipeError(
        f"features: found {name!r}{no_texts}{did_you_mean(name, known)}; accepted: encoders of frames and texts in"
        f" {cache.folder.url}: {', '.join(known) or 'there are none: add frames.encoders to the recipe of the cache'}"
    )


def _asked(recipe: RouterTrainingRecipe, cache: TokenCache, display: Display) -> dict[Part, _Asked]:
    """The labels of each head that there are any for; RecipeError where there are none."""
    found: dict[Part, _Asked] = {}
    heads: tuple[tuple[Part, str, str | None, pa.Table], ...] = (
        ("relevance", "labels", recipe.labels, _frame_labels(recipe, cache)),
        ("policy", "policies", recipe.policies, _query_policies(recipe, cache)),
    )
    for part, table, source, rows in heads:
        counts = {
            one["source"]: one["n"]
            for one in cache.sql(f"select source, count(*) n from {table} group by 1").to_pylist()
        }
        if source is not None and source not in counts:
            accepted = ", ".join(sorted(counts)) or f"null: the cache has no {table}"
            raise RecipeError(f"{table}: found {source!r}{did_you_mean(source, list(counts))}; accepted: {accepted}")
        if rows.num_rows:
            found[part] = _grouped(part, rows)
        total = sum(counts.values()) if source is None else counts[source]
        if not rows.num_rows or rows.num_rows < total:
            display.event("left_out", head=part, of=table, used=rows.num_rows, total=total, reason=LEFT_OUT[part])
    if not found:
        raise RecipeError(
            f"cache: {cache.folder.url} has neither labels of frames nor policies of queries that can be learned from:"
            f" add some: {IMPORT}"
        )
    return found


def _frame_labels(recipe: RouterTrainingRecipe, cache: TokenCache) -> pa.Table:
    """Those of a clip together, so that it is decoded once."""
    embedded = EMBEDDED.format(name=recipe.features) if recipe.features else ""
    return cache.sql(
        f"""select l.query_id, l.video_id, l.clip_id, l.frame, l.label, q.text {LABELS.format(embedded=embedded)}
            order by l.video_id, l.clip_id, l.query_id, l.frame, l.source""",
        [recipe.labels, recipe.labels],
    )


def _query_policies(recipe: RouterTrainingRecipe, cache: TokenCache) -> pa.Table:
    return cache.sql(
        f"""select p.query_id, (p.policy = 'fragment')::tinyint as label, q.text {POLICIES}
            order by p.query_id, p.source, p.video_id nulls first""",
        [recipe.policies, recipe.policies],
    )


def _grouped(part: Part, rows: pa.Table) -> _Asked:
    """Frames are held out by video, of one video alone by query; queries by query, since their head sees no video."""
    if part == "relevance" and len(rows["video_id"].unique()) > 1:
        return _Asked(rows=rows, group="video_id", split="video")
    return _Asked(rows=rows, group="query_id", split="query" if len(rows["query_id"].unique()) > 1 else "nothing")


def held_out(groups: pa.ChunkedArray, share: float) -> np.ndarray:
    """Which of examples are held out (N,): `share` of their groups, at least one where there are more, by digest."""
    names = sorted(groups.unique().to_pylist(), key=lambda name: digest_of([name]))
    count = min(len(names) - 1, max(1, round(share * len(names)))) if share else 0
    chosen = pa.array(names[:count], pa.string())
    return pc.is_in(groups, value_set=chosen).to_numpy()  # pyright: ignore[reportAttributeAccessIssue]


def _kept(folder: Folder) -> dict[str, Any] | None:
    """What the features that are there are of; None without any."""
    if not folder.exists(ABOUT):
        return None
    try:
        found = json.loads(folder.read(ABOUT))
        return {key: found[key] for key in ("identity", "of", "split", "is_done")}
    except (ValueError, KeyError, TypeError):
        return None


def _make(
    asked: Mapping[Part, _Asked], identity: Mapping[str, Any], maker: FeatureMaker, folder: Folder, display: Display
) -> dict[str, Any]:
    """Make the features that are lacking; returns what is then kept of them."""
    about = {
        "identity": identity,
        "of": maker.of,
        "split": {part: one.split for part, one in asked.items()},
        "is_done": False,
    }
    if _kept(folder) != json.loads(json.dumps(about)):
        for name in folder.list(FEATURES):  # about.json first: what is left by a kill is of nothing
            folder.remove(name)
        folder.replace(ABOUT, _stored(about))
    makes: dict[Part, Callable[[Sequence[Row]], np.ndarray]] = {
        "relevance": maker.of_frames,
        "policy": lambda rows: maker.of_texts([row["text"] for row in rows]),
    }
    total, done = sum(one.rows.num_rows for one in asked.values()), 0
    for part, one in asked.items():
        for first in range(0, one.rows.num_rows, CHUNK):
            raise_if_interrupted()
            display.progress("features", done, total, {})
            rows, name = one.rows.slice(first, CHUNK), _chunk(part, first)
            if not folder.exists(name):
                features_NF = makes[part](rows.to_pylist())
                write_whole(folder, name, lambda path, values_NF=features_NF: np.save(path, values_NF))
            done += rows.num_rows
        _join(folder, part, one, identity["held_out"])
    display.progress("features", total, total, {})
    folder.replace(ABOUT, _stored({**about, "is_done": True}))
    return _kept(folder) or {}


def _chunk(part: Part, first: int) -> str:
    return f"{CHUNKS}/{part}-{first:09d}.npy"


def _stored(about: Mapping[str, Any]) -> bytes:
    return json.dumps(about, indent=1).encode() + b"\n"


def _join(folder: Folder, part: Part, asked: _Asked, share: float) -> None:
    """Make one file of all chunks of a part, and one of targets; frames that could not be had are in neither."""
    firsts = range(0, asked.rows.num_rows, CHUNK)
    chunks = [np.load(folder.path(_chunk(part, first)), mmap_mode="r") for first in firsts]
    is_there_N = np.concatenate([~np.isnan(chunk[:, 0]) for chunk in chunks])
    if not is_there_N.any():
        raise CacheError(f"{folder.url}: none of the labelled frames can be read again, for the reasons above")
    is_held_out_N = held_out(asked.rows[asked.group], share)
    about_N2 = np.stack((asked.rows["label"].to_numpy() > 0, is_held_out_N), axis=1)

    def save(path: str) -> None:
        shape = (int(is_there_N.sum()), chunks[0].shape[1])
        joined = np.lib.format.open_memmap(path, "w+", np.float32, shape)
        end = 0
        for chunk in chunks:
            values_NF = chunk[~np.isnan(chunk[:, 0])]
            joined[end : end + len(values_NF)] = values_NF
            end += len(values_NF)
        joined.flush()

    write_whole(folder, f"{FEATURES}/{part}_targets.npy", lambda path: np.save(path, about_N2[is_there_N]))
    write_whole(folder, f"{FEATURES}/{part}.npy", save)


def _read(folder: Folder, part: Part, split: Split) -> Examples:
    """The examples of a part; CacheError where their files are damaged."""
    name = f"{FEATURES}/{part}.npy"
    try:
        with storage_errors(folder.uri(name)):
            features_NF = np.load(folder.path(name), mmap_mode="r")
            about_N2 = np.load(folder.path(f"{FEATURES}/{part}_targets.npy"))
        if features_NF.ndim != 2 or about_N2.shape != (len(features_NF), 2):
            raise ValueError(f"shapes {features_NF.shape} and {about_N2.shape}")
    except (ValueError, EOFError) as error:
        raise CacheError(
            f"{folder.uri(name)}: damaged ({error}): remove {folder.uri(ABOUT)} and checkpoint.pt to begin anew"
        ) from None
    return Examples(
        features_NF=features_NF,
        targets_N=about_N2[:, 0].astype(np.int64),
        is_held_out_N=about_N2[:, 1].astype(bool),
        split=split,
    )


def _maker(recipe: RouterTrainingRecipe, cache: TokenCache, display: Display) -> FeatureMaker:
    """What makes the recipe's features; RecipeError where it cannot."""
    try:
        if recipe.early_layers:
            return EarlyFeatures(recipe.early_layers, cache, display)
        return PairFeatures(_encoder(recipe, cache), cache)
    except (TokenizerError, RecipeError, CacheError) as error:
        raise RecipeError(f"{'early_layers' if recipe.early_layers else 'features'}: {error}") from None


class PairFeatures:
    """Pairs of embeddings, of frames as the cache has them and of texts by the encoder that made those."""

    def __init__(self, known: KnownEncoder, cache: TokenCache) -> None:
        self._name, self._cache = known.name, cache
        self._encoder = load_encoder_of(known)
        check_same_encoder(self._encoder, known, cache.folder.url)
        self.of = self._encoder.spec.weights_sha256 or self._encoder.spec.name

    def of_frames(self, rows: Sequence[Row]) -> np.ndarray:
        found = self._cache.sql(
            f"select clip_id, frame, embedding from frames_{self._name} where clip_id in (select unnest(?::varchar[]))",
            [sorted({row["clip_id"] for row in rows})],
        )
        places = {
            key: n for n, key in enumerate(zip(*(found[key].to_pylist() for key in ("clip_id", "frame")), strict=True))
        }
        values_KD = found["embedding"].combine_chunks().flatten().to_numpy().reshape(found.num_rows, -1)
        frames_ND = values_KD[[places[row["clip_id"], row["frame"]] for row in rows]]
        texts = list(dict.fromkeys(row["text"] for row in rows))
        number = {text: n for n, text in enumerate(texts)}
        texts_ND = self.of_texts(texts)[[number[row["text"]] for row in rows]]
        return pair_features(torch.from_numpy(frames_ND), torch.from_numpy(texts_ND)).numpy()

    def of_texts(self, texts: Sequence[str]) -> np.ndarray:
        firsts = range(0, len(texts), TEXTS_AT_ONCE)
        return np.concatenate([self._encoder.embed_texts(texts[first : first + TEXTS_AT_ONCE]) for first in firsts])


class EarlyFeatures:
    """What early layers make of frames, decoded from their sources again, and of queries."""

    def __init__(self, section: EarlyLayersSection, cache: TokenCache, display: Display) -> None:
        check_device(section.device)
        self._layers = EarlyLayers(section.weights, section.layers, section.device, section.dtype)
        self._cache, self._display, self.of = cache, display, self._layers.sha256

    def of_frames(self, rows: Sequence[Row]) -> np.ndarray:
        parts: list[np.ndarray] = []
        for clip_id, of_clip in itertools.groupby(rows, lambda row: row["clip_id"]):
            raise_if_interrupted()
            asked = list(of_clip)
            try:
                frames_THWC = source_of(self._cache, clip_id)[1]
            except DecodeError as error:
                self._display.event("failed", clip=clip_id, frames=len(asked), reason=str(error))
                parts.append(np.full((len(asked), self._layers.dim), np.nan, np.float32))
                continue
            for text, of_query in itertools.groupby(asked, lambda row: row["text"]):
                frames_NHWC = frames_THWC[[row["frame"] for row in of_query]]
                parts.append(_finite(self._layers.features(frames_NHWC, text)))
        return np.concatenate(parts)

    def of_texts(self, texts: Sequence[str]) -> np.ndarray:
        return _finite(self._layers.text_features(texts))


def _finite(features_NF: torch.Tensor) -> np.ndarray:
    if not torch.isfinite(features_NF).all():
        raise RecipeError("early_layers: their features are not numbers: set dtype to float32, or check the weights")
    return features_NF.float().cpu().numpy()
