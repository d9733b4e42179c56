"""The tar of a shard: what it made of every product, clip by clip."""

import json
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from ..schemas.shard import MASKS, TOKENS, WEBDATASET, VideoText
from ..schemas.tokens import TrajectoryTokens
from .encode import EMBEDDING, BatchEncoder
from .mask_file import MaskRow
from .store import ShardRows
from .webdataset_output import Sample, TarProduct, write_tar
from .worker import Worker

Arrays = dict[str, np.ndarray | Mapping[str, np.ndarray]]


def write_shard_tar(staging: str, rows: ShardRows, texts: Mapping[str, VideoText], worker: Worker, version: str) -> str:
    """Write all products of a worker to a local tar, with its index beside it; returns the path of the tar.

    `texts` are by video. Masks are ``<name>.masks.npz``, embeddings ``<name>.embedding.npy``.
    """
    path = f"{staging}/{uuid.uuid4().hex}.tar"
    described: dict[str, Mapping[str, Any]] = {}
    members: dict[str, Arrays] = {clip["clip_id"]: {} for clip in rows.clips}
    for product, encoder in worker.encoders.items():
        name = product.removeprefix(TOKENS)
        described[name] = described_tokens(encoder)
        for clip, arrays in zip(rows.sorted_clips(), _token_arrays(rows, product, encoder), strict=True):
            members[clip["clip_id"]][name] = arrays
        if encoder.embedding:
            values_NE = rows.sorted_values(product, EMBEDDING)
            described[f"{name}.embedding"] = {"tokenizer": encoder.tokenizer.spec.name, "dim": encoder.embedding.dim}
            for clip, embedding in zip(rows.sorted_clips(), values_NE, strict=True):
                members[clip["clip_id"]][f"{name}.embedding"] = embedding
    masks: dict[str, dict[str, MaskRow]] = {}
    for product, maker in worker.mask_makers.items():
        name = f"{product.removeprefix(MASKS)}.masks"
        described[name] = {"segmenter": json.loads(json.dumps(asdict(maker.segmenter.spec)))}
        masks[name] = {row.clip["clip_id"]: row for row in rows.sorted_masks(product)}
    samples = (
        Sample(
            clip=clip,
            text=texts.get(clip["video_id"], VideoText()),
            arrays=members[clip["clip_id"]] | {name: mask_arrays(of[clip["clip_id"]]) for name, of in masks.items()},
        )
        for clip in rows.sorted_clips(WEBDATASET)
    )
    write_tar(path, samples, described, version)
    return path


def mask_arrays(row: MaskRow) -> dict[str, np.ndarray]:
    """The masks of a clip as arrays by name."""
    masks = row.masks.unpack()
    ids = np.array(row.trajectory_ids, np.str_)
    return {"masks": masks.masks_THW, "graph": masks.graph_MT, "trajectory_ids": ids}


def described_tokens(encoder: BatchEncoder) -> dict[str, Any]:
    """What every sample says of a product of tokens."""
    return TarProduct(tokenizer=encoder.tokenizer.spec.name, layout=encoder.layout).to_json()


def _token_arrays(
    rows: ShardRows, product: str, encoder: BatchEncoder
) -> Iterator[np.ndarray | Mapping[str, np.ndarray]]:
    """The tokens of each clip: an array, or the arrays of trajectories."""
    tar = TarProduct(tokenizer=encoder.tokenizer.spec.name, layout=encoder.layout)
    if not encoder.has_trajectories:
        yield from tar.arrays(rows.sorted_values(product))
        return
    for clip in rows.sorted_trajectories(product):
        yield trajectory_arrays(clip, tar)


def trajectory_arrays(clip: TrajectoryTokens, tar: TarProduct) -> dict[str, np.ndarray]:
    """The tokens of a clip's trajectories as arrays by name."""
    arrays = {
        "tokens": tar.arrays(clip.values_Nd),
        "slots": clip.slots_N.astype("<u2"),
        "chunks": clip.chunks_N.astype("<u2"),
        "trajectories": clip.trajectories_N.astype("<u2"),
        "assignment": clip.assignment_Thw,
        "chunk_frames": np.array(clip.chunk_frames),
    }
    return arrays if clip.mass_N is None else arrays | {"mass": clip.mass_N}
