"""tokenmill gc: list, and on request remove, files that nothing names."""

import re
from collections.abc import Sequence

from rich.filesize import decimal

from ..pipeline.cache import open_cache
from ..pipeline.garbage import Garbage, find_garbage, remove_garbage
from ..schemas.errors import CacheError, StorageError, TokenmillError
from .printing import new_table, output_console

SHOWN_NAMES = 100
UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def collect_garbage(cache: str, older_than: str, *, delete: bool, old_versions: bool) -> None:
    """Print the garbage of a cache that was not touched for `older_than`; remove it if `delete`."""
    older_than_s = age_s(older_than)
    folder = open_cache(cache).folder
    try:
        garbage = find_garbage(folder, older_than_s, old_versions=old_versions)
    except (CacheError, StorageError) as error:
        raise CacheError(f"nothing was removed, since what is needed is not known: {error}") from None
    _print_table(garbage)
    for one in garbage[:SHOWN_NAMES]:
        print(f"{one.kind}: {one.file.name}")
    if len(garbage) > SHOWN_NAMES:
        print(f"… and {len(garbage) - SHOWN_NAMES} more")
    if not delete:
        print("nothing was removed: --delete does" if garbage else f"no garbage older than {older_than}")
        return
    removed = list(remove_garbage(folder, garbage, older_than_s))
    kept = f"; {len(garbage) - len(removed)} are in use again" if len(removed) < len(garbage) else ""
    print(f"removed {len(removed)} files, {decimal(sum(one.file.size_bytes for one in removed))}{kept}")


def age_s(text: str) -> float:
    """Seconds in an age such as 90s, 30m, 24h or 7d."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if not found:
        raise TokenmillError(f"--older-than {text!r}: accepted is a number with s, m, h or d, for instance 24h")
    return float(found[1]) * UNITS_S[found[2]]


def _print_table(garbage: Sequence[Garbage]) -> None:
    numbers = ("files", "bytes")
    table = new_table("garbage", *numbers, numbers=numbers)
    for kind in dict.fromkeys(one.kind for one in garbage):
        sizes = [one.file.size_bytes for one in garbage if one.kind == kind]
        table.add_row(kind, f"{len(sizes):,}", decimal(sum(sizes)))
    if garbage:
        output_console().print(table)
