"""Tokenizing on a fixed batch shape, so that tokens do not depend on how many clips came together."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ..schemas.clip import FrameBatch, Sampling
from ..schemas.errors import TokenizerError
from ..schemas.tokens import EmbeddingSpec, TrajectoryTokens
from ..tokenizers.base import NO_CODE, AnyTokenizer, LevelTokenizer, TrajectoryBatch, TrajectoryTokenizer, joined_levels
from .token_file import TokenLayout

log = logging.getLogger(__name__)

USUAL_BATCH, LARGEST_BATCH = 8, 256
VALUES, EMBEDDING = "values", "embedding"  # the tokens and the clip itself, among what a tokenizer gives

Tensors = Mapping[str, torch.Tensor]  # by name, the first dimension that of clips


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchEncoder:
    """A tokenizer and the one batch shape that it is run on; `stored_dtype` is that of latents, None the tokenizer's.

    Sums of floating-point numbers depend on the shape of a model's input, so the last batch is filled up with
    black clips, and `batch_size` is part of the product's fingerprint.
    """

    tokenizer: AnyTokenizer
    batch_size: int
    sampling: Sampling
    stored_dtype: str | None = None

    @property
    def has_trajectories(self) -> bool:
        """Whether tokens stand for trajectories, as many as a clip has, and not for a grid."""
        return self.tokenizer.spec.kind == "trajectory"

    @property
    def layout(self) -> TokenLayout:
        """How one clip's tokens (of trajectories: one token) are stored: codes as uint16 planes, latents as numbers of
        `stored_dtype`.
        """
        spec, s = self.tokenizer.spec, self.sampling
        if isinstance(self.tokenizer, LevelTokenizer):
            grids = self.tokenizer.level_grids(s.num_frames, s.height, s.width)
            return TokenLayout.of_levels(grids, spec.codebook_size or 0)
        grid_thw = self.tokenizer.grid_shape(s.num_frames, s.height, s.width)
        if spec.kind == "discrete":
            return TokenLayout(dtype="uint16", shape=grid_thw, codebook_size=spec.codebook_size)
        dtype, dims = self.stored_dtype or spec.dtype, (spec.latent_dim or 1,)
        return TokenLayout(dtype=dtype, shape=dims if self.has_trajectories else grid_thw + dims, codebook_size=None)

    @property
    def embedding(self) -> EmbeddingSpec | None:
        """What the tokenizer gives of each clip beside its tokens; None where it was not asked for it."""
        return self.tokenizer.embedding if isinstance(self.tokenizer, TrajectoryTokenizer) else None

    def encode(self, batch: FrameBatch) -> "EncodedBatch":
        """The tokens of all clips of `batch`, in their order."""
        frames_BTHWC, splits = torch.from_numpy(batch.frames_BTHWC), []
        with torch.inference_mode():
            parts = [self._encode(part, self.batch_size, splits) for part in frames_BTHWC.split(self.batch_size)]
            tensors = _joined(parts)
            if self.tokenizer.spec.kind != "discrete":
                tensors[VALUES] = tensors[VALUES].to(getattr(torch, self.layout.dtype))
            if EMBEDDING in tensors:
                tensors[EMBEDDING] = _of_clips(tensors[EMBEDDING], tensors["chunk_frames"], batch.num_valid_B)
        return EncodedBatch(tensors, batch.num_valid_B, num_splits=len(splits))

    def _encode(self, frames_BTHWC: torch.Tensor, shape: int, splits: list[int]) -> Tensors:
        """The tokens of up to `shape` clips, run as so many, or in halves where memory is short: `splits` notes it."""
        num_clips = len(frames_BTHWC)
        filled = frames_BTHWC
        if num_clips < shape and self.tokenizer.is_batched:
            filled = torch.cat((filled, filled.new_zeros((shape - num_clips, *filled.shape[1:]))))
        try:
            made = self.tokenizer.encode(filled)
            tensors = _tensors_of(made) if isinstance(made, TrajectoryBatch) else {VALUES: joined_levels(made)}
            return {name: tensor[:num_clips] for name, tensor in tensors.items()}
        except torch.OutOfMemoryError:
            half = shape // 2
            if not half:
                raise
        log.warning("event=batch_split clips=%d", shape)
        splits.append(shape)
        return _joined([self._encode(part, half, splits) for part in frames_BTHWC.split(half)])


def _joined(parts: list[Tensors]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _of_clips(embeddings_BCE: torch.Tensor, chunk_frames_B: torch.Tensor, num_valid_B: tuple[int, ...]) -> torch.Tensor:
    """The embedding (B,E) of each clip: the mean of those of its chunks that are not padding alone, at length 1."""
    begins_BC = chunk_frames_B[:, None] * torch.arange(embeddings_BCE.shape[1])
    is_real_BC1 = (begins_BC < torch.tensor(num_valid_B)[:, None]).unsqueeze(-1).to(embeddings_BCE.device)
    return F.normalize((embeddings_BCE * is_real_BC1).sum(1), dim=-1)


def _tensors_of(batch: TrajectoryBatch) -> Tensors:
    """The tensors of trajectories, each with one row for every clip."""
    num_clips = len(batch.values_BNd)
    found = {
        VALUES: batch.values_BNd,
        "valid": batch.valid_BN,
        "slots": batch.slots_N.expand(num_clips, -1),
        "chunks": batch.chunks_N.expand(num_clips, -1),
        "trajectories": batch.trajectories_BN,
        "assignment": batch.assignment_BThw,
        "chunk_frames": torch.full((num_clips,), batch.chunk_frames),
        "mass": batch.mass_BN,
        EMBEDDING: batch.embedding_BCE,
    }
    return {name: tensor for name, tensor in found.items() if tensor is not None}


class EncodedBatch:
    """Tokens on their way to this process's memory: a GPU may still be at work on them. `num_splits` counts model calls
    that memory did not hold and that were made in halves.
    """

    def __init__(self, tensors: Tensors, num_valid_B: tuple[int, ...], num_splits: int) -> None:
        self.num_splits, self._num_valid_B = num_splits, num_valid_B
        self._trajectories: list[TrajectoryTokens] | None = None
        values = tensors[VALUES]
        self._arrival = torch.cuda.Event() if values.is_cuda else None
        self._tensors = {name: tensor.to("cpu", non_blocking=True) for name, tensor in tensors.items()}
        if self._arrival:
            self._arrival.record(torch.cuda.current_stream(values.device))

    @property
    def num_tokens(self) -> int:
        """How many tokens the clips have together; those of trajectories are waited for."""
        if self._trajectories is not None or "valid" in self._tensors:
            return sum(len(clip.values_Nd) for clip in self.trajectories())
        values = self._tensors[VALUES]
        return math.prod(values.shape[:4]) if values.is_floating_point() else values.numel()

    def wait(self) -> Tensors:
        """The tensors, on the CPU, tokens as `VALUES`; TokenizerError where the arithmetic has left the numbers."""
        if self._arrival:
            self._arrival.synchronize()
        for name in self._tensors.keys() & {VALUES, EMBEDDING}:
            values = self._tensors[name]
            if values.isfinite().all() if values.is_floating_point() else (values != NO_CODE).all():
                continue
            raise TokenizerError(
                "the networks gave values that are not finite: set dtype (and stored_dtype) to float32 or bfloat16,"
                " whose range is wider than that of float16, or check the weights"
            )
        return self._tensors

    def trajectories(self) -> list[TrajectoryTokens]:
        """The tokens of each clip, where tokens stand for trajectories; bfloat16 as the int16 of its bits.

        Of what the tokenizer gave, embeddings alone are kept besides: rows of no trajectory are not worth memory.
        """
        if self._trajectories is not None:
            return self._trajectories
        tensors = self.wait()
        made: list[TrajectoryTokens] = []
        for i, (num_valid, valid) in enumerate(zip(self._num_valid_B, self._valid_BN(), strict=True)):
            made.append(
                TrajectoryTokens(
                    values_Nd=bits_of(tensors[VALUES][i][valid]),
                    slots_N=tensors["slots"][i][valid].numpy(),
                    chunks_N=tensors["chunks"][i][valid].numpy(),
                    trajectories_N=tensors["trajectories"][i][valid].numpy(),
                    assignment_Thw=tensors["assignment"][i].numpy(),
                    chunk_frames=int(tensors["chunk_frames"][i]),
                    num_valid=num_valid,
                    mass_N=tensors["mass"][i][valid].float().numpy() if "mass" in tensors else None,
                )
            )
        self._trajectories = made
        self._tensors = {name: tensor for name, tensor in tensors.items() if name == EMBEDDING}
        return made

    def _valid_BN(self) -> torch.Tensor:
        """Which rows stand for a trajectory, in chunks that are not padding alone."""
        tensors = self.wait()
        begins_BN = tensors["chunks"] * tensors["chunk_frames"][:, None]
        return tensors["valid"] & (begins_BN < torch.tensor(self._num_valid_B)[:, None])


def bits_of(tokens: torch.Tensor) -> np.ndarray:
    """Tokens as numpy can hold them: bfloat16 as the int16 of its bits, everything else as it is."""
    return (tokens.view(torch.int16) if tokens.dtype == torch.bfloat16 else tokens).numpy()


def largest_batch(tokenizer: AnyTokenizer, sampling: Sampling) -> int:
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
