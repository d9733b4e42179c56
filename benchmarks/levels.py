"""Reading the first levels of codes: bytes and time against reading all, and against one column for all levels.

python benchmarks/levels.py [--clips 2000] [--rounds 5]
"""

import argparse
import mmap
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from tokenmill.pipeline.token_file import TokenFile, TokenLayout, from_planes, write_token_file

GRID, NUM_LEVELS, BATCH = (5, 32, 32), 4, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 1 << 16, (args.clips, *GRID, NUM_LEVELS), np.uint16).astype(np.int32)
    one_column = TokenLayout(dtype="uint16", shape=(*GRID, NUM_LEVELS), codebook_size=1 << 16)
    by_level = TokenLayout.of_levels([GRID] * NUM_LEVELS, 1 << 16)
    batches = [rng.integers(0, args.clips, BATCH) for _ in range(50)]
    with tempfile.TemporaryDirectory() as folder:
        files = {name: _written(Path(folder) / name, codes, layout) for name, layout in
                 (("one column", one_column), ("levels", by_level))}  # fmt: skip
        ways = {"all levels in one column": (files["one column"], one_column)}
        ways |= {f"first {m} of {NUM_LEVELS} levels": (files["levels"], by_level.first_levels(m)) for m in range(1, 5)}
        for _, (file, layout) in ways.items():
            file.read_planes(np.arange(args.clips), layout)  # checked, and in the page cache
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(args.rounds):
            for way, (file, layout) in ways.items():
                begin_s = time.process_time()
                for rows in batches:
                    from_planes(file.read_planes(rows, layout), layout)
                seconds[way].append(time.process_time() - begin_s)
    whole_s = statistics.median(seconds["all levels in one column"])
    print(f"{'way':28} {'bytes a clip':>12} {'clips per core-second':>22} {'of one column':>14}")
    for way, (_, layout) in ways.items():
        median_s = statistics.median(seconds[way])
        rate = BATCH * len(batches) / median_s
        print(f"{way:28} {sum(layout.widths.values()):12,} {rate:22,.0f} {whole_s / median_s:14.2f}")


def _written(path: Path, codes: np.ndarray, layout: TokenLayout) -> TokenFile:
    ids = pa.table({"clip_id": [f"{i:032x}" for i in range(len(codes))]})
    write_token_file(str(path), ids, codes, layout, {})
    with path.open("rb") as stream:
        return TokenFile(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), str(path))


if __name__ == "__main__":
    main()
