"""A cache as a dataset of Ray Data: which clips there are is asked once, their tokens are read in Ray's tasks."""

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported

import numpy as np
import pyarrow as pa
import ray.data
from ray.data.extensions import ArrowTensorArray, ArrowVariableShapedTensorArray

from ..schemas.errors import CacheError
from ..schemas.shard import EMBEDDINGS, MASKS
from .cache import TokenCache
from .decoding import layout_of, plain_values
from .index_tables import quoted
from .loader import check_columns
from .mask_file import MaskFile
from .open_files import OpenFiles
from .storage import Folder
from .token_file import TokenFile, TokenLayout
from .trajectory_file import TrajectoryFile
from .views import CLIPS_WITH_VIDEOS

BLOCK_CLIPS = 1000  # a task reads as many, of one file; in an object store those of a whole file
BLOCK_BYTES = 64 << 20  # or fewer, of so many stored bytes
MASK_RATIO = 30  # how much larger masks are than their stored bytes, about

Kind = Literal["grid", "trajectories", "masks"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Product:
    """A product by the name that was asked for, and in full; `columns` say where each clip lies: file and row.

    `layout` is that of its values, None of masks.
    """

    asked: str
    full: str
    kind: Kind
    layout: TokenLayout | None
    columns: tuple[str, str]


def to_ray(
    cache: TokenCache,
    products: str | Sequence[str],
    *,
    where: str = "true",
    columns: Sequence[str] | Mapping[str, str] = (),
) -> ray.data.Dataset:
    """A lazy dataset of the clips that all `products` have and the SQL condition `where` holds for, a row to a clip.

    It has `clip_id`, `num_valid`, the `columns` asked for (of clips and their videos, or SQL expressions by name), and
    each product by the name asked, as tensors: codes uint16, or int32 for codebooks of more than 65,536; latents as
    they are stored, but bfloat16 as float32, which is exact; tokens of trajectories (n,d), as many as a clip has; masks
    uint8 (T,H,W). Rows come in the order of files: shuffle by `random_shuffle`, or by a local buffer. Every machine of
    the cluster must reach the cache by the same URL. CacheError where there is no such product, or no such clip.
    """
    asked = [products] if isinstance(products, str) else list(products)
    chosen = [_product(cache, name, i) for i, name in enumerate(asked)]
    if len({one.asked for one in chosen}) < max(1, len(chosen)):
        raise CacheError(f"one product or more is needed, each once; found {asked}")
    places = _places(cache, chosen, where, columns)
    reader = _Reader(url=cache.folder.url, products=tuple(chosen))
    most = _clips_per_block(cache, chosen) if cache.folder.is_local else places.num_rows
    blocks = list(_blocks(places, chosen[0].columns[0], most))
    return ray.data.from_arrow(blocks).map_batches(reader, batch_size=None, batch_format="pyarrow")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reader:
    """Reads the tokens of a block of places, in whatever process that is."""

    url: str
    products: tuple[_Product, ...]

    def __call__(self, places: pa.Table) -> pa.Table:
        folder, read = Folder(self.url), {}
        # Files of a local cache stay open. Others are fetched whole, and only kept for the block that is of them.
        files = _open_files(self.url) if folder.is_local else _Files(folder)
        for one in self.products:
            names, rows = (places[column] for column in one.columns)
            read[one.asked] = files.read(one, names.to_pylist(), rows.to_numpy())
        small = places.drop_columns([column for one in self.products for column in one.columns])
        return pa.table({**dict(zip(small.column_names, small.columns, strict=True)), **read})


class _Files:
    """The files of a cache, as one process has them open."""

    def __init__(self, folder: Folder) -> None:
        self._grids, self._trajectories = OpenFiles(TokenFile, folder), OpenFiles(TrajectoryFile, folder)
        self._masks = OpenFiles(MaskFile, folder)

    def read(self, product: _Product, names: Sequence[str], rows_N: np.ndarray) -> pa.Array:
        """What lies at these rows of these files, as a column of tensors."""
        layout, places = product.layout, list(zip(names, rows_N.tolist(), strict=True))
        if layout is None:
            return ArrowTensorArray.from_numpy(np.stack([self._masks.get(n).read(row).masks_THW for n, row in places]))
        if product.kind == "grid":
            return ArrowTensorArray.from_numpy(plain_values(self._grids_at(names, rows_N), layout))
        bits = [self._trajectories.get(n).read(row).values_Nd for n, row in places]
        return ArrowVariableShapedTensorArray.from_numpy([plain_values(one, layout) for one in bits])

    def _grids_at(self, names: Sequence[str], rows_N: np.ndarray) -> np.ndarray:
        """Codes or the bits of latents (N,...), file by file."""
        names_N = np.array(names)
        chosen = [np.flatnonzero(names_N == name) for name in dict.fromkeys(names)]
        read = [self._grids.get(names[int(places[0])]).read(rows_N[places]) for places in chosen]
        return read[0] if len(read) == 1 else np.concatenate(read)[np.argsort(np.concatenate(chosen))]


@functools.cache
def _open_files(url: str) -> _Files:
    return _Files(Folder(url))


def _product(cache: TokenCache, asked: str, number: int) -> _Product:
    if asked.startswith(MASKS):
        full, kind = cache.masks_product(asked), "masks"
    elif asked.startswith(EMBEDDINGS) and asked in cache.info.products:
        full, kind = asked, "grid"
    else:
        full = cache.product(asked)
        kind = "trajectories" if cache.has_trajectories(full) else "grid"
    layout = None if kind == "masks" else layout_of(full, cache.info.products[full])
    columns = (f"__file_{number}", f"__row_{number}")
    return _Product(asked=asked, full=full, kind=kind, layout=layout, columns=columns)


def _places(
    cache: TokenCache, products: Sequence[_Product], where: str, columns: Sequence[str] | Mapping[str, str]
) -> pa.Table:
    """Clips with the columns asked for, and where each product has them, in the order of the first one's files."""
    asked = check_columns(columns, [one.asked for one in products])
    selected = {"clip_id": "clip_id", "num_valid": "num_valid::bigint", **asked}
    # A line for each, which may end in a comment; numbered, for names that differ in case alone are one to SQL.
    numbered = {name: f"_column_{i}" for i, name in enumerate(selected)}
    small = ", ".join(f"({expression}\n) as {numbered[name]}" for name, expression in selected.items())
    joins = "\n".join(
        f"join (select clip_id as id_{i}, name as {one.columns[0]}, row_in_file as {one.columns[1]} from locations"
        f" where product = ?) on id_{i} = {numbered['clip_id']}::uuid"
        for i, one in enumerate(products)
    )
    named = [f"{column} as {quoted(name)}" for name, column in numbered.items()]
    wanted = ", ".join([*named, *(column for one in products for column in one.columns)])
    file, row = products[0].columns
    chosen = f"(select {small} from {CLIPS_WITH_VIDEOS} where ({where}\n))"
    places = cache.sql(
        f"select {wanted} from {chosen} {joins} order by {file}, {row}",
        [one.full for one in products],
    )
    if not places.num_rows:
        names = ", ".join(one.full for one in products)
        raise CacheError(
            f'{cache.folder.url}: no clip has {names} where {where}: tokenmill sql CACHE "from clips" lists clips'
        )
    return places


def _clips_per_block(cache: TokenCache, products: Sequence[_Product]) -> int:
    sizes = cache.sql("select product, sum(size_bytes) / sum(num_rows) as size from files group by product").to_pylist()
    by_product = {row["product"]: row["size"] for row in sizes}
    size = sum(by_product[one.full] * (MASK_RATIO if one.kind == "masks" else 1) for one in products)
    return max(1, min(BLOCK_CLIPS, int(BLOCK_BYTES // size)))


def _blocks(places: pa.Table, file_column: str, num_clips: int) -> Iterator[pa.Table]:
    """Parts of `places` of one file and at most `num_clips` clips each."""
    files_N = places[file_column].combine_chunks().dictionary_encode().indices.to_numpy()
    ends = [*(np.flatnonzero(np.diff(files_N)) + 1).tolist(), len(files_N)]
    start = 0
    for end in ends:
        for first in range(start, end, num_clips):
            yield places.slice(first, min(num_clips, end - first))
        start = end
