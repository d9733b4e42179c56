"""tokenmill score: queries over the frames of a cache, and the frames or clips that match best."""

import textwrap
from collections.abc import Sequence
from typing import Literal

import pyarrow as pa
from rich.markup import escape

from ..pipeline.cache import TokenCache
from ..pipeline.rerank import Reranked
from ..pipeline.scoring import encoder_name
from ..pipeline.views import CLIPS_WITH_VIDEOS
from ..schemas.errors import StorageError
from ..schemas.queries import query_id_of, read_queries
from .lines import read_lines
from .opening import open_cache
from .printing import new_table, output_console
from .rerankers import RouterUse, load_reranker, score_by_router

MOST_TITLE = 100  # characters of a query that are shown


def score_cache(
    cache: str,
    texts: Sequence[str],
    queries: str | None,
    scorer: str | None,
    *,
    where: str,
    top: int,
    by: Literal["frame", "clip"],
    router: RouterUse | None = None,
    keep: bool = True,
    snapshot: int | None = None,
) -> bool:
    """Score all candidate frames for the texts and for those in the file `queries`, and print the best of each text;
    False where frames were left out.

    With `router`, the best frames of each query are scored by it too, and printed in its order. Without `keep` nothing
    is stored, and the texts alone are looked for.
    """
    opened = open_cache(cache, snapshot)
    listed = read_queries(read_lines(queries), queries) if queries else []
    all_texts = list(dict.fromkeys(list(texts) + listed))
    name, reranked, scored_by = encoder_name(opened, scorer, for_text=True), Reranked(num_added=0, left_out={}), ""
    if router:
        load_reranker(opened, router)  # a wrong one is told before anything is scored
    if keep:
        try:
            ids = opened.score(all_texts, name, where=where)
        except StorageError as error:
            raise StorageError(f"{error}; --no-keep looks for the best frames without keeping scores") from None
        print(f"{len(ids)} queries are scored by {name}: {cache} has them in relevance, queries, scorers")
    if router:
        scored_by, reranked = score_by_router(opened, all_texts, router, first=name, where=where)
        print(f"{reranked.num_added} frames are scored by {scored_by}")
        print_left_out(reranked)
    for text in texts:
        found = (
            _reranked(opened, text, scored_by, top, where)
            if router
            else opened.search(text, k=top, by=by, scorer=name, where=where)
        )
        _print_best(text, found)
    return not reranked.left_out


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


def print_left_out(reranked: Reranked) -> None:
    """Say why frames could not be looked at."""
    for reason, count in reranked.left_out.items():
        print(f"{count} frames are left out: {reason}")


def _reranked(cache: TokenCache, text: str, scorer: str, top: int, where: str) -> pa.Table:
    within = f"select clip_id from {CLIPS_WITH_VIDEOS} where ({where}\n)"
    return cache.sql(
        f"""select r.video_id, v.uri, r.clip_id, r.frame, c.frame_pts_s[r.frame + 1] as pts_s, r.raw
            from relevance r join clips c using (clip_id) left join videos v on v.video_id = r.video_id
            where r.query_id = ? and r.scorer = ? and r.clip_id in ({within})
            order by r.raw desc, clip_id, frame limit ?""",
        [query_id_of(text), scorer, top],
    )


def _print_best(title: str, found: pa.Table) -> None:
    numbers = ("frame", "time", "score")
    table = new_table("video", "clip", *numbers, numbers=numbers, title=escape(textwrap.shorten(title, MOST_TITLE)))
    for row in found.to_pylist():
        video = (row["uri"] or row["video_id"]).rpartition("/")[2]
        table.add_row(escape(video), row["clip_id"], str(row["frame"]), f"{row['pts_s']:.2f} s", f"{row['raw']:.4f}")
    output_console().print(table)
