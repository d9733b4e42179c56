"""The worker: what one process holds open while it makes shards."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from ..schemas.digest import digest_of
from ..schemas.shard import CLIPS, WEBDATASET
from ..schemas.tables import FORMAT_VERSION
from .decode import FrameDecoder
from .decoders import ClipDecoder
from .encode import BatchEncoder
from .storage import Folder
from .webdataset_output import tars_fingerprint

ShardsFormat = Literal["parquet", "webdataset", "both"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """Decoders that work side by side, an encoder for every token product, and the folder of the cache.

    `fingerprints` names the version of each product that this worker makes. `commits` is False where the store
    cannot create a file only if it is absent: the worker then publishes, and the driver alone commits.
    """

    folder: Folder
    decoders: tuple[ClipDecoder, ...]
    encoders: Mapping[str, BatchEncoder]
    fingerprints: Mapping[str, str]
    commits: bool = True

    @property
    def batch_size(self) -> int:
        """How many clips are worth decoding before the encoders run."""
        return max(encoder.batch_size for encoder in self.encoders.values())

    def encoders_for(self, products: Sequence[str]) -> dict[str, BatchEncoder]:
        """The encoders that making `products` takes: all of them for tars, which hold the tokens of every product."""
        return {p: encoder for p, encoder in self.encoders.items() if p in products or WEBDATASET in products}


def fingerprints_of(
    decoder: FrameDecoder, encoders: Mapping[str, BatchEncoder], format: ShardsFormat = "parquet"
) -> dict[str, str]:
    """The fingerprint of every product that `format` asks for: a digest of all that decides its bytes apart from
    the videos, in the order in which products are made.

    Tars come first: should the worker die between two products, they are the ones that take all tokens again.
    """
    tokens = {product: _tokens_fingerprint(decoder, encoder) for product, encoder in encoders.items()}
    prints = {WEBDATASET: tars_fingerprint(tokens)} if format != "parquet" else {}
    prints[CLIPS] = digest_of({"product": CLIPS, "format": FORMAT_VERSION, "decoder": decoder.identity})
    return prints if format == "webdataset" else prints | tokens


def _tokens_fingerprint(decoder: FrameDecoder, encoder: BatchEncoder) -> str:
    return digest_of(
        {
            "format": FORMAT_VERSION,
            "decoder": decoder.identity,
            "sampling": asdict(encoder.sampling),
            "tokenizer": asdict(encoder.tokenizer.spec),
            "stored": encoder.layout.dtype,
            "batch_size": encoder.batch_size,
        }
    )
