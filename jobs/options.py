"""Arguments and options that several commands have."""

from typing import Annotated

import typer

RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="YAML recipe; path or fsspec URL.")]
CachePath = Annotated[str, typer.Argument(metavar="CACHE", help="Folder of a token cache; path or fsspec URL.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe; repeatable."),
]
PinnedAs = Annotated[
    int | None, typer.Option("--snapshot", metavar="N", help="Read the cache as this snapshot pinned it.")
]
RouterFile = Annotated[
    str | None, typer.Option("--router", metavar="FILE", help="A trained router, which scores the best frames again.")
]
RouterModel = Annotated[
    str | None,
    typer.Option("--router-model", metavar="FOLDER", help="The model whose early layers the router is over."),
]
RerankTop = Annotated[int, typer.Option("--rerank", help="Frames that the router scores for each query.", min=1)]
Device = Annotated[str, typer.Option(help="Where the router's model runs: cpu, cuda, cuda:N.")]
LogJson = Annotated[bool, typer.Option("--log-json", help="Report as JSON lines on standard output.")]
