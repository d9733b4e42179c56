"""The same samples read by tokenmill, np.memmap (the limit) and other libraries: a table, and a JSON file.

    python -m tokenmill.benchmarks.loaders.run [--sets fsq kl traj] [--folder out/loaders]

Every measurement is in a process of its own, in three rounds in which the libraries take turns at being first. The
median of the rounds is given. Files are in the page cache. Rates are samples for each second of a core's time.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from .report import judge, show
from .samples import LIBRARIES, SETS, SetSpec, lengths_of, make_sample

PACKAGES = ("torch", "numpy", "pyarrow", "webdataset", "litdata", "mosaicml-streaming", "datasets", "pylance", "duckdb")


def act(action: str, library: str, spec: SetSpec, folder: Path) -> dict[str, Any]:
    """What one process found; its last words where it failed."""
    module = f"{__package__}.measure"
    command = [sys.executable, "-m", module, action, library, spec.name, str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        print(f"{action} {library} {spec.name} failed:\n{ended.stderr[-2000:]}", file=sys.stderr, flush=True)
        return {"error": ended.stderr.strip().rpartition("\n")[2][:300]}
    return json.loads(ended.stdout.strip().rpartition("\n")[2])


def make(spec: SetSpec, libraries: list[str], folder: Path) -> None:
    """Write the set by every library that has not written it yet; the first gives the samples to the others."""
    for library in libraries:
        place = folder / spec.name / library
        if not place.exists() and "error" in act("write", library, spec, folder):
            shutil.rmtree(place, ignore_errors=True)


def size(spec: SetSpec, library: str, folder: Path) -> dict[str, float]:
    """Bytes for each token, of all files that hold them (of tokenmill: those of the product)."""
    place = folder / spec.name / library
    if library == "tokenmill":
        place = place / "tokens" / spec.name
    num_bytes = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    num_tokens = int(lengths_of(spec).sum()) if spec.lengths else spec.num_samples * spec.num_tokens_each
    return {"bytes_per_token": num_bytes / num_tokens}


def measure(spec: SetSpec, libraries: list[str], folder: Path, num_rounds: int) -> dict[str, Any]:
    """All that is measured of a set, by library."""
    found: dict[str, Any] = {library: size(spec, library, folder) for library in libraries}
    rounds: dict[str, list[dict[str, Any]]] = {library: [] for library in libraries}
    for path in (folder / spec.name).rglob("*"):
        if path.is_file():
            path.read_bytes()  # into the page cache
    for number in range(num_rounds):
        turn = number * len(libraries) // num_rounds
        for library in libraries[turn:] + libraries[:turn]:
            rounds[library].append(act("speed", library, spec, folder))
            print(f"{spec.name} round {number + 1} {library}: {json.dumps(rounds[library][-1])}", flush=True)
    for library in libraries:
        found[library] |= median_of(rounds[library]) | resumed(spec, library, folder) | damaged(spec, library, folder)
    return found


def median_of(rounds: list[Any]) -> Any:
    """The median of every number that all rounds have; of rounds that failed, what the first of them said."""
    if not isinstance(rounds[0], dict):
        return statistics.median(rounds)
    if failed := [one for one in rounds if "error" in one]:
        return failed[0]
    return {name: median_of([one[name] for one in rounds]) for name in rounds[0] if all(name in one for one in rounds)}


def resumed(spec: SetSpec, library: str, folder: Path) -> dict[str, Any]:
    """How a shuffled epoch goes on in another process: the median of three."""
    left = act("leave", library, spec, folder)
    if "error" in left:
        return {"resume": left}
    tries = [act("resume", library, spec, folder) for _ in range(3)]
    if failed := [one for one in tries if "error" in one]:
        return {"resume": left | failed[0]}
    seconds = statistics.median(one["resume_s"] for one in tries)
    return {"resume": left | {"resume_s": seconds, "is_same": all(one["is_same"] for one in tries)}}


def damaged(spec: SetSpec, library: str, folder: Path) -> dict[str, Any]:
    """Whether a byte that was changed among the tokens of the sample in the middle is noticed; it is put back."""
    found = place_of_middle(spec, library, folder)
    if found is None:
        return {"damage": {"error": "the tokens of the sample in the middle are not stored as they are"}}
    path, position = found
    _flip(path, position)
    try:
        return {"damage": act("read", library, spec, folder)}
    finally:
        _flip(path, position)


def place_of_middle(spec: SetSpec, library: str, folder: Path) -> tuple[Path, int] | None:
    """The file that holds the tokens of the sample in the middle, and where in it; None where they are encoded."""
    index = spec.num_samples // 2
    tokens = make_sample(spec, index, int(lengths_of(spec)[index])).tobytes()
    wanted = tokens[len(tokens) // 2 :][:64]
    for path in sorted((folder / spec.name / library).rglob("*")):
        if path.is_file() and (position := path.read_bytes().find(wanted)) >= 0:
            return path, position
    return None


def _flip(path: Path, position: int) -> None:
    with open(path, "r+b") as stream:
        stream.seek(position)
        byte = stream.read(1)[0]
        stream.seek(position)
        stream.write(bytes([byte ^ 0xFF]))


def machine() -> dict[str, Any]:
    """Where this was measured, and with what."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version(), **versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--libraries", nargs="+", default=list(LIBRARIES), choices=LIBRARIES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("out/loaders"))
    parser.add_argument("--output", type=Path, help="FOLDER/results.json")
    options = parser.parse_args()
    results: dict[str, Any] = {"machine": machine(), "sets": {}}
    for spec in (SETS[name] for name in options.sets):
        wanted = [library for library in spec.libraries if library in {"memmap", *options.libraries}]
        make(spec, wanted, options.folder)
        there = [library for library in wanted if (options.folder / spec.name / library).exists()]
        if spec.is_for_size:
            results["sets"][spec.name] = {library: size(spec, library, options.folder) for library in there}
        else:
            results["sets"][spec.name] = measure(spec, there, options.folder, options.rounds)
        output = options.output or options.folder / "results.json"
        output.write_text(json.dumps(results, indent=1) + "\n")
    show(results)
    judge(results)


if __name__ == "__main__":
    main()
