"""The worker: what one process holds open while it makes shards."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from ..schemas.digest import digest_of
from ..schemas.shard import CLIPS
from ..schemas.tables import FORMAT_VERSION
from .decode import FrameDecoder
from .encode import BatchEncoder
from .storage import Folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """The decoder, an encoder for every token product, and the folder of the cache.

    `fingerprints` names the version of each product that this worker makes.
    """

    folder: Folder
    decoder: FrameDecoder
    encoders: Mapping[str, BatchEncoder]
    fingerprints: Mapping[str, str]

    @property
    def batch_size(self) -> int:
        """How many clips are worth decoding before the encoders run."""
        return max(encoder.batch_size for encoder in self.encoders.values())


def fingerprints_of(decoder: FrameDecoder, encoders: Mapping[str, BatchEncoder]) -> dict[str, str]:
    """The fingerprint of every product: a digest of all that decides its bytes apart from the videos."""
    prints = {CLIPS: digest_of({"product": CLIPS, "format": FORMAT_VERSION, "decoder": decoder.identity})}
    for product, encoder in encoders.items():
        prints[product] = digest_of(
            {
                "format": FORMAT_VERSION,
                "decoder": decoder.identity,
                "sampling": asdict(encoder.sampling),
                "tokenizer": asdict(encoder.tokenizer.spec),
                "batch_size": encoder.batch_size,
            }
        )
    return prints
