"""PyraTok's released networks as their specification reads, in the plainest PyTorch: (B,C,T,H,W) throughout, a clip at
once, every padding a copy, one 3-D convolution for a kernel over time. What tokenizers/pyratok_vae.py and
pyratok_quantizer.py are measured against, and tested against; it shares nothing with them.

    plain = PlainPyraTok(model.state_dict()); mean, logvar, taps = plain.encode(x_BCTHW); plain.decode(z_BCthw)
    values, ids, loss, margins = plain.quantize(mean)
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F


class PlainPyraTok:
    """The VAE and the quantizer over a state dict with the official keys, which say all sizes.

    Keywords are what a state dict does not say of the quantizer: those of its constructor, and the scale of the text.
    """

    def __init__(
        self,
        state: Mapping[str, torch.Tensor],
        *,
        heads: int = 2,
        commitment_weight: float = 0.25,
        entropy_weight: float = 0.1,
        inv_temperature: float = 100.0,
        text_scale: float = 0.0,
    ) -> None:
        self.state, self.heads, self.text_scale = state, heads, text_scale
        self.commitment_weight, self.entropy_weight = commitment_weight, entropy_weight
        self.inv_temperature = inv_temperature

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Mean, logarithm of the variance, and the features behind every block, of 1 + 4k frames (1 + 2k, ...)."""
        taps, h, i = {}, self.causal("encoder.conv_in", x), 0
        while self.has(f"encoder.down_blocks.{i}."):
            key = f"encoder.down_blocks.{i}"
            h = self.block(key, h) if f"{key}.conv1.weight" in self.state else self.down(key, h)
            taps[f"down{i}"], i = h, i + 1
        h = taps["mid"] = self.middle("encoder.mid_block", h)
        h = self.causal("encoder.conv_out", F.silu(self.norm("encoder.norm_out", h)))
        mean, logvar = self.conv("quant_conv", h).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20), taps

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Frames in [-1,1]."""
        h = self.middle("decoder.mid_block", self.causal("decoder.conv_in", self.conv("post_quant_conv", z)))
        i = 0
        while self.has(key := f"decoder.up_blocks.{i}."):
            j = 0
            while self.has(f"{key}resnets.{j}."):
                h, j = self.block(f"{key}resnets.{j}", h), j + 1
            h = self.up(f"{key}upsamplers.0", h) if self.has(f"{key}upsamplers.") else h
            i += 1
        return self.causal("decoder.conv_out", F.silu(self.norm("decoder.norm_out", h))).clamp(-1, 1)

    def has(self, prefix: str) -> bool:
        return any(key.startswith(prefix) for key in self.state)

    def conv(self, key: str, x: torch.Tensor, stride: int | tuple[int, ...] = 1) -> torch.Tensor:
        return F.conv3d(x, self.state[f"{key}.weight"], self.state[f"{key}.bias"], stride)

    def conv_2d(self, key: str, x: torch.Tensor, stride: int = 1, padding: int = 0) -> torch.Tensor:
        """Of every frame."""
        frames = x.transpose(1, 2).flatten(0, 1)
        y = F.conv2d(frames, self.state[f"{key}.weight"], self.state[f"{key}.bias"], stride, padding)
        return y.unflatten(0, (len(x), -1)).transpose(1, 2)

    def causal(self, key: str, x: torch.Tensor) -> torch.Tensor:
        side = self.state[f"{key}.weight"].shape[3] // 2
        return self.conv(key, F.pad(x, (side, side, side, side, 2, 0)))

    def norm(self, key: str, x: torch.Tensor) -> torch.Tensor:
        gamma = self.state[f"{key}.gamma"].view(-1, 1, 1, 1)
        return F.normalize(x, dim=1, eps=1e-12) * math.sqrt(x.shape[1]) * gamma

    def block(self, key: str, x: torch.Tensor) -> torch.Tensor:
        h = self.causal(f"{key}.conv1", F.silu(self.norm(f"{key}.norm1", x)))
        h = self.causal(f"{key}.conv2", F.silu(self.norm(f"{key}.norm2", h)))
        return h + (self.conv(f"{key}.conv_shortcut", x) if f"{key}.conv_shortcut.weight" in self.state else x)

    def middle(self, key: str, x: torch.Tensor) -> torch.Tensor:
        x = self.attention(f"{key}.attentions.0", self.block(f"{key}.resnets.0", x))
        return self.block(f"{key}.resnets.1", x)

    def attention(self, key: str, x: torch.Tensor) -> torch.Tensor:
        b, c, t, h, w = x.shape
        qkv = self.conv_2d(f"{key}.to_qkv", self.norm(f"{key}.norm", x))
        q, k, v = qkv.permute(0, 2, 3, 4, 1).reshape(b * t, h * w, 3 * c).chunk(3, dim=-1)
        y = (q @ k.transpose(1, 2) / math.sqrt(c)).softmax(-1) @ v
        return x + self.conv_2d(f"{key}.proj", y.reshape(b, t, h, w, c).permute(0, 4, 1, 2, 3))

    def down(self, key: str, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_2d(f"{key}.resample.1", F.pad(x, (0, 1, 0, 1)), 2)
        if f"{key}.time_conv.weight" not in self.state or x.shape[2] == 1:
            return x
        return torch.cat((x[:, :, :1], self.conv(f"{key}.time_conv", x, (2, 1, 1))), dim=2)

    def up(self, key: str, x: torch.Tensor) -> torch.Tensor:
        if f"{key}.time_conv.weight" in self.state and x.shape[2] > 1:
            earlier, later = self.causal(f"{key}.time_conv", x[:, :, 1:]).chunk(2, dim=1)
            x = torch.cat((x[:, :, :1], torch.stack((earlier, later), dim=3).flatten(2, 3)), dim=2)
        return self.conv_2d(f"{key}.resample.1", F.interpolate(x, scale_factor=(1.0, 2.0, 2.0)), padding=1)

    def quantize(
        self, z: torch.Tensor, text: torch.Tensor | None = None, *, is_training: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Values as `z`, ids (B,t,h,w,Q), the loss, and how near each site's least certain value is to 0."""
        left, values, loss, ids, margins, stage = z, torch.zeros_like(z), torch.zeros(()), [], [], 0
        while self.has(key := f"lapq_quantizer.layers.{stage}."):
            y = left if text is None or self.text_scale == 0 else self.moved(key, left, text)
            signs = torch.where(y >= 0, 1.0, -1.0)
            number = torch.zeros_like(signs[:, 0], dtype=torch.int64)
            for channel in range(z.shape[1]):
                number = 2 * number + (signs[:, channel] > 0)
            loss = loss + self.commitment_weight * (y - signs).square().mean()
            if is_training:
                loss = loss + self.entropy_weight * self.entropy(y)
            value = (signs + (y - y.detach())) * 2.0**-stage
            ids.append(number)
            margins.append(y.abs().amin(1))
            left, values, stage = left - value.detach(), values + value, stage + 1
        return values, torch.stack(ids, dim=-1), loss, torch.stack(margins, dim=-1)

    def moved(self, key: str, z: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """With what every site attends to in the text."""

        def normed(name: str, x: torch.Tensor) -> torch.Tensor:
            return F.layer_norm(x, x.shape[-1:], self.state[f"{key}{name}.weight"], self.state[f"{key}{name}.bias"])

        def linear(name: str, x: torch.Tensor) -> torch.Tensor:
            return x @ self.state[f"{key}{name}.weight"].T + self.state[f"{key}{name}.bias"]

        sites = z.permute(0, 2, 3, 4, 1).flatten(1, 3)
        context = normed("text_context_norm", linear("text_proj", text))
        weights = self.state[f"{key}cross_attn.in_proj_weight"].chunk(3)
        biases = self.state[f"{key}cross_attn.in_proj_bias"].chunk(3)
        of = (normed("query_norm", sites), context, context)
        q, k, v = (x @ weight.T + bias for x, weight, bias in zip(of, weights, biases, strict=True))
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        y = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        y = linear("cross_attn.out_proj", y.transpose(1, 2).flatten(2))
        return z + self.text_scale * y.transpose(1, 2).reshape(z.shape)

    def entropy(self, y: torch.Tensor) -> torch.Tensor:
        p = (2 * self.inv_temperature * y).clamp(-30, 30).sigmoid().clamp(1e-6, 1 - 1e-6).movedim(1, -1).flatten(0, -2)
        return y.shape[1] * math.log(2) + nats(p).sum(-1).mean() - nats(p.mean(0)).sum()


def nats(p: torch.Tensor) -> torch.Tensor:
    return -p * p.log() - (1 - p) * (1 - p).log()
