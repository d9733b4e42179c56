"""What stored token columns mean to tools that read a cache's files by themselves: docs/interop.md."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa

from ..schemas.cache_info import ProductInfo
from ..schemas.errors import CacheError
from ..schemas.shard import EMBEDDINGS
from .sql_bytes import bytes_of
from .store import embedding_layout
from .token_file import LOW, TokenLayout, from_planes

if TYPE_CHECKING:
    from .cache import TokenCache


class Columns(Protocol):
    """Columns by name: a dict, an Arrow table or record batch, a frame of Polars or pandas."""

    def __getitem__(self, name: str, /) -> Any: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenDecoder:
    """Turns the stored columns of many rows into arrays, in any process: it holds a layout, and no cache.

    ``decoder(batch)`` is ``{name: array}``: codes (N,...) uint16, or int32 for codebooks of more than 65,536; latents
    (N,...) as they are stored, but bfloat16 as float32, which is exact; of trajectories a list of (n,d) for each row.
    `Dataset.map(decoder, batched=True)` and `Dataset.set_transform(decoder)` of Hugging Face take it as it is.
    """

    name: str
    layout: TokenLayout
    has_trajectories: bool = False

    @property
    def columns(self) -> list[str]:
        """The columns of a file that it needs."""
        return list(self.layout.widths)

    def __call__(self, batch: Columns) -> dict[str, np.ndarray | list[np.ndarray]]:
        """The tokens of all rows of `batch`, whose columns are lists of bytes, numpy or Arrow arrays, or series.

        CacheError where a column is absent, or its values do not have the width of this product's.
        """
        stored = {name: self._column(batch, name) for name in self.columns}
        if not self.has_trajectories:
            return {self.name: self._decoded(stored)}
        lengths, values = _flattened(stored[LOW])
        tokens_Nd = self._decoded({LOW: values})
        return {self.name: np.split(tokens_Nd, np.cumsum(lengths)[:-1]) if lengths else []}

    def _decoded(self, stored: Mapping[str, Any]) -> np.ndarray:
        widths = self.layout.widths
        return plain_values(
            from_planes({n: self._plane(n, stored[n], w) for n, w in widths.items()}, self.layout), self.layout
        )

    def _plane(self, name: str, column: Any, width: int) -> np.ndarray:
        """The bytes (N, width) uint8 of a column."""
        if isinstance(column, np.ndarray) and column.dtype.kind in "SVu":
            stored = np.ascontiguousarray(column).reshape(len(column), -1).view(np.uint8).reshape(-1)
        elif isinstance(column, (pa.Array, pa.ChunkedArray)):
            stored = bytes_of(column)
        else:
            stored = np.frombuffer(b"".join(column), np.uint8)
        if stored.size != len(column) * width:
            raise CacheError(
                f"{self.name}: {len(column)} values of column {name} have {stored.size} bytes, {width} to each were"
                f" expected: give the decoder of the product that the files are of"
            )
        return stored.reshape(len(column), width)

    def _column(self, batch: Columns, name: str) -> Any:
        try:
            column = batch[name]
        except LookupError as error:
            raise CacheError(f"{self.name}: there is no column {name}: read {', '.join(self.columns)}") from error
        return column.to_arrow() if hasattr(column, "to_arrow") else column


def plain_values(values_N: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """Values of `from_planes` in number types that every tool knows: codes uint16 or int32, bfloat16 as float32."""
    if layout.dtype == "bfloat16":
        return (values_N.view("<u2").astype("<u4") << 16).view("<f4")
    is_small = layout.codebook_size is not None and not layout.high_bits
    return values_N.astype(np.uint16) if is_small else values_N


def _flattened(column: Any) -> tuple[list[int], Any]:
    """How many tokens each row of a column of lists has, and all of them in one column."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if isinstance(column, pa.Array):
        return np.diff(column.offsets.to_numpy()).tolist(), column.flatten()
    return [len(row) for row in column], [token for row in column for token in row]


def decoder_of(cache: "TokenCache", product: str) -> TokenDecoder:
    """The decoder of a product of tokens or embeddings, whose arrays come by the name `product`; CacheError lists what
    there is.
    """
    known = cache.info.products
    full = product if product.startswith(EMBEDDINGS) and product in known else cache.product(product)
    return TokenDecoder(
        name=product, layout=layout_of(full, known[full]), has_trajectories=cache.has_trajectories(full)
    )


def layout_of(product: str, entry: ProductInfo) -> TokenLayout:
    """How the values of one clip lie in the files of a product of tokens or embeddings (of trajectories: of one)."""
    if product.startswith(EMBEDDINGS):
        return embedding_layout(entry.shape[0])
    tokenizer = entry.tokenizer or {}
    size = tokenizer["codebook_size"]
    stored = (entry.section or {}).get("stored_dtype") or tokenizer["dtype"]
    dtype = stored if size is None else "uint16"
    return TokenLayout(dtype=dtype, shape=entry.shape, codebook_size=size, levels=entry.levels)


def token_files(cache: "TokenCache", product: str) -> list[str]:
    """The paths or URLs of the files of a product's current version, by name: of tokens (`dct`), or of any other by its
    full name (`clips`, `embeddings/objects`, `webdataset`). CacheError lists what there is.
    """
    full = product if product in cache.info.products else cache.product(product)
    names: Sequence[str] = cache.sql("select name from files where product = ? order by name", [full])[
        "name"
    ].to_pylist()
    return [cache.folder.uri(name) for name in names]
