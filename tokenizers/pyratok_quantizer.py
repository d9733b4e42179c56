"""The quantizer of PyraTok's release: stages of signs, each of what the earlier ones left, at half their scale.

After the published code of PyraTok (arXiv:2601.16210). Text can move values before their signs are taken; the release
switches it off with a scale of 0, and then the stages are one uniform quantizer of each channel.
"""

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn

from ..schemas.errors import TokenizerError

MOST_BITS = 16  # ids are stored as uint16
LOGIT_RANGE, SHARE_FLOOR = 30.0, 1e-6  # of the shares in the entropy
ID_TYPES = (torch.uint8, torch.uint16, torch.int32, torch.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """Values (B,C,t,h,w), which pass gradients to what was quantized, their int64 ids (B,t,h,w,Q), and the loss.

    `margins_BthwQ` says how far the least certain channel of each stage was from another sign.
    """

    values_BCthw: torch.Tensor
    ids_BthwQ: torch.Tensor
    loss: torch.Tensor
    margins_BthwQ: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelIds:
    """The int64 ids (B,t,h,w) of one level of clips, and how far the least certain channel of each was from another
    sign.
    """

    ids_Bthw: torch.Tensor
    margins_Bthw: torch.Tensor


def ids_of(signs_XC: torch.Tensor) -> torch.Tensor:
    """int64 ids (...) of signs (...,C): a bit is 1 where the sign is positive, channel 0 the highest."""
    return ((signs_XC > 0) * _place_values(signs_XC.shape[-1], signs_XC.device)).sum(-1)


def signs_of(ids_X: torch.Tensor, num_bits: int) -> torch.Tensor:
    """float32 signs (...,C), each 1 or -1, of ids (...)."""
    bits_XC = ids_X.to(torch.int64).unsqueeze(-1) & _place_values(num_bits, ids_X.device)
    return torch.where(bits_XC != 0, 1.0, -1.0)


def _place_values(num_bits: int, device: torch.device) -> torch.Tensor:
    return 1 << torch.arange(num_bits - 1, -1, -1, device=device)


def fixed_buffers(num_bits: int) -> dict[str, torch.Tensor]:
    """What the published code keeps of a stage and never reads: place values of bits, and signs of all ids."""
    ids = torch.arange(1 << num_bits)
    return {"bitmask": _place_values(num_bits, ids.device), "codebook": signs_of(ids, num_bits)}


class SignStage(nn.Module):
    """The signs of one stage."""

    def __init__(self, num_bits: int, text_embed_dim: int | None, heads: int) -> None:
        super().__init__()
        for name, value in fixed_buffers(num_bits).items():
            self.register_buffer(name, value)
        self.cross_attn = nn.MultiheadAttention(num_bits, heads, batch_first=True)
        self.query_norm = nn.LayerNorm(num_bits)
        self.text_context_norm = nn.LayerNorm(num_bits)
        if text_embed_dim is not None:
            self.text_proj = nn.Linear(text_embed_dim, num_bits)

    def moved(
        self, z_BNC: torch.Tensor, text_BLE: torch.Tensor, mask_BL: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        """`z` and `scale` times what it attends to in the text, of whose tokens `mask` is True for those to use."""
        context_BLC = self.text_context_norm(self.text_proj(text_BLE))
        ignored_BL = None if mask_BL is None else ~mask_BL
        query_BNC = self.query_norm(z_BNC)
        attended_BNC = self.cross_attn(query_BNC, context_BLC, context_BLC, ignored_BL, need_weights=False)[0]
        return z_BNC + scale * attended_BNC


def bit_entropy(share: torch.Tensor) -> torch.Tensor:
    """The entropy, in nats, of a bit that is 1 with probability `share`."""
    return -(share * share.log() + (1 - share) * (1 - share).log())


def entropy_loss(y_BNC: torch.Tensor, inv_temperature: float) -> torch.Tensor:
    """How far bits are from certain at every site and balanced over all sites; from 0, in nats."""
    logits = (2 * inv_temperature * y_BNC).clamp(-LOGIT_RANGE, LOGIT_RANGE)
    share_SC = logits.sigmoid().clamp(SHARE_FLOOR, 1 - SHARE_FLOOR).flatten(0, 1)
    of_sites, of_all = bit_entropy(share_SC).sum(-1).mean(), bit_entropy(share_SC.mean(0)).sum()
    return y_BNC.shape[-1] * math.log(2) + of_sites - of_all


class ResidualSignQuantizer(nn.Module):
    """`num_stages` ids of `num_bits` bits for each latent, of as many channels. Keys are those of the release.

    `text_condition_scale` is how much text moves what is quantized: 0, as in the release, leaves it without effect.
    """

    def __init__(
        self,
        num_bits: int,
        num_stages: int = 4,
        *,
        text_embed_dim: int | None = None,
        text_condition_heads: int = 2,
        commitment_weight: float = 0.25,
        entropy_weight: float = 0.1,
        inv_temperature: float = 100.0,
        text_condition_scale: float = 0.0,
    ) -> None:
        super().__init__()
        if not 1 <= num_bits <= MOST_BITS or num_stages < 1 or num_bits % text_condition_heads:
            raise ValueError(
                f"1 to {MOST_BITS} bits, which the heads divide, and one stage or more:"
                f" {num_bits=} {text_condition_heads=} {num_stages=}"
            )
        self.num_bits, self.num_stages, self.text_embed_dim = num_bits, num_stages, text_embed_dim
        self.commitment_weight, self.entropy_weight = commitment_weight, entropy_weight
        self.inv_temperature, self.text_condition_scale = inv_temperature, text_condition_scale
        stages = (SignStage(num_bits, text_embed_dim, text_condition_heads) for _ in range(num_stages))
        self.layers = nn.ModuleList(stages)

    def forward(
        self, z_BCthw: torch.Tensor, text_BLE: torch.Tensor | None = None, mask_BL: torch.Tensor | None = None
    ) -> Quantized:
        """Values, ids and losses of latents (B,C,t,h,w).

        `text` (B,L,E) are embedded tokens, `mask` (B,L) is True for those that are no padding; all count without it, as
        in the release. The entropy is part of the loss in training only. ValueError for other shapes.
        """
        self._check(z_BCthw, text_BLE, mask_BL)
        b, c, *grid_thw = z_BCthw.shape
        left_BNC = z_BCthw.flatten(2).transpose(1, 2)
        total_BNC, loss = torch.zeros_like(left_BNC), left_BNC.new_zeros(())
        ids, margins = [], []
        for stage, layer in enumerate(self.layers):
            y_BNC = left_BNC
            if text_BLE is not None and self.text_condition_scale != 0:
                assert isinstance(layer, SignStage)
                y_BNC = layer.moved(left_BNC, text_BLE, mask_BL, self.text_condition_scale)
            signs_BNC = torch.where(y_BNC >= 0, 1.0, -1.0).to(y_BNC.dtype)
            loss = loss + self._loss(y_BNC, signs_BNC)
            ids.append(ids_of(signs_BNC))
            margins.append(y_BNC.detach().abs().amin(-1))
            passing_BNC = signs_BNC + (y_BNC - y_BNC.detach()) if y_BNC.requires_grad else signs_BNC
            total_BNC = total_BNC + passing_BNC * 2.0**-stage
            left_BNC = left_BNC - signs_BNC * 2.0**-stage
        return Quantized(
            values_BCthw=total_BNC.transpose(1, 2).reshape(b, c, *grid_thw),
            ids_BthwQ=torch.stack(ids, dim=-1).unflatten(1, grid_thw),
            loss=loss,
            margins_BthwQ=torch.stack(margins, dim=-1).unflatten(1, grid_thw),
        )

    def decode(self, ids_BthwQ: torch.Tensor) -> torch.Tensor:
        """The float32 values (B,C,t,h,w) that ids (B,t,h,w,Q) stand for, of all stages or of the first Q.

        Exactly those that were quantized. TokenizerError for anything that is no id.
        """
        self._check_ids(ids_BthwQ)
        signs_BthwQC = signs_of(ids_BthwQ, self.num_bits)
        scales_Q = 0.5 ** torch.arange(ids_BthwQ.shape[-1], device=ids_BthwQ.device)
        return (signs_BthwQC * scales_Q[:, None]).sum(-2).movedim(-1, 1).contiguous()

    def _loss(self, y_BNC: torch.Tensor, signs_BNC: torch.Tensor) -> torch.Tensor:
        loss = self.commitment_weight * F.mse_loss(y_BNC, signs_BNC)
        if self.training:
            loss = loss + self.entropy_weight * entropy_loss(y_BNC, self.inv_temperature)
        return loss

    def _check(self, z_BCthw: torch.Tensor, text_BLE: torch.Tensor | None, mask_BL: torch.Tensor | None) -> None:
        shape = tuple(z_BCthw.shape)
        if len(shape) != 5 or shape[1] != self.num_bits or 0 in shape:
            raise ValueError(f"latents are (B,{self.num_bits},t,h,w), none of them 0: {shape=}")
        if text_BLE is None or self.text_condition_scale == 0:
            return
        if self.text_embed_dim is None:
            raise ValueError("this quantizer takes no text: make it with text_embed_dim, or set the scale to 0")
        wanted = (shape[0], text_BLE.shape[1] if text_BLE.ndim == 3 else 0, self.text_embed_dim)
        if tuple(text_BLE.shape) != wanted or 0 in wanted:
            raise ValueError(f"text is (B,L,E) with B={shape[0]}, E={self.text_embed_dim}: {tuple(text_BLE.shape)=}")
        if mask_BL is not None and (mask_BL.dtype != torch.bool or tuple(mask_BL.shape) != wanted[:2]):
            raise ValueError(f"a mask is bool of shape {wanted[:2]}: {mask_BL.dtype} of {tuple(mask_BL.shape)}")
        if mask_BL is not None and not mask_BL.any(dim=1).all():
            raise ValueError("a text has one token or more: pass no mask, or no text")

    def _check_ids(self, ids_BthwQ: torch.Tensor) -> None:
        shape = tuple(ids_BthwQ.shape)
        if ids_BthwQ.dtype not in ID_TYPES or len(shape) != 5 or not 1 <= shape[4] <= self.num_stages:
            raise TokenizerError(
                f"ids of PyraTok are integers (B,t,h,w,Q) of 1 to {self.num_stages} stages, found {ids_BthwQ.dtype} of"
                f" shape {shape}: pass them as they were made"
            )
        low, high = (int(bound) for bound in ids_BthwQ.long().aminmax()) if ids_BthwQ.numel() else (0, 0)
        if not 0 <= low <= high < 1 << self.num_bits:
            raise TokenizerError(
                f"ids of PyraTok are from 0 to {(1 << self.num_bits) - 1}, found {low} to {high}:"
                f" decode with the quantizer that made them"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentStatistics:
    """Mean and deviation of each channel of latents, which bring them to the range of a quantizer."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        for item in fields(self):
            object.__setattr__(self, item.name, tuple(map(float, getattr(self, item.name))))
        if len(self.mean) != len(self.std) or not self.mean or not min(self.std) > 0:
            raise ValueError(f"as many means as deviations, which are above 0: {self}")

    def normalized(self, z_BCthw: torch.Tensor) -> torch.Tensor:
        """Latents (B,C,t,h,w) less their mean, in deviations."""
        return (z_BCthw - self._of(self.mean, z_BCthw)) / self._of(self.std, z_BCthw)

    def restored(self, z_BCthw: torch.Tensor) -> torch.Tensor:
        """Latents as the decoder takes them, of normalized ones."""
        return z_BCthw * self._of(self.std, z_BCthw) + self._of(self.mean, z_BCthw)

    def _of(self, values: tuple[float, ...], z_BCthw: torch.Tensor) -> torch.Tensor:
        return torch.tensor(values, dtype=z_BCthw.dtype, device=z_BCthw.device).view(-1, 1, 1, 1)


# Of Wan 2.1, as its published config names them.
WAN_STATISTICS = LatentStatistics(
    mean=(
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    ),
    std=(
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    ),
)  # fmt: skip
