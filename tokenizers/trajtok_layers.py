"""The blocks of TrajTok: a ConvNeXt, perceivers with rotary positions, and a ViT over tokens."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

HEADS = 8  # of every perceiver
ROTARY_BASE = 10_000.0
OPEN_PATCHES = 2  # the last of the sequence, which every slot may see


class ConvNextBlock(nn.Module):
    """Depthwise 7x7, norm and two products beside the identity, on frames (N,H,W,C)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pwconv1 = nn.Linear(width, 4 * width)
        self.pwconv2 = nn.Linear(4 * width, width)

    def forward(self, x_NHWC: torch.Tensor) -> torch.Tensor:
        h = self.dwconv(x_NHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        h = self.pwconv2(F.gelu(self.pwconv1(self.norm(h))))
        return torch.addcmul(x_NHWC, h, self.gamma)


class ConvNext(nn.Module):
    """DINOv3's ConvNeXt: the outputs of all four stages, of which only the last is normalised."""

    def __init__(self, depths: Sequence[int] = (3, 3, 27, 3), widths: Sequence[int] = (96, 192, 384, 768)) -> None:
        super().__init__()
        self.downsample_layers = nn.ModuleList()
        for i, width in enumerate(widths):
            if i == 0:
                layers = [nn.Conv2d(3, width, 4, stride=4), nn.LayerNorm(width, eps=1e-6)]
            else:
                layers = [nn.LayerNorm(widths[i - 1], eps=1e-6), nn.Conv2d(widths[i - 1], width, 2, stride=2)]
            self.downsample_layers.append(nn.ModuleList(layers))
        self.stages = nn.ModuleList(
            nn.ModuleList(ConvNextBlock(width) for _ in range(depth))
            for depth, width in zip(depths, widths, strict=True)
        )
        self.norm = nn.LayerNorm(widths[-1], eps=1e-6)
        self.norms = nn.ModuleList([*(nn.Identity() for _ in widths[1:]), self.norm])  # twice in the state dict

    def forward(self, x_NHWC: torch.Tensor) -> list[torch.Tensor]:
        outputs = []
        for down, stage in zip(self.downsample_layers, self.stages, strict=True):
            assert isinstance(down, nn.ModuleList)
            assert isinstance(stage, nn.ModuleList)
            for layer in down:
                is_conv = isinstance(layer, nn.Conv2d)
                x_NHWC = layer(x_NHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if is_conv else layer(x_NHWC)
            for block in stage:
                x_NHWC = block(x_NHWC)
            outputs.append(x_NHWC)
        outputs[-1] = self.norm(outputs[-1])
        return outputs


class Rotary(nn.Module):
    """Rotary positions on the first half of each head, neighbouring channels in pairs (Su et al. 2021)."""

    def __init__(self, dim_head: int) -> None:
        super().__init__()
        num = dim_head // 4
        self.register_buffer("freqs", ROTARY_BASE ** (-torch.arange(num) / num))

    def forward(self, x_BHMd: torch.Tensor, start: int = 0) -> torch.Tensor:
        """Turn rows that stand at positions `start`, `start` + 1, ..; positions are always in float32."""
        freqs = self.get_buffer("freqs").float()
        positions = torch.arange(start, start + x_BHMd.shape[2], device=x_BHMd.device, dtype=torch.float32)
        return rotated(x_BHMd, positions[:, None] * freqs)


def rotated(x_BHMd: torch.Tensor, angles_Mp: torch.Tensor) -> torch.Tensor:
    """The first 2p channels turned by `angles` in pairs of neighbours; the others as they are."""
    num = 2 * angles_Mp.shape[-1]
    even, odd = x_BHMd[..., 0:num:2].float(), x_BHMd[..., 1:num:2].float()
    cos, sin = angles_Mp.cos(), angles_Mp.sin()
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((turned.to(x_BHMd.dtype), x_BHMd[..., num:]), dim=-1)


def split_heads(x_BMD: torch.Tensor) -> torch.Tensor:
    """(B,M,D) to (B,heads,M,D/heads)."""
    return x_BMD.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class LatentAttention(nn.Module):
    """Latents that attend to themselves and to patches; positions count latents first, then patches."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm_media = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)
        self.rotary_emb = Rotary(dim // HEADS)

    def forward(
        self, patches_BND: torch.Tensor, latents_BMD: torch.Tensor, labels_BN: torch.Tensor | None, num_slots: int
    ) -> torch.Tensor:
        """Every latent sees everything; with `labels` those of a slot see their own kind and its patches alone."""
        normed = self.norm_latents(latents_BMD)
        q = self.rotary_emb(split_heads(self.to_q(normed)))
        own_k, own_v = (split_heads(part) for part in self.to_kv(normed).chunk(2, dim=-1))
        k, v = (split_heads(part) for part in self.to_kv(self.norm_media(patches_BND)).chunk(2, dim=-1))
        own_k, k = self.rotary_emb(own_k), self.rotary_emb(k, start=latents_BMD.shape[1])
        if labels_BN is None:
            out = F.scaled_dot_product_attention(q, torch.cat((own_k, k), dim=2), torch.cat((own_v, v), dim=2))
        else:
            clips = zip(q, zip(own_k, own_v, strict=True), zip(k, v, strict=True), labels_BN, strict=True)
            out = torch.stack([attend_by_slot(*clip, num_slots) for clip in clips])
        return self.to_out(out.transpose(1, 2).flatten(2))


def attend_by_slot(
    q_HMd: torch.Tensor,
    own: tuple[torch.Tensor, torch.Tensor],
    patches: tuple[torch.Tensor, torch.Tensor],
    labels_N: torch.Tensor,
    num_slots: int,
) -> torch.Tensor:
    """Attention in which a slot's latents see each other, the patches that it owns, and OPEN_PATCHES.

    `own` and `patches` are keys and values (H,M,d) and (H,N,d). Each patch is read by one slot: nothing is masked.
    """
    order = labels_N.argsort(stable=True)
    ends = labels_N.bincount(minlength=num_slots).cumsum(0).tolist()
    owners = labels_N[-OPEN_PATCHES:].tolist()
    open_ones = range(len(labels_N) - OPEN_PATCHES, len(labels_N))
    (k, v), (own_k, own_v) = ((part[:, order] for part in patches), own)
    per_slot = q_HMd.shape[1] // num_slots
    outputs, start = [], 0
    for slot, end in enumerate(ends):
        latents = slice(slot * per_slot, (slot + 1) * per_slot)
        others = [n for n, owner in zip(open_ones, owners, strict=True) if owner != slot]
        keys = torch.cat((own_k[:, latents], k[:, start:end], patches[0][:, others]), dim=1)
        values = torch.cat((own_v[:, latents], v[:, start:end], patches[1][:, others]), dim=1)
        outputs.append(F.scaled_dot_product_attention(q_HMd[:, latents], keys, values))
        start = end
    return torch.cat(outputs, dim=1)


class GatedMlp(nn.Module):
    """Norm, and two products of which one gates the other (SwiGLU)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.gate = nn.Linear(dim, 4 * dim)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)

    def forward(self, x_BMD: torch.Tensor) -> torch.Tensor:
        h = self.norm(x_BMD)
        return self.down(F.silu(self.gate(h)) * self.up(h))


def through_layers(
    layers: nn.ModuleList, norm: nn.Module, context_BND: torch.Tensor, latents_BMD: torch.Tensor, *attended: object
) -> torch.Tensor:
    """Latents after all layers of a perceiver; `attended` is what its attention takes besides context and latents."""
    for layer in layers:
        assert isinstance(layer, nn.ModuleList)
        attention, mlp = layer
        latents_BMD = norm(latents_BMD)
        latents_BMD = latents_BMD + attention(context_BND, latents_BMD, *attended)
        latents_BMD = latents_BMD + mlp(latents_BMD)
    return latents_BMD


class Perceiver(nn.Module):
    """Latents that read patches, layer by layer; each layer begins from the same norm of the latents."""

    def __init__(self, dim: int, depth: int, num_latents: int | None = None) -> None:
        super().__init__()
        if num_latents is not None:
            self.latents = nn.Parameter(0.02 * torch.randn(num_latents, dim))
        self.layers = nn.ModuleList(nn.ModuleList([LatentAttention(dim), GatedMlp(dim)]) for _ in range(depth))
        self.norm_lat = nn.LayerNorm(dim, eps=1e-6)
        self.norm_ctx = nn.LayerNorm(dim, eps=1e-6)

    def forward(
        self,
        patches_BND: torch.Tensor,
        latents_BMD: torch.Tensor | None = None,
        labels_BN: torch.Tensor | None = None,
        num_slots: int = 0,
    ) -> torch.Tensor:
        """The latents (its own, or those given) once they have read the patches; `labels` as in LatentAttention."""
        context = self.norm_ctx(patches_BND)
        latents = self.latents.expand(len(context), -1, -1) if latents_BMD is None else latents_BMD
        return through_layers(self.layers, self.norm_lat, context, latents, labels_BN, num_slots)


class PatchAttention(nn.Module):
    """Latents that attend to the patches of their slot, which carry their place in time, rows and columns."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(
        self,
        patches_BND: torch.Tensor,
        latents_BKD: torch.Tensor,
        labels_BN: torch.Tensor,
        grid_thw: tuple[int, int, int],
    ) -> torch.Tensor:
        q = split_heads(self.to_q(latents_BKD))
        k, v = (split_heads(part) for part in self.to_kv(patches_BND).chunk(2, dim=-1))
        k = rotated(k, places_in(grid_thw, k.shape[-1], k.device))
        none = k[0, :, :0]
        clips = zip(q, zip(k, v, strict=True), labels_BN, strict=True)
        out = torch.stack([attend_by_slot(one, (none, none), own, labels, one.shape[1]) for one, own, labels in clips])
        return self.to_out(out.transpose(1, 2).flatten(2))


def places_in(grid_thw: tuple[int, int, int], dim_head: int, device: torch.device) -> torch.Tensor:
    """Rotary angles (N,p) of a grid's patches: a third of the turned channels each for time, rows and columns."""
    num = dim_head // 12
    freqs = ROTARY_BASE ** (-torch.arange(num, device=device) / num)
    axes = torch.meshgrid(*(torch.arange(size, device=device).float() for size in grid_thw), indexing="ij")
    return torch.cat([axis.flatten()[:, None] * freqs for axis in axes], dim=-1)


class Rope3dPerceiver(nn.Module):
    """Latents, one for each slot, that read the patches of their slot by 3-D positions (TrajPerceiver)."""

    def __init__(self, dim: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([PatchAttention(dim), GatedMlp(dim)]) for _ in range(depth))
        self.norm_lat = nn.LayerNorm(dim, eps=1e-6)
        self.norm_ctx = nn.LayerNorm(dim, eps=1e-6)

    def forward(
        self,
        patches_BND: torch.Tensor,
        latents_BKD: torch.Tensor,
        labels_BN: torch.Tensor,
        grid_thw: tuple[int, int, int],
    ) -> torch.Tensor:
        """The latents (B,K,D) once they have read the patches (B,N,D), of which `labels` (B,N) names the slot."""
        context = self.norm_ctx(patches_BND)
        return through_layers(self.layers, self.norm_lat, context, latents_BKD, labels_BN, grid_thw)
