"""VidTok's networks: encoder, decoder, and the regulariser between them."""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from .fsq import Fsq
from .vidtok_layers import (
    Attention,
    Memory,
    Norm,
    Padding,
    SpaceBlock,
    SpaceDown,
    SpaceUp,
    TimeBlock,
    TimeConv,
    TimeDown,
    TimeUp,
    named_for,
)
from .vidtok_variants import FSQ_LEVEL, WIDTH, Variant

BLOCKS = 2  # of each level of the encoder; the decoder has one more
LOGVAR_RANGE = (-30.0, 20.0)


class Blocks(nn.Module):
    """The blocks of one level, over space or over time; `resampling` names what follows them, where anything does."""

    def __init__(self, blocks: list[nn.Module], **resampling: nn.Module | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)
        for name, module in resampling.items():
            if module is not None:
                self.add_module(name, module)

    def resample(self, x_TBHWC: torch.Tensor, *memory: Memory | None) -> torch.Tensor:
        """What follows the blocks."""
        for name, module in self.named_children():
            if name != "block":
                x_TBHWC = module(x_TBHWC, *memory)
        return x_TBHWC


def through_levels(
    levels: Iterable[tuple[nn.Module, nn.Module]], h_TBHWC: torch.Tensor, memory: Memory | None
) -> torch.Tensor:
    """Over space and over time in turns, level by level."""
    for space, time in levels:
        assert isinstance(space, Blocks)
        assert isinstance(time, Blocks)
        for over_space, over_time in zip(space.block, time.block, strict=True):
            h_TBHWC = over_time(over_space(h_TBHWC), memory)
        h_TBHWC = time.resample(space.resample(h_TBHWC), memory)
    return h_TBHWC


class Middle(nn.Module):
    """Two blocks over space and time around attention."""

    def __init__(self, channels: int, padding: Padding) -> None:
        super().__init__()
        self.block_1 = TimeBlock(channels, (3, 3, 3), padding)
        self.attn_1 = Attention(channels, padding)
        self.block_2 = TimeBlock(channels, (3, 3, 3), padding)

    def forward(self, x_TBHWC: torch.Tensor, memory: Memory | None) -> torch.Tensor:
        return self.block_2(self.attn_1(self.block_1(x_TBHWC, memory)), memory)


class Encoder(nn.Module):
    """From frames to latents, before they are regularised."""

    def __init__(self, variant: Variant, padding: Padding) -> None:
        super().__init__()
        plan, width = variant.resampling, WIDTH
        self.conv_in = named_for(padding, TimeConv(3, width, (3, 3, 3), padding))
        self.down, self.down_temporal = nn.ModuleList(), nn.ModuleList()
        for level, factor in enumerate(plan.widths):
            before, width = width, WIDTH * factor
            sizes = [(before if i == 0 else width, width) for i in range(BLOCKS)]
            space_down = SpaceDown(width) if level in plan.space_down else None
            time_down = TimeDown(width, padding) if level in plan.time_down else None
            self.down.append(Blocks([SpaceBlock(*size) for size in sizes], downsample=space_down))
            times = [TimeBlock(width, (3,), padding) for _ in sizes]
            self.down_temporal.append(Blocks([*times], downsample=time_down))
        self.mid = Middle(width, padding)
        self.norm_out = Norm(width)
        channels = variant.channels * (2 if variant.regularizer == "kl" else 1)
        self.conv_out = named_for(padding, TimeConv(width, channels, (3, 3, 3), padding))

    def forward(self, x_TBHWC: torch.Tensor, memory: Memory | None = None) -> torch.Tensor:
        h = self.conv_in(x_TBHWC, memory)
        h = through_levels(zip(self.down, self.down_temporal, strict=True), h, memory)
        h = self.mid(h, memory)
        return self.conv_out(F.silu(self.norm_out(h), inplace=True), memory)


class Decoder(nn.Module):
    """From regularised latents to frames."""

    def __init__(self, variant: Variant, padding: Padding) -> None:
        super().__init__()
        plan = variant.resampling
        width = WIDTH * plan.widths[-1]
        self.conv_in = named_for(padding, TimeConv(variant.channels, width, (3, 3, 3), padding))
        self.mid = Middle(width, padding)
        up, up_temporal = [], []
        for level, factor in reversed(list(enumerate(plan.widths))):
            before, width = width, WIDTH * factor
            sizes = [(before if i == 0 else width, width) for i in range(BLOCKS + 1)]
            space_up = SpaceUp(width) if level in plan.space_up else None
            time_up = TimeUp(width, padding) if level in plan.time_up else None
            up.append(Blocks([SpaceBlock(*size) for size in sizes], upsample=space_up))
            times = [TimeBlock(width, (3,), padding) for _ in sizes]
            up_temporal.append(Blocks([*times], upsample=time_up))
        self.up, self.up_temporal = nn.ModuleList(reversed(up)), nn.ModuleList(reversed(up_temporal))
        self.norm_out = Norm(width)
        self.conv_out = named_for(padding, TimeConv(width, 3, (3, 3, 3), padding))

    def forward(self, z_TBHWC: torch.Tensor, memory: Memory | None = None) -> torch.Tensor:
        h = self.mid(self.conv_in(z_TBHWC, memory), memory)
        h = through_levels(zip(list(self.up)[::-1], list(self.up_temporal)[::-1], strict=True), h, memory)
        return self.conv_out(F.silu(self.norm_out(h), inplace=True), memory)


