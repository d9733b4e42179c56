"""Train a classifier on tokens of trajectories: `python examples/train_classifier.py [CACHE]`.

CACHE is that of `python examples/make_training_cache.py`. A clip has as many tokens as there are trajectories in it, so
batches are packs of whole clips under a budget of tokens: no padding. Attention stays inside of each clip, here by a
mask, on a GPU by the `cu_seqlens` of the batch (flash-attn's flash_attn_varlen_func). The class is the clip's video,
and every fifth clip or so is held out (clips overlap, so those are no measure of anything new).
"""

import sys

import torch
import torch.nn.functional as F
from torch import nn

import tokenmill

BUDGET, EPOCHS, WIDTH, HEADS = 1024, 20, 64, 4
HELD_OUT = "clip_id >= 'd'"  # ids are digests, in hexadecimal digits


class Classifier(nn.Module):
    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, WIDTH))
        self.norm, self.to_qkv, self.mixed = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 128), nn.GELU(), nn.Linear(128, num_classes))

    def forward(self, values_Nd: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """Logits (B, classes) of B clips, whose tokens lie one after the other."""
        lengths_B = cu_seqlens.diff()
        clip_N = torch.arange(len(lengths_B)).repeat_interleave(lengths_B)
        x_NC = self.enter(values_Nd.float())
        qkv = self.to_qkv(self.norm(x_NC)).unflatten(-1, (3, HEADS, -1)).permute(1, 2, 0, 3)
        attended = F.scaled_dot_product_attention(*qkv.unbind(0), attn_mask=clip_N[:, None] == clip_N)
        x_NC = x_NC + self.mixed(attended.transpose(0, 1).flatten(1))
        sums_BC = torch.zeros(len(lengths_B), WIDTH).index_add_(0, clip_N, x_NC)
        return self.head(sums_BC / lengths_B[:, None])


def main() -> None:
    cache = tokenmill.open_cache(sys.argv[1] if len(sys.argv) > 1 else "out/training")
    videos = cache.sql("select distinct uri from videos order by uri")["uri"].to_pylist()
    settings = {"columns": ["uri"], "token_budget": BUDGET}
    loader = cache.loader("objects", where=f"not {HELD_OUT}", shuffle="global", seed=0, **settings)
    held_out = cache.loader("objects", where=HELD_OUT, shuffle="none", **settings)

    def logits_and_labels(batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        packed = batch["objects"]
        labels_B = torch.tensor([videos.index(uri) for uri in batch["uri"]])
        return model(packed.values, packed.cu_seqlens), labels_B

    torch.manual_seed(0)
    model = Classifier(next(iter(held_out))["objects"].values.shape[1], len(videos))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for epoch in range(1, 1 + EPOCHS):
        for batch in loader:
            loss = F.cross_entropy(*logits_and_labels(batch))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        if epoch % 5 == 0:
            print(f"epoch {epoch}: loss {losses[-1]:.3f}, packs are {loader.fill:.0%} full", flush=True)
    with torch.no_grad():
        answers = [logits_and_labels(batch) for batch in held_out]
    right = torch.cat([logits_BC.argmax(1) == labels_B for logits_BC, labels_B in answers])
    print(f"{len(videos)} videos; of {len(right)} clips held out {right.float().mean():.0%} are right")
    first, last = (sum(part) / len(part) for part in (losses[:5], losses[-5:]))
    print(f"first loss {first:.3f}, last loss {last:.3f}")
    sys.exit(last >= first)


if __name__ == "__main__":
    main()
