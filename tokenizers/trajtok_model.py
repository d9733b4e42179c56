"""TrajTok's networks: the segmenter, and the encoder of trajectories."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..schemas.errors import TokenizerError
from .trajtok_layers import ConvNext, Perceiver

LARGEST_SCALE = 20.0
IMAGE_SIDE = 224  # that clips are resized to before they are tokenized
LEAST_SIDE = 32  # of which the backbone makes one patch
CPU_FRAMES = 4  # go through the backbone together on a CPU: more do not stay in its cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Widths and variants of one model: `dim` of patches and slots, `grid` patches to a side of a frame, 2^`level`
    tokens at most for a slot, and `up` how much finer the high-resolution head is (None: there is none).

    `feature_dim` and `token_dim` are those of the patches that tokens are read from, and of tokens (None: `dim`).
    `add_mean_traj` begins each token from the mean of its slot's patches; with `attend_other_latents` tokens see those
    of other slots. `depths` and `widths` are those of the backbone's stages.
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
    feature_dim: int | None = None
    token_dim: int | None = None
    add_mean_traj: bool = False
    attend_other_latents: bool = False
    depths: tuple[int, ...] = (3, 3, 27, 3)
    widths: tuple[int, ...] = (96, 192, 384, 768)

    def __post_init__(self) -> None:
        if self.up not in (None, 1, 2, 4, 8):
            raise TokenizerError(f"TrajTok's high-resolution head is 1, 2, 4 or 8 times finer, found up={self.up}")


class PatchEncoder(nn.Module):
    """Frames to patch features: all stages of the backbone, projected, at one resolution, summed."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.backbone = ConvNext(sizes.depths, sizes.widths)
        self.proj = nn.ModuleList(nn.Conv2d(width, sizes.dim, 1) for width in sizes.widths)
        self.ln = nn.LayerNorm(sizes.dim)
        self._grid = sizes.grid

    def forward(self, x_NHWC: torch.Tensor) -> torch.Tensor:
        """(N,grid,grid,D) of frames (N,H,W,3)."""
        at_once = CPU_FRAMES if x_NHWC.device.type == "cpu" else len(x_NHWC)
        return torch.cat([self._features(some) for some in x_NHWC.split(at_once)])

    def _features(self, x_NHWC: torch.Tensor) -> torch.Tensor:
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


def soft_mass(logits_BNK: torch.Tensor) -> torch.Tensor:
    """How many patches each slot has (B,K), by their soft shares."""
    return logits_BNK.softmax(-1).sum(1)


def mean_features(patches_BND: torch.Tensor, logits_BNK: torch.Tensor) -> torch.Tensor:
    """The mean of patches for each slot (B,K,D), weighted by their soft shares."""
    shares = logits_BNK.softmax(-1)
    return shares.mT @ patches_BND / (shares.sum(1)[..., None] + 1e-6)


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
        """The segmentation of normalised frames (B,T,H,W,3), or of images (B,H,W,3).

        The backbone learns from patches alone: slots read them without passing gradients on.
        """
        x_BTHWC = as_clips(x_BTHWC)
        b, _, height, width, _ = x_BTHWC.shape
        if min(height, width) < LEAST_SIDE:
            raise TokenizerError(
                f"TrajTok segments frames of {LEAST_SIDE} pixels a side or more, found {height}x{width}: resize them"
            )
        features_NHWC = self.patch_encoder(x_BTHWC.flatten(0, 1))
        patches = features_NHWC.reshape(b, -1, features_NHWC.shape[-1])
        queries = self.trajectory_perceiver(patches.detach())
        fine = None
        if hasattr(self, "patch_decoder_high_res"):
            finer = self.patch_decoder_high_res(features_NHWC)
            fine = self._logits(finer.reshape(b, -1, finer.shape[-1]), self.traj_seg_head_high_res(queries))
        logits = self._logits(self.patch_decoder_low_res(patches), self.traj_seg_head_low_res(queries))
        return Segmentation(patches_BND=patches, queries_BKD=queries, logits_BNK=logits, fine_logits_BNK=fine)

    def _logits(self, patches_BNd: torch.Tensor, queries_BKd: torch.Tensor) -> torch.Tensor:
        scale = (1 + F.softplus(self.log_scale)).clamp(max=LARGEST_SCALE)
        return scale * F.normalize(patches_BNd, dim=-1) @ F.normalize(queries_BKd, dim=-1).mT