class VidTok(nn.Module):
    """One variant, with the keys and shapes of the official state dict. Its methods take and give (B,C,T,H,W)."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        padding: Padding = "symmetric"
        if variant.is_causal:
            padding = "replicate" if variant.streams else "zeros"
        self.variant = variant
        self.encoder = Encoder(variant, padding)
        self.decoder = Decoder(variant, padding)
        self.fsq = Fsq((FSQ_LEVEL,) * variant.channels) if variant.regularizer == "fsq" else None

    def encode_latent(self, x_BCTHW: torch.Tensor, part: int | None = None) -> torch.Tensor:
        """Latents (B,C,t,h,w) of frames (B,3,T,H,W), before they are regularised; spec section 4.

        Frames are in [-1,1], or uint8. `part` of them (a multiple of the time stride) are in work at a time, which
        bounds memory and changes no token; causal variants alone can do so. Frames are put before the first as in
        section 2 of the spec. ValueError for sizes that the strides do not divide.
        """
        stride, space, _ = self.variant.stride_thw
        if not x_BCTHW.shape[2] or x_BCTHW.shape[3] % space or x_BCTHW.shape[4] % space:
            raise ValueError(f"{self.variant.name} takes frames whose sides {space} divides: {tuple(x_BCTHW.shape)=}")
        if part is not None and (part < 1 or part % stride):
            raise ValueError(f"{self.variant.name} takes parts of a multiple of {stride} frames: {part=}")
        x_TBHWC = x_BCTHW.permute(2, 0, 3, 4, 1)
        still, missing = 0, -len(x_TBHWC) % stride
        if self.variant.is_causal and missing:
            copies = missing if self.variant.streams else stride - 1
            if self.variant.streams and copies == stride - 1:
                still = 1  # copies of the first frame stay equal to it: it alone is computed
            else:
                x_TBHWC = torch.cat((x_TBHWC[:1].expand(copies, *x_TBHWC.shape[1:]), x_TBHWC))
        parts = self._in_parts(self.encoder, x_TBHWC, part, still)
        return torch.cat(list(parts)).permute(1, 4, 0, 2, 3)

    def decode_latent(self, z_BCTHW: torch.Tensor, part: int | None = None) -> torch.Tensor:
        """Frames (B,3,T,H,W), about [-1,1], of regularised latents: T as the official decode gives it, spec section 2.

        `part` latent frames are in work at a time, as for `encode_latent`.
        """
        return torch.cat(list(self.decode_parts(z_BCTHW, part)), dim=2)

    def decode_parts(self, z_BCTHW: torch.Tensor, part: int | None = None) -> Iterator[torch.Tensor]:
        """The frames of `decode_latent`, some (B,3,n,H,W) after the other as they are made."""
        if not z_BCTHW.shape[2] or (part is not None and part < 1):
            raise ValueError(f"one latent frame or more, and parts of one or more: {tuple(z_BCTHW.shape)=} {part=}")
        stride, streams = self.variant.stride_thw[0], self.variant.streams
        num_dropped = stride - 1 if self.variant.is_causal and not streams else 0
        z_TBHWC = z_BCTHW.permute(2, 0, 3, 4, 1)
        for i, x_TBHWC in enumerate(self._in_parts(self.decoder, z_TBHWC, part, still=int(streams))):
            if streams and not i:
                x_TBHWC = torch.cat((x_TBHWC[:1].expand(stride - 1, *x_TBHWC.shape[1:]), x_TBHWC))
            yield x_TBHWC[num_dropped:].permute(1, 4, 0, 2, 3)
            num_dropped = max(0, num_dropped - len(x_TBHWC))

    def quantize(self, h_BCTHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """FSQ: the decoder's input (B,C,t,h,w) and int32 codes (B,t,h,w); spec section 6."""
        z_BTHWC, codes_BTHW = self._fsq().quantize(h_BCTHW.movedim(1, -1))
        return z_BTHWC.movedim(-1, 1), codes_BTHW

    def indices_to_latent(self, codes_BTHW: torch.Tensor) -> torch.Tensor:
        """FSQ: the decoder's input (B,C,t,h,w) of codes."""
        return self._fsq().values(codes_BTHW).movedim(-1, 1)

    def posterior(self, h_BCTHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """KL: mean and logarithm of the variance, (B,C,t,h,w) each; spec section 7."""
        if self.fsq is not None:
            raise TypeError(f"{self.variant.name} has codes and no posterior: use quantize")
        mean, logvar = h_BCTHW.chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def _fsq(self) -> Fsq:
        if self.fsq is None:
            raise TypeError(f"{self.variant.name} has no codes: use posterior")
        return self.fsq

    def _in_parts(
        self, network: nn.Module, x_TBHWC: torch.Tensor, part: int | None, still: int
    ) -> Iterator[torch.Tensor]:
        """`network` of all frames, `part` at a time: the first part has the `still` besides, the last what is left."""
        if part is None or len(x_TBHWC) < 2 * part + still:
            yield network(self._prepared(x_TBHWC))
            return
        if not self.variant.is_causal:
            raise ValueError(f"{self.variant.name} sees later frames: it takes clips whole")
        memory = Memory()
        starts = [0, *range(part + still, len(x_TBHWC) - part + 1, part)]
        for start, end in zip(starts, [*starts[1:], len(x_TBHWC)], strict=True):
            memory.is_last = end == len(x_TBHWC)
            yield network(self._prepared(x_TBHWC[start:end]), memory)

    def _prepared(self, x_TBHWC: torch.Tensor) -> torch.Tensor:
        """Values in the number type of the weights; uint8 frames as the official loaders normalise them."""
        dtype = self.encoder.norm_out.norm.weight.dtype
        if x_TBHWC.dtype == torch.uint8:
            x_TBHWC = x_TBHWC.float().div_(255).sub_(0.5).div_(0.5)
        return x_TBHWC.to(dtype).contiguous()
