"""Texts for TrajTok's text tower: normalised as it was trained, cut into word pieces, and embedded beside clips.

The word pieces are those of bert-base-uncased (WordPiece, Devlin et al. 2018), by a vocabulary with one piece a line.
"""

import functools
import re
import unicodedata
from collections.abc import Iterator, Sequence

import torch

from ..schemas.errors import TokenizerError
from .trajtok_towers import EMBED, SegmentClip
from .weights import fetch_weights

MOST_PIECES = 77  # of a text, with the two that stand around it
LONGEST_WORD = 100  # characters: longer ones are unknown
TEXTS_AT_ONCE = 64
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
# Where Chinese characters are, each of which is a word: the blocks that BERT names, extensions included.
IDEOGRAPHS = (
    (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
)  # fmt: skip
_DROPPED = re.compile(r"[,.'!?\"()*#:;~]")


def normalized_text(text: str) -> str:
    """`text` as captions were written in training: small letters, without most punctuation, single spaces."""
    text = _DROPPED.sub("", text.lower()).replace("-", " ").replace("/", " ").replace("<person>", "person")
    return " ".join(text.split())


class TextTokenizer:
    """Texts to word pieces, by the vocab.txt of bert-base-uncased at a path or fsspec URL; TokenizerError without it.

    `sha256` is that of the vocabulary.
    """

    def __init__(self, vocab_uri: str) -> None:
        file = fetch_weights(vocab_uri)
        self.sha256 = file.sha256
        try:
            with open(file.path, encoding="utf-8") as stream:
                self._ids = {line.rstrip("\n"): i for i, line in enumerate(stream)}
        except UnicodeDecodeError:
            self._ids = {}
        missing = [piece for piece in SPECIAL if piece not in self._ids]
        if missing:
            raise TokenizerError(
                f"vocabulary {vocab_uri}: no {', '.join(missing)} in it: give vocab.txt of bert-base-uncased, one piece"
                f" a line"
            )
        self._pad, self._unknown, self._begin, self._end = (self._ids[piece] for piece in SPECIAL)

    def __len__(self) -> int:
        """How many ids there are."""
        return 1 + max(self._ids.values())

    def __call__(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids (B,MOST_PIECES) int64 of normalised texts, cut or filled up to that length; and False for filling."""
        ids_BM = torch.full((len(texts), MOST_PIECES), self._pad)
        seen_BM = torch.zeros((len(texts), MOST_PIECES), dtype=torch.bool)
        for ids_M, seen_M, text in zip(ids_BM, seen_BM, texts, strict=True):
            pieces = [self._begin, *self.pieces(normalized_text(text))[: MOST_PIECES - 2], self._end]
            ids_M[: len(pieces)] = torch.tensor(pieces)
            seen_M[: len(pieces)] = True
        return ids_BM, seen_BM

    def pieces(self, text: str) -> list[int]:
        """The ids of all word pieces of `text`, without those around it."""
        return [piece for word in words_of(text) for piece in self._of_word(word)]

    def _of_word(self, word: str) -> list[int]:
        """The longest piece that the word begins with, then that of its rest: all of it, or one unknown piece."""
        if len(word) > LONGEST_WORD:
            return [self._unknown]
        found, start = [], 0
        while start < len(word):
            prefix = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((end for end in ends if prefix + word[start:end] in self._ids), None)
            if end is None:
                return [self._unknown]
            found.append(self._ids[prefix + word[start:end]])
            start = end
        return found


def words_of(text: str) -> Iterator[str]:
    """Words in small letters without accents; punctuation marks and Chinese characters are words of their own."""
    text = "".join(_spaced(character) for character in text)
    plain = "".join(one for one in unicodedata.normalize("NFD", text) if unicodedata.category(one) != "Mn")
    for word in plain.lower().split():
        yield from "".join(f" {one} " if _is_mark(one) else one for one in word).split()


@functools.lru_cache(maxsize=1 << 16)
def _spaced(character: str) -> str:
    """The character, apart from its neighbours if it is Chinese; nothing for what cannot be seen."""
    if character.isspace() and (character in "\t\n\r" or unicodedata.category(character)[0] != "C"):
        return " "
    if character in "\0\ufffd" or unicodedata.category(character)[0] == "C":
        return ""
    return f" {character} " if any(low <= ord(character) <= high for low, high in IDEOGRAPHS) else character


@functools.lru_cache(maxsize=1 << 16)
def _is_mark(character: str) -> bool:
    is_ascii_mark = character.isascii() and not character.isalnum() and 32 < ord(character) < 127
    return is_ascii_mark or unicodedata.category(character)[0] == "P"


@torch.inference_mode()
def embed_texts(model: SegmentClip, tokenizer: TextTokenizer, texts: Sequence[str]) -> torch.Tensor:
    """The embeddings (N,EMBED) float32 of texts, of length 1, on the CPU: their products with those of clips rank."""
    words = model.text_encoder.get_submodule("embeddings.word_embeddings").get_parameter("weight")
    if len(tokenizer) > len(words):
        raise TokenizerError(
            f"the vocabulary has {len(tokenizer)} pieces, the text tower {len(words)}: give vocab.txt of"
            f" bert-base-uncased"
        )
    embeddings = [torch.empty(0, EMBED)]
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        ids_BM, seen_BM = tokenizer(texts[start : start + TEXTS_AT_ONCE])
        embeddings.append(model.embed_text(ids_BM.to(words.device), seen_BM.to(words.device)).float().cpu())
    return torch.cat(embeddings)
