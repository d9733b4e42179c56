"""The command line. Each command imports its job when it is called, so that help answers at once."""

import sys
from typing import Annotated, Literal

import typer

INTERRUPTED = 130

app = typer.Typer(
    name="tokenmill",
    help="Turn video into cached tokens that SQL answers and trainers read.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="YAML recipe; path or fsspec URL.")]
CachePath = Annotated[str, typer.Argument(metavar="CACHE", help="Folder of a token cache; path or fsspec URL.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe; repeatable."),
]
LogJson = Annotated[bool, typer.Option("--log-json", help="Report as JSON lines on standard output.")]


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
    """Run a recipe; running it again resumes it. Exit code 3: finished, but some clips failed."""
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
    from .run import run_recipe  # only now: a wrong recipe is told before torch is loaded

    with showing(log_json=log_json) as display:
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
def status(cache: CachePath, log_json: LogJson = False) -> None:
    """Show a cache's plan, what is done, what failed, sizes and rates."""
    from .status import read_status, show_status

    show_status(read_status(cache), log_json=log_json)


@app.command()
def verify(
    cache: CachePath,
    sample: Annotated[int, typer.Option(help="Clips to make again from their sources and compare.", min=0)] = 8,
) -> None:
    """Check every file against its manifest, the account, and a sample of clips made again."""
    from .verify import verify_cache

    raise typer.Exit(1 if verify_cache(cache, sample) else 0)


@app.command()
def index(cache: CachePath) -> None:
    """Rebuild a cache's index.duckdb, which can be deleted at any time."""
    from .index import rebuild_index

    typer.echo(rebuild_index(cache))


@app.command()
def sql(
    cache: CachePath,
    query: Annotated[str, typer.Argument(metavar="QUERY", help="One read-only query in DuckDB's SQL.")],
    format: Annotated[Literal["table", "csv", "json", "parquet"], typer.Option(help="How to print it.")] = "table",
    output: Annotated[str | None, typer.Option("--output", "-o", help="File to write instead of printing.")] = None,
    max_rows: Annotated[int, typer.Option(help="Rows that a printed table shows.", min=1)] = 40,
) -> None:
    """Answer a query over videos, clips, tokens_<product>, shards, failures, products and files."""
    from .sql import print_answer

    print_answer(cache, query, format, output, max_rows)


@app.command()
def reconstruct(
    cache: CachePath,
    clip_id: Annotated[str, typer.Argument(metavar="CLIP_ID", help="A clip, or the first digits of its id.")],
    output: Annotated[str, typer.Argument(metavar="OUT.mp4", help="Video to write: source left, tokens right.")],
    product: Annotated[str | None, typer.Option(help="Which tokens; the cache's only ones by default.")] = None,
    png: Annotated[str | None, typer.Option(help="Also write a contact sheet of frames to this PNG.")] = None,
) -> None:
    """Decode a clip's tokens to video, source and reconstruction side by side."""
    from .reconstruct import reconstruct_clip

    reconstruct_clip(cache, clip_id, output, product, png)


def main() -> None:
    """Run the command line; a user's mistake ends in one line and a non-zero exit code, never a traceback."""
    from ..schemas.errors import RecipeError, TokenmillError
    from .interruption import heed_interrupts

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
