"""The blocks of TrajTok: a ConvNeXt, and perceivers with rotary positions."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import nn

HEADS = 8  # of every perceiver
ROTARY_BASE = 10_000.0
BLOCK_PATCHES = 1024  # read at a time: more do not stay in a processor's cache
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

    freqs: torch.Tensor

    def __init__(self, dim_head: int) -> None:
        super().__init__()
        num = dim_head // 4
        self.register_buffer("freqs", ROTARY_BASE ** (-torch.arange(num) / num))

    def forward(self, places_N: torch.Tensor) -> torch.Tensor:
        """The angles (p,N) of rows at these places, in float32 whatever the network computes in."""
        return self.freqs[:, None] * places_N

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Moved like any module, but never to another number type, in which far places would fall together."""
        freqs = self.freqs
        super()._apply(fn, recurse)
        if not freqs.is_meta:
            self.freqs = freqs.to(self.freqs.device)
        return self


def rotated(x_dN: torch.Tensor, angles_pN: torch.Tensor) -> torch.Tensor:
    """Columns (..,d,N) with the first 2p channels turned by `angles` in pairs of neighbours; the others as they are."""
    num = 2 * len(angles_pN)
    even, odd = x_dN[..., 0:num:2, :], x_dN[..., 1:num:2, :]
    cos, sin = angles_pN.cos(), angles_pN.sin()
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-2).flatten(-3, -2)
    return torch.cat((turned.to(x_dN.dtype), x_dN[..., num:, :]), dim=-2)


def head_columns(x_BMD: torch.Tensor) -> torch.Tensor:
    """(B,M,D) to (B,heads,D/heads,M)."""
    return x_BMD.mT.unflatten(1, (HEADS, -1))


def attend_by_block(
    q_BHdM: torch.Tensor, blocks: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]
) -> torch.Tensor:
    """Attention (B,H,M,d) to keys and values (B,H,d,P) that come block by block (Milakov and Gimelshein 2018).

    The third of a block says who sees what in it, (B,1,M,P); None is all. In the first block every row sees something.
    """
    b, h, d, m = q_BHdM.shape
    queries = q_BHdM.mT * d**-0.5
    highest = queries.new_full((b, h, m, 1), -torch.inf, dtype=torch.float32)
    total, out = torch.zeros_like(highest), torch.zeros_like(highest)
    for k, v, sees in blocks:
        scores = (queries @ k).float()
        scores = scores if sees is None else scores.masked_fill(~sees, -torch.inf)
        before, highest = highest, torch.maximum(highest, scores.detach().amax(-1, keepdim=True))
        shares, kept = scores.sub_(highest).exp_(), (before - highest).exp()
        total = total * kept + shares.sum(-1, keepdim=True)
        out = out * kept + shares.to(v.dtype) @ v.mT
    return (out / total).to(q_BHdM.dtype)


def attend_by_slot(
    q_HdSL: torch.Tensor,
    slots: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]],
    kv_weight: torch.Tensor,
    num_turned: int,
) -> torch.Tensor:
    """Attention (H,M,d) of the L latents of each slot, to keys and values of latents and to the slot's patches.

    A slot gives these keys and values (H,d,L'), its patches (n,D) and their angles. Few latents read many patches, so
    only the channels that turn are made of patches: for the other keys and the values, latents are multiplied by the
    weights, before and after they read the patches as they are.
    """
    k_weight, v_weight = kv_weight.unflatten(0, (2, HEADS, -1))
    turning = k_weight[:, :num_turned].flatten(0, 1)
    queries = q_HdSL.flatten(2).mT * q_HdSL.shape[1] ** -0.5
    sights = queries[..., num_turned:] @ k_weight[:, num_turned:]
    by_slot = (x.unflatten(1, q_HdSL.shape[2:]).unbind(1) for x in (queries, sights))
    of_latents, read = [], []
    for q, sight, (own_k, own_v, x, angles) in zip(*by_slot, slots, strict=True):
        k, seen = (F.linear(rows, x).unflatten(0, (HEADS, -1)) for rows in (turning, sight.flatten(0, 1)))
        scores = q[..., :num_turned] @ rotated(k, angles) + seen
        shares = torch.cat((q @ own_k, scores), dim=-1).float().softmax(-1).to(x.dtype)
        own_shares, shares = shares.tensor_split((own_k.shape[-1],), dim=-1)
        of_latents.append(own_shares @ own_v.mT)
        read.append((shares.flatten(0, 1) @ x).unflatten(0, (HEADS, -1)))
    return torch.cat(of_latents, dim=1) + torch.cat(read, dim=1) @ v_weight.mT


