"""tokenmill score: queries over the frames of a cache, and the frames or clips that match best."""

from collections.abc import Sequence
from typing import Literal

import pyarrow as pa

from ..pipeline.cache import TokenCache
from ..pipeline.rerank import rerank
from ..pipeline.scoring import encoder_name
from ..schemas.queries import query_id_of, read_queries
from .lines import read_lines
from .opening import open_cache
from .printing import new_table, output_console

ROUTER = "router"  # what relevance calls the scores of a trained router


def score_cache(
    cache: str,
    texts: Sequence[str],
    queries: str | None,
    scorer: str | None,
    *,
    where: str,
    top: int,
    by: Literal["frame", "clip"],
    router: str | None = None,
    router_model: str | None = None,
    rerank_top: int = 100,
    device: str = "cpu",
    snapshot: int | None = None,
) -> None:
    """Score all candidate frames for the texts and for those in the file `queries`, and print the best of each text.

    With `router`, the best `rerank_top` frames of each query are scored by it too, and printed in its order.
    """
    opened = open_cache(cache, snapshot)
    listed = read_queries(read_lines(queries), queries) if queries else []
    all_texts = list(dict.fromkeys(list(texts) + listed))
    name = encoder_name(opened, scorer, for_text=True)
    ids = opened.score(all_texts, name, where=where)
    print(
        f"{len(ids)} queries are scored by {name}: tokenmill sql {cache} \"from relevance where query_id = '{ids[0]}'\""
    )
    if router:
        from .rerankers import load_reranker

        reranker, frames_of = load_reranker(opened, router, router_model, device)
        num_added = rerank(opened, all_texts, reranker, frames_of, name=ROUTER, top=rerank_top, first=name, where=where)
        print(f"{num_added} frames are scored by the router")
    for text in texts:
        _print_best(
            text,
            _reranked(opened, text, top) if router else opened.search(text, k=top, by=by, scorer=name, where=where),
        )


def search_alike(
    cache: str,
    like: str,
    scorer: str | None,
    *,
    where: str,
    top: int,
    by: Literal["frame", "clip"],
    snapshot: int | None = None,
) -> None:
    """Print the frames, or clips, that are most like a clip or its frame ``CLIP:FRAME``."""
    found = open_cache(cache, snapshot).search(like=like, k=top, by=by, scorer=scorer, where=where)
    _print_best(f"like {like}", found)


def _reranked(cache: TokenCache, text: str, top: int) -> pa.Table:
    return cache.sql(
        f"""select r.video_id, v.uri, r.clip_id, r.frame, f.pts_s, r.raw, r.p
            from relevance r join frames f using (clip_id, frame) left join videos v on v.video_id = r.video_id
            where r.query_id = ? and r.scorer = '{ROUTER}' order by r.raw desc, clip_id, frame limit {top}""",
        [query_id_of(text)],
    )


def _print_best(title: str, found: pa.Table) -> None:
    numbers = ("frame", "time", "score")
    table = new_table("video", "clip", *numbers, numbers=numbers, title=title)
    for row in found.to_pylist():
        video = (row["uri"] or row["video_id"]).rpartition("/")[2]
        table.add_row(video, row["clip_id"], str(row["frame"]), f"{row['pts_s']:.2f} s", f"{row['raw']:.4f}")
    output_console().print(table)
