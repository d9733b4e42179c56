"""The store: rows of a shard -> the local files of its products, which the commit publishes."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ..schemas.clip import ClipFailure, ClipFrames
from ..schemas.shard import WEBDATASET, VideoText
from ..schemas.tables import CLIP_SCHEMA, with_format
from .encode import BatchEncoder, EncodedBatch
from .token_file import FINGERPRINT, write_token_file
from .webdataset_output import Sample, TarProduct, write_tar

TOKEN_ROWS_SCHEMA = pa.schema(
    [pa.field("clip_id", pa.string(), nullable=False), pa.field("num_valid", pa.uint32(), nullable=False)]
)


@dataclass(slots=True)
class ShardRows:
    """What a shard has made so far: decoded clips without their frames, tokens by product, failures."""

    clips: list[dict] = field(default_factory=list)
    tokens: dict[str, list[EncodedBatch]] = field(default_factory=dict)
    failures: list[ClipFailure] = field(default_factory=list)

    def add(self, decoded: Sequence[ClipFrames], tokens: Mapping[str, EncodedBatch]) -> None:
        """Append a batch: the clips, and for each product their tokens in the same order.

        A GPU may still be at work on them: they are waited for when the next batch is on its way.
        """
        for one in decoded:
            self.clips.append(
                {
                    "clip_id": one.clip.clip_id,
                    "video_id": one.clip.video.digest,
                    "uri": one.clip.video.uri,
                    "start_s": one.clip.start_s,
                    "end_s": one.clip.end_s,
                    "num_valid": one.clip.num_valid,
                    "frame_pts_s": one.decoded_pts_s,
                    "decoder": one.decoder,
                }
            )
        for product, values in tokens.items():
            held = self.tokens.setdefault(product, [])
            for last in held[-1:]:
                last.wait()
            held.append(values)

    @property
    def order(self) -> list[int]:
        """The order of rows in every file, by clip_id: a digest, so neighbours in a file are not so in a video."""
        return sorted(range(len(self.clips)), key=lambda i: self.clips[i]["clip_id"])

    def sorted_clips(self) -> list[dict]:
        """The clips as files have them."""
        return [self.clips[i] for i in self.order]

    def sorted_tokens(self, product: str) -> np.ndarray:
        """Codes (N,...) or the bits of latents (N,...) of all clips, as files have them."""
        return np.concatenate([bits_of(batch.wait()) for batch in self.tokens[product]])[self.order]

    def num_splits(self, product: str) -> int:
        """How many model calls for a product were made in halves; tars hold the tokens of every product."""
        chosen = self.tokens.values() if product == WEBDATASET else [self.tokens.get(product, [])]
        return sum(batch.num_splits for batches in chosen for batch in batches)


def bits_of(tokens: torch.Tensor) -> np.ndarray:
    """Tokens as numpy can hold them: bfloat16 as the int16 of its bits, everything else as it is."""
    return (tokens.view(torch.int16) if tokens.dtype == torch.bfloat16 else tokens).numpy()


def write_clips(staging: str, rows: ShardRows, version: str) -> str:
    """Write what was decoded to a local file; returns its path."""
    path = f"{staging}/{uuid.uuid4().hex}.parquet"
    schema = with_format(CLIP_SCHEMA, **{FINGERPRINT.decode(): version})
    pq.write_table(_clip_table(rows).cast(schema), path, compression="zstd", write_page_checksum=True)
    return path


def write_tokens(staging: str, rows: ShardRows, product: str, encoder: BatchEncoder, version: str) -> str:
    """Write the tokens of one product to a local file; returns its path."""
    path = f"{staging}/{uuid.uuid4().hex}.parquet"
    table = _clip_table(rows).select(TOKEN_ROWS_SCHEMA.names)
    write_token_file(path, table, rows.sorted_tokens(product), encoder.layout, {FINGERPRINT.decode(): version})
    return path


def write_shard_tar(
    staging: str, rows: ShardRows, texts: Mapping[str, VideoText], encoders: Mapping[str, BatchEncoder], version: str
) -> str:
    """Write the tokens of all products to a local tar, with its index beside it; returns the path of the tar.

    `texts` are by video, `encoders` by product.
    """
    path = f"{staging}/{uuid.uuid4().hex}.tar"
    names = {product: product.removeprefix("tokens/") for product in encoders}
    products = {
        names[product]: TarProduct(tokenizer=encoder.tokenizer.spec.name, layout=encoder.layout)
        for product, encoder in encoders.items()
    }
    arrays = {name: products[name].arrays(rows.sorted_tokens(product)) for product, name in names.items()}
    samples = (
        Sample(
            clip=clip,
            text=texts.get(clip["video_id"], VideoText()),
            arrays={name: array[i] for name, array in arrays.items()},
        )
        for i, clip in enumerate(rows.sorted_clips())
    )
    write_tar(path, samples, products, version)
    return path


def _clip_table(rows: ShardRows) -> pa.Table:
    return pa.Table.from_pylist(rows.sorted_clips(), schema=CLIP_SCHEMA)
