"""Texts for PyraTok's pyramid: words hashed into a learned table, so that no vocabulary has to be had from anywhere."""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

MOST_WORDS = 64  # of a text: later ones are cut off
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedText:
    """Embedded words (B,L,E) of clips' texts; `mask_BL` is True for those that are no padding.

    It is nowhere True for a clip without text.
    """

    text_BLE: torch.Tensor
    mask_BL: torch.Tensor

    def __post_init__(self) -> None:
        shape, mask = tuple(self.text_BLE.shape), self.mask_BL
        if len(shape) != 3 or 0 in shape or mask.dtype != torch.bool or tuple(mask.shape) != shape[:2]:
            raise ValueError(f"text is (B,L,E), its mask bool (B,L): {shape=}, {mask.dtype} of {tuple(mask.shape)}")

    @property
    def given_B(self) -> torch.Tensor:
        """Which clips have a text."""
        return self.mask_BL.any(dim=1)

    @property
    def mean_BE(self) -> torch.Tensor:
        """The mean of each text's words, 0 where there is no text."""
        count_B1 = self.mask_BL.sum(dim=1, keepdim=True).clamp(min=1)
        return self.text_BLE.masked_fill(~self.mask_BL[..., None], 0).sum(dim=1) / count_B1


def words_of(text: str) -> list[str]:
    """The first MOST_WORDS words of `text`, in small letters and without punctuation."""
    return _WORD.findall(text.lower())[:MOST_WORDS]


class WordEmbedding(nn.Module):
    """A learned vector of each word. Words share one of `vocabulary` vectors where their CRC-32 says so.

    A text without words has one more vector, as if it were a word.
    """

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary + 1, width)

    def forward(self, texts: Sequence[str | None]) -> EmbeddedText:
        """The embedded words of texts, of which None is no text at all."""
        rows = [[] if text is None else self._rows_of(text) for text in texts]
        longest = max([1, *map(len, rows)])
        device = self.table.weight.device
        rows_BL = torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.long, device=device)
        counts_B = torch.tensor([len(row) for row in rows], dtype=torch.long, device=device)
        mask_BL = torch.arange(longest, device=device) < counts_B[:, None]
        return EmbeddedText(text_BLE=self.table(rows_BL), mask_BL=mask_BL)

    def _rows_of(self, text: str) -> list[int]:
        empty = self.table.num_embeddings - 1
        return [zlib.crc32(word.encode()) % empty for word in words_of(text)] or [empty]
