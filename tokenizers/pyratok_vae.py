"""The causal video VAE below PyraTok, of the kind of Wan 2.1, with the keys of diffusers' state dict.

A clip of 1 + 4k frames has 1 + k latent frames: the first frame has one alone, every four that follow share one. Frames
go through in these groups, which change nothing but rounding.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from .pyratok_layers import CausalConv, Down, LengthNorm, Middle, NarrowConv, PixelProduct, ResidualBlock, Up
from .vidtok_layers import Memory

LOGVAR_RANGE = (-30.0, 20.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeSizes:
    """What decides the shapes, by the names of the published config; by default that of Wan 2.1."""

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    attn_scales: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("dim_mult", "temperal_downsample", "attn_scales"):  # JSON gives lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.attn_scales:
            raise ValueError(f"attention is in the middle alone: {self.attn_scales=}, set it to []")
        counts = (self.base_dim, self.z_dim, self.num_res_blocks, len(self.dim_mult), *self.dim_mult)
        if min(counts) < 1 or len(self.temperal_downsample) != len(self.dim_mult) - 1:
            raise ValueError(f"sizes from 1 on, and temperal_downsample one shorter than dim_mult: {self}")
        if any(width % 2 for width in self.widths[2:]):
            raise ValueError(f"the decoder halves its widths, which must be even: {self.widths=}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels behind the first convolution, and of each level."""
        return tuple(self.base_dim * factor for factor in (1, *self.dim_mult))

    @property
    def stride_thw(self) -> tuple[int, int, int]:
        """How many frames, rows and columns share a latent."""
        space = 2 ** (len(self.dim_mult) - 1)
        return 2 ** sum(self.temperal_downsample), space, space

    def grid_of(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """The (t,h,w) grid of the latents of a clip, which is filled up to whole groups of frames."""
        frames, rows, columns = self.stride_thw
        return 1 + -(-(num_frames - 1) // frames), height // rows, width // columns


class Encoder(nn.Module):
    """From frames to means and logarithms of variances, before the last product."""

    def __init__(self, sizes: VaeSizes) -> None:
        super().__init__()
        self.conv_in = NarrowConv(3, sizes.base_dim)
        blocks: list[nn.Module] = []
        for level, (before, width) in enumerate(pairwise(sizes.widths)):
            blocks += [ResidualBlock(width if i else before, width) for i in range(sizes.num_res_blocks)]
            if level < len(sizes.temperal_downsample):
                blocks.append(Down(width, halves_time=sizes.temperal_downsample[level]))
        self.down_blocks = nn.ModuleList(blocks)
        self.mid_block = Middle(sizes.widths[-1])
        self.norm_out = LengthNorm(sizes.widths[-1])
        self.conv_out = CausalConv(sizes.widths[-1], 2 * sizes.z_dim)

    @property
    def tap_names(self) -> tuple[str, ...]:
        """Where features can be taken: behind every one of `down_blocks`, and behind the middle."""
        return (*(f"down{i}" for i in range(len(self.down_blocks))), "mid")

    def forward(
        self, x_TBHWC: torch.Tensor, memory: Memory | None, taps: Collection[str] = ()
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """What the last convolution gives, and the features (T',B,h',w',C') of each name in `taps`."""
        found, h = {}, self.conv_in(x_TBHWC, memory)
        for name, block in zip(self.tap_names, [*self.down_blocks, self.mid_block], strict=True):
            h = block(h, memory)
            if name in taps:
                found[name] = h
        return self.conv_out(F.silu(self.norm_out(h), inplace=True), memory), found


class Level(nn.Module):
    """Residual blocks of the decoder, and what makes the next level larger, where there is one."""

    def __init__(self, blocks: list[nn.Module], up: Up | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(blocks)
        if up is not None:
            self.upsamplers = nn.ModuleList([up])

    def forward(self, x_TBHWC: torch.Tensor, memory: Memory | None) -> torch.Tensor:
        for block in (*self.resnets, *getattr(self, "upsamplers", ())):
            x_TBHWC = block(x_TBHWC, memory)
        return x_TBHWC


class Decoder(nn.Module):
    """From latents to frames."""

    def __init__(self, sizes: VaeSizes) -> None:
        super().__init__()
        before = sizes.widths[-1]
        self.conv_in = CausalConv(sizes.z_dim, before)
        self.mid_block = Middle(before)
        levels = []
        for width, doubles_time in zip(sizes.widths[:0:-1], (*sizes.temperal_downsample[::-1], None), strict=True):
            blocks: list[nn.Module] = [
                ResidualBlock(width if i else before, width) for i in range(sizes.num_res_blocks + 1)
            ]
            up = None if doubles_time is None else Up(width, doubles_time=doubles_time)
            levels.append(Level(blocks, up))
            before = width // 2
        self.up_blocks = nn.ModuleList(levels)
        self.norm_out = LengthNorm(sizes.widths[1])
        self.conv_out = CausalConv(sizes.widths[1], 3)

    def forward(self, z_TBHWC: torch.Tensor, memory: Memory | None) -> torch.Tensor:
        h = self.mid_block(self.conv_in(z_TBHWC, memory), memory)
        for level in self.up_blocks:
            h = level(h, memory)
        return self.conv_out(F.silu(self.norm_out(h), inplace=True), memory)


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """The posterior of each latent (B,C,t,h,w), and features (B,C',t',h',w') of the encoder by name."""

    mean_BCthw: torch.Tensor
    logvar_BCthw: torch.Tensor
    taps: dict[str, torch.Tensor] = field(default_factory=dict)

    @staticmethod
    def joined(parts: Sequence["Encoded"]) -> "Encoded":
        """Parts of a clip, one after the other in time."""
        return Encoded(
            mean_BCthw=torch.cat([part.mean_BCthw for part in parts], dim=2),
            logvar_BCthw=torch.cat([part.logvar_BCthw for part in parts], dim=2),
            taps={name: torch.cat([part.taps[name] for part in parts], dim=2) for name in parts[0].taps},
        )


class WanVae(nn.Module):
    """Encoder and decoder. Methods take and give (B,C,T,H,W)."""

    def __init__(self, sizes: VaeSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.encoder = Encoder(sizes)
        self.quant_conv = PixelProduct(2 * sizes.z_dim, 2 * sizes.z_dim)
        self.post_quant_conv = PixelProduct(sizes.z_dim, sizes.z_dim)
        self.decoder = Decoder(sizes)

    def encode(self, x_BCTHW: torch.Tensor, taps: Collection[str] = (), *, in_groups: bool = True) -> Encoded:
        """The posterior of frames (B,3,T,H,W), and the features that `taps` names (see Encoder.tap_names).

        Frames are in [-1,1], or uint8. The last one is repeated up to a length of 1 + 4k. In groups memory is bounded,
        and pieces fed to an `EncoderStream` give the same bits; all at once give the same but for rounding. ValueError
        for sides that the stride does not divide, for no frames, and for names that are no taps.
        """
        stream = EncoderStream(self, taps, in_groups=in_groups)
        return Encoded.joined([*stream.push(x_BCTHW), *stream.finish()])

    def decode(self, z_BCthw: torch.Tensor, part: int | None = 1, *, clamped: bool = True) -> torch.Tensor:
        """Frames (B,3,T,H,W) in [-1,1] of latents: one of the first, four of each later one.

        `part` latent frames are in work at a time, all for None, which changes nothing but rounding. What is not
        `clamped` reaches beyond that range, and has gradients there.
        """
        return torch.cat(list(self.decode_parts(z_BCthw, part, clamped=clamped)), dim=2)

    def decode_parts(
        self, z_BCthw: torch.Tensor, part: int | None = 1, *, clamped: bool = True
    ) -> Iterator[torch.Tensor]:
        """The frames of `decode`, some (B,3,n,H,W) after the other as they are made; ValueError as there."""
        if z_BCthw.ndim != 5 or z_BCthw.shape[1] != self.sizes.z_dim or 0 in z_BCthw.shape:
            raise ValueError(f"latents are (B,{self.sizes.z_dim},t,h,w), none of them 0: {tuple(z_BCthw.shape)=}")
        if part is not None and part < 1:
            raise ValueError(f"parts have one latent frame or more: {part=}")
        z_TBHWC = self.post_quant_conv(z_BCthw.permute(2, 0, 3, 4, 1).to(self.dtype).contiguous())
        memory = Memory()
        for z in z_TBHWC.split(part or len(z_TBHWC)):
            x_TBHWC = self.decoder(z, memory)
            yield (x_TBHWC.clamp(-1, 1) if clamped else x_TBHWC).permute(1, 4, 0, 2, 3)

    def encode_group(self, x_TBHWC: torch.Tensor, memory: Memory | None, taps: Collection[str]) -> Encoded:
        """The posterior of frames (T,B,H,W,3) after those that `memory` knows."""
        if x_TBHWC.dtype == torch.uint8:
            x_TBHWC = x_TBHWC.float().div_(127.5).sub_(1)
        h_TBHWC, found = self.encoder(x_TBHWC.to(self.dtype).contiguous(), memory, taps)
        mean, logvar = self.quant_conv(h_TBHWC).permute(1, 4, 0, 2, 3).chunk(2, dim=1)
        features = {name: tap_TBHWC.permute(1, 4, 0, 2, 3) for name, tap_TBHWC in found.items()}
        return Encoded(mean_BCthw=mean, logvar_BCthw=logvar.clamp(*LOGVAR_RANGE), taps=features)

    @property
    def dtype(self) -> torch.dtype:
        """The number type of the weights."""
        return self.quant_conv.bias.dtype


Vae = TypeVar("Vae", bound=WanVae)


def on_device(vae: Vae, device: str, dtype: torch.dtype = torch.float32) -> Vae:
    """The model where it is to compute, not to be trained. On a GPU float32 means float32."""
    if device.startswith("cuda"):
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return vae.requires_grad_(False).to(device, dtype)


def draw_weights(vae: WanVae, seed: int) -> None:
    """Random weights that keep the size of what goes through, for a training from the start; gains become 1.

    They follow from the sizes of the VAE and `seed` alone, whatever is above it.
    """
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in vae.named_parameters():
            if name.endswith("gamma"):
                value.fill_(1)
            elif name.endswith("bias"):
                value.zero_()
            elif name.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")):
                value.normal_(std=value[0].numel() ** -0.5, generator=drawn)


class EncoderStream:
    """Encodes clips whose frames come in pieces of any length, always in the same groups: one frame, four, four, .."""

    def __init__(self, vae: WanVae, taps: Collection[str] = (), *, in_groups: bool = True) -> None:
        unknown = sorted(set(taps) - set(vae.encoder.tap_names))
        if unknown:
            raise ValueError(f"no taps of this encoder: {unknown}, it has {', '.join(vae.encoder.tap_names)}")
        self._vae, self._taps, self._in_groups = vae, taps, in_groups
        self._memory = Memory()
        self._waiting_TBHWC: torch.Tensor | None = None
        self._wanted = 1  # frames that complete the next group

    def push(self, x_BCTHW: torch.Tensor) -> list[Encoded]:
        """What frames (B,3,T,H,W), in [-1,1] or uint8, complete; ValueError for sizes that the VAE does not take."""
        space = self._vae.sizes.stride_thw[1]
        shape = tuple(x_BCTHW.shape)
        if len(shape) != 5 or shape[1] != 3 or 0 in shape or shape[3] % space or shape[4] % space:
            raise ValueError(f"frames are (B,3,T,H,W), their sides multiples of {space}: {shape=}")
        x_TBHWC = x_BCTHW.permute(2, 0, 3, 4, 1)
        waiting = self._waiting_TBHWC
        self._waiting_TBHWC = x_TBHWC if waiting is None else torch.cat((waiting, x_TBHWC))
        return self._complete() if self._in_groups else []

    def finish(self) -> list[Encoded]:
        """What is left, its last frame repeated until the group is complete. The stream then begins anew."""
        left, memory = self._waiting_TBHWC, self._memory if self._in_groups else None
        if left is None:
            raise ValueError("a clip has one frame or more: push some before the end")
        missing = (self._wanted - len(left)) % self._vae.sizes.stride_thw[0] if len(left) else 0
        if missing:
            left = torch.cat((left, left[-1:].expand(missing, *left.shape[1:])))
        self._waiting_TBHWC, self._memory, self._wanted = None, Memory(), 1
        return [self._vae.encode_group(left, memory, self._taps)] if len(left) else []

    def _complete(self) -> list[Encoded]:
        """The groups that the waiting frames complete."""
        done: list[Encoded] = []
        waiting = self._waiting_TBHWC
        while waiting is not None and len(waiting) >= self._wanted:
            group, waiting = waiting[: self._wanted], waiting[self._wanted :]
            done.append(self._vae.encode_group(group, self._memory, self._taps))
            self._wanted = self._vae.sizes.stride_thw[0]
        self._waiting_TBHWC = waiting
        return done
