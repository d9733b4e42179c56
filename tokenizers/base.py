"""What every tokenizer offers, and a small one for tests."""

from typing import Protocol

import torch

from ..schemas.errors import TokenizerError
from ..schemas.tokens import TokenizerSpec


class VideoTokenizer(Protocol):
    """Turns frames into tokens and back. Holds the weights, if it has any."""

    @property
    def spec(self) -> TokenizerSpec:
        """What decides the tokens, apart from the frames."""
        ...

    def grid_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """The (t,h,w) grid of a clip of this size; TokenizerError says which sizes are accepted."""
        ...

    def encode(self, frames_BTHWC: torch.Tensor) -> torch.Tensor:
        """uint8 RGB frames to int32 codes (B,t,h,w), or to latents (B,t,h,w,d) of the spec's dtype."""
        ...

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens as `encode` gives them to uint8 RGB frames (B,T,H,W,3)."""
        ...


def grid_of(num_frames: int, height: int, width: int, spec: TokenizerSpec) -> tuple[int, int, int]:
    """The (t,h,w) grid for sizes that `spec.stride_thw` divides; TokenizerError for others."""
    sizes = dict(zip(("num_frames", "height", "width"), (num_frames, height, width), strict=True))
    for (key, size), stride in zip(sizes.items(), spec.stride_thw, strict=True):
        if size < stride or size % stride:
            near = max(stride, round(size / stride) * stride)
            raise TokenizerError(
                f"{spec.name} takes clips whose {key} is a multiple of {stride}, found {size}: set clips.{key}={near}"
            )
    t, h, w = (size // stride for size, stride in zip(sizes.values(), spec.stride_thw, strict=True))
    return t, h, w


class FakeTokenizer:
    """One token per 4x8x8 block, its mean brightness: quick, exact and easy to check by hand."""

    spec = TokenizerSpec(
        name="fake", kind="discrete", codebook_size=256, latent_dim=None,
        stride_thw=(4, 8, 8), weights_sha256=None, dtype="float32",
    )  # fmt: skip

    def grid_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        return grid_of(num_frames, height, width, self.spec)

    def encode(self, frames_BTHWC: torch.Tensor) -> torch.Tensor:
        b, t, h, w, _ = frames_BTHWC.shape
        blocks = frames_BTHWC.to(torch.int32).reshape(b, t // 4, 4, h // 8, 8, w // 8, 8, 3)
        return blocks.sum(dim=(2, 4, 6, 7)) // (4 * 8 * 8 * 3)

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        for dim, stride in ((1, 4), (2, 8), (3, 8)):
            tokens = tokens.repeat_interleave(stride, dim=dim)
        return tokens.to(torch.uint8).unsqueeze(-1).expand(*tokens.shape, 3).contiguous()
