"""What makes the features that a router learns from: embeddings that a cache has, or early layers of a model."""

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import torch

from ..pipeline.cache import TokenCache
from ..pipeline.relevance import KnownEncoder, encoders_of
from ..schemas.errors import CacheError, DecodeError, RecipeError, TokenizerError, did_you_mean
from ..schemas.router_training import EarlyLayersSection, RouterTrainingRecipe
from ..tokenizers.early_layers import EarlyLayers
from ..tokenizers.load import check_device
from .display import Display
from .interruption import raise_if_interrupted
from .reconstruct import source_of

FRAMES_AT_ONCE = 1 << 16  # embeddings that are read at once: every time, those of the whole cache are gone through
PAIRS_AT_ONCE = 4096  # frames with their query that early layers see until they are kept
TEXTS_AT_ONCE = 1024  # that are embedded until they are kept

Part = Literal["relevance", "policy"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Labels:
    """Labels as numbers: what they are of is there once, in an order that the labels alone decide.

    `clips` has video_id and clip_id, `queries` query_id and text; `frames_M2` are numbers of clips, and places in
    these. `parts` are the labels of each head that there are any for, int32: of relevance (N,3) the numbers of frame
    and query, and 0 or 1; of the policy (N,2) the number of the query, and 1 for a fragment.
    """

    clips: pa.Table
    queries: pa.Table
    frames_M2: np.ndarray
    parts: Mapping[Part, np.ndarray]

    def digest(self) -> str:
        """SHA-256 (64 hex digits) of all of them."""
        sha256 = hashlib.sha256()
        for table in (self.clips, self.queries):
            for batch in table.combine_chunks().to_batches():
                sha256.update(batch.serialize())
        for values in (self.frames_M2, *self.parts.values()):
            sha256.update(f"{values.shape}".encode())
            sha256.update(np.ascontiguousarray(values).data)
        return sha256.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureRows:
    """Rows of features (M,D) to be made: `count` of them, `at_once` by every call of `make`, which is given a range.

    Those of frames that are gone are no numbers.
    """

    count: int
    at_once: int
    make: Callable[[int, int], np.ndarray]


class FeatureMaker(Protocol):
    """Makes the features of labels. `of` names the weights that it does it with.

    `rows` are what is made, by name; an example of `part` is put together of those that ``places[part]`` names, where
    the numbers (N,) of its rows are: `pair_features` of two, or the one itself.
    """

    of: str
    rows: Mapping[str, FeatureRows]
    places: Mapping[Part, Mapping[str, np.ndarray]]


def maker_version(recipe: RouterTrainingRecipe, cache: TokenCache) -> Any:
    """What features are made by, as plain values; RecipeError for an encoder that the cache does not have."""
    if recipe.early_layers:
        return recipe.early_layers.model_dump(mode="json", exclude={"device"})
    return [recipe.features, _encoder(recipe, cache).version]


def maker_of(recipe: RouterTrainingRecipe, cache: TokenCache, labels: Labels, display: Display) -> FeatureMaker:
    """What makes the recipe's features of these labels; RecipeError where it cannot."""
    try:
        if recipe.early_layers:
            return EarlyFeatures(recipe.early_layers, cache, labels, display)
        return PairFeatures(_encoder(recipe, cache), cache, labels)
    except (TokenizerError, RecipeError, CacheError) as error:
        raise RecipeError(f"{'early_layers' if recipe.early_layers else 'features'}: {error}") from None


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


class PairFeatures:
    """Embeddings of frames and of texts, each once: frames in float16, as the cache has them, texts in float32."""

    def __init__(self, known: KnownEncoder, cache: TokenCache, labels: Labels) -> None:
        self._known, self._cache, self._labels = known, cache, labels
        self._encoder = cache.encoder(known.name)
        self.of = known.spec["weights_sha256"] or known.spec["name"]
        names: dict[Part, Sequence[str]] = {"relevance": ("frames", "texts"), "policy": ("texts",)}
        self.places: Mapping[Part, Mapping[str, np.ndarray]] = {
            part: dict(zip(names[part], values_NK.T, strict=False)) for part, values_NK in labels.parts.items()
        }
        self.rows: Mapping[str, FeatureRows] = {
            "frames": FeatureRows(count=len(labels.frames_M2), at_once=FRAMES_AT_ONCE, make=self._of_frames),
            "texts": FeatureRows(count=labels.queries.num_rows, at_once=TEXTS_AT_ONCE, make=self._of_texts),
        }

    def _of_frames(self, first: int, end: int) -> np.ndarray:
        clip_N, frame_N = self._labels.frames_M2[first:end].T
        asked = pa.table(
            {
                "number": np.arange(end - first),
                "clip_id": self._labels.clips["clip_id"].take(pa.array(clip_N)),
                "frame": pa.array(frame_N),
            }
        )
        found = self._cache.answer(
            f"select number, embedding from asked join frames_{self._known.name} using (clip_id, frame)",
            [],
            asked=asked,
        )
        values_KD = _vectors(found)
        values_ND = np.full((end - first, values_KD.shape[1]), np.nan, np.float16)
        values_ND[found["number"].to_numpy()] = values_KD
        return values_ND

    def _of_texts(self, first: int, end: int) -> np.ndarray:
        """Those that the cache lacks are embedded one by one: what is kept must not depend on what came with it."""
        queries = self._labels.queries.slice(first, end - first)
        found = self._cache.answer(
            """select number, embedding from asked join query_embeddings using (query_id)
               where scorer = ? and version = ?""",
            [self._known.name, self._known.version],
            asked=queries.select(["query_id"]).append_column("number", pa.array(np.arange(end - first))),
        )
        known = dict(zip(found["number"].to_pylist(), _vectors(found), strict=True)) if found.num_rows else {}
        return np.stack(
            [
                known[number] if number in known else self._encoder.embed_texts([text])[0]
                for number, text in enumerate(queries["text"].to_pylist())
            ]
        )


def _vectors(found: pa.Table) -> np.ndarray:
    """float32 (K,D): the embeddings in the rows of an answer that has any."""
    return found["embedding"].combine_chunks().flatten().to_numpy().reshape(found.num_rows, -1)


class EarlyFeatures:
    """What early layers make of frames, decoded from their sources again, each with its query, and of queries."""

    def __init__(self, section: EarlyLayersSection, cache: TokenCache, labels: Labels, display: Display) -> None:
        check_device(section.device)
        self._layers = EarlyLayers(section.weights, section.layers, section.device, section.dtype)
        self._cache, self._labels, self._display, self.of = cache, labels, display, self._layers.sha256
        rows: dict[str, FeatureRows] = {}
        places: dict[Part, dict[str, np.ndarray]] = {}
        if "relevance" in labels.parts:
            pairs_N2 = labels.parts["relevance"][:, :2]  # the same ones follow each other: clip, query, frame
            is_new_N = np.concatenate(([True], (pairs_N2[1:] != pairs_N2[:-1]).any(1)))
            self._pairs_K2 = pairs_N2[is_new_N]
            places["relevance"] = {"pairs": is_new_N.cumsum() - 1}
            rows["pairs"] = FeatureRows(count=len(self._pairs_K2), at_once=PAIRS_AT_ONCE, make=self._of_pairs)
        if "policy" in labels.parts:
            self._queries_K, places_N = np.unique(labels.parts["policy"][:, 0], return_inverse=True)
            places["policy"] = {"texts": places_N}
            rows["texts"] = FeatureRows(count=len(self._queries_K), at_once=TEXTS_AT_ONCE, make=self._of_texts)
        self.rows: Mapping[str, FeatureRows] = rows
        self.places: Mapping[Part, Mapping[str, np.ndarray]] = places

    def _of_pairs(self, first: int, end: int) -> np.ndarray:
        parts: list[np.ndarray] = []
        for clip, of_clip in itertools.groupby(
            self._pairs_K2[first:end], lambda pair: self._labels.frames_M2[pair[0], 0]
        ):
            raise_if_interrupted()
            asked = list(of_clip)
            clip_id = self._labels.clips["clip_id"][int(clip)].as_py()
            try:
                frames_THWC = source_of(self._cache, clip_id)[1]
            except DecodeError as error:
                self._display.event("failed", clip=clip_id, frames=len(asked), reason=str(error))
                parts.append(np.full((len(asked), self._layers.dim), np.nan, np.float32))
                continue
            for query, of_query in itertools.groupby(asked, lambda pair: pair[1]):
                frames_NHWC = frames_THWC[[self._labels.frames_M2[pair[0], 1] for pair in of_query]]
                parts.append(_finite(self._layers.features(frames_NHWC, self._texts([query])[0])))
        return np.concatenate(parts)

    def _of_texts(self, first: int, end: int) -> np.ndarray:
        return _finite(self._layers.text_features(self._texts(self._queries_K[first:end])))

    def _texts(self, queries_N: Sequence[int] | np.ndarray) -> list[str]:
        return self._labels.queries["text"].take(pa.array(queries_N, pa.int64())).to_pylist()


def _finite(features_NF: torch.Tensor) -> np.ndarray:
    if not torch.isfinite(features_NF).all():
        raise RecipeError("early_layers: their features are not numbers: set dtype to float32, or check the weights")
    return features_NF.float().cpu().numpy()
