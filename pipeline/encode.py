"""Tokenizing on a fixed batch shape, so that tokens do not depend on how many clips came together."""

from dataclasses import dataclass

import numpy as np
import torch

from ..schemas.clip import FrameBatch, Sampling
from ..tokenizers.base import VideoTokenizer
from .token_file import TokenLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchEncoder:
    """A tokenizer and the one batch shape that it is run on.

    Sums of floating-point numbers depend on the shape of a model's input, so the last batch is filled up with
    black clips, and `batch_size` is part of the product's fingerprint.
    """

    tokenizer: VideoTokenizer
    batch_size: int
    sampling: Sampling

    @property
    def layout(self) -> TokenLayout:
        """How one clip's tokens are stored: codes as uint16 planes, latents in the dtype of the arithmetic."""
        spec, s = self.tokenizer.spec, self.sampling
        grid_thw = self.tokenizer.grid_shape(s.num_frames, s.height, s.width)
        if spec.kind == "discrete":
            return TokenLayout(dtype="uint16", shape=grid_thw, codebook_size=spec.codebook_size)
        return TokenLayout(dtype=spec.dtype, shape=(*grid_thw, spec.latent_dim or 1), codebook_size=None)

    def encode(self, batch: FrameBatch) -> torch.Tensor:
        """The tokens of all clips of `batch`, in their order, on the CPU."""
        parts: list[torch.Tensor] = []
        for start in range(0, len(batch.clips), self.batch_size):
            frames_BTHWC = batch.frames_BTHWC[start : start + self.batch_size]
            num_clips = len(frames_BTHWC)
            if num_clips < self.batch_size:
                frames_BTHWC = np.pad(frames_BTHWC, ((0, self.batch_size - num_clips), *[(0, 0)] * 4))
            with torch.inference_mode():
                parts.append(self.tokenizer.encode(torch.from_numpy(frames_BTHWC))[:num_clips].cpu())
        return torch.cat(parts)
