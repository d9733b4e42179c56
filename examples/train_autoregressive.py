"""Train a small causal transformer on codes: `python examples/train_autoregressive.py [CACHE [CHECKPOINT]]`.

CACHE is that of `tokenmill run examples/demo.yaml`. A codebook of 262,144 is large for few clips, but a code of
dct_fsq/488_262144 is six digits, one for each coefficient of its block: codes are embedded as the sum of their digits,
and the digits of the next code are predicted side by side. With a CHECKPOINT the training goes on where it was killed.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import tokenmill

LEVELS = (32, 4, 8, 8, 8, 4)  # of the digits, the highest first
BATCH, EPOCHS, WINDOW, WIDTH = 8, 30, 8, 96
SEQUENCE = 4 * WINDOW**2


def digits_of(codes_X: torch.Tensor) -> torch.Tensor:
    """The digits (...,6) of codes (...)."""
    digits = []
    for level in reversed(LEVELS):
        digits.append(codes_X % level)
        codes_X = codes_X // level
    return torch.stack(digits[::-1], dim=-1)


class Predictor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(level, WIDTH) for level in LEVELS)
        self.positions = nn.Parameter(torch.randn(SEQUENCE, WIDTH) * 0.02)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.heads = nn.ModuleList(nn.Linear(WIDTH, level) for level in LEVELS)

    def loss(self, codes_BN: torch.Tensor) -> torch.Tensor:
        """Nats to a code, each predicted from all before it."""
        digits_BND = digits_of(codes_BN)
        x_BNC = sum(embed(digits_BND[:, :-1, i]) for i, embed in enumerate(self.embeddings)) + self.positions[:-1]
        mask_NN = nn.Transformer.generate_square_subsequent_mask(x_BNC.shape[1])
        x_BNC = self.layers(x_BNC, mask=mask_NN, is_causal=True)
        losses = [F.cross_entropy(h(x_BNC).mT, digits_BND[:, 1:, i]) for i, h in enumerate(self.heads)]
        return torch.stack(losses).sum()


def window_of(codes_Bthw: torch.Tensor) -> torch.Tensor:
    """The same columns of all time steps (B, 4*8*8), at a random place: whole grids are long for a CPU."""
    y, x = (int(torch.randint(size - WINDOW + 1, ())) for size in codes_Bthw.shape[2:])
    return codes_Bthw[:, :4, y : y + WINDOW, x : x + WINDOW].flatten(1).long()


def main() -> None:
    cache = tokenmill.open_cache(sys.argv[1] if len(sys.argv) > 1 else "out/demo")
    checkpoint = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    loader = cache.loader("dct", BATCH, shuffle="global", seed=0, tail="drop")
    torch.manual_seed(0)
    model, losses = Predictor(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    if checkpoint and checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        loader.load_state_dict(state["loader"])  # goes on with the batch after the last one that counted
        losses = state["losses"]
        print(f"resumed after {len(losses)} steps")
    while loader.epoch < EPOCHS:
        for batch in loader:
            loss = model.loss(window_of(batch["dct"]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if checkpoint and len(losses) % 20 == 0:
                parts = {"model": model, "optimizer": optimizer, "loader": loader}
                state = {name: part.state_dict() for name, part in parts.items()} | {"losses": losses}
                torch.save(state, f"{checkpoint}.new")
                Path(f"{checkpoint}.new").replace(checkpoint)  # whole, whenever the training is killed
        if loader.epoch % 5 == 0:
            print(f"epoch {loader.epoch}: {losses[-1]:.3f} nats to a code", flush=True)
    first, last = (sum(part) / len(part) for part in (losses[:5], losses[-5:]))
    print(f"first loss {first:.3f}, last loss {last:.3f}")
    sys.exit(last >= first)


if __name__ == "__main__":
    main()
