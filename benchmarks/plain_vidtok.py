"""VidTok as its specification reads, in the plainest PyTorch: (B,C,T,H,W) throughout, a permute for every norm,
activations unfused, every padding a copy. What tokenizers/vidtok_model.py is measured against, and tested against.

    plain = PlainVidTok("fsq_causal_488_32768", model.state_dict()); plain.encode(x_BCTHW); plain.decode(z_BCTHW)
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from tokenmill.tokenizers.vidtok_variants import variant_of


class PlainVidTok:
    """Encoder and decoder of one variant over a state dict with the official keys."""

    def __init__(self, name: str, state: Mapping[str, torch.Tensor]) -> None:
        self.variant, self.state = variant_of(name), state
        self.is_causal, self.copies_first = self.variant.is_causal, self.variant.version == "1.1"
        self.nest = ".conv" if self.is_causal else ""
        self.ups = 0

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """The latent before the regulariser."""
        stride, plan = self.variant.stride_thw[0], self.variant.resampling
        if self.is_causal and x.shape[2] % stride:
            copies = stride - x.shape[2] % stride if self.copies_first else stride - 1
            x = torch.cat((x[:, :, :1].repeat(1, 1, copies, 1, 1), x), dim=2)
        h = self.conv("encoder.conv_in", x)
        for i in range(len(plan.widths)):
            for j in range(2):
                h = self.block_2d(f"encoder.down.{i}.block.{j}", h)
                h = self.block(f"encoder.down_temporal.{i}.block.{j}", h, self.conv_1d)
            if i in plan.space_down:
                h = self.frames(
                    lambda x, i=i: self.conv_2d(f"encoder.down.{i}.downsample.conv", F.pad(x, (0, 1, 0, 1)), 2), h
                )
            if i in plan.time_down:
                h = self.down(f"encoder.down_temporal.{i}.downsample", h)
        h = self.middle("encoder.mid", h)
        return self.conv("encoder.conv_out", silu(self.norm("encoder.norm_out", h)))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Frames as the official decode gives them."""
        plan, self.ups = self.variant.resampling, 0
        h = self.middle("decoder.mid", self.conv("decoder.conv_in", z))
        for i in reversed(range(len(plan.widths))):
            for j in range(3):
                h = self.block_2d(f"decoder.up.{i}.block.{j}", h)
                h = self.block(f"decoder.up_temporal.{i}.block.{j}", h, self.conv_1d)
            if i in plan.space_up:
                key = f"decoder.up.{i}.upsample.conv"
                h = self.frames(lambda x, key=key: self.conv_2d(key, F.interpolate(x, scale_factor=2.0), 1, 1), h)
            if i in plan.time_up:
                h = self.up(f"decoder.up_temporal.{i}.upsample", h)
        x = self.conv("decoder.conv_out", silu(self.norm("decoder.norm_out", h)))
        is_trimmed = self.is_causal and not self.copies_first
        return x[:, :, self.variant.stride_thw[0] - 1 :] if is_trimmed else x

    def norm(self, key: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.state[f"{key}.norm.weight"], self.state[f"{key}.norm.bias"]
        return F.layer_norm(x.movedim(1, -1), (x.shape[1],), weight, bias, 1e-6).movedim(-1, 1).contiguous()

    def conv_2d(self, key: str, x: torch.Tensor, stride: int = 1, padding: int = 0) -> torch.Tensor:
        return F.conv2d(x, self.state[f"{key}.weight"], self.state[f"{key}.bias"], stride, padding)

    def frames(self, function, x: torch.Tensor) -> torch.Tensor:
        b = len(x)
        return function(x.transpose(1, 2).reshape(-1, x.shape[1], *x.shape[3:])).unflatten(0, (b, -1)).transpose(1, 2)

    def before(self, x: torch.Tensor, count: int) -> torch.Tensor:
        """With frames put before the first, on axis 2."""
        first = x[:, :, :1].repeat_interleave(count, dim=2)
        return torch.cat((first if self.copies_first else torch.zeros_like(first), x), dim=2)

    def conv_1d(self, key: str, x: torch.Tensor) -> torch.Tensor:
        b, c, t, h, w = x.shape
        weight, bias = self.state[f"{key}{self.nest}.weight"], self.state[f"{key}{self.nest}.bias"]
        lines = x.permute(0, 3, 4, 1, 2).reshape(b * h * w, c, t)
        y = (
            F.conv1d(self.before(lines, 2), weight, bias)
            if self.is_causal
            else F.conv1d(lines, weight, bias, padding=1)
        )
        return y.reshape(b, h, w, -1, t).permute(0, 3, 4, 1, 2).contiguous()

    def conv(self, key: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        weight, bias = self.state[f"{key}{self.nest}.weight"], self.state[f"{key}{self.nest}.bias"]
        size = weight.shape[2]
        if self.is_causal and size == 3:
            return F.conv3d(self.before(x, 3 - stride), weight, bias, (stride, 1, 1), (0, 1, 1))
        if stride == 2:  # symmetric, behind a frame of zeros
            return F.conv3d(x, weight, bias, (2, 1, 1), (0, 1, 1))
        return F.conv3d(x, weight, bias, 1, size // 2)

    def block(self, key: str, x: torch.Tensor, conv) -> torch.Tensor:
        h = conv(f"{key}.conv1", silu(self.norm(f"{key}.norm1", x)))
        return x + conv(f"{key}.conv2", silu(self.norm(f"{key}.norm2", h)))

    def block_2d(self, key: str, x: torch.Tensor) -> torch.Tensor:
        def conv(name: str, x: torch.Tensor) -> torch.Tensor:
            return self.frames(lambda x: self.conv_2d(name, x, 1, 1), x)

        h = conv(f"{key}.conv1", silu(self.norm(f"{key}.norm1", x)))
        h = conv(f"{key}.conv2", silu(self.norm(f"{key}.norm2", h)))
        shortcut = f"{key}.nin_shortcut"
        return h + (self.frames(lambda x: self.conv_2d(shortcut, x), x) if f"{shortcut}.weight" in self.state else x)

    def middle(self, key: str, x: torch.Tensor) -> torch.Tensor:
        x = self.attention(f"{key}.attn_1", self.block(f"{key}.block_1", x, self.conv))
        return self.block(f"{key}.block_2", x, self.conv)

    def attention(self, key: str, x: torch.Tensor) -> torch.Tensor:
        b, c, t, h, w = x.shape
        normed = self.norm(f"{key}.norm", x)
        q, k, v = (
            self.conv(f"{key}.{name}", normed).permute(0, 2, 3, 4, 1).reshape(b * t, 1, h * w, c) for name in "qkv"
        )
        y = F.scaled_dot_product_attention(q, k, v).reshape(b, t, h, w, c).permute(0, 4, 1, 2, 3).contiguous()
        return x + self.conv(f"{key}.proj_out", y)

    def down(self, key: str, x: torch.Tensor) -> torch.Tensor:
        share = self.state[f"{key}.mix_factor"].sigmoid()
        padded = self.before(x, 1) if self.is_causal else torch.cat((x, torch.zeros_like(x[:, :, :1])), dim=2)
        pooled = F.avg_pool3d(padded, (3, 1, 1), (2, 1, 1))
        return share * pooled + (1 - share) * self.conv(f"{key}.conv", x if self.is_causal else padded, 2)

    def up(self, key: str, x: torch.Tensor) -> torch.Tensor:
        share = self.state[f"{key}.mix_factor"].sigmoid()
        if self.copies_first:
            first, self.ups = 2**self.ups, self.ups + 1
            groups = [group for group in (x[:, :, :first], x[:, :, first:]) if group.shape[2]]
            u = torch.cat([F.interpolate(g, scale_factor=(2.0, 1.0, 1.0), mode="trilinear") for g in groups], dim=2)
        else:
            u = F.interpolate(x, scale_factor=(2.0, 1.0, 1.0))
        return share * u + (1 - share) * self.conv(f"{key}.conv", u)


def silu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)
