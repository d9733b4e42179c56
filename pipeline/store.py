"""The store: rows of a shard -> the local files of its products, which the commit publishes."""

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..schemas.clip import ClipFailure, ClipFrames
from ..schemas.shard import EMBEDDINGS, TOKENS, WEBDATASET
from ..schemas.tables import CLIP_SCHEMA, with_format
from ..schemas.tokens import TrajectoryTokens
from .encode import EMBEDDING, VALUES, BatchEncoder, EncodedBatch, bits_of
from .frame_file import write_embedded_frames, write_frames
from .frames import EmbeddedFrames, FrameEmbedder, FrameRows
from .mask_file import MaskRow, PackedMasks, write_mask_file
from .segment import MaskMaker, SegmentedClip
from .token_file import FINGERPRINT, TokenLayout, write_token_file
from .trajectories import ClipLinks
from .trajectory_file import write_trajectory_file

TOKEN_ROWS_SCHEMA = pa.schema(
    [pa.field("clip_id", pa.string(), nullable=False), pa.field("num_valid", pa.uint32(), nullable=False)]
)


@dataclass(slots=True)
class ShardRows:
    """What a shard has made so far: decoded clips without their frames, tokens and masks by product, failures.

    `links` say, by product of masks, which trajectories go on from clip to clip. `mask_failures` are, by product, of
    clips that were decoded and could not be segmented.
    """

    clips: list[dict] = field(default_factory=list)
    tokens: dict[str, list[EncodedBatch]] = field(default_factory=dict)
    masks: dict[str, dict[str, PackedMasks]] = field(default_factory=dict)
    links: dict[str, ClipLinks] = field(default_factory=dict)
    frames: list[FrameRows] = field(default_factory=list)
    embedded_frames: dict[str, list[EmbeddedFrames]] = field(default_factory=dict)
    failures: list[ClipFailure] = field(default_factory=list)
    mask_failures: dict[str, list[ClipFailure]] = field(default_factory=dict)

    def add_clips(self, decoded: Sequence[ClipFrames]) -> None:
        """Append a batch of clips."""
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

    def add_masks(self, made: Mapping[str, Sequence[SegmentedClip | ClipFailure]]) -> None:
        """Append the masks of the clips that were added last, by product, in their order."""
        for product, segmented in made.items():
            masks, links = self.masks.setdefault(product, {}), self.links.setdefault(product, ClipLinks())
            newest = self.clips[len(self.clips) - len(segmented) :]
            for clip, one in zip(newest, segmented, strict=True):
                if isinstance(one, ClipFailure):
                    self.mask_failures.setdefault(product, []).append(one)
                else:
                    masks[clip["clip_id"]] = PackedMasks.pack(one.masks)
                    links.add(clip, one)

    def add_frames(self, described: Sequence[FrameRows], embedded: Mapping[str, Sequence[EmbeddedFrames]]) -> None:
        """Append the candidate frames of the clips that were added last, in their order, and their embeddings."""
        self.frames.extend(described)
        for product, values in embedded.items():
            self.embedded_frames.setdefault(product, []).extend(values)

    def add_tokens(self, tokens: Mapping[str, EncodedBatch]) -> None:
        """Append the tokens of the clips that were added last, by product, in their order.

        A GPU may still be at work on them: they are waited for when the next batch is on its way.
        """
        for product, values in tokens.items():
            held = self.tokens.setdefault(product, [])
            for last in held[-1:]:
                last.wait()
            held.append(values)

    @property
    def order(self) -> list[int]:
        """The order of rows in every file, by clip_id: a digest, so neighbours in a file are not so in a video."""
        return sorted(range(len(self.clips)), key=lambda i: self.clips[i]["clip_id"])

    def sorted_clips(self, product: str = "") -> list[dict]:
        """The clips as the files of a product have them: of masks, and of tars, those that could be segmented."""
        failed = self._unsegmented(product)
        return [clip for clip in (self.clips[i] for i in self.order) if clip["clip_id"] not in failed]

    def failures_of(self, product: str) -> tuple[ClipFailure, ...]:
        """What could not be made of a product, by clip."""
        failures = [*self.failures, *self._unsegmented(product).values()]
        return tuple(sorted(failures, key=lambda failure: failure.clip_id))

    def _unsegmented(self, product: str) -> dict[str, ClipFailure]:
        """Decoded clips that a product lacks, by clip: tars hold all products of a clip or nothing."""
        failed = self.mask_failures.values() if product == WEBDATASET else [self.mask_failures.get(product, [])]
        return {failure.clip_id: failure for failures in failed for failure in failures}

    def sorted_values(self, product: str, name: str = VALUES) -> np.ndarray:
        """Codes (N,...) or the bits of latents (N,...) of all clips, as files have them; or their embeddings (N,E)."""
        return np.concatenate([bits_of(batch.wait()[name]) for batch in self.tokens[product]])[self.order]

    def sorted_trajectories(self, product: str) -> list[TrajectoryTokens]:
        """The tokens of trajectories of all clips, as files have them."""
        made = [one for batch in self.tokens[product] for one in batch.trajectories()]
        return [made[i] for i in self.order]

    def sorted_masks(self, product: str) -> list[MaskRow]:
        """The masks of all clips that have any, as files have them."""
        masks, ids = self.masks[product], self.links[product].ids(self.clips)
        return [
            MaskRow(clip=clip, masks=masks[clip["clip_id"]], trajectory_ids=ids[clip["clip_id"]])
            for clip in self.sorted_clips(product)
        ]

    def num_splits(self, product: str) -> int:
        """How many model calls for a product were made in halves; tars hold the tokens of every product."""
        chosen = self.tokens.values() if product == WEBDATASET else [self.tokens.get(product, [])]
        return sum(batch.num_splits for batches in chosen for batch in batches)


