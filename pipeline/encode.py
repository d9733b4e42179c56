"""Tokenizing on a fixed batch shape, so that tokens do not depend on how many clips came together."""

import logging
from dataclasses import dataclass

import numpy as np
import torch

from ..schemas.clip import FrameBatch, Sampling
from ..schemas.errors import TokenizerError
from ..tokenizers.base import NO_CODE, VideoTokenizer
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

    @property
    def layout(self) -> TokenLayout:
        """How one clip's tokens are stored: codes as uint16 planes, latents as numbers of `stored_dtype`."""
        spec, s = self.tokenizer.spec, self.sampling
        grid_thw = self.tokenizer.grid_shape(s.num_frames, s.height, s.width)
        if spec.kind == "discrete":
            return TokenLayout(dtype="uint16", shape=grid_thw, codebook_size=spec.codebook_size)
        dtype = self.stored_dtype or spec.dtype
        return TokenLayout(dtype=dtype, shape=(*grid_thw, spec.latent_dim or 1), codebook_size=None)

    def encode(self, batch: FrameBatch) -> "EncodedBatch":
        """The tokens of all clips of `batch`, in their order."""
        frames_BTHWC, splits = torch.from_numpy(batch.frames_BTHWC), []
        with torch.inference_mode():
            parts = [self._encode(part, self.batch_size, splits) for part in frames_BTHWC.split(self.batch_size)]
            tokens = torch.cat(parts)
            if self.tokenizer.spec.kind != "discrete":
                tokens = tokens.to(getattr(torch, self.layout.dtype))
        return EncodedBatch(tokens, num_splits=len(splits))

    def _encode(self, frames_BTHWC: torch.Tensor, shape: int, splits: list[int]) -> torch.Tensor:
        """The tokens of up to `shape` clips, run as so many, or in halves where memory is short: `splits` notes it."""
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
        splits.append(shape)
        return torch.cat([self._encode(part, half, splits) for part in frames_BTHWC.split(half)])


class EncodedBatch:
    """Tokens on their way to this process's memory: a GPU may still be at work on them. `num_splits` counts model calls
    that memory did not hold and that were made in halves.
    """

    def __init__(self, tokens: torch.Tensor, num_splits: int) -> None:
        self.shape, self.num_splits = tuple(tokens.shape), num_splits
        self._arrival = torch.cuda.Event() if tokens.is_cuda else None
        self._tokens = tokens.to("cpu", non_blocking=True)
        if self._arrival:
            self._arrival.record(torch.cuda.current_stream(tokens.device))

    def wait(self) -> torch.Tensor:
        """The tokens, on the CPU; TokenizerError where the arithmetic has left the numbers."""
        if self._arrival:
            self._arrival.synchronize()
        floating = self._tokens.is_floating_point()
        if not (self._tokens.isfinite().all() if floating else (self._tokens != NO_CODE).all()):
            raise TokenizerError(
                "the networks gave values that are not finite: set dtype (and stored_dtype) to float32 or bfloat16,"
                " whose range is wider than that of float16, or check the weights"
            )
        return self._tokens


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
