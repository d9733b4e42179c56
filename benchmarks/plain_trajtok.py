"""TrajTok as its specification reads, in the plainest PyTorch: (N,C,H,W) frames, all of a clip at once, latents and
patches concatenated, dense masks, a softmax over all scores. What tokenizers/trajtok_model.py is measured against, and
tested against.

    plain = PlainTrajTok(Sizes(), SegmentVit(Sizes()).state_dict()); plain(x_BTHWC)["tokens"]
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from tokenmill.tokenizers.trajtok_model import Sizes

PERCEIVER_HEADS, SIDE = 8, 224


class PlainTrajTok:
    """Segmenter, encoder of trajectories and ViT over a state dict with the official keys (of SegmentViT)."""

    def __init__(self, sizes: Sizes, state: Mapping[str, torch.Tensor]) -> None:
        self.sizes, self.state = sizes, state

    def __call__(
        self,
        x: torch.Tensor,
        level: int = 0,
        labels: torch.Tensor | None = None,
        *,
        features: torch.Tensor | None = None,
        masked: bool = False,
    ) -> dict[str, torch.Tensor]:
        """What SegmentVit gives for frames (B,T,H,W,3), by name."""
        b, t = x.shape[:2]
        x = x.permute(0, 1, 4, 2, 3).flatten(0, 1)
        if x.shape[2] != SIDE:
            x = F.interpolate(x, (SIDE, SIDE), mode="bilinear")
        found = self.segment(x, b)
        shares, logits = found["logits"].softmax(-1), found["logits"]
        patches = found["patches"] if features is None else features
        if patches.shape[1] != logits.shape[1]:
            old, new = self.sizes.grid, round((patches.shape[1] // t) ** 0.5)
            maps = logits.reshape(b * t, old, old, -1).permute(0, 3, 1, 2)
            logits = F.interpolate(maps, (new, new), mode="bilinear").permute(0, 2, 3, 1).reshape(b, t * new * new, -1)
            shares = logits.softmax(-1)
        labels = logits.argmax(-1) if labels is None else labels
        tokens, valid = self.tokens(patches, shares, labels, level)
        rows = self.vit(tokens, valid if masked else None)
        return found | {"labels": labels, "tokens": tokens, "valid": valid, "rows": rows}

    def segment(
        self, x: torch.Tensor, batch: int, prefix: str = "traj_tokenizer.segmenter."
    ) -> dict[str, torch.Tensor]:
        """Patches, queries and logits, of the finer grid too where there is a head for it, of frames (B*T,3,H,W)."""
        maps = self.patch_features(f"{prefix}patch_encoder", x)
        patches = maps.flatten(2).transpose(1, 2).reshape(batch, -1, maps.shape[1])
        queries = self.queries(f"{prefix}trajectory_perceiver", patches)
        found = {"patches": patches, "queries": queries, "logits": self.logits(prefix, patches, queries)}
        if f"{prefix}traj_seg_head_high_res.0.weight" in self.state:
            fine = self.high_resolution(f"{prefix}patch_decoder_high_res.conv_up", maps)
            fine = fine.flatten(2).transpose(1, 2).reshape(batch, -1, fine.shape[1])
            found["fine_logits"] = self.similarity(prefix, fine, self.head(f"{prefix}traj_seg_head_high_res", queries))
        return found

    def patch_features(self, key: str, x: torch.Tensor) -> torch.Tensor:
        """(N,D,grid,grid)"""
        back, size, total = f"{key}.backbone", (self.sizes.grid,) * 2, 0.0
        for i, depth in enumerate(self.sizes.depths):
            down = f"{back}.downsample_layers.{i}"
            if i == 0:
                x = self.channel_norm(f"{down}.1", self.conv(f"{down}.0", x, stride=4), 1e-6)
            else:
                x = self.conv(f"{down}.1", self.channel_norm(f"{down}.0", x, 1e-6), stride=2)
            for j in range(depth):
                x = self.convnext_block(f"{back}.stages.{i}.{j}", x)
            stage = self.channel_norm(f"{back}.norm", x, 1e-6) if i == len(self.sizes.depths) - 1 else x
            h = self.channel_norm(f"{key}.ln", self.conv(f"{key}.proj.{i}", stage), 1e-5)
            total = total + F.interpolate(h, size, mode="bilinear", align_corners=False)
        return total

    def convnext_block(self, key: str, x: torch.Tensor) -> torch.Tensor:
        h = self.conv(f"{key}.dwconv", x, padding=3, groups=x.shape[1]).permute(0, 2, 3, 1)
        h = self.linear(f"{key}.pwconv1", self.norm(f"{key}.norm", h, 1e-6))
        h = self.state[f"{key}.gamma"] * self.linear(f"{key}.pwconv2", F.gelu(h))
        return x + h.permute(0, 3, 1, 2)

    def queries(self, key: str, patches: torch.Tensor) -> torch.Tensor:
        latents = self.state[f"{key}.latents"].unsqueeze(0).repeat(len(patches), 1, 1)
        return self.perceiver(key, patches, latents, None)

    def logits(self, prefix: str, patches: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        decoded = self.head(f"{prefix}patch_decoder_low_res", patches)
        return self.similarity(prefix, decoded, self.head(f"{prefix}traj_seg_head_low_res", queries))

    def similarity(self, prefix: str, patches: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        scale = (1 + F.softplus(self.state[f"{prefix}log_scale"])).clamp(max=20)
        return scale * torch.einsum("bnd,bkd->bnk", F.normalize(patches, dim=-1), F.normalize(queries, dim=-1))

    def head(self, key: str, x: torch.Tensor) -> torch.Tensor:
        return self.linear(f"{key}.2", F.relu(self.linear(f"{key}.0", x)))

    def high_resolution(self, key: str, x: torch.Tensor) -> torch.Tensor:
        ups = (self.sizes.up or 1).bit_length() - 1
        position = 0
        for i in range(ups):
            x = F.conv_transpose2d(x, *self.affine(f"{key}.{position}"), stride=2)
            if i == 0:
                x = self.channel_norm(f"{key}.{position + 1}", x, 1e-6)
            x, position = F.gelu(x), position + (3 if i == 0 else 2)
        return F.gelu(self.conv(f"{key}.{position}", x))

    def tokens(
        self,
        patches: torch.Tensor,
        shares: torch.Tensor,
        labels: torch.Tensor,
        level: int,
        prefix: str = "traj_tokenizer.",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and validity by dense masks."""
        b, per_slot = len(labels), 2**level
        latents = self.state[f"{prefix}latents"][:, :per_slot].unsqueeze(0).repeat(b, 1, 1, 1)
        if self.sizes.add_mean_traj:
            weights = shares / (shares.sum(1, keepdim=True) + 1e-6)
            latents = latents + torch.einsum("bnk,bnd->bkd", weights, patches)[:, :, None]
        slots = torch.arange(self.sizes.num_slots, device=labels.device).repeat_interleave(per_slot)
        own = slots[:, None] == slots[None]
        own = torch.ones_like(own) if self.sizes.attend_other_latents else own
        sees = labels[:, None, :] == slots[:, None]
        sees[:, :, -2:] = True
        mask = torch.cat((own.expand(b, -1, -1), sees), dim=2)
        tokens = self.perceiver(f"{prefix}traj_feature_updater", patches, latents.flatten(1, 2), mask)
        valid = (labels[:, :, None] == slots).any(1)
        return self.linear(f"{prefix}output_projector", tokens), valid

    def perceiver(
        self, key: str, patches: torch.Tensor, latents: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        context = self.norm(f"{key}.norm_ctx", patches, 1e-6)
        for i in range(self.sizes.depth):
            latents = self.norm(f"{key}.norm_lat", latents, 1e-6)
            latents = latents + self.attention(f"{key}.layers.{i}.0", context, latents, mask)
            h = self.norm(f"{key}.layers.{i}.1.norm", latents, 1e-6)
            gate, up = (self.linear(f"{key}.layers.{i}.1.{name}", h) for name in ("gate", "up"))
            latents = latents + self.linear(f"{key}.layers.{i}.1.down", F.silu(gate) * up)
        return latents

    def attention(
        self, key: str, context: torch.Tensor, latents: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        context = self.norm(f"{key}.norm_media", context, 1e-5)
        latents = self.norm(f"{key}.norm_latents", latents, 1e-5)
        q = self.linear(f"{key}.to_q", latents)
        k, v = self.linear(f"{key}.to_kv", torch.cat((latents, context), dim=1)).chunk(2, dim=-1)
        q, k, v = (x.unflatten(-1, (PERCEIVER_HEADS, -1)).transpose(1, 2).contiguous() for x in (q, k, v))
        q, k = (self.rotate(f"{key}.rotary_emb.freqs", x) for x in (q, k))
        scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -torch.finfo(scores.dtype).max)
        out = torch.matmul(scores.softmax(-1), v)
        return self.linear(f"{key}.to_out", out.transpose(1, 2).flatten(2))

    def rotate(self, key: str, x: torch.Tensor) -> torch.Tensor:
        """Pairs of neighbours in the first half of the channels turned by the positions of their rows."""
        freqs = self.state[key]
        angles = (torch.arange(x.shape[2], device=x.device).float()[:, None] * freqs).repeat_interleave(2, dim=-1)
        turned, rest = x[..., : 2 * len(freqs)], x[..., 2 * len(freqs) :]
        first, second = turned.unflatten(-1, (-1, 2)).unbind(-1)
        across = torch.stack((-second, first), dim=-1).flatten(-2)
        return torch.cat((turned * angles.cos() + across * angles.sin(), rest), dim=-1)

    def vit(self, tokens: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        key = "vision_encoder"
        x = torch.cat((self.state[f"{key}.cls_token"].expand(len(tokens), -1, -1), tokens), dim=1)
        x = self.linear(f"{key}.in_proj", x) if f"{key}.in_proj.weight" in self.state else x
        for i in range(self.sizes.vit_layers):
            x = self.vit_block(f"{key}.vit.encoder.layer.{i}", x, valid)
        x = self.linear(f"{key}.out_proj", x) if f"{key}.out_proj.weight" in self.state else x
        return self.norm("norm", x, 1e-5)

    def vit_block(self, key: str, x: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        h = self.norm(f"{key}.layernorm_before", x, 1e-12)
        q, k, v = (
            self.linear(f"{key}.attention.attention.{name}", h)
            .unflatten(-1, (self.sizes.vit_heads, -1))
            .transpose(1, 2)
            for name in ("query", "key", "value")
        )
        scores = torch.matmul(q, k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        if valid is not None:
            scores = scores.masked_fill(~F.pad(valid, (1, 0), value=True)[:, None, None], float("-inf"))
        h = torch.matmul(scores.softmax(-1), v).transpose(1, 2).flatten(2)
        x = x + self.linear(f"{key}.attention.output.dense", h)
        h = self.linear(f"{key}.intermediate.dense", self.norm(f"{key}.layernorm_after", x, 1e-12))
        return x + self.linear(f"{key}.output.dense", F.gelu(h))

    def affine(self, key: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.state[f"{key}.weight"], self.state.get(f"{key}.bias")

    def linear(self, key: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, *self.affine(key))

    def conv(self, key: str, x: torch.Tensor, stride: int = 1, padding: int = 0, groups: int = 1) -> torch.Tensor:
        return F.conv2d(x, *self.affine(key), stride=stride, padding=padding, groups=groups)

    def norm(self, key: str, x: torch.Tensor, eps: float) -> torch.Tensor:
        weight, bias = self.affine(key)
        return F.layer_norm(x, weight.shape, weight, bias, eps)

    def channel_norm(self, key: str, x: torch.Tensor, eps: float) -> torch.Tensor:
        """Over the channels of (N,C,H,W)."""
        return self.norm(key, x.permute(0, 2, 3, 1), eps).permute(0, 3, 1, 2).contiguous()
