"""tokenmill select: the tokens that a budget allows for a query, as a plan, a picture and a file."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors.torch import save

from ..pipeline.cache import TokenCache
from ..pipeline.render import write_png
from ..pipeline.scoring import scores_for
from ..pipeline.selection import Selection, SelectionSettings, select_tokens
from ..pipeline.storage import written_aside
from ..pipeline.timeline import draw_timeline
from ..schemas.errors import RecipeError, TokenmillError
from ..tokenizers.router import RouterFile
from .opening import open_cache
from .printing import new_table, output_console
from .reconstruct import choose_product, source_of
from .rerankers import RouterUse, decide_policy, policy_of, score_by_router
from .score import print_left_out

MOST_THUMBNAILS = 12
MOST_DRAWN = 12  # videos


def print_selection(
    cache: str,
    query: str,
    budget: int,
    product: str | None,
    *,
    scorer: str | None,
    where: str,
    settings: Mapping[str, Any],
    router: RouterUse | None = None,
    output: str | None = None,
    png: str | None = None,
    max_rows: int = 40,
    snapshot: int | None = None,
) -> None:
    """Print the plan of the tokens that `budget` allows; write the tokens to `output`, and their timeline to `png`.

    With `router`, its heads say which policy, and which frames matter of the best by the encoder `scorer`.
    """
    _check_outputs(output, png)
    opened, chosen = open_cache(cache, snapshot), dict(settings)
    if router:
        scorer, chosen = _routed(opened, query, (scorer, where), router, chosen)
    name = opened.product(product) if product else choose_product(opened, None)
    scored = scores_for(opened, query, scorer, where)
    selection = select_tokens(opened, name, scored, budget, SelectionSettings(**chosen))
    _print_plan(selection, budget, max_rows)
    if output:
        _write_tokens(selection, output)
    if png:
        title = f"{' '.join(query.split())}: {selection.policy}"
        _draw(opened, selection, scored, png, title=title, budget=budget)


def read_tiers(text: str | None) -> tuple[int, ...] | None:
    """Numbers of tokens from ``64,256``; RecipeError for anything else."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise RecipeError(
            f"--tiers: found {text!r}; accepted: numbers of tokens with commas between them, such as 64,256"
        )
    return tuple(int(part) for part in parts)


def _routed(
    cache: TokenCache, query: str, asked: tuple[str | None, str], router: RouterUse, settings: dict[str, Any]
) -> tuple[str | None, dict[str, Any]]:
    """The scorer and settings that the heads of a router leave of those `asked` for (the encoder, and where): each head
    does what it was trained for.
    """
    scorer, where = asked
    about = RouterFile.read(router.file).about
    if settings["policy"] == "auto" and about.policy_dim:
        settings = {**settings, "p_fragment": decide_policy(cache, router, query)}
    elif settings["policy"] == "auto":
        settings = {**settings, "policy": policy_of(cache, query, scorer, where)}
    if about.relevance_dim:
        scorer, reranked = score_by_router(cache, [query], router, first=scorer, where=where)
        print_left_out(reranked)
    return scorer, settings


def _print_plan(selection: Selection, budget: int, max_rows: int) -> None:
    console = output_console()
    numbers = ("step", "from", "to", "p", "tier", "tokens", "bytes")
    table = new_table("clip", *numbers, numbers=numbers)
    for row in selection.plan.slice(0, max_rows).to_pylist():
        size_bytes = sum(one["size"] for one in row["ranges"])
        times = (f"{row['start_s']:.2f} s", f"{row['end_s']:.2f} s")
        cells = (
            str(row["step"]),
            *times,
            f"{row['p']:.3f}",
            str(row["tier"]),
            f"{row['num_tokens']:,}",
            f"{size_bytes:,}",
        )
        table.add_row(row["clip_id"], *cells)
    console.print(table)
    rows = selection.plan.num_rows
    shown = f", the first {max_rows} shown" if rows > max_rows else ""
    console.print(
        f"{rows} steps{shown}; {selection.num_tokens:,} of {budget:,} tokens; {selection.bytes_read:,} bytes read"
    )
    console.print(f"policy {selection.policy}: {selection.reason}", markup=False)
    if selection.num_left_out:
        console.print(f"{selection.num_left_out} clips have no tokens of this product")


def _check_outputs(output: str | None, png: str | None) -> None:
    """RecipeError for names of files that say another format, before anything is read."""
    for option, path, suffix in (("--output", output, ".safetensors"), ("--png", png, ".png")):
        if path and not path.endswith(suffix):
            raise RecipeError(f"{option} {path}: it is written as {suffix}: give such a name")


def _write_tokens(selection: Selection, output: str) -> None:
    """Tokens as tensors ``0``, ``1``, ... in the plan's order, and the plan, in one .safetensors file."""
    tensors = {str(i): tokens.contiguous() for i, tokens in enumerate(selection.tokens)}
    data = save(tensors, metadata={"plan": json.dumps(selection.plan.to_pylist())})
    with written_aside(output) as aside, open(aside, "wb") as stream:
        stream.write(data)
    print(f"{output}: {len(tensors)} tensors in the order of the plan, which is in its metadata")


def _draw(cache: TokenCache, selection: Selection, scored: pa.Table, png: str, *, title: str, budget: int) -> None:
    clips = cache.answer(
        "select * from clips where clip_id in (select clip_id from scored) order by video_id, start_s",
        [],
        scored=scored,
    )
    plan, clips = _of_most_tokens(selection.plan, clips)
    thumbnails = _thumbnails(cache, plan, clips)
    picture = draw_timeline(plan, scored, clips, thumbnails, title, budget=budget)
    with written_aside(png) as aside:
        write_png(aside, picture)
    print(f"{png}: relevance, tokens of each step, and frames")


def _of_most_tokens(plan: pa.Table, clips: pa.Table) -> tuple[pa.Table, pa.Table]:
    """What is drawn of a plan and its clips: the videos with the most tokens."""
    tokens: dict[str, int] = dict.fromkeys(clips["video_id"].to_pylist(), 0)
    for row in plan.select(["video_id", "num_tokens"]).to_pylist():
        tokens[row["video_id"]] += row["num_tokens"]
    drawn = sorted(tokens, key=lambda video: -tokens[video])[:MOST_DRAWN]
    if len(drawn) < len(tokens):
        print(f"{len(drawn)} of {len(tokens)} videos are drawn, those with the most tokens")
    kept = [pa.array([video in drawn for video in table["video_id"].to_pylist()]) for table in (plan, clips)]
    return plan.filter(kept[0]), clips.filter(kept[1])


def _thumbnails(cache: TokenCache, plan: pa.Table, clips: pa.Table) -> dict[float, np.ndarray]:
    """Frames of the steps that matter most, by time; none where sources are gone, or of several videos."""
    if len(set(clips["video_id"].to_pylist())) != 1:
        return {}
    best = sorted(plan.to_pylist(), key=lambda row: (-row["p"], row["start_s"]))[:MOST_THUMBNAILS]
    pictures = {}
    for clip_id in dict.fromkeys(row["clip_id"] for row in best):
        try:
            clip, frames_THWC = source_of(cache, clip_id)
        except TokenmillError as error:
            print(f"no pictures of frames: {error}")
            return {}
        for row in (row for row in best if row["clip_id"] == clip_id):
            nearest = int(np.argmin(np.abs(np.array(clip.frame_pts_s) - row["start_s"])))
            pictures[row["start_s"]] = frames_THWC[nearest]
    return pictures
