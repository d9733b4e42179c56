"""How tables look on a terminal, and in logs where nobody says how wide they are."""

import sys

from rich import box
from rich.console import Console
from rich.table import Table

LOG_WIDTH = 160


def output_console() -> Console:
    """Standard output: as wide as the terminal, or LOG_WIDTH where there is none."""
    return Console(width=None if sys.stdout.isatty() else LOG_WIDTH, highlight=False)


def new_table(*names: str, numbers: tuple[str, ...] = (), title: str | None = None) -> Table:
    """A table of these columns; those in `numbers` are aligned right."""
    table = Table(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title=title, title_justify="left", title_style="bold"
    )
    for name in names:
        is_number = name in numbers
        table.add_column(name, justify="right" if is_number else "left", no_wrap=is_number, overflow="fold")
    return table
