"""tokenmill snapshot: pin what is committed, and list what was pinned."""

from ..pipeline.cache import open_cache
from ..pipeline.snapshots import read_snapshot, snapshot_numbers, take_snapshot
from .printing import new_table, output_console


def pin_snapshot(cache: str) -> None:
    """Pin what is committed now, and print the snapshot's number."""
    snapshot, is_new = take_snapshot(open_cache(cache).folder)
    what = f"{snapshot.num_manifests} manifests, {len(snapshot.plans)} plans"
    if is_new:
        print(f"snapshot {snapshot.number}: {what}; read it with --snapshot {snapshot.number}")
    else:
        print(f"snapshot {snapshot.number} of {snapshot.created} has this very state ({what}): none was added")


def list_snapshots(cache: str) -> None:
    """Print all snapshots of a cache as a table."""
    folder = open_cache(cache).folder
    numbers = ("snapshot", "manifests", "plans")
    table = new_table("snapshot", "created", "products", "manifests", "plans", numbers=numbers)
    for number in snapshot_numbers(folder):
        one = read_snapshot(folder, number)
        products = ", ".join(one.info.products)
        table.add_row(str(number), one.created, products, f"{one.num_manifests:,}", f"{len(one.plans):,}")
    output_console().print(table)
