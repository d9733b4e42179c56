"""The store: rows of a shard -> files under content names -> one manifest per product, the commit point."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ..schemas.clip import ClipFailure, ClipFrames
from ..schemas.shard import CLIPS
from ..schemas.tables import CLIP_SCHEMA, with_format
from .encode import BatchEncoder
from .token_file import FINGERPRINT, write_token_file

TOKEN_ROWS_SCHEMA = pa.schema(
    [pa.field("clip_id", pa.string(), nullable=False), pa.field("num_valid", pa.uint32(), nullable=False)]
)


@dataclass(slots=True)
class ShardRows:
    """What a shard has made so far: decoded clips without their frames, tokens by product, failures."""

    clips: list[dict] = field(default_factory=list)
    tokens: dict[str, list[np.ndarray]] = field(default_factory=dict)
    failures: list[ClipFailure] = field(default_factory=list)

    def add(self, decoded: Sequence[ClipFrames], tokens: Mapping[str, torch.Tensor]) -> None:
        """Append a batch: the clips, and for each product their tokens in the same order."""
        for one in decoded:
            self.clips.append(
                {
                    "clip_id": one.clip.clip_id,
                    "video_id": one.clip.video.digest,
                    "start_s": one.clip.start_s,
                    "end_s": one.clip.end_s,
                    "num_valid": one.clip.num_valid,
                    "frame_pts_s": one.decoded_pts_s,
                    "decoder": one.decoder,
                }
            )
        for product, values in tokens.items():
            self.tokens.setdefault(product, []).append(bits_of(values))


def bits_of(tokens: torch.Tensor) -> np.ndarray:
    """Tokens as numpy can hold them: bfloat16 as the int16 of its bits, everything else as it is."""
    return (tokens.view(torch.int16) if tokens.dtype == torch.bfloat16 else tokens).numpy()


def write_product(
    staging: str, product: str, rows: ShardRows, encoder: BatchEncoder | None, version: str
) -> str | None:
    """Write one product of a shard to a local file and return its path; None where no clip succeeded.

    Rows lie in the order of clip_id, a digest, so that neighbours in a file are not neighbours in a video.
    """
    if not rows.clips:
        return None
    order = sorted(range(len(rows.clips)), key=lambda i: rows.clips[i]["clip_id"])
    table = pa.Table.from_pylist([rows.clips[i] for i in order], schema=CLIP_SCHEMA)
    path, footer = f"{staging}/{uuid.uuid4().hex}.parquet", {FINGERPRINT.decode(): version}
    if product == CLIPS:
        stored = table.cast(with_format(CLIP_SCHEMA, **footer))
        pq.write_table(stored, path, compression="zstd", write_page_checksum=True)
    elif encoder is not None:
        values_N = np.concatenate(rows.tokens[product])[order]
        write_token_file(path, table.select(TOKEN_ROWS_SCHEMA.names), values_N, encoder.layout, footer)
    return path