def write_clips(staging: str, rows: ShardRows, version: str) -> str:
    """Write what was decoded to a local file; returns its path."""
    path = _new_path(staging)
    schema = with_format(CLIP_SCHEMA, **{FINGERPRINT.decode(): version})
    pq.write_table(_clip_table(rows).cast(schema), path, compression="zstd", write_page_checksum=True)
    return path


def write_tokens(staging: str, rows: ShardRows, product: str, encoder: BatchEncoder, version: str) -> str:
    """Write the tokens of one product to a local file; returns its path."""
    path, footer = _new_path(staging), {FINGERPRINT.decode(): version}
    if encoder.has_trajectories:
        clip_ids = [clip["clip_id"] for clip in rows.sorted_clips()]
        write_trajectory_file(path, clip_ids, rows.sorted_trajectories(product), encoder.layout, footer)
    else:
        write_token_file(path, _id_table(rows), rows.sorted_values(product), encoder.layout, footer)
    return path


def write_embeddings(staging: str, rows: ShardRows, product: str, version: str) -> str:
    """Write the embeddings of clips to a local file; returns its path."""
    path = _new_path(staging)
    values_NE = rows.sorted_values(product.replace(EMBEDDINGS, TOKENS), EMBEDDING)
    write_token_file(
        path, _id_table(rows), values_NE, embedding_layout(values_NE.shape[1]), {FINGERPRINT.decode(): version}
    )
    return path


def write_masks(staging: str, rows: ShardRows, product: str, maker: MaskMaker, version: str) -> str:
    """Write the masks of one product to a local file; returns its path."""
    path = _new_path(staging)
    spec = json.loads(json.dumps(asdict(maker.segmenter.spec)))
    write_mask_file(path, rows.sorted_masks(product), spec, {FINGERPRINT.decode(): version})
    return path


def write_candidate_frames(staging: str, rows: ShardRows, version: str) -> str:
    """Write the candidate frames to a local file; returns its path."""
    path, clips = _new_path(staging), rows.sorted_clips()
    frames = (rows.frames[i] for i in rows.order)
    small = [
        {"clip_id": clip["clip_id"], "video_id": clip["video_id"], "frames": one}
        for clip, one in zip(clips, frames, strict=True)
    ]
    write_frames(path, small, {FINGERPRINT.decode(): version})
    return path


def write_frame_embeddings(staging: str, rows: ShardRows, product: str, embedder: FrameEmbedder, version: str) -> str:
    """Write the embeddings of candidate frames by one encoder to a local file; returns its path."""
    path = _new_path(staging)
    embedded = [rows.embedded_frames[product][i] for i in rows.order]
    spec = json.loads(json.dumps(asdict(embedder.encoder.spec)))
    write_embedded_frames(path, rows.sorted_clips(), embedded, spec, {FINGERPRINT.decode(): version})
    return path


def embedding_layout(dim: int) -> TokenLayout:
    """How the embedding of one clip is stored."""
    return TokenLayout(dtype="float32", shape=(dim,), codebook_size=None)


def _new_path(staging: str) -> str:
    return f"{staging}/{uuid.uuid4().hex}.parquet"


def _clip_table(rows: ShardRows) -> pa.Table:
    return pa.Table.from_pylist(rows.sorted_clips(), schema=CLIP_SCHEMA)


def _id_table(rows: ShardRows) -> pa.Table:
    return _clip_table(rows).select(TOKEN_ROWS_SCHEMA.names)
