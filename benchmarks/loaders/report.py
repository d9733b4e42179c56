"""The table of what was measured, and the ratios that tokenmill is judged by.

python -m tokenmill.benchmarks.loaders.report out/loaders/results.json
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .samples import SETS

PEERS = ("litdata", "webdataset", "mosaicml")
MOST_BITS = {"fsq": 16.1, "fsq18": 18.1}
COLUMNS = (
    f"{'set':6} {'library':12} {'per token':>11} {'order':11} {'first epoch':>12} {'later':>10} {'open s':>7}"
    f" {'p50 us':>7} {'p99 us':>7} {'resume s':>9} {'same':>5}  {'by':14} {'damage':8}"
)


def show(results: Mapping[str, Any]) -> None:
    """Print the table: a row for every order of every library. Epochs are in samples per core-second."""
    print("  ".join(f"{name} {value}" for name, value in results["machine"].items()))
    print(COLUMNS)
    for name, libraries in results["sets"].items():
        for library, found in libraries.items():
            orders = {order: rates for order, rates in found.items() if isinstance(rates, dict) and "later" in rates}
            for number, (order, rates) in enumerate((orders or {"": {}}).items()):
                print(_row(name, library, found, order, rates, is_first=number == 0))


def _row(name: str, library: str, found: Mapping[str, Any], order: str, rates: Mapping[str, Any], **of: bool) -> str:
    size = found["bytes_per_token"]
    size = f"{8 * size:.3f} bit" if SETS[name].codebook_size else f"{size:.1f} byte"
    resume, damage = found.get("resume", {}), found.get("damage", {})
    kept = resume if resume.get("order") == order else {}
    alone = found if of["is_first"] else {}
    noticed = {True: "noticed", False: "silent"}.get(damage.get("noticed", ""), "") if of["is_first"] else ""
    return (
        f"{name:6} {library:12} {size if of['is_first'] else '':>11} {order:11}"
        f" {_number(rates.get('first'), 12)} {_number(rates.get('later'), 10)} {_number(rates.get('open_s'), 7, 3)}"
        f" {_number(alone.get('p50_us'), 7, 1)} {_number(alone.get('p99_us'), 7, 1)}"
        f" {_number(kept.get('resume_s'), 9, 3)} {_yes(kept.get('is_same')):>5}  {kept.get('resumes_by', ''):14}"
        f" {noticed:8} {found.get('error', '') if of['is_first'] else ''}"
    ).rstrip()


def _number(value: float | None, width: int, digits: int = 0) -> str:
    return " " * width if value is None else f"{value:{width},.{digits}f}"


def _yes(value: bool | None) -> str:
    return "" if value is None else ("yes" if value else "NO")


def judge(results: Mapping[str, Any]) -> None:
    """Print every ratio with its limit and whether it is kept."""
    for name, libraries in results["sets"].items():
        ours, limit = libraries.get("tokenmill", {}), libraries.get("memmap", {})
        for what, value, wanted, is_least in _ratios(name, ours, limit, libraries):
            kept = value >= wanted if is_least else value <= wanted
            sign = ">=" if is_least else "<="
            print(f"{'pass' if kept else 'FAIL'}  {name}: {what} {value:.2f} (wanted {sign} {wanted})")


def _ratios(
    name: str, ours: Mapping[str, Any], limit: Mapping[str, Any], libraries: Mapping[str, Any]
) -> Iterator[tuple[str, float, float, bool]]:
    if name in MOST_BITS and "bytes_per_token" in ours:
        yield "bits per token", 8 * ours["bytes_per_token"], MOST_BITS[name], False
    if "sequential" not in ours or "sequential" not in limit:
        return
    of_memmap = {"sequential": "sequential", "window": "shuffled", "global": "shuffled"}
    for epoch in ("later", "first"):
        for order, same in of_memmap.items():
            yield f"{order}, {epoch} epoch, of memmap", ours[order][epoch] / limit[same][epoch], 0.8, True
    peers = {peer: libraries[peer]["sequential"]["later"] for peer in PEERS if "sequential" in libraries.get(peer, {})}
    if peers:
        best = max(peers, key=lambda peer: peers[peer])
        yield f"sequential of {best}, the best of its kind", ours["sequential"]["later"] / peers[best], 3.0, True
    if "p50_us" in ours:
        yield "p50 of random access of memmap's", ours["p50_us"] / limit["p50_us"], 2.0, False
    resume, damage = ours.get("resume", {}), ours.get("damage", {})
    yield "the rest of an epoch is the same (1 is yes)", float(resume.get("is_same", False)), 1, True
    yield "damage is noticed (1 is yes)", float(damage.get("noticed", False)), 1, True


if __name__ == "__main__":
    found = json.loads(Path(sys.argv[1]).read_text())
    show(found)
    judge(found)
