"""What is measured of one library and one set, in a process of its own.

python -m tokenmill.benchmarks.loaders.measure ACTION LIBRARY SET FOLDER
"""

import importlib
import json
import pickle
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .samples import SETS, Reader, SetSpec, ids_of

SEED, NUM_GETS, TOUCH_EVERY = 7, 2000, 16
LATER_EPOCHS = 5  # the median of their rates


def write(module: Any, spec: SetSpec, folder: Path) -> dict[str, Any]:
    """Write the set, from the samples that the memory map holds."""
    library = folder.name
    folder.mkdir(parents=True)
    samples = None
    if library != "memmap":
        samples = importlib.import_module(f"{__package__}.memmap_set").Reader(folder.parent / "memmap", spec, "", 0)
    start_s = time.perf_counter()
    module.write(folder, spec, samples)
    return {"write_s": time.perf_counter() - start_s}


def speed(module: Any, spec: SetSpec, folder: Path) -> dict[str, Any]:
    """Samples per core-second of the first epoch of this process and of later ones, by order; and random access."""
    found: dict[str, Any] = {}
    for order in module.Reader.orders:
        start_s = time.perf_counter()
        reader = module.Reader(folder, spec, order, SEED)
        found[order] = {"open_s": time.perf_counter() - start_s}
        first, *later = [_rate(reader, number) for number in range(1 + LATER_EPOCHS)]
        found[order] |= {"first": first, "later": statistics.median(later)}
        if order == module.Reader.orders[0]:
            found |= _random_access(reader, spec)
        del reader  # two readers of one folder are more than some libraries bear
    return found


def _rate(reader: Reader, number: int) -> float:
    """Samples per second of the time of this process's cores."""
    num_samples, start_s = 0, time.process_time()
    for batch in reader.epoch(number):
        num_samples += len(batch) if isinstance(batch, torch.Tensor) else len(batch.cu_seqlens) - 1
    taken_s = time.process_time() - start_s
    return num_samples / taken_s


def _random_access(reader: Reader, spec: SetSpec) -> dict[str, float]:
    """Microseconds of single samples, once every part of the files has been touched."""
    try:
        for index in range(0, spec.num_samples, TOUCH_EVERY):
            reader.get(index)
    except NotImplementedError:
        return {}
    taken_ns = []
    for index in np.random.default_rng(SEED).integers(0, spec.num_samples, NUM_GETS).tolist():
        start_ns = time.perf_counter_ns()
        reader.get(index)
        taken_ns.append(time.perf_counter_ns() - start_ns)
    p50_ns, p99_ns = np.percentile(taken_ns, [50, 99])
    return {"p50_us": p50_ns / 1e3, "p99_us": p99_ns / 1e3}


def _rest_file(folder: Path) -> Path:
    return folder.parent / f"{folder.name}.state"


def leave(module: Any, spec: SetSpec, folder: Path) -> dict[str, Any]:
    """Keep the state of a shuffled epoch in its middle, and which samples come then."""
    reader = module.Reader(folder, spec, module.Reader.orders[1], SEED)
    batches = reader.epoch(0)
    half = spec.num_samples // 64 // 2
    for _ in range(half):
        next(batches)
    state = reader.state(half)
    rest = [ids_of(batch) for batch in batches]
    _rest_file(folder).write_bytes(pickle.dumps((state, rest)))
    return {"order": module.Reader.orders[1], "resumes_by": module.Reader.resumes_by}


def resume(module: Any, spec: SetSpec, folder: Path) -> dict[str, Any]:
    """Seconds from that state to the next batch, opening included, and whether the rest is the same."""
    state, rest = pickle.loads(_rest_file(folder).read_bytes())
    start_s = time.perf_counter()
    batches = module.Reader(folder, spec, module.Reader.orders[1], SEED).resume(state)
    first = next(batches)
    taken_s = time.perf_counter() - start_s
    return {"resume_s": taken_s, "is_same": [ids_of(first), *map(ids_of, batches)] == rest}


def read(module: Any, spec: SetSpec, folder: Path) -> dict[str, Any]:
    """Whether the library says that a set is damaged, when all of it is read."""
    try:
        for _ in module.Reader(folder, spec, module.Reader.orders[0], SEED).epoch(0):
            pass
    except Exception as error:  # of any class: every library has its own
        return {"noticed": True, "said": f"{type(error).__name__}: {error}"[:300]}
    return {"noticed": False}


ACTIONS = {one.__name__: one for one in (write, speed, leave, resume, read)}


def main() -> None:
    action, library, name, folder = sys.argv[1:]
    torch.set_num_threads(1)
    module = importlib.import_module(f"{__package__}.{library}_set")
    print(json.dumps(ACTIONS[action](module, SETS[name], Path(folder) / name / library)), flush=True)


if __name__ == "__main__":
    main()
