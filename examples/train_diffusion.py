"""Train a small denoiser on continuous latents: `python examples/train_diffusion.py [CACHE]`.

CACHE is that of `python examples/make_training_cache.py`, whose latents are a random projection of real video: what is
learned is that projection's distribution, by flow matching (Lipman et al. 2022, arXiv:2210.02747): the network sees
(1-t) noise + t latents, and predicts latents - noise. Samples follow its field from noise to latents.
"""

import math
import sys

import torch
import torch.nn.functional as F
from torch import nn

import tokenmill

BATCH, EPOCHS, WIDTH = 32, 30, 64


class Denoiser(nn.Module):
    def __init__(self, grid_thw: tuple[int, ...], dim: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(dim, WIDTH), nn.Linear(WIDTH, dim)
        self.positions = nn.Parameter(torch.randn(math.prod(grid_thw), WIDTH) * 0.02)
        self.time = nn.Sequential(nn.Linear(16, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, noisy_BNd: torch.Tensor, time_B: torch.Tensor) -> torch.Tensor:
        """The direction (B,N,d) from noise to latents, at times (B,) from 0 to 1."""
        angles = time_B[:, None] * math.pi * 2.0 ** torch.arange(8)
        time_B1C = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))[:, None]
        return self.leave(self.layers(self.enter(noisy_BNd) + self.positions + time_B1C))


def loss_of(model: Denoiser, latents_BNd: torch.Tensor) -> torch.Tensor:
    noise_BNd, time_B = torch.randn_like(latents_BNd), torch.rand(len(latents_BNd))
    time_B11 = time_B[:, None, None]
    predicted_BNd = model((1 - time_B11) * noise_BNd + time_B11 * latents_BNd, time_B)
    return F.mse_loss(predicted_BNd, latents_BNd - noise_BNd)


@torch.no_grad()
def sampled(model: Denoiser, latents_BNd: torch.Tensor, steps: int = 20) -> torch.Tensor:
    """As many new latents, by Euler's method from noise."""
    x_BNd = torch.randn_like(latents_BNd)
    for step in range(steps):
        x_BNd += model(x_BNd, torch.full((len(x_BNd),), step / steps)) / steps
    return x_BNd


def main() -> None:
    cache = tokenmill.open_cache(sys.argv[1] if len(sys.argv) > 1 else "out/training")
    loader = cache.loader("latents", BATCH, shuffle="global", seed=0, tail="drop")
    # The first epoch only measures: latents are stored as the encoder gives them, of any scale.
    latents_Nthwd = torch.cat([batch["latents"].float() for batch in loader])
    mean_d, std_d = latents_Nthwd.mean((0, 1, 2, 3)), latents_Nthwd.std((0, 1, 2, 3))
    torch.manual_seed(0)
    model = Denoiser(latents_Nthwd.shape[1:4], latents_Nthwd.shape[-1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for epoch in range(1, 1 + EPOCHS):
        for batch in loader:
            latents_BNd = ((batch["latents"].float() - mean_d) / std_d).flatten(1, 3)
            loss = loss_of(model, latents_BNd)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        if epoch % 10 == 0:
            print(f"epoch {epoch}: loss {losses[-1]:.3f}", flush=True)
    samples_BNd = sampled(model, latents_BNd)
    for name, one in {"latents": latents_BNd, "samples": samples_BNd}.items():
        print(f"{name}: deviation {one.std():.2f}, step from token to token {one.diff(dim=1).std():.2f}")
    first, last = (sum(part) / len(part) for part in (losses[:5], losses[-5:]))
    print(f"first loss {first:.3f}, last loss {last:.3f}")
    sys.exit(last >= first)


if __name__ == "__main__":
    main()