def rows_by_slot(labels_N: torch.Tensor, num_slots: int) -> list[torch.Tensor]:
    """For each slot the patches that its latents read: those labelled with it, and the OPEN_PATCHES."""
    labels = labels_N.clamp(-1, num_slots)  # other labels are of no slot
    counts = (labels + 1).bincount(minlength=num_slots + 2).tolist()
    owned = labels.argsort(stable=True).split(counts)[1:-1]
    last = torch.arange(len(labels), device=labels.device)[-OPEN_PATCHES:]
    return [torch.cat((rows, last[labels[last] != slot])) for slot, rows in enumerate(owned)]


# For each clip and slot the patches (n,D) that it reads, and their places (n,) in the sequence.
PatchesBySlot = list[list[tuple[torch.Tensor, torch.Tensor]]]


def gathered(patches_BND: torch.Tensor, labels_BN: torch.Tensor, num_slots: int, norm: nn.Module) -> PatchesBySlot:
    """The patches of clips by slot, and the norm of each."""
    clips = zip(patches_BND, labels_BN, strict=True)
    return [[(norm(x[rows]), rows) for rows in rows_by_slot(labels, num_slots)] for x, labels in clips]


class LatentAttention(nn.Module):
    """Latents that attend to themselves and to patches; places count latents first, then patches."""

    def __init__(self, dim: int, *, sees_all_latents: bool = False) -> None:
        super().__init__()
        self.norm_media = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)
        self.rotary_emb = Rotary(dim // HEADS)
        self._sees_all_latents = sees_all_latents

    def forward(
        self,
        context: torch.Tensor | PatchesBySlot,
        latents_BMD: torch.Tensor,
        labels_BN: torch.Tensor | None,
        num_slots: int,
    ) -> torch.Tensor:
        """Every latent sees everything; with `labels` those of a slot see their own kind and its patches alone."""
        normed = self.norm_latents(latents_BMD)
        q, k, v = (head_columns(x) for x in (self.to_q(normed), *self.to_kv(normed).chunk(2, dim=-1)))
        angles = self.rotary_emb(torch.arange(q.shape[-1], device=q.device))
        q, k = rotated(q, angles), rotated(k, angles)
        if isinstance(context, torch.Tensor):
            out = attend_by_block(q, self._blocks((k, v), context, labels_BN, num_slots))
        else:
            out = torch.stack([self._of_clip(*clip) for clip in zip(q, k, v, context, strict=True)])
        return self.to_out(out.transpose(1, 2).flatten(2))

    def _blocks(
        self,
        own: tuple[torch.Tensor, torch.Tensor],
        context_BND: torch.Tensor,
        labels_BN: torch.Tensor | None,
        num_slots: int,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """What attend_by_block takes: the latents, then the patches."""
        (b, num_patches, _), num_latents = context_BND.shape, own[0].shape[-1]
        sees_latents = sees_patches = None
        if labels_BN is not None:
            slots = torch.arange(num_slots, device=labels_BN.device).repeat_interleave(num_latents // num_slots)
            sees_latents = (slots[:, None] == slots) | self._sees_all_latents
            sees_patches = labels_BN[:, None, None] == slots[:, None]
            sees_patches[..., -OPEN_PATCHES:] = True
        yield *own, sees_latents
        weight = self.to_kv.weight.expand(b, -1, -1)
        for start in range(0, num_patches, BLOCK_PATCHES):
            block = slice(start, min(start + BLOCK_PATCHES, num_patches))
            k, v = (weight @ self.norm_media(context_BND[:, block]).mT).unflatten(1, (2, HEADS, -1)).unbind(1)
            places = num_latents + torch.arange(block.start, block.stop, device=k.device)
            yield rotated(k, self.rotary_emb(places)), v, None if sees_patches is None else sees_patches[..., block]

    def _of_clip(
        self,
        q_HdM: torch.Tensor,
        k_HdM: torch.Tensor,
        v_HdM: torch.Tensor,
        context: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> torch.Tensor:
        """attend_by_slot for the slots of one clip."""
        num_slots, num_latents = len(context), q_HdM.shape[-1]
        q, k, v = (x.unflatten(-1, (num_slots, -1)) for x in (q_HdM, k_HdM, v_HdM))
        own = zip(k.unbind(2), v.unbind(2), strict=True)
        if self._sees_all_latents:
            own = [(k_HdM, v_HdM)] * num_slots
        patches = ((self.norm_media(x), self.rotary_emb(num_latents + rows)) for x, rows in context)
        slots = ((*latents, *some) for latents, some in zip(own, patches, strict=True))
        return attend_by_slot(q, slots, self.to_kv.weight, 2 * len(self.rotary_emb.freqs))


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
    layers: nn.ModuleList,
    norm: nn.Module,
    context: torch.Tensor | PatchesBySlot,
    latents_BMD: torch.Tensor,
    *attended: object,
) -> torch.Tensor:
    """Latents after all layers of a perceiver; `attended` is what its attention takes besides context and latents."""
    for layer in layers:
        assert isinstance(layer, nn.ModuleList)
        attention, mlp = layer
        latents_BMD = norm(latents_BMD)
        latents_BMD = latents_BMD + attention(context, latents_BMD, *attended)
        latents_BMD = latents_BMD + mlp(latents_BMD)
    return latents_BMD


class Perceiver(nn.Module):
    """Latents that read patches, layer by layer; each layer begins from the same norm of the latents."""

    def __init__(self, dim: int, depth: int, num_latents: int | None = None, *, sees_all_latents: bool = False) -> None:
        super().__init__()
        if num_latents is not None:
            self.latents = nn.Parameter(0.02 * torch.randn(num_latents, dim))
        self.layers = nn.ModuleList(
            nn.ModuleList([LatentAttention(dim, sees_all_latents=sees_all_latents), GatedMlp(dim)])
            for _ in range(depth)
        )
        self.norm_lat = nn.LayerNorm(dim, eps=1e-6)
        self.norm_ctx = nn.LayerNorm(dim, eps=1e-6)

    def forward(
        self,
        patches_BND: torch.Tensor,
        latents_BMD: torch.Tensor | None = None,
        labels_BN: torch.Tensor | None = None,
        num_slots: int = 0,
    ) -> torch.Tensor:
        """The latents (its own, or those given) once they have read the patches; `labels` as in LatentAttention.

        On the CPU patches are gathered by slot, elsewhere masks hide those of others: many small steps cost more there.
        """
        latents = self.latents.expand(len(patches_BND), -1, -1) if latents_BMD is None else latents_BMD
        if labels_BN is None or patches_BND.device.type != "cpu":
            context = self.norm_ctx(patches_BND)
        else:
            context = gathered(patches_BND, labels_BN, num_slots, self.norm_ctx)
        return through_layers(self.layers, self.norm_lat, context, latents, labels_BN, num_slots)


class PatchAttention(nn.Module):
    """Latents that attend to the patches of their slot, which carry their place in time, rows and columns."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(
        self, context: PatchesBySlot, latents_BKD: torch.Tensor, grid_thw: tuple[int, int, int]
    ) -> torch.Tensor:
        q = head_columns(self.to_q(latents_BKD)).unsqueeze(-1)
        angles = places_in(grid_thw, q.shape[2], q.device)
        none = q[0, :, :, 0, :0]
        outputs = []
        for one, clip in zip(q, context, strict=True):
            slots = ((none, none, x, angles[:, rows]) for x, rows in clip)
            outputs.append(attend_by_slot(one, slots, self.to_kv.weight, 2 * len(angles)))
        return self.to_out(torch.stack(outputs).transpose(1, 2).flatten(2))


def places_in(grid_thw: tuple[int, int, int], dim_head: int, device: torch.device) -> torch.Tensor:
    """Rotary angles (p,N) of a grid's patches: a third of the turned channels each for time, rows and columns."""
    num = dim_head // 12
    freqs = ROTARY_BASE ** (-torch.arange(num, device=device) / num)
    axes = torch.meshgrid(*(torch.arange(size, device=device).float() for size in grid_thw), indexing="ij")
    return torch.cat([freqs[:, None] * axis.flatten() for axis in axes])


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
        context = gathered(patches_BND, labels_BN, latents_BKD.shape[1], self.norm_ctx)
        return through_layers(self.layers, self.norm_lat, context, latents_BKD, grid_thw)
