"""Train a small model on cached tokens: `python examples/train.py CACHE`."""

import sys

import torch

import tokenmill

cache = tokenmill.open_cache(sys.argv[1] if len(sys.argv) > 1 else "out/demo")
loader = cache.loader("dct", batch_size=8)
embedding, head = torch.nn.EmbeddingBag(2**18, 32), torch.nn.Linear(32, 1)
optimizer = torch.optim.Adam([*embedding.parameters(), *head.parameters()], lr=0.01)
for epoch in range(3):
    for batch in loader:
        codes_BN = batch["tokens"].flatten(1)
        change_B1 = (codes_BN[:, 1:] != codes_BN[:, :-1]).float().mean(dim=1, keepdim=True)
        loss = torch.nn.functional.mse_loss(head(embedding(codes_BN)), change_B1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}: loss {loss.item():.4f} over {len(loader)} batches")
