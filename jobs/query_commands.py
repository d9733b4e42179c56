"""The commands of queries: tokenmill score, select and labels."""

from typing import Annotated, Literal

import typer

from .options import CachePath, Device, PinnedAs, RerankTop, RouterFile, RouterModel


def score(
    cache: CachePath,
    query: Annotated[list[str] | None, typer.Option(help="What frames are scored for, in words; repeatable.")] = None,
    queries: Annotated[
        str | None, typer.Option(metavar="FILE", help='JSON lines of queries: {"query": "..."} or "...".')
    ] = None,
    like: Annotated[
        str | None, typer.Option(metavar="CLIP[:FRAME]", help="Show what is most like this clip or frame instead.")
    ] = None,
    scorer: Annotated[
        str | None, typer.Option(metavar="NAME", help="Encoder; the cache's only one by default.")
    ] = None,
    top: Annotated[int, typer.Option(help="How many to show for each query.", min=1)] = 10,
    by: Annotated[Literal["frame", "clip"], typer.Option(help="Show frames, or clips by their best frame.")] = "frame",
    where: Annotated[str, typer.Option(metavar="SQL", help="Which clips: a condition on clips and videos.")] = "true",
    router: RouterFile = None,
    router_model: RouterModel = None,
    rerank: RerankTop = 100,
    device: Device = "cpu",
    snapshot: PinnedAs = None,
) -> None:
    """Score the frames of a cache for queries, without its videos, and show the best; scores are kept in relevance."""
    from .score import score_cache, search_alike

    if like and (query or queries or router):
        raise typer.BadParameter("frames are compared with frames: give it alone", param_hint="--like")
    if like:
        return search_alike(cache, like, scorer, where=where, top=top, by=by, snapshot=snapshot)
    if not query and not queries:
        raise typer.BadParameter("give --query TEXT, --queries FILE or --like CLIP[:FRAME]")
    score_cache(
        cache, query or [], queries, scorer, where=where, top=top, by=by, router=router, router_model=router_model,
        rerank_top=rerank, device=device, snapshot=snapshot,
    )  # fmt: skip


def select(
    cache: CachePath,
    query: Annotated[str, typer.Option(help="What the tokens are to show, in words.")],
    budget: Annotated[int, typer.Option(metavar="TOKENS", help="How many tokens there may be.", min=1)],
    product: Annotated[str | None, typer.Option(help="Which tokens; the cache's only ones by default.")] = None,
    scorer: Annotated[
        str | None, typer.Option(metavar="NAME", help="Encoder, or router; by default the only one.")
    ] = None,
    where: Annotated[str, typer.Option(metavar="SQL", help="Which clips: a condition on clips and videos.")] = "true",
    policy: Annotated[
        Literal["auto", "global", "fragment", "utility", "paper_global", "paper_fragment"],
        typer.Option(help="auto: fragment where some frames stand out, otherwise global."),
    ] = "auto",
    tiers: Annotated[str | None, typer.Option(metavar="N,N", help="Tokens a step can have; all by default.")] = None,
    floor: Annotated[int, typer.Option(help="The best step of each of so many parts comes first.", min=0)] = 0,
    fill: Annotated[bool, typer.Option("--fill", help="Fragment: give what is left to other steps.")] = False,
    check: Annotated[bool, typer.Option("--verify", help="Check digests, which reads whole row groups.")] = False,
    router: RouterFile = None,
    router_model: RouterModel = None,
    rerank: RerankTop = 100,
    device: Device = "cpu",
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="OUT.safetensors", help="Write the tokens and the plan.")
    ] = None,
    png: Annotated[
        str | None, typer.Option(metavar="OUT.png", help="Draw relevance, tokens and frames over time.")
    ] = None,
    max_rows: Annotated[int, typer.Option(help="Steps that the printed plan shows.", min=1)] = 40,
    snapshot: PinnedAs = None,
) -> None:
    """Read the tokens that a budget allows for a query, and no other bytes; print the plan."""
    from .selecting import print_selection, read_tiers

    settings = {"policy": policy, "tiers": read_tiers(tiers), "floor": floor, "fill": fill, "verify": check}
    print_selection(
        cache, query, budget, product, scorer=scorer, where=where, settings=settings, router=router,
        router_model=router_model, rerank_top=rerank, device=device, output=output, png=png, max_rows=max_rows,
        snapshot=snapshot,
    )  # fmt: skip


def labels(
    action: Annotated[
        Literal["import", "export", "make"], typer.Argument(metavar="ACTION", help="import, export or make.")
    ],
    cache: CachePath,
    file: Annotated[str | None, typer.Argument(metavar="FILE", help="JSON lines to read or to write.")] = None,
    source: Annotated[str | None, typer.Option(help="Who says so; the file's name by default.")] = None,
    kind: Annotated[
        Literal["frames", "policies"] | None,
        typer.Option(help="export: labels of frames or policies; both by default."),
    ] = None,
    judge: Annotated[str | None, typer.Option(metavar="URL", help="make: an OpenAI-compatible endpoint.")] = None,
    model: Annotated[str | None, typer.Option(help="make: the model that the endpoint shall run.")] = None,
    where: Annotated[str, typer.Option(metavar="SQL", help="make: which videos, a condition on clips.")] = "true",
    limit: Annotated[int | None, typer.Option(help="make: how many videos at most.", min=1)] = None,
) -> None:
    """Bring labels of frames and policies into a cache, write them out, or make them with a judge that sees frames.

    Exit code 3: some lines were left out.
    """
    from .labels import run_labels

    is_good = run_labels(
        action, cache, file, source=source, kind=kind, judge=judge, model=model, where=where, limit=limit
    )
    raise typer.Exit(0 if is_good else 3)
