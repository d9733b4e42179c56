"""The blocks of VidTok's networks, on frames that lie as (time, batch, rows, columns, channels).

Channels are innermost, so that norms, products and 2-D convolutions need no copies, and time is outermost, so that
the frames before others are a slice. A kernel of three frames is three products with slices. Frames may come a few
at a time: what a layer needs of earlier ones is kept in a `Memory`.
"""

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

# What kernels see beyond the first frame: zeros, or copies of it. Symmetric ones see zeros beyond the last one too.
Padding = Literal["zeros", "replicate", "symmetric"]
EPS = 1e-6


class Memory:
    """What layers keep of earlier frames of a clip that comes in parts; `is_last` is set for its last part."""

    def __init__(self) -> None:
        self.frames: dict[nn.Module, torch.Tensor] = {}
        self.is_last = False


class Nested(nn.Module):
    """A layer under the name `conv`: official causal convolutions are wrapped once more than others."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, *inputs: object) -> torch.Tensor:
        return self.conv(*inputs)


def named_for(padding: Padding, conv: nn.Module) -> nn.Module:
    """The layer `conv`, wrapped as the official state dict has it."""
    return conv if padding == "symmetric" else Nested(conv)


def taps(
    frames: torch.Tensor, before: torch.Tensor | None, first: int, stride: int, num_out: int
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(k, i, frames): what tap k of a kernel of three sees for outputs i, i+1, .., where it sees a frame at all.

    Tap 0 of output 0 sees frame `first`; frames before frame 0 are the last of `before`, and zeros, which add nothing,
    before these.
    """
    num_known = 0 if before is None else len(before)
    for k in range(3):
        start = first + k
        num_before = min(num_out, max(0, -(start // stride)))
        num_zeros = min(num_before, max(0, -((start + num_known) // stride)))
        if before is not None and num_before > num_zeros:
            yield k, num_zeros, before[num_known + start + num_zeros * stride :: stride][: num_before - num_zeros]
        seen = frames[start + num_before * stride :: stride][: num_out - num_before]
        if len(seen):
            yield k, num_before, seen


def frames_before(
    layer: nn.Module, frames: torch.Tensor, padding: Padding, memory: Memory | None
) -> torch.Tensor | None:
    """The two frames before `frames`, less those that are zeros; their successors are kept for the next part."""
    before = memory.frames.get(layer) if memory else None
    if before is None and padding == "replicate":
        before = frames[:1].expand(2, *frames.shape[1:])
    if memory:
        last = frames[-2:]
        if len(last) < 2 and before is not None:
            last = torch.cat((before[-1:], last))
        memory.frames[layer] = last.clone()
    return before


class Norm(nn.Module):
    """Layer norm over channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=EPS)

    def forward(self, x_TBHWC: torch.Tensor) -> torch.Tensor:
        return self.norm(x_TBHWC)


class PixelConv(nn.Conv3d):
    """A product of every pixel's channels with a matrix, (C,C,1,1,1) in the state dict."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 1)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, self.weight.flatten(1), self.bias)


class SpaceConv(nn.Conv2d):
    """A convolution of each frame."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return conv_2d(input, self.weight, self.bias, self.stride, self.padding)


def conv_2d(
    x_TBHWC: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: tuple[int, ...] | int = 1,
    padding: str | tuple[int, ...] | int = 1,
) -> torch.Tensor:
    """F.conv2d of each frame (T,B,H,W,C)."""
    t, b = x_TBHWC.shape[:2]
    y = F.conv2d(x_TBHWC.flatten(0, 1).permute(0, 3, 1, 2), weight, bias, stride, padding)  # pyright: ignore
    return y.permute(0, 2, 3, 1).unflatten(0, (t, b))


class TimeConv(nn.Module):
    """A convolution over three frames, stride 1, of each pixel (kernel (3,)) or of 3x3 pixels (kernel (3,3,3))."""

    def __init__(self, c_in: int, c_out: int, kernel: tuple[int, ...], padding: Padding) -> None:
        super().__init__()
        # In memory the taps lie apart, each of them ready for use; the state dict does not show it.
        apart = torch.empty(3, c_out, *kernel[1:], c_in)
        self.weight = nn.Parameter(apart.movedim(0, -1).movedim(-2, 1).movedim(-1, 2))
        self.bias = nn.Parameter(torch.empty(c_out))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)  # as torch does for its own convolutions
        bound = self.weight[0].numel() ** -0.5
        nn.init.uniform_(self.bias, -bound, bound)
        self._padding: Padding = padding

    def forward(self, x_TBHWC: torch.Tensor, memory: Memory | None) -> torch.Tensor:
        y_TBHWC = x_TBHWC.new_empty((*x_TBHWC.shape[:-1], len(self.bias))).copy_(self.bias)
        first, before = -1, None
        if self._padding != "symmetric":
            first, before = -2, frames_before(self, x_TBHWC, self._padding, memory)
        for k, i, frames in taps(x_TBHWC, before, first, 1, len(x_TBHWC)):
            self.add_tap(y_TBHWC[i : i + len(frames)], frames, k)
        return y_TBHWC

    def add_tap(self, y_TBHWC: torch.Tensor, x_TBHWC: torch.Tensor, k: int) -> None:
        """Add what tap `k` of the kernel makes of `x`."""
        weight = self.weight[:, :, k]
        if weight.ndim == 2:
            y_TBHWC.flatten(0, -2).addmm_(x_TBHWC.flatten(0, -2), weight.T)
        else:
            y_TBHWC += conv_2d(x_TBHWC, weight, None)


class SpaceBlock(nn.Module):
    """Norm, SiLU, 3x3 convolution, twice, beside a shortcut; each frame by itself."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.norm1 = Norm(c_in)
        self.conv1 = SpaceConv(c_in, c_out, 3, padding=1)
        self.norm2 = Norm(c_out)
        self.conv2 = SpaceConv(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = SpaceConv(c_in, c_out, 1)

    def forward(self, x_TBHWC: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x_TBHWC), inplace=True))
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        return h.add_(self.nin_shortcut(x_TBHWC) if hasattr(self, "nin_shortcut") else x_TBHWC)


class TimeBlock(nn.Module):
    """Norm, SiLU, convolution over time (`kernel` as in TimeConv), twice, beside the identity."""

    def __init__(self, channels: int, kernel: tuple[int, ...], padding: Padding) -> None:
        super().__init__()
        self.norm1 = Norm(channels)
        self.conv1 = named_for(padding, TimeConv(channels, channels, kernel, padding))
        self.norm2 = Norm(channels)
        self.conv2 = named_for(padding, TimeConv(channels, channels, kernel, padding))

    def forward(self, x_TBHWC: torch.Tensor, memory: Memory | None) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x_TBHWC), inplace=True), memory)
        h = self.conv2(F.silu(self.norm2(h), inplace=True), memory)
        return h.add_(x_TBHWC)


class Attention(nn.Module):
    """Self-attention among the pixels of each frame, one head."""

    def __init__(self, channels: int, padding: Padding) -> None:
        super().__init__()
        self.norm = Norm(channels)
        self.q, self.k, self.v, self.proj_out = (named_for(padding, PixelConv(channels)) for _ in range(4))

    def forward(self, x_TBHWC: torch.Tensor) -> torch.Tensor:
        t, b, h, w, c = x_TBHWC.shape
        normed = self.norm(x_TBHWC).reshape(t * b, 1, h * w, c)
        attended = F.scaled_dot_product_attention(self.q(normed), self.k(normed), self.v(normed))
        return self.proj_out(attended).reshape(x_TBHWC.shape).add_(x_TBHWC)


class SpaceDown(nn.Module):
    """Half the rows and columns."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = SpaceConv(channels, channels, 3, stride=2)

    def forward(self, x_TBHWC: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x_TBHWC, (0, 0, 0, 1, 0, 1)))


class SpaceUp(nn.Module):
    """Twice the rows and columns."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = SpaceConv(channels, channels, 3, padding=1)

    def forward(self, x_TBHWC: torch.Tensor) -> torch.Tensor:
        t, b, h, w, c = x_TBHWC.shape
        twice = x_TBHWC[:, :, :, None, :, None].expand(t, b, h, 2, w, 2, c)
        return self.conv(twice.reshape(t, b, 2 * h, 2 * w, c))


class TimeResample(nn.Module):
    """What TimeDown and TimeUp share: a 3x3x3 convolution, blended with a plain resampling by a learned share."""

    def __init__(self, channels: int, padding: Padding) -> None:
        super().__init__()
        self.mix_factor = nn.Parameter(torch.tensor([2.0]))
        self.conv = named_for(padding, TimeConv(channels, channels, (3, 3, 3), padding))
        self._padding: Padding = padding


class TimeDown(TimeResample):
    """Half the frames: the mean of three, blended with a convolution of the same three."""

    def forward(self, x_TBHWC: torch.Tensor, memory: Memory | None) -> torch.Tensor:
        conv = self.conv.conv if isinstance(self.conv, Nested) else self.conv
        assert isinstance(conv, TimeConv)
        num_out, first, before = len(x_TBHWC) // 2, 0, None
        if self._padding != "symmetric":
            is_first = not memory or self not in memory.frames
            before = frames_before(self, x_TBHWC, self._padding, memory)
            if self._padding == "replicate" and is_first and len(x_TBHWC) % 2:
                num_out, first = num_out + 1, -2  # the first frame is a still: it stands for all copies of it
            else:
                first = -1
        shape = (num_out, *x_TBHWC.shape[1:])
        mean, blend = x_TBHWC.new_zeros(shape), x_TBHWC.new_empty(shape).copy_(conv.bias)
        for k, i, frames in taps(x_TBHWC, before, first, 2, num_out):
            mean[i : i + len(frames)] += frames
            conv.add_tap(blend[i : i + len(frames)], frames, k)
        share = self.mix_factor.sigmoid()
        return blend.mul_(1 - share).add_(mean.mul_(share / 3))


class TimeUp(TimeResample):
    """Twice the frames: each one twice, or in straight lines between them, blended with a convolution of the result."""

    def forward(self, x_TBHWC: torch.Tensor, memory: Memory | None) -> torch.Tensor:
        replicates = self._padding == "replicate"
        twice = self._interpolated(x_TBHWC, memory) if replicates else x_TBHWC.repeat_interleave(2, dim=0)
        share = self.mix_factor.sigmoid()
        return self.conv(twice, memory).mul_(1 - share).add_(twice.mul_(share))

    def _interpolated(self, x_TBHWC: torch.Tensor, memory: Memory | None) -> torch.Tensor:
        """The first frame, which is a still and stays one frame; the others in straight lines, clamped at both ends.

        What comes after a frame needs the next one: it waits for it in `memory`.
        """
        known = memory.frames.get(self) if memory else None
        still = x_TBHWC[:1] if known is None else x_TBHWC[:0]
        rest = x_TBHWC[len(still) :] if known is None else torch.cat((known, x_TBHWC))
        if memory:
            memory.frames[self] = rest[-1:].clone()
        begin = rest[:1] if known is None or not len(known) else rest[:0]
        end = rest[-1:] if not memory or memory.is_last else rest[:0]
        one, other = rest[:-1].float(), rest[1:].float()
        between = torch.stack((torch.lerp(one, other, 0.25), torch.lerp(one, other, 0.75)), dim=1).flatten(0, 1)
        return torch.cat((still, begin, between.to(rest.dtype), end))
