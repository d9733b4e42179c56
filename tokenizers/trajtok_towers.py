"""TrajTok's transformers: a ViT over the tokens of trajectories, a text tower, and what makes the two comparable."""

import torch
import torch.nn.functional as F
from torch import nn

from .trajtok_model import Segmentation, Sizes, TrajectoryEncoder

EMBED = 256  # of clips and texts
TEXT_LAYERS, TEXT_DIM, TEXT_HEADS = 9, 768, 12
TEXT_TOKENS, TEXT_POSITIONS = 30_522, 512


def place(root: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Put modules below `root` under their dotted names, as official state dicts have them."""
    for name, module in modules.items():
        *parents, leaf = name.split(".")
        parent = root
        for one in parents:
            if one not in parent._modules:
                parent.add_module(one, nn.Module())
            parent = parent.get_submodule(one)
        parent.add_module(leaf, module)


def attend(
    x_BMD: torch.Tensor, names: tuple[str, str, str, str], block: nn.Module, heads: int, seen_BM: torch.Tensor | None
) -> torch.Tensor:
    """Self-attention by the layers of `block` called `names` (query, key, value, output); keys are those `seen`."""
    query, key, value, out = (block.get_submodule(name) for name in names)
    q, k, v = (layer(x_BMD).unflatten(-1, (heads, -1)).transpose(1, 2) for layer in (query, key, value))
    mask = None if seen_BM is None else seen_BM[:, None, None, :]
    return out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class VitBlock(nn.Module):
    """A pre-norm transformer block."""

    NAMES = (
        "attention.attention.query",
        "attention.attention.key",
        "attention.attention.value",
        "attention.output.dense",
    )

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        place(self, {name: nn.Linear(dim, dim) for name in self.NAMES})
        place(self, {"intermediate.dense": nn.Linear(dim, 4 * dim), "output.dense": nn.Linear(4 * dim, dim)})
        self.layernorm_before = nn.LayerNorm(dim, eps=1e-12)
        self.layernorm_after = nn.LayerNorm(dim, eps=1e-12)
        self._heads = heads

    def forward(self, x_BMD: torch.Tensor, seen_BM: torch.Tensor | None) -> torch.Tensor:
        x = x_BMD + attend(self.layernorm_before(x_BMD), self.NAMES, self, self._heads, seen_BM)
        wide, narrow = self.get_submodule("intermediate.dense"), self.get_submodule("output.dense")
        return x + narrow(F.gelu(wide(self.layernorm_after(x))))


class TokenVit(nn.Module):
    """A ViT over tokens. Its state dict has embeddings, a last norm and a pooler besides, which nothing uses."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        dim, inner = sizes.token_dim or sizes.dim, sizes.vit_dim
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        if inner != dim:
            self.in_proj, self.out_proj = nn.Linear(dim, inner), nn.Linear(inner, dim)
        embeddings = nn.Module()
        embeddings.cls_token = nn.Parameter(torch.zeros(1, 1, inner))
        embeddings.position_embeddings = nn.Parameter(torch.zeros(1, 197, inner))
        self.layers = [VitBlock(inner, sizes.vit_heads) for _ in range(sizes.vit_layers)]
        place(self, {"vit.embeddings": embeddings})
        place(self, {"vit.embeddings.patch_embeddings.projection": nn.Conv2d(3, inner, 16)})
        place(self, {f"vit.encoder.layer.{i}": block for i, block in enumerate(self.layers)})
        place(self, {"vit.layernorm": nn.LayerNorm(inner), "vit.pooler.dense": nn.Linear(inner, inner)})

    def forward(self, tokens_BMD: torch.Tensor, valid_BM: torch.Tensor | None) -> torch.Tensor:
        """(B,1+M,D), the first row that of the clip; with `valid` the other tokens are seen by none."""
        x = torch.cat((self.cls_token.expand(len(tokens_BMD), -1, -1), tokens_BMD), dim=1)
        seen = None if valid_BM is None else F.pad(valid_BM, (1, 0), value=True)
        x = self.in_proj(x) if hasattr(self, "in_proj") else x
        for block in self.layers:
            x = block(x, seen)
        return self.out_proj(x) if hasattr(self, "out_proj") else x


class SegmentVit(nn.Module):
    """Clips to tokens of trajectories, and these through a ViT (TrajViT2)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.traj_tokenizer = TrajectoryEncoder(sizes)
        self.vision_encoder = TokenVit(sizes)
        self.norm = nn.LayerNorm(sizes.token_dim or sizes.dim)

    def forward(
        self,
        x_BTHWC: torch.Tensor,
        level: int = 0,
        labels_BN: torch.Tensor | None = None,
        *,
        masked: bool = False,
        features_BND: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Segmentation]:
        """(B,1+M,D), the first row that of the clip; and tokens, validity and segmentation of TrajectoryEncoder.

        By default unused slots are seen, as the published model was trained; with `masked` they are not.
        """
        tokens, valid, found = self.traj_tokenizer(x_BTHWC, level, labels_BN, features_BND=features_BND)
        return self.norm(self.vision_encoder(tokens, valid if masked else None)), tokens, valid, found


class BertLayer(nn.Module):
    """A post-norm transformer layer."""

    NAMES = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")

    def __init__(self, dim: int) -> None:
        super().__init__()
        place(self, {name: nn.Linear(dim, dim) for name in self.NAMES})
        place(self, {"attention.output.LayerNorm": nn.LayerNorm(dim, eps=1e-12)})
        place(self, {"intermediate.dense": nn.Linear(dim, 4 * dim), "output.dense": nn.Linear(4 * dim, dim)})
        place(self, {"output.LayerNorm": nn.LayerNorm(dim, eps=1e-12)})

    def forward(self, x_BMD: torch.Tensor, seen_BM: torch.Tensor) -> torch.Tensor:
        x = self.get_submodule("attention.output.LayerNorm")(
            x_BMD + attend(x_BMD, self.NAMES, self, TEXT_HEADS, seen_BM)
        )
        wide, narrow = self.get_submodule("intermediate.dense"), self.get_submodule("output.dense")
        return self.get_submodule("output.LayerNorm")(x + narrow(F.gelu(wide(x))))


class TextEncoder(nn.Module):
    """The first nine layers of BERT-base, which are all that texts go through."""

    def __init__(self) -> None:
        super().__init__()
        place(
            self,
            {
                "embeddings.word_embeddings": nn.Embedding(TEXT_TOKENS, TEXT_DIM),
                "embeddings.position_embeddings": nn.Embedding(TEXT_POSITIONS, TEXT_DIM),
                "embeddings.token_type_embeddings": nn.Embedding(2, TEXT_DIM),
                "embeddings.LayerNorm": nn.LayerNorm(TEXT_DIM, eps=1e-12),
            },
        )
        place(self, {f"encoder.layer.{i}": BertLayer(TEXT_DIM) for i in range(TEXT_LAYERS)})

    def forward(self, ids_BM: torch.Tensor, seen_BM: torch.Tensor) -> torch.Tensor:
        """Hidden states (B,M,768) of word pieces; `seen` is False for padding."""
        words, positions, types, norm = (
            self.get_submodule(f"embeddings.{name}")
            for name in ("word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm")
        )
        places = torch.arange(ids_BM.shape[1], device=ids_BM.device)
        x = norm(words(ids_BM) + positions(places) + types(torch.zeros_like(places)))
        for i in range(TEXT_LAYERS):
            x = self.get_submodule(f"encoder.layer.{i}")(x, seen_BM)
        return x


class SegmentClip(nn.Module):
    """Clips and texts in one space of EMBED numbers, in which near ones mean the same."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.vision_encoder = SegmentVit(sizes)
        self.text_encoder = TextEncoder()
        self.vision_proj = nn.Linear(sizes.token_dim or sizes.dim, EMBED)
        self.text_proj = nn.Linear(TEXT_DIM, EMBED)
        self.temp = nn.Parameter(torch.tensor(0.07))

    def embed_rows(self, rows_BMD: torch.Tensor) -> torch.Tensor:
        """The embeddings (B,EMBED), of length 1, of what SegmentVit gives for clips."""
        return F.normalize(self.vision_proj(rows_BMD[:, 0]), dim=-1)

    def embed_text(self, ids_BM: torch.Tensor, seen_BM: torch.Tensor) -> torch.Tensor:
        """The embeddings (B,EMBED), of length 1, of texts as word pieces; `seen` is False for padding."""
        return F.normalize(self.text_proj(self.text_encoder(ids_BM, seen_BM)[:, 0]), dim=-1)