def as_clips(x: torch.Tensor) -> torch.Tensor:
    """Frames (B,T,H,W,3); images (B,H,W,3) are clips of one frame. TokenizerError for other shapes."""
    clips = x.unsqueeze(1) if x.ndim == 4 else x
    if clips.ndim != 5 or clips.shape[-1] != 3 or 0 in clips.shape:
        raise TokenizerError(
            f"TrajTok takes frames (B,T,H,W,3) or images (B,H,W,3), found {tuple(x.shape)}: permute them"
        )
    return clips


class TrajectoryEncoder(nn.Module):
    """Tokens of trajectories: 2^level for each slot, in the order of slots (SegmentTokenizer)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        feature_dim = sizes.feature_dim or sizes.dim
        self.latents = nn.Parameter(0.02 * torch.randn(sizes.num_slots, 2**sizes.level, feature_dim))
        self.segmenter = Segmenter(sizes)
        self.traj_feature_updater = Perceiver(feature_dim, sizes.depth, sees_all_latents=sizes.attend_other_latents)
        self.output_projector = nn.Linear(feature_dim, sizes.token_dim or sizes.dim)
        self._adds_mean = sizes.add_mean_traj

    def forward(
        self,
        x_BTHWC: torch.Tensor,
        level: int = 0,
        labels_BN: torch.Tensor | None = None,
        *,
        features_BND: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, Segmentation]:
        """Tokens (B,K*2^level,D), which of them stand for a trajectory (B,K*2^level), and the segmentation.

        Frames are square; sides other than IMAGE_SIDE are resized. `labels` and `features` as in `read`.
        """
        x_BTHWC = as_clips(x_BTHWC)
        b, num_frames, height, width, _ = x_BTHWC.shape
        if height != width:
            raise TokenizerError(
                f"TrajTok makes tokens of square frames, found {height}x{width}: resize or crop them to {IMAGE_SIDE}"
            )
        x = resized(x_BTHWC.flatten(0, 1).permute(0, 3, 1, 2), IMAGE_SIDE)
        found = self.segmenter(x.permute(0, 2, 3, 1).unflatten(0, (b, num_frames)))
        return *self.read(found, num_frames, level, labels_BN, features_BND), found

    def read(
        self,
        found: Segmentation,
        num_frames: int,
        level: int = 0,
        labels_BN: torch.Tensor | None = None,
        features_BND: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and their validity, as `forward`, of a segmentation.

        `features` (B,N',D') of another model, on a square grid in each frame, are read in place of the segmenter's
        patches. `labels` (B,N') take the place of those found; those that are no slot are read by none.
        """
        num_slots, most, dim = self.latents.shape
        if not 1 <= 2**level <= most:
            raise TokenizerError(f"these weights have levels 0 to {most.bit_length() - 1}, found level={level}")
        patches = found.patches_BND if features_BND is None else features_BND
        if patches.shape[-1] != dim:
            raise TokenizerError(f"this encoder reads patches of {dim} channels, found {tuple(patches.shape)}")
        logits = on_grid_of(patches, found.logits_BNK, num_frames)
        labels = logits.argmax(-1) if labels_BN is None else labels_BN
        if labels.shape != patches.shape[:2]:
            raise TokenizerError(f"patches {tuple(patches.shape)} want a label each, found {tuple(labels.shape)}")

        latents = self.latents[:, : 2**level].expand(len(patches), -1, -1, -1)
        if self._adds_mean:
            latents = latents + mean_features(patches, logits).unsqueeze(2)
        tokens = self.traj_feature_updater(patches, latents.flatten(1, 2), labels, num_slots)
        valid = (labels[..., None] == torch.arange(num_slots, device=labels.device)).any(1)
        return self.output_projector(tokens), valid.repeat_interleave(2**level, dim=1)


def on_grid_of(patches_BND: torch.Tensor, logits_BNK: torch.Tensor, num_frames: int) -> torch.Tensor:
    """Logits bilinearly resized to the grid of other patches; TokenizerError unless that is a square in every frame."""
    (b, num, _), old = patches_BND.shape, math.isqrt(logits_BNK.shape[1] // num_frames)
    side = math.isqrt(num // num_frames)
    if num != num_frames * side**2 or b != len(logits_BNK):
        raise TokenizerError(
            f"features are (B,N,D) with the patches of a square grid for each frame, found {tuple(patches_BND.shape)}"
            f" for {len(logits_BNK)} clips of {num_frames} frames"
        )
    maps = logits_BNK.reshape(b * num_frames, old, old, -1).permute(0, 3, 1, 2)
    return resized(maps, side).permute(0, 2, 3, 1).reshape(b, num, -1)
