"""Caches of tokens that differ from place to place, and scores of their frames: what selections are made from."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from tokenmill.pipeline.cache import TokenCache, open_cache
from tokenmill.schemas.tokens import EmbeddingSpec, TokenizerSpec
from tokenmill.tokenizers.base import Levels, TrajectoryBatch, grid_of
from tokenmill.tokenizers.load import load_tokenizer

from . import test_cache

SIZE = {"num_frames": 16, "height": 64, "width": 96}
STRIDES = (4, 8, 8)


class Mixed:
    """Tokens that differ from place to place and clip to clip: codes of a codebook of some size, or latents."""

    is_batched = False

    def __init__(self, kind: int | str) -> None:
        size = kind if isinstance(kind, int) else None
        self.spec = TokenizerSpec(
            name="mixed", kind="discrete" if size else "continuous", codebook_size=size,
            latent_dim=None if size else 3, stride_thw=STRIDES, weights_sha256=None,
            dtype="float32" if size else str(kind),
        )  # fmt: skip

    def grid_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        return grid_of(num_frames, height, width, self.spec)

    def encode(self, frames_BTHWC: torch.Tensor) -> torch.Tensor:
        dims = () if self.spec.codebook_size else (3,)
        values = mixed(
            frames_BTHWC, (*self.grid_shape(*frames_BTHWC.shape[1:4]), *dims), self.spec.codebook_size or 999
        )
        return values.to(torch.int32) if self.spec.codebook_size else values.to(getattr(torch, self.spec.dtype)) / 8

    def margins(self, frames_BTHWC: torch.Tensor) -> None:
        return None

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens


def mixed(frames_BTHWC: torch.Tensor, shape: tuple[int, ...], below: int) -> torch.Tensor:
    """Numbers (B,*shape) from the content of clips and from places."""
    clip_B = frames_BTHWC.long().sum((1, 2, 3, 4))
    place = torch.arange(int(np.prod(shape))).reshape(shape)
    return (clip_B.reshape(-1, *[1] * len(shape)) * 7919 + place * 104_729 + place**2 * 31) % below


class MixedLevels:
    """The same for three levels, on one grid or on grids of their own."""

    is_batched = False
    spec = TokenizerSpec(
        name="mixed_levels", kind="discrete", codebook_size=1 << 16, latent_dim=None,
        stride_thw=STRIDES, weights_sha256=None, dtype="float32",
    )  # fmt: skip

    def __init__(self, *, native: bool) -> None:
        self._times = (2, 1, 1) if native else (1, 1, 1)

    def level_grids(self, num_frames: int, height: int, width: int) -> tuple[tuple[int, int, int], ...]:
        t, h, w = grid_of(num_frames, height, width, self.spec)
        return tuple((t * many, h * many, w * many) for many in self._times)

    def encode(self, frames_BTHWC: torch.Tensor) -> Levels:
        grids = self.level_grids(*frames_BTHWC.shape[1:4])
        levels = [((n + 1) * mixed(frames_BTHWC, grid, 1 << 14)).int() for n, grid in enumerate(grids)]
        return torch.stack(levels, dim=-1) if len(set(grids)) == 1 else levels

    def margins(self, frames_BTHWC: torch.Tensor) -> Any:
        return None

    def decode(self, tokens: Levels, num_frames: int | None = None) -> Any:
        return None


class Tracks:
    """Three trajectories, in chunks of 4 frames: a background, a wide one until frame 8, a narrow one in frames 5 to 7
    and, in another slot, 8 to 9.
    """

    is_batched = False
    embedding: EmbeddingSpec | None = None
    spec = TokenizerSpec(
        name="tracks", kind="trajectory", codebook_size=None, latent_dim=5,
        stride_thw=(1, 8, 8), weights_sha256=None, dtype="bfloat16",
    )  # fmt: skip

    def grid_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        return num_frames, height // 8, width // 8

    def encode(self, frames_BTHWC: torch.Tensor) -> TrajectoryBatch:
        num_clips, num_frames = frames_BTHWC.shape[:2]
        labels_Thw = torch.zeros((num_frames, 8, 12), dtype=torch.uint8)
        labels_Thw[:8, :, 6:] = 1
        labels_Thw[5:8, :, :2] = 2
        labels_Thw[8:10, :, :2] = 3
        chunks, slots = torch.arange(4).repeat_interleave(4), torch.arange(4).repeat(4)
        present = torch.stack([(labels_Thw[4 * c : 4 * c + 4] == s).any() for c, s in zip(chunks, slots, strict=True)])
        trajectories = torch.where(present, torch.tensor([0, 1, 2, 2])[slots], -1)
        return TrajectoryBatch(
            values_BNd=mixed(frames_BTHWC, (16, 5), 999).to(torch.bfloat16) / 8,
            valid_BN=present.expand(num_clips, -1),
            slots_N=slots.to(torch.int16),
            chunks_N=chunks.to(torch.int16),
            trajectories_BN=trajectories.to(torch.int16).expand(num_clips, -1),
            assignment_BThw=labels_Thw.expand(num_clips, -1, -1, -1),
            chunk_frames=4,
        )


TOKENIZERS: dict[str, Any] = {
    "tokens/short": Mixed(32_768),
    "tokens/long": Mixed(1 << 18),
    "tokens/dct": load_tokenizer("dct_fsq/488_262144"),
    "tokens/half": Mixed("float16"),
    "tokens/brain": Mixed("bfloat16"),
    "tokens/levels": MixedLevels(native=False),
    "tokens/native": MixedLevels(native=True),
    "tokens/tracks": Tracks(),
}


def make_cache(url: str, tokenizers: dict[str, Any]) -> TokenCache:
    """A cache of seven videos, in clips of `SIZE`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_cache, "SIZE", SIZE)
        patch.setattr(test_cache, "TOKENIZERS", tokenizers)
        test_cache.make_cache(url)
    return open_cache(url)


def scored_of(cache: TokenCache, seed: int = 0, share: float = 0.5, where: str = "true") -> pa.Table:
    """Some of the frames of every clip, with p at random: at least one of each."""
    rng, rows = np.random.default_rng(seed), []
    for clip in cache.clips(where).to_pylist():
        frames = np.flatnonzero(rng.random(clip["num_valid"]) < share)
        for frame in frames if len(frames) else [0]:
            rows.append({"clip_id": clip["clip_id"], "frame": int(frame), "p": float(rng.random() ** 3)})
    rng.shuffle(rows)
    return table_of(rows)


def table_of(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(
        rows, schema=pa.schema([("clip_id", pa.string()), ("frame", pa.int32()), ("p", pa.float64())])
    )
