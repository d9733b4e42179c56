"""Re-ranking: the best frames by an encoder, scored again by what looks at frame and text together."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ..schemas.digest import digest_of
from ..schemas.errors import CacheError
from ..schemas.tables import SCORE_SCHEMA
from .queries import add_queries
from .relevance import FrameScorer, encoders_of, plain_spec
from .score_table import add_scores, known_scores, register_scorer
from .scoring import best_frames, encoder_name, text_vectors

if TYPE_CHECKING:
    from .cache import TokenCache

FRAMES_AT_ONCE = 256  # that are scored before their scores are stored

Row = Mapping[str, Any]  # a frame: video_id, clip_id and frame
# What a scorer looks at, of these frames, a part of them at a time; or why there is nothing to look at.
FramesOf = Callable[[Sequence[Row]], Iterable[tuple[Sequence[Row], np.ndarray | str]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reranker:
    """A scorer, what `relevance` calls it, and how it is shown frames."""

    name: str
    scorer: FrameScorer
    frames_of: FramesOf

    @property
    def version(self) -> str:
        """All that decides its scores, apart from frames and texts."""
        return digest_of(plain_spec(self.scorer.spec))


@dataclass(frozen=True, slots=True, kw_only=True)
class Reranked:
    """How many scores were added, and why frames were left out, by reason."""

    num_added: int
    left_out: Mapping[str, int]


def rerank(
    cache: "TokenCache",
    texts: Sequence[str],
    reranker: Reranker,
    *,
    top: int,
    first: str | None = None,
    where: str = "true",
) -> Reranked:
    """Score the `top` frames that the encoder `first` finds for each text by `reranker` too.

    Scores are added to `relevance`, a part of the frames at a time: a killed run goes on. A video that cannot be read
    leaves its frames out. CacheError where an encoder has the scorer's name.
    """
    if reranker.name in encoders_of(cache.info):
        raise CacheError(f"{cache.folder.url}: an encoder is called {reranker.name}: call the scorer something else")
    encoder, version = encoder_name(cache, first, for_text=True), reranker.version
    register_scorer(cache.folder, reranker.name, version, reranker.scorer.spec, reranker.scorer.spec.calibration)
    vectors_ND, num_added, left_out = text_vectors(cache, encoder, texts), 0, {}
    for text, query_id, vector_D in zip(texts, add_queries(cache.folder, texts), vectors_ND, strict=True):
        best = best_frames(cache, encoder, vector_D, top, by="frame", where=where).to_pylist()
        known = known_scores(cache.folder, reranker.name, version, [query_id])
        new = [row for row in best if (query_id, row["clip_id"], row["frame"]) not in known]
        for start in range(0, len(new), FRAMES_AT_ONCE):
            rows = []
            for shown, seen in reranker.frames_of(new[start : start + FRAMES_AT_ONCE]):
                if isinstance(seen, str):
                    left_out[seen] = left_out.get(seen, 0) + len(shown)
                    continue
                said = {"query_id": query_id, "scorer": reranker.name, "version": version}
                for row, raw in zip(shown, reranker.scorer.score(seen, text), strict=True):
                    place = {key: row[key] for key in ("video_id", "clip_id", "frame")}
                    rows.append({**said, **place, "raw": float(raw)})
            scores = pa.Table.from_pylist(rows, schema=SCORE_SCHEMA)
            num_added += add_scores(cache.folder, reranker.name, version, scores) if rows else 0
    cache.refresh()
    return Reranked(num_added=num_added, left_out=left_out)
