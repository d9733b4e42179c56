"""A product as a loader sees it: its files, where their tokens lie, and how many values a clip has."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from ..schemas.errors import CacheError
from ..schemas.shard import EMBEDDINGS, FRAMES, MASKS
from .cache import TokenCache
from .decoding import layout_of
from .frame_file import EMBEDDINGS_COLUMN
from .token_file import LOW, TokenLayout

Kind = Literal["grid", "packed", "masks"]


@dataclass(frozen=True, slots=True, eq=False)
class RowGroups:
    """The row groups of a product's files, in the order of files and groups; arrays over groups (G) and files (F).

    Value n of the product lies in group ``searchsorted(value_ends_G, n, side="right")``. `offsets` and `checksums` are
    by column; an offset of -1 is unknown, since another tool has rewritten the file, and a checksum of -1 too.
    """

    files_G: np.ndarray
    numbers_G: np.ndarray
    value_ends_G: np.ndarray
    offsets: Mapping[str, np.ndarray]
    checksums: Mapping[str, np.ndarray]
    names_F: tuple[str, ...]
    sizes_F: np.ndarray
    rest_sha256_F: tuple[str | None, ...]


@dataclass(frozen=True, slots=True, eq=False)
class StoredProduct:
    """One product: clips have a grid each (also embeddings), several vectors each (``packed``), or masks.

    `widths` are the bytes of one value in each token column; of masks there are none. `file_starts` gives by file
    `name` the number of its `first_row`.
    """

    name: str
    kind: Kind
    layout: TokenLayout
    widths: Mapping[str, int]
    groups: RowGroups
    file_starts: pa.Table

    @property
    def tokens_per_clip(self) -> int:
        """Tokens of a clip where all have as many."""
        return self.layout.num_tokens

    def counts(self, cache: TokenCache) -> np.ndarray | None:
        """How many values each row of the files has, in their order; None where each has one."""
        if self.kind != "packed":
            return None
        name = self.name.partition("/")[2]
        counted = f"select clip_id, num_tokens::bigint as n from tokens_{name}"
        if self.name.startswith(f"{FRAMES}/"):
            counted = f"select clip_id, count(*) as n from frames_{name} group by clip_id"
        rows = cache.answer(
            f"""select n from locations l join file_starts using (name)
                join ({counted}) t on t.clip_id::uuid = l.clip_id
                where l.product = ? order by first_row + row_in_file""",
            [self.name],
            file_starts=self.file_starts,
        )
        return rows["n"].to_numpy().astype(np.int32)


def stored_product(cache: TokenCache, name: str) -> StoredProduct:
    """The product called `name`: ``dct``, ``tokens/dct``, ``masks/objects``, ``frames/clip``; CacheError lists them."""
    product = _full_name(cache, name)
    files = cache.answer(
        "select name, num_rows, size_bytes, rest_sha256 from files where product = ? order by name", [product]
    )
    if not files.num_rows:
        raise CacheError(f"{cache.folder.url}: nothing of {product} is committed yet: tokenmill status says what is")
    rows_F = files["num_rows"].to_numpy()
    starts = pa.table({"name": files["name"], "first_row": np.cumsum(rows_F) - rows_F})
    kind, layout, widths = _layout(cache, product)
    groups = _row_groups(cache, product, files)
    return StoredProduct(product, kind, layout, widths, groups, starts)


def _full_name(cache: TokenCache, name: str) -> str:
    if name in cache.info.products and (name.startswith((EMBEDDINGS, MASKS, f"{FRAMES}/"))):
        return name
    if f"{MASKS}{name}" in cache.info.products and f"tokens/{name}" not in cache.info.products:
        return f"{MASKS}{name}"
    return cache.product(name)


def _layout(cache: TokenCache, product: str) -> tuple[Kind, TokenLayout, Mapping[str, int]]:
    if product.startswith(MASKS):
        return "masks", TokenLayout(dtype="uint8", shape=(), codebook_size=256), {}
    if product.startswith(f"{FRAMES}/"):
        layout = TokenLayout(dtype="float16", shape=cache.info.products[product].shape, codebook_size=None)
        return "packed", layout, {EMBEDDINGS_COLUMN: layout.widths[LOW]}
    layout = layout_of(product, cache.info.products[product])
    return "packed" if cache.has_trajectories(product) else "grid", layout, layout.widths


def _row_groups(cache: TokenCache, product: str, files: pa.Table) -> RowGroups:
    rows = cache.answer(
        """select g.name, g.row_group, g."column", g.num_values, coalesce(g."offset", -1) as "offset",
                  coalesce(g.crc32, -1) as crc32
           from row_groups g join files f using (name) where f.product = ?
           order by g."column", g.name, g.row_group""",
        [product],
    )
    numbers_of = {name: i for i, name in enumerate(files["name"].to_pylist())}
    columns = rows["column"].to_numpy(zero_copy_only=False)
    by_column = {column: np.flatnonzero(columns == column) for column in dict.fromkeys(columns.tolist())}
    first = next(iter(by_column.values()), np.zeros(0, np.int64))
    names = rows["name"].take(first).to_pylist()
    return RowGroups(
        files_G=np.array([numbers_of[name] for name in names], np.int64),
        numbers_G=rows["row_group"].to_numpy()[first],
        value_ends_G=np.cumsum(rows["num_values"].to_numpy()[first]),
        offsets={column: rows["offset"].to_numpy()[places] for column, places in by_column.items()},
        checksums={column: rows["crc32"].to_numpy()[places] for column, places in by_column.items()},
        names_F=tuple(numbers_of),
        sizes_F=files["size_bytes"].to_numpy(),
        rest_sha256_F=tuple(files["rest_sha256"].to_pylist()),
    )
