"""The worker: what one process holds open while it makes shards."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from ..schemas.digest import digest_of
from ..schemas.shard import CLIPS, EMBEDDINGS, FRAMES, TOKENS, WEBDATASET
from ..schemas.tables import FORMAT_VERSION
from .decode import FrameDecoder
from .decoders import ClipDecoder
from .encode import USUAL_BATCH, BatchEncoder
from .frame_scores import FRAME_SCORES_REVISION
from .frames import FRAMES_REVISION, FrameEmbedder, FrameMaker
from .linking import LINK_REVISION
from .segment import MASKS_REVISION, MaskMaker
from .storage import Folder
from .webdataset_output import tars_fingerprint

ShardsFormat = Literal["parquet", "webdataset", "both"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """Decoders that work side by side, an encoder for every token product, a maker for every product of masks and one
    for candidate frames, and the folder of the cache.

    `fingerprints` names the version of each product that this worker makes. `commits` is False where the store
    cannot create a file only if it is absent: the worker then publishes, and the driver alone commits.
    """

    folder: Folder
    decoders: tuple[ClipDecoder, ...]
    encoders: Mapping[str, BatchEncoder]
    fingerprints: Mapping[str, str]
    mask_makers: Mapping[str, MaskMaker] = field(default_factory=dict)
    frame_maker: FrameMaker | None = None
    commits: bool = True

    @property
    def batch_size(self) -> int:
        """How many clips are worth decoding before the encoders run."""
        return max((encoder.batch_size for encoder in self.encoders.values()), default=USUAL_BATCH)

    def encoders_for(self, products: Sequence[str]) -> dict[str, BatchEncoder]:
        """The encoders that making `products` takes: all of them for tars, which hold the tokens of every product."""
        wanted = {product.replace(EMBEDDINGS, TOKENS) for product in products}
        return {p: encoder for p, encoder in self.encoders.items() if p in wanted or WEBDATASET in products}

    def mask_makers_for(self, products: Sequence[str]) -> dict[str, MaskMaker]:
        """The makers of masks that making `products` takes."""
        return {p: maker for p, maker in self.mask_makers.items() if p in products or WEBDATASET in products}

    def frame_embedders_for(self, products: Sequence[str]) -> dict[str, FrameEmbedder]:
        """The embedders of frames that making `products` takes; tars hold no frames."""
        embedders = self.frame_maker.embedders if self.frame_maker else {}
        return {p: embedder for p, embedder in embedders.items() if p in products}


def fingerprints_of(
    decoder: FrameDecoder,
    encoders: Mapping[str, BatchEncoder],
    mask_makers: Mapping[str, MaskMaker] | None = None,
    frame_maker: FrameMaker | None = None,
    format: ShardsFormat = "parquet",
) -> dict[str, str]:
    """The fingerprint of every product that `format` asks for: a digest of all that decides its bytes apart from
    the videos, in the order in which products are made.

    Tars come first: should the worker die between two products, they are the ones that take all tokens again.
    """
    made: dict[str, str] = {}
    for product, encoder in encoders.items():
        made |= _token_fingerprints(decoder, product, encoder)
    for product, maker in (mask_makers or {}).items():
        made[product] = _masks_fingerprint(decoder, maker)
    prints = {WEBDATASET: tars_fingerprint(made)} if format != "parquet" else {}
    prints[CLIPS] = digest_of({"product": CLIPS, "format": FORMAT_VERSION, "decoder": decoder.identity})
    prints |= {} if format == "webdataset" else made
    return prints | (_frame_fingerprints(decoder, frame_maker) if frame_maker else {})


def _token_fingerprints(decoder: FrameDecoder, product: str, encoder: BatchEncoder) -> dict[str, str]:
    """Of the tokens, and of the embeddings that come with them."""
    basis = {
        "format": FORMAT_VERSION,
        "decoder": decoder.identity,
        "sampling": asdict(encoder.sampling),
        "tokenizer": asdict(encoder.tokenizer.spec),
        "batch_size": encoder.batch_size,
    }
    prints = {product: digest_of(basis | {"stored": encoder.layout.dtype})}
    if encoder.embedding:
        prints[product.replace(TOKENS, EMBEDDINGS)] = digest_of(basis | {"embedding": asdict(encoder.embedding)})
    return prints


def _frame_fingerprints(decoder: FrameDecoder, maker: FrameMaker) -> dict[str, str]:
    """Of the candidate frames, and of every product of their embeddings."""
    basis = {
        "format": FORMAT_VERSION,
        "decoder": decoder.identity,
        "sampling": asdict(maker.sampling),
        "fps": maker.fps,
        "frames": FRAMES_REVISION,
    }
    prints = {FRAMES: digest_of(basis | {"scores": FRAME_SCORES_REVISION})}
    for product, embedder in maker.embedders.items():
        spec = {key: value for key, value in asdict(embedder.encoder.spec).items() if key != "calibration"}
        prints[product] = digest_of(basis | {"encoder": spec, "batch_size": embedder.batch_size})
    return prints


def _masks_fingerprint(decoder: FrameDecoder, maker: MaskMaker) -> str:
    return digest_of(
        {
            "format": FORMAT_VERSION,
            "decoder": decoder.identity,
            "sampling": asdict(maker.sampling),
            "segmenter": asdict(maker.segmenter.spec),
            "max_trajectories": maker.max_trajectories,
            "masks": [MASKS_REVISION, LINK_REVISION],
        }
    )
