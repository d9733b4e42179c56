"""Re-ranking: the best frames by an encoder, scored again by what looks at frame and text together."""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from ..schemas.digest import digest_of
from ..schemas.tables import SCORE_SCHEMA
from .queries import add_queries
from .relevance import FrameScorer, plain_spec
from .score_table import add_scores, known_scores, register_scorer
from .scoring import best_frames, encoder_name, text_vectors

if TYPE_CHECKING:
    from .cache import TokenCache

FRAMES_AT_ONCE = 256  # that are scored before their scores are stored

FramesOf = Callable[[str, Sequence[int]], np.ndarray]  # what a scorer looks at, of these candidate frames of a clip


def rerank(
    cache: "TokenCache",
    texts: Sequence[str],
    scorer: FrameScorer,
    frames_of: FramesOf,
    *,
    name: str,
    top: int,
    first: str | None = None,
    where: str = "true",
) -> int:
    """Score the `top` frames that the encoder `first` finds for each text by `scorer` too; returns how many were new.

    Scores are added to `relevance` as those of the scorer `name`, a part of the frames at a time: a killed run goes on.
    """
    encoder = encoder_name(cache, first, for_text=True)
    version = version_of(scorer)
    register_scorer(cache.folder, name, version, scorer.spec, scorer.spec.calibration)
    vectors_ND, num_added = text_vectors(cache, encoder, texts), 0
    for text, query_id, vector_D in zip(texts, add_queries(cache.folder, texts), vectors_ND, strict=True):
        best = best_frames(cache, encoder, vector_D, top, "frame", where).to_pylist()
        known = known_scores(cache.folder, name, version, [query_id])
        new = [row for row in best if (query_id, row["clip_id"], row["frame"]) not in known]
        for start in range(0, len(new), FRAMES_AT_ONCE):
            part = sorted(new[start : start + FRAMES_AT_ONCE], key=lambda row: (row["clip_id"], row["frame"]))
            rows = []
            for clip_id, group in groupby(part, key=lambda row: row["clip_id"]):
                chosen = list(group)
                raw_N = scorer.score(frames_of(clip_id, [row["frame"] for row in chosen]), text)
                rows += [
                    {"query_id": query_id, "scorer": name, "version": version, "raw": float(raw)}
                    | {key: row[key] for key in ("video_id", "clip_id", "frame")}
                    for row, raw in zip(chosen, raw_N, strict=True)
                ]
            num_added += add_scores(cache.folder, name, version, pa.Table.from_pylist(rows, schema=SCORE_SCHEMA))
    cache.refresh()
    return num_added


def version_of(scorer: FrameScorer) -> str:
    """The version of a scorer that makes no product."""
    return digest_of(plain_spec(scorer.spec))
