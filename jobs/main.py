"""The command line. Each command imports its job when it is called, so that help answers at once."""

import sys
from functools import partial
from typing import Annotated, Literal

import typer

from .options import CachePath, LogJson, Overrides, PinnedAs, RecipePath
from .query_commands import labels, score, select

app = typer.Typer(
    name="tokenmill",
    help="Turn video into cached tokens that SQL answers and trainers read.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(f"tokenmill {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="YAML recipe; path or fsspec URL.")] = None,
    overrides: Overrides = None,
    executor: Annotated[Literal["local", "ray"] | None, typer.Option(help="Where the work runs.")] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to use: local, auto, or its address.")] = None,
    log_json: LogJson = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the recipe's JSON Schema and exit.")] = False,
) -> None:
    """Run a recipe; running it again resumes it. Exit code 3: finished, but some clips failed; 75: asked to stop."""
    if schema:
        from .recipes import print_schema

        return print_schema()
    if recipe is None:
        raise typer.BadParameter("give a recipe, or --schema")
    from .recipes import load_recipe

    chosen = [f"executor.kind={executor}"] if executor else []
    chosen += ["executor.kind=ray", f"executor.address={address}"] if address else []
    loaded = load_recipe(recipe, [*(overrides or []), *chosen])
    from .display import showing
    from .interruption import resumable
    from .run import run_recipe  # only now: a wrong recipe is told before torch is loaded

    with resumable(), showing(log_json=log_json) as display:
        status = run_recipe(loaded, display)
    from .status import show_status

    show_status(status, log_json=log_json)
    raise typer.Exit(status.exit_code)


@app.command()
def plan(recipe: RecipePath, overrides: Overrides = None, log_json: LogJson = False) -> None:
    """Probe a recipe's videos and write its clips and shards, without making tokens."""
    from .display import showing
    from .plan import plan_recipe
    from .recipes import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    with showing(log_json=log_json) as display:
        plan_recipe(loaded, display)


@app.command()
def estimate(
    recipe: RecipePath,
    overrides: Overrides = None,
    videos: Annotated[int, typer.Option(help="Videos to sample.", min=1)] = 16,
    clips: Annotated[int, typer.Option(help="Clips of them to make.", min=1)] = 64,
) -> None:
    """Measure a small sample and print frames, clips, tokens, bytes per product and hours per worker."""
    from .estimate import estimate_recipe, print_estimate
    from .recipes import load_recipe

    print_estimate(estimate_recipe(load_recipe(recipe, overrides or []), videos, clips))


@app.command()
def status(cache: CachePath, log_json: LogJson = False, snapshot: PinnedAs = None) -> None:
    """Show a cache's plan, what is done, what failed or is quarantined, sizes, rates, and where workers' time went."""
    from .status import read_status, show_status

    show_status(read_status(cache, snapshot=snapshot), log_json=log_json)


@app.command()
def retry(cache: CachePath, overrides: Overrides = None, log_json: LogJson = False) -> None:
    """Try failed and quarantined clips and videos again, by the cache's own recipe; exit codes as run has them."""
    from .display import showing
    from .interruption import resumable
    from .retry import retry_cache

    with resumable(), showing(log_json=log_json) as display:
        done = retry_cache(cache, overrides or [], display)
    from .status import show_status

    if done:
        show_status(done, log_json=log_json)
        raise typer.Exit(done.exit_code)


@app.command()
def snapshot(
    cache: CachePath, list_them: Annotated[bool, typer.Option("--list", help="List what was pinned.")] = False
) -> None:
    """Pin what is committed now: it stays readable, by --snapshot N, whatever is added later."""
    from .snapshot import list_snapshots, pin_snapshot

    list_snapshots(cache) if list_them else pin_snapshot(cache)


@app.command()
def gc(
    cache: CachePath,
    delete: Annotated[bool, typer.Option("--delete", help="Remove the files; without it they are listed.")] = False,
    older_than: Annotated[
        str, typer.Option(metavar="AGE", help="Only files not touched for so long: running jobs may need others.")
    ] = "24h",
    old_versions: Annotated[
        bool, typer.Option("--old-versions", help="Also product versions neither current nor in a snapshot.")
    ] = False,
) -> None:
    """List, and with --delete remove, files that no manifest, plan or snapshot names."""
    from .collect import collect_garbage

    collect_garbage(cache, older_than, delete=delete, old_versions=old_versions)


