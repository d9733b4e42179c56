"""The commands of queries: tokenmill score, select and labels."""

from typing import Annotated, Any, Literal

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
    keep: Annotated[bool, typer.Option(help="Keep the scores of all frames in the cache, for SQL.")] = True,
    snapshot: PinnedAs = None,
) -> None:
    """Score the frames of a cache for queries, without its videos, and show the best; scores are kept in relevance.

    Exit code 3: frames were left out, since a router could not be shown them.
    """
    from .score import score_cache, search_alike

    if like and (query or queries or router):
        raise typer.BadParameter("frames are compared with frames: give it alone", param_hint="--like")
    if like:
        return search_alike(cache, like, scorer, where=where, top=top, by=by, snapshot=snapshot)
    if not query and not queries:
        raise typer.BadParameter("give --query TEXT, --queries FILE or --like CLIP[:FRAME]")
    if not keep and (queries or router):
        raise typer.BadParameter("scores of files of queries, and of routers, are kept", param_hint="--no-keep")
    use = _router_use(router, router_model, rerank, device)
    is_whole = score_cache(
        cache, query or [], queries, scorer, where=where, top=top, by=by, router=use, keep=keep, snapshot=snapshot
    )
    raise typer.Exit(0 if is_whole else 3)


def _router_use(file: str | None, model: str | None, top: int, device: str) -> Any:
    if file is None:
        if model:
            raise typer.BadParameter("it is the model of a router: give --router too", param_hint="--router-model")
        return None
    from .rerankers import RouterUse

    return RouterUse(file=file, model=model, top=top, device=device)


def select(
    cache: CachePath,
    query: Annotated[str, typer.Option(help="What the tokens are to show, in words.")],
    budget: Annotated[
        int | None, typer.Option(metavar="TOKENS", help="How many tokens there may be; or give --context.", min=1)
    ] = None,
    context: Annotated[
        int | None, typer.Option(metavar="TOKENS", help="What a model takes in all: words, answer and 100 to spare.")
    ] = None,
    text_tokens: Annotated[int, typer.Option(help="Of --context: taken by words.", min=0)] = 0,
    generated_tokens: Annotated[int, typer.Option(help="Of --context: left for the answer.", min=0)] = 0,
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
    if (budget is None) == (context is None):
        raise typer.BadParameter("give one of --budget and --context")
    from ..pipeline.allocation import image_budget
    from .selecting import print_selection, read_tiers

    allowed = budget if context is None else image_budget(context, text_tokens, generated_tokens)
    settings = {"policy": policy, "tiers": read_tiers(tiers), "floor": floor, "fill": fill, "verify": check}
    print_selection(
        cache, query, allowed or 0, product, scorer=scorer, where=where, settings=settings,
        router=_router_use(router, router_model, rerank, device), output=output, png=png, max_rows=max_rows,
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
    policies: Annotated[
        bool, typer.Option("--policies", help="make: also which policy each question needs, by two more answers.")
    ] = False,
    where: Annotated[
        str, typer.Option(metavar="SQL", help="make: which videos, by a condition on clips and videos.")
    ] = "true",
    limit: Annotated[int | None, typer.Option(help="make: how many videos at most.", min=1)] = None,
) -> None:
    """Bring labels of frames and policies into a cache, write them out, or make them with a judge that sees frames.

    Exit code 3: some lines were left out.
    """
    from .labels import run_labels

    is_good = run_labels(
        action, cache, file, source=source, kind=kind, judge=judge, model=model, policies=policies, where=where,
        limit=limit,
    )  # fmt: skip
    raise typer.Exit(0 if is_good else 3)
