"""TrajTok's networks: the segmenter, the encoder of trajectories, and the ViT over their tokens."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .trajtok_layers import ConvNext, Perceiver

LARGEST_SCALE = 20.0
IMAGE_SIDE = 224  # that clips are resized to before they are tokenized


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Widths of one model: `dim` of patches and slots, `grid` patches to a side of a frame, 2^`level` tokens at most
    for a slot, and `up` how much finer the high-resolution head is (None: there is none).
    """

    dim: int = 512
    num_slots: int = 128
    grid: int = 56
    depth: int = 2
    level: int = 0
    up: int | None = None
    vit_layers: int = 24
    vit_heads: int = 16
    vit_dim: int = 512


class PatchEncoder(nn.Module):
    """Frames to patch features: all four stages of the backbone, projected, at one resolution, summed."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.backbone = ConvNext()
        self.proj = nn.ModuleList(nn.Conv2d(width, sizes.dim, 1) for width in (96, 192, 384, 768))
        self.ln = nn.LayerNorm(sizes.dim)
        self._grid = sizes.grid

    def forward(self, x_NHWC: torch.Tensor) -> torch.Tensor:
        """(N,grid,grid,D) of frames (N,H,W,3)."""
        total = None
        for features, proj in zip(self.backbone(x_NHWC), self.proj, strict=True):
            assert isinstance(proj, nn.Conv2d)
            h = self.ln(F.linear(features, proj.weight.flatten(1), proj.bias))
            h = resized(h.permute(0, 3, 1, 2), self._grid).permute(0, 2, 3, 1)
            total = h if total is None else total.add_(h)
        assert total is not None
        return total


def resized(x_NCHW: torch.Tensor, side: int) -> torch.Tensor:
    """Bilinear, without antialiasing."""
    if x_NCHW.shape[-2:] == (side, side):
        return x_NCHW
    return F.interpolate(x_NCHW, size=(side, side), mode="bilinear", align_corners=False)


def head(dim: int) -> nn.Sequential:
    """Features to the space in which patches and queries are compared."""
    return nn.Sequential(nn.Linear(dim, dim // 4), nn.ReLU(), nn.Linear(dim // 4, dim // 8))


class ChannelNorm(nn.LayerNorm):
    """Layer norm over channels of (N,C,H,W)."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class HighResolution(nn.Module):
    """Patch features on a finer grid: transposed convolutions, each of which doubles the sides."""

    def __init__(self, dim: int, up: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(up.bit_length() - 1):
            layers.append(nn.ConvTranspose2d(dim >> i, dim >> (i + 1), 2, stride=2))
            layers += [ChannelNorm(dim >> 1, eps=1e-6)] if i == 0 else []
            layers.append(nn.GELU())
        width = dim >> (up.bit_length() - 1)
        self.conv_up = nn.Sequential(*layers, nn.Conv2d(width, dim // 8, 1), nn.GELU())

    def forward(self, x_NHWC: torch.Tensor) -> torch.Tensor:
        return self.conv_up(x_NHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Segmentation:
    """What a segmenter finds: patches (B,N,D), N in the order of time, rows and columns; slots (B,K,D); and how much
    each patch is of each slot, logits (B,N,K), also on the finer grid where there is one.
    """

    patches_BND: torch.Tensor
    queries_BKD: torch.Tensor
    logits_BNK: torch.Tensor
    fine_logits_BNK: torch.Tensor | None = None

    @property
    def labels_BN(self) -> torch.Tensor:
        """The slot that each patch belongs to."""
        return self.logits_BNK.argmax(-1)


class Segmenter(nn.Module):
    """Assigns every patch of a clip to one of `num_slots` trajectories (SimpleSegmenter)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        dim = sizes.dim
        self.log_scale = nn.Parameter(torch.tensor([16.0]).log())
        self.patch_encoder = PatchEncoder(sizes)
        self.traj_seg_head_low_res = head(dim)
        self.trajectory_perceiver = Perceiver(dim, sizes.depth, sizes.num_slots)
        self.patch_decoder_low_res = head(dim)
        if sizes.up is not None:
            self.patch_decoder_high_res = HighResolution(dim, sizes.up)
            self.traj_seg_head_high_res = head(dim)

    def forward(self, x_BTHWC: torch.Tensor) -> Segmentation:
        """The segmentation of normalised frames (B,T,H,W,3)."""
        b = len(x_BTHWC)
        features_NHWC = self.patch_encoder(x_BTHWC.flatten(0, 1))
        patches = features_NHWC.reshape(b, -1, features_NHWC.shape[-1])
        queries = self.trajectory_perceiver(patches)
        fine = None
        if hasattr(self, "patch_decoder_high_res"):
            finer = self.patch_decoder_high_res(features_NHWC)
            fine = self._logits(finer.reshape(b, -1, finer.shape[-1]), self.traj_seg_head_high_res(queries))
        logits = self._logits(self.patch_decoder_low_res(patches), self.traj_seg_head_low_res(queries))
        return Segmentation(patches_BND=patches, queries_BKD=queries, logits_BNK=logits, fine_logits_BNK=fine)

    def _logits(self, patches_BNd: torch.Tensor, queries_BKd: torch.Tensor) -> torch.Tensor:
        scale = (1 + F.softplus(self.log_scale)).clamp(max=LARGEST_SCALE)
        return scale * F.normalize(patches_BNd, dim=-1) @ F.normalize(queries_BKd, dim=-1).mT


class TrajectoryEncoder(nn.Module):
    """Tokens of trajectories: 2^level for each slot, in the order of slots (SegmentTokenizer)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(sizes.num_slots, 2**sizes.level, sizes.dim))
        self.segmenter = Segmenter(sizes)
        self.traj_feature_updater = Perceiver(sizes.dim, sizes.depth)
        self.output_projector = nn.Linear(sizes.dim, sizes.dim)

    def forward(
        self, x_BTHWC: torch.Tensor, level: int = 0, labels_BN: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, Segmentation]:
        """Tokens (B,K*2^level,D), which of them stand for a trajectory (B,K*2^level), and the segmentation.

        `labels` take the place of those that the segmenter finds.
        """
        if x_BTHWC.shape[2:4] != (IMAGE_SIDE, IMAGE_SIDE):
            b = len(x_BTHWC)
            x = resized(x_BTHWC.flatten(0, 1).permute(0, 3, 1, 2), IMAGE_SIDE)
            x_BTHWC = x.permute(0, 2, 3, 1).unflatten(0, (b, -1))
        found = self.segmenter(x_BTHWC)
        labels = found.labels_BN if labels_BN is None else labels_BN
        num_slots = len(self.latents)
        latents = self.latents[:, : 2**level].flatten(0, 1).expand(len(x_BTHWC), -1, -1)
        tokens = self.traj_feature_updater(found.patches_BND, latents, labels, num_slots)
        valid = torch.stack([one.bincount(minlength=num_slots) > 0 for one in labels])
        return self.output_projector(tokens), valid.repeat_interleave(2**level, dim=1), found