@app.command()
def verify(
    cache: CachePath,
    deep: Annotated[bool, typer.Option("--deep", help="Read every file against its SHA-256 and row count.")] = False,
    retokenize: Annotated[
        float | None, typer.Option(metavar="P", help="Make this fraction of the clips again and compare.", min=0, max=1)
    ] = None,
    quality: Annotated[
        float | None,
        typer.Option(
            metavar="P", help="Decode this fraction of the clips: PSNR and SSIM to their sources.", min=0, max=1
        ),
    ] = None,
    lpips: Annotated[
        str | None, typer.Option(metavar="WEIGHTS", help="With --quality: a VidTok checkpoint, for its LPIPS networks.")
    ] = None,
    truth: Annotated[
        str | None, typer.Option(metavar="NAME", help="With --quality: masks to compare all others with, as true ones.")
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="First make again what is damaged or missing, from its sources.")
    ] = False,
    overrides: Overrides = None,
    log_json: LogJson = False,
) -> None:
    """Check that every file that manifests, plans and snapshots name is there, and the account; exit code 1 if not.

    With --repair what a listing shows as damaged, or with --deep what reading shows, is made again by the cache's own
    recipe; exit codes 3 and 75 as run has them.
    """
    from .verify import verify_as_json, verify_cache

    for name, value in (("--lpips", lpips), ("--truth", truth)):
        if value and quality is None:
            raise typer.BadParameter("it is measured with --quality P", param_hint=name)
    if overrides and not repair:
        raise typer.BadParameter("it changes what --repair runs: give that too", param_hint="--set")
    num_failed = 0
    if repair:
        from .display import showing
        from .interruption import resumable
        from .repair import repair_cache

        with resumable(), showing(log_json=log_json) as display:
            num_failed = repair_cache(cache, overrides or [], display, deep=deep)
    check = partial(verify_cache, cache, deep=deep, retokenize=retokenize, quality=quality, lpips=lpips, truth=truth)
    problems = verify_as_json(check) if log_json else check()
    raise typer.Exit(1 if problems else 3 if num_failed else 0)


@app.command()
def index(cache: CachePath) -> None:
    """Rebuild a cache's index.duckdb, which can be deleted at any time."""
    from .index import rebuild_index

    typer.echo(rebuild_index(cache))


@app.command()
def sql(
    cache: CachePath,
    query: Annotated[
        str | None, typer.Argument(metavar="QUERY", help="One read-only query in DuckDB's SQL; or give --named.")
    ] = None,
    named: Annotated[
        str | None, typer.Option(metavar="NAME", help="A saved query instead; an unknown name lists them.")
    ] = None,
    param: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A parameter of the saved query; repeatable.")
    ] = None,
    format: Annotated[Literal["table", "csv", "json", "parquet"], typer.Option(help="How to print it.")] = "table",
    output: Annotated[str | None, typer.Option("--output", "-o", help="File to write instead of printing.")] = None,
    max_rows: Annotated[int, typer.Option(help="Rows that a printed table shows.", min=1)] = 40,
    snapshot: PinnedAs = None,
) -> None:
    """Answer a query over videos, clips, tokens_<product>, frames, relevance, shards, failures, products and files."""
    if (query is None) == (named is None):
        raise typer.BadParameter("give a query, or --named NAME for a saved one: one of both", param_hint="QUERY")
    if param and named is None:
        raise typer.BadParameter("they are of saved queries: give --named NAME too", param_hint="--param")
    from .sql import print_answer

    print_answer(
        cache, query, format, output, named=named, parameters=param or [], max_rows=max_rows, snapshot=snapshot
    )


app.command()(score)


app.command()(select)


@app.command()
def reconstruct(
    cache: CachePath,
    clip_id: Annotated[str, typer.Argument(metavar="CLIP_ID", help="A clip, or the first digits of its id.")],
    output: Annotated[str, typer.Argument(metavar="OUT.mp4", help="Video to write: source left, tokens right.")],
    product: Annotated[str | None, typer.Option(help="Which tokens; the cache's only ones by default.")] = None,
    levels: Annotated[
        int | None, typer.Option(help="Only the first levels, of tokens that come in levels.", min=1)
    ] = None,
    masks: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Show these masks, or tokens of trajectories, in colours instead."),
    ] = None,
    png: Annotated[str | None, typer.Option(help="Also write a contact sheet of frames to this PNG.")] = None,
    snapshot: PinnedAs = None,
) -> None:
    """Decode a clip's tokens to video, source and reconstruction side by side; or show its masks so."""
    from .reconstruct import reconstruct_clip, show_masks

    if masks and product:
        raise typer.BadParameter("masks are shown in place of tokens: give one of both", param_hint="--product")
    if masks and levels:
        raise typer.BadParameter("levels are of tokens, masks are shown", param_hint="--levels")
    if masks:
        return show_masks(cache, clip_id, output, masks, png=png, snapshot=snapshot)
    reconstruct_clip(cache, clip_id, output, product, levels=levels, png=png, snapshot=snapshot)


