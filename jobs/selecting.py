"""tokenmill select: the tokens that a budget allows for a query, as a plan, a picture and a file."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from ..pipeline.cache import TokenCache
from ..pipeline.render import write_png
from ..pipeline.rerank import rerank
from ..pipeline.scoring import scores_for
from ..pipeline.selection import Selection, SelectionSettings, select_tokens
from ..pipeline.storage import written_aside
from ..pipeline.timeline import draw_timeline
from ..schemas.errors import RecipeError, TokenmillError
from .opening import open_cache
from .printing import new_table, output_console
from .reconstruct import choose_product, source_of
from .score import ROUTER

MOST_THUMBNAILS = 12


def print_selection(
    cache: str,
    query: str,
    budget: int,
    product: str | None,
    *,
    scorer: str | None,
    where: str,
    settings: Mapping[str, Any],
    router: str | None = None,
    router_model: str | None = None,
    rerank_top: int = 100,
    device: str = "cpu",
    output: str | None = None,
    png: str | None = None,
    max_rows: int = 40,
    snapshot: int | None = None,
) -> None:
    """Print the plan of the tokens that `budget` allows; write the tokens to `output`, and their timeline to `png`.

    With `router`, its heads say which policy, and which frames matter of the best `rerank_top` by the encoder `scorer`.
    """
    opened, chosen = open_cache(cache, snapshot), dict(settings)
    if router:
        scorer, chosen = _routed(opened, query, scorer, where, router, router_model, rerank_top, device, chosen)
    name = opened.product(product) if product else choose_product(opened, None)
    scored = scores_for(opened, query, scorer, where)
    selection = select_tokens(opened, name, scored, budget, SelectionSettings(**chosen))
    _print_plan(selection, budget, max_rows)
    if output:
        _write_tokens(selection, output)
    if png:
        _draw(opened, selection, scored, f"{query}: {selection.policy}", budget, png)


def read_tiers(text: str | None) -> tuple[int, ...] | None:
    """Numbers of tokens from ``64,256``; RecipeError for anything else."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise RecipeError(
            f"--tiers: found {text!r}; accepted: numbers of tokens with commas between them, such as 64,256"
        )
    return tuple(int(part) for part in parts)


def _routed(
    cache: TokenCache,
    query: str,
    scorer: str | None,
    where: str,
    router: str,
    model: str | None,
    top: int,
    device: str,
    settings: dict[str, Any],
) -> tuple[str | None, dict[str, Any]]:
    """The scorer and settings that the heads of a router leave: each does what it was trained for."""
    from ..tokenizers.router import RouterFile
    from .rerankers import decide_policy, load_reranker

    about = RouterFile.read(router).about
    if about.policy_dim and settings["policy"] == "auto":
        settings = {**settings, "p_fragment": decide_policy(cache, router, model, device, query)}
    if about.relevance_dim:
        reranker, frames_of = load_reranker(cache, router, model, device)
        rerank(cache, [query], reranker, frames_of, name=ROUTER, top=top, first=scorer, where=where)
        scorer = ROUTER
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


def _write_tokens(selection: Selection, output: str) -> None:
    """Tokens as tensors ``0``, ``1``, ... in the plan's order, and the plan, in one .safetensors file."""
    from safetensors.torch import save_file

    if not output.endswith(".safetensors"):
        raise TokenmillError(f"--output {output}: tokens are written as .safetensors: give such a name")
    tensors = {str(i): tokens.contiguous() for i, tokens in enumerate(selection.tokens)}
    plan = json.dumps(selection.plan.to_pylist())
    with written_aside(output) as aside:
        save_file(tensors, aside, metadata={"plan": plan})
    print(f"{output}: {len(tensors)} tensors in the order of the plan, which is in its metadata")


def _draw(cache: TokenCache, selection: Selection, scored: pa.Table, title: str, budget: int, png: str) -> None:
    clips = cache.answer(
        "select * from clips where clip_id in (select clip_id from scored) order by video_id, start_s",
        [],
        scored=scored,
    )
    thumbnails = _thumbnails(cache, selection, clips)
    picture = draw_timeline(selection.plan, scored, clips, thumbnails, title, budget=budget)
    with written_aside(png) as aside:
        write_png(aside, picture)
    print(f"{png}: relevance, tokens of each step, and frames")


def _thumbnails(cache: TokenCache, selection: Selection, clips: pa.Table) -> dict[float, np.ndarray]:
    """Frames of the steps that matter most, by time; none where sources are gone, or of several videos."""
    if len(set(clips["video_id"].to_pylist())) != 1:
        return {}
    best = sorted(selection.plan.to_pylist(), key=lambda row: (-row["p"], row["start_s"]))[:MOST_THUMBNAILS]
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
