"""The blocks of the causal VAE below PyraTok (of the kind of Wan 2.1), on frames that lie as VidTok's do.

That is (time, batch, rows, columns, channels), a few frames at a time where a `Memory` keeps what layers need of
earlier ones. Before the first frame convolutions over time see zeros. Keys and shapes are those of diffusers' state
dict.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .vidtok_layers import Memory, SpaceConv, TimeConv, conv_2d, frames_before, taps

NORM_EPS = 1e-12  # the length below which vectors are not made longer


class LengthNorm(nn.Module):
    """Each pixel's channels brought to the length sqrt(C), times a learned gain; `ndim` is that of the tensors."""

    def __init__(self, channels: int, ndim: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * ndim))

    def forward(self, x_TBHWC: torch.Tensor) -> torch.Tensor:
        least = max(NORM_EPS, torch.finfo(x_TBHWC.dtype).tiny)
        length_TBHW1 = torch.linalg.vector_norm(x_TBHWC, dim=-1, keepdim=True).clamp_min(least)
        return (x_TBHWC / length_TBHW1).mul_(self.gamma.flatten() * len(self.gamma) ** 0.5)


class PixelProduct(nn.Module):
    """A product of every pixel's channels with a matrix, kept as a convolution over `ndim` dimensions."""

    def __init__(self, c_in: int, c_out: int, ndim: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(c_out, c_in, *(1,) * ndim))
        self.bias = nn.Parameter(torch.empty(c_out))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)  # as torch does for its own convolutions
        nn.init.uniform_(self.bias, -(c_in**-0.5), c_in**-0.5)

    def forward(self, x_TBHWC: torch.Tensor) -> torch.Tensor:
        return F.linear(x_TBHWC, self.weight.flatten(1), self.bias)


class CausalConv(TimeConv):
    """A convolution over 3x3x3 pixels: those of a frame and of the two before it."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__(c_in, c_out, (3, 3, 3), "zeros")


class NarrowConv(CausalConv):
    """The same for few input channels, which are laid side by side: one product in place of three narrow ones."""

    def forward(self, x_TBHWC: torch.Tensor, memory: Memory | None) -> torch.Tensor:
        before = frames_before(self, x_TBHWC, "zeros", memory)
        known = x_TBHWC if before is None else torch.cat((before, x_TBHWC))
        frames = F.pad(known, (0,) * 8 + (2 + len(x_TBHWC) - len(known), 0))
        beside_TBHWC = torch.cat((frames[:-2], frames[1:-1], frames[2:]), dim=-1)
        return conv_2d(beside_TBHWC, self.weight.movedim(2, 1).flatten(1, 2), self.bias)


class PixelTimeConv(TimeConv):
    """A convolution over three frames of each pixel, kept with a kernel of (3,1,1)."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__(c_in, c_out, (3, 1, 1), "zeros")

    def add_tap(self, y_TBHWC: torch.Tensor, x_TBHWC: torch.Tensor, k: int) -> None:
        y_TBHWC.flatten(0, -2).addmm_(x_TBHWC.flatten(0, -2), self.weight[:, :, k, 0, 0].T)


class ResidualBlock(nn.Module):
    """Norm, SiLU, causal convolution, twice, beside a shortcut: the identity, or a product where the width changes."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.norm1 = LengthNorm(c_in)
        self.conv1 = CausalConv(c_in, c_out)
        self.norm2 = LengthNorm(c_out)
        self.conv2 = CausalConv(c_out, c_out)
        if c_in != c_out:
            self.conv_shortcut = PixelProduct(c_in, c_out)

    def forward(self, x_TBHWC: torch.Tensor, memory: Memory | None) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x_TBHWC), inplace=True), memory)
        h = self.conv2(F.silu(self.norm2(h), inplace=True), memory)
        return h.add_(self.conv_shortcut(x_TBHWC) if hasattr(self, "conv_shortcut") else x_TBHWC)


class FrameAttention(nn.Module):
    """Self-attention among the pixels of each frame, one head, beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = LengthNorm(channels, ndim=2)
        self.to_qkv = PixelProduct(channels, 3 * channels, ndim=2)
        self.proj = PixelProduct(channels, channels, ndim=2)

    def forward(self, x_TBHWC: torch.Tensor) -> torch.Tensor:
        t, b, h, w, c = x_TBHWC.shape
        query, key, value = self.to_qkv(self.norm(x_TBHWC).reshape(t * b, 1, h * w, c)).chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.proj(attended).reshape(x_TBHWC.shape).add_(x_TBHWC)


class Middle(nn.Module):
    """Attention between two residual blocks."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([FrameAttention(channels)])
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels) for _ in range(2)])

    def forward(self, x_TBHWC: torch.Tensor, memory: Memory | None) -> torch.Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x_TBHWC, memory)), memory)


class Down(nn.Module):
    """Half the rows and columns, then, with `halves_time`, half the frames after the first one, which is left alone."""

    def __init__(self, channels: int, *, halves_time: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": SpaceConv(channels, channels, 3, stride=2)})
        self.time_conv = PixelTimeConv(channels, channels) if halves_time else None

    def forward(self, x_TBHWC: torch.Tensor, memory: Memory | None) -> torch.Tensor:
        """Frames (T,B,H/2,W/2,C); over time the first part has one frame and pairs of them, later ones only pairs."""
        x_TBHWC = self.resample["1"](F.pad(x_TBHWC, (0, 0, 0, 1, 0, 1)))
        if self.time_conv is None:
            return x_TBHWC
        before = memory.frames.get(self) if memory else None
        if memory:
            memory.frames[self] = x_TBHWC[-1:].clone()
        num_out = len(x_TBHWC) // 2
        y_TBHWC = torch.empty_like(x_TBHWC[:num_out]).copy_(self.time_conv.bias)
        for k, i, frames in taps(x_TBHWC, before, 0 if before is None else -1, 2, num_out):
            self.time_conv.add_tap(y_TBHWC[i : i + len(frames)], frames, k)
        return y_TBHWC if before is not None else torch.cat((x_TBHWC[:1], y_TBHWC))


class Up(nn.Module):
    """With `doubles_time`, two frames for each one after the first; then twice the rows and columns, half as wide."""

    def __init__(self, channels: int, *, doubles_time: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": SpaceConv(channels, channels // 2, 3, padding=1)})
        self.time_conv = PixelTimeConv(channels, 2 * channels) if doubles_time else None

    def forward(self, x_TBHWC: torch.Tensor, memory: Memory | None) -> torch.Tensor:
        if self.time_conv is not None:
            x_TBHWC = self._doubled(x_TBHWC, self.time_conv, memory)
        t, b, h, w, c = x_TBHWC.shape
        twice = x_TBHWC[:, :, :, None, :, None].expand(t, b, h, 2, w, 2, c)
        return self.resample["1"](twice.reshape(t, b, 2 * h, 2 * w, c))

    def _doubled(self, x_TBHWC: torch.Tensor, time_conv: nn.Module, memory: Memory | None) -> torch.Tensor:
        """The clip's first frame as it is, which the convolution of the others does not see: before them are zeros."""
        is_first = memory is None or self not in memory.frames
        still = x_TBHWC[: int(is_first)]
        rest = x_TBHWC[len(still) :]
        if memory:
            memory.frames[self] = still[:0]  # a mark alone
        if not len(rest):
            return still
        pairs_TBHWC = time_conv(rest, memory).unflatten(-1, (2, -1)).movedim(-2, 1).flatten(0, 1)
        return torch.cat((still, pairs_TBHWC))