@app.command()
def export(
    format: Annotated[
        Literal["webdataset", "trajtok"], typer.Argument(metavar="FORMAT", help="webdataset or trajtok.")
    ],
    cache: CachePath,
    output: Annotated[str, typer.Argument(metavar="OUT", help="Empty or new folder; path or fsspec URL.")],
    product: Annotated[
        list[str] | None, typer.Option(help="Which tokens, all by default, repeatable; for trajtok which masks.")
    ] = None,
    where: Annotated[str, typer.Option(metavar="SQL", help="Which clips: a condition on clips and videos.")] = "true",
    clips_per_tar: Annotated[
        int | None, typer.Option(help="Clips in each tar, 8192 by default; the last may have fewer.", min=1)
    ] = None,
    layout: Annotated[
        Literal["video", "image", "sa1b", "sav"] | None,
        typer.Option(help="trajtok: which files its loaders shall find; video by default."),
    ] = None,
    root: Annotated[
        str | None, typer.Option(help="trajtok: what paths in the manifest begin with; OUT by default, '' for names.")
    ] = None,
    snapshot: PinnedAs = None,
) -> None:
    """Write tokens of a cache as WebDataset tars with an index, or clips and masks as TrajTok's trainers read them."""
    from ..pipeline.cache import open_cache

    per_tar = clips_per_tar or 8192
    if format == "webdataset":
        from .export import export_webdataset

        for name, value in (("--layout", layout), ("--root", root)):
            if value is not None:
                raise typer.BadParameter("it is of exports for trajtok", param_hint=name)
        return export_webdataset(open_cache(cache, snapshot), output, product or [], where, per_tar)
    from .export_trajtok import export_trajtok

    if clips_per_tar and layout != "sa1b":
        raise typer.BadParameter("of trajtok's layouts sa1b alone has tars", param_hint="--clips-per-tar")
    if len(product or []) > 1:
        raise typer.BadParameter("the masks of one product are exported: name one", param_hint="--product")
    masks = product[0] if product else None
    opened = open_cache(cache, snapshot)
    export_trajtok(opened, output, masks, where, layout=layout or "video", root=root, per_tar=per_tar)


app.command()(labels)


@app.command()
def train(
    model: Annotated[
        Literal["pyratok", "router"], typer.Argument(metavar="MODEL", help="What to train: pyratok or router.")
    ],
    recipe: RecipePath,
    overrides: Overrides = None,
    log_json: LogJson = False,
) -> None:
    """Train a tokenizer on your videos, or a router on a cache; running it again resumes it. Exit code 75: asked to
    stop.
    """
    from .recipes import load_as

    if model == "pyratok":
        from ..schemas.training import parse_training

        loaded = load_as(parse_training, recipe, overrides or [])
        from .train import train_pyratok

        start = partial(train_pyratok, loaded)
    else:
        from ..schemas.router_training import parse_router_training

        loaded = load_as(parse_router_training, recipe, overrides or [])
        from .train_router import train_router

        start = partial(train_router, loaded)
    from .display import showing
    from .interruption import resumable

    with resumable(), showing(log_json=log_json) as display:
        start(display)


def main() -> None:
    """Run the command line; a user's mistake ends in one line and a non-zero exit code, never a traceback."""
    from ..schemas.errors import RecipeError, TokenmillError
    from .interruption import INTERRUPTED, heed_interrupts

    heed_interrupts()
    try:
        app()
    except TokenmillError as error:
        print(f"tokenmill: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, RecipeError) else 1)
    except SystemExit as end:
        if end.code == INTERRUPTED:  # Ctrl-C, as typer passes it on
            print("tokenmill: interrupted; what was committed is kept, the same command resumes", file=sys.stderr)
        raise
    except OSError as error:
        print(f"tokenmill: {error}", file=sys.stderr)
        sys.exit(1)
