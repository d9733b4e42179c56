"""Tokenizing on a fixed batch shape, so that tokens do not depend on how many clips came together."""

import logging
from dataclasses import dataclass, field

import numpy as np
import torch

from ..schemas.clip import FrameBatch, Sampling
from ..tokenizers.base import VideoTokenizer
from .token_file import TokenLayout

log = logging.getLogger(__name__)

USUAL_BATCH, LARGEST_BATCH = 8, 256


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchEncoder:
    """A tokenizer and the one batch shape that it is run on; `stored_dtype` is that of latents, None the tokenizer's.

    Sums of floating-point numbers depend on the shape of a model's input, so the last batch is filled up with
    black clips, and `batch_size` is part of the product's fingerprint.
    """

    tokenizer: VideoTokenizer
    batch_size: int
    sampling: Sampling
    stored_dtype: str | None = None
    _splits: list[int] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def layout(self) -> TokenLayout:
        """How one clip's tokens are stored: codes as uint16 planes, latents as numbers of `stored_dtype`."""
        spec, s = self.tokenizer.spec, self.sampling
        grid_thw = self.tokenizer.grid_shape(s.num_frames, s.height, s.width)
        if spec.kind == "discrete":
            return TokenLayout(dtype="uint16", shape=grid_thw, codebook_size=spec.codebook_size)
        dtype = self.stored_dtype or spec.dtype
        return TokenLayout(dtype=dtype, shape=(*grid_thw, spec.latent_dim or 1), codebook_size=None)

    def encode(self, batch: FrameBatch) -> torch.Tensor:
        """The tokens of all clips of `batch`, in their order, where the tokenizer makes them."""
        frames_BTHWC = torch.from_numpy(batch.frames_BTHWC)
        with torch.inference_mode():
            tokens = torch.cat([self._encode(part, self.batch_size) for part in frames_BTHWC.split(self.batch_size)])
        return tokens if self.tokenizer.spec.kind == "discrete" else tokens.to(getattr(torch, self.layout.dtype))

    def take_splits(self) -> int:
        """How many batches did not fit into memory and were encoded in halves, since the last call."""
        number = len(self._splits)
        self._splits.clear()
        return number

    def _encode(self, frames_BTHWC: torch.Tensor, shape: int) -> torch.Tensor:
        """The tokens of up to `shape` clips, run as so many; in halves where memory is short of it."""
        num_clips = len(frames_BTHWC)
        filled = frames_BTHWC
        if num_clips < shape and self.tokenizer.is_batched:
            filled = torch.cat((filled, filled.new_zeros((shape - num_clips, *filled.shape[1:]))))
        try:
            return self.tokenizer.encode(filled)[:num_clips]
        except torch.OutOfMemoryError:
            half = shape // 2
            if not half:
                raise
        log.warning("event=batch_split clips=%d", shape)
        self._splits.append(shape)
        return torch.cat([self._encode(part, half) for part in frames_BTHWC.split(half)])


def largest_batch(tokenizer: VideoTokenizer, sampling: Sampling) -> int:
    """The largest power of two of clips that are encoded in at most half of the free memory of the device."""
    if not tokenizer.is_batched:
        return USUAL_BATCH
    clip_THWC = np.zeros((sampling.num_frames, sampling.height, sampling.width, 3), np.uint8)
    size = 1
    while size < LARGEST_BATCH:
        try:
            with torch.inference_mode():
                tokenizer.encode(torch.from_numpy(clip_THWC).expand(4 * size, -1, -1, -1, -1).contiguous())
        except torch.OutOfMemoryError:
            break
        size *= 2
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return size
