"""Texts become the word pieces of BERT, and embeddings of the text tower."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tokenmill.schemas.errors import TokenizerError
from tokenmill.tokenizers import trajtok_towers
from tokenmill.tokenizers.trajtok_model import Sizes
from tokenmill.tokenizers.trajtok_text import MOST_PIECES, TextTokenizer, embed_texts, normalized_text, words_of
from tokenmill.tokenizers.trajtok_towers import SegmentClip

PIECES = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] a man person play ##ing ##s the guitar ##tar gui un ##aff ##able cafe & < > 中 ##b"
    " 1 ##2"
).split()


@pytest.fixture
def vocab(tmp_path: Path) -> str:
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    return str(tmp_path / "vocab.txt")


@pytest.fixture
def tokenizer(vocab: str) -> TextTokenizer:
    return TextTokenizer(vocab)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("A man, playing the guitar.", "a man playing the guitar"),
        ('Don\'t (really) do "it"; #1 *: ~!?', "dont really do it 1"),
        ("slow-motion/close-up", "slow motion close up"),
        ("<person> waves", "person waves"),
        ("  two\t spaces \n", "two spaces"),
        ("<PERSON>", "person"),
        ("", ""),
        (".,!", ""),
    ],
)
def test_texts_are_written_as_captions_were_in_training(text: str, wanted: str) -> None:
    assert normalized_text(text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a man plays the guitar", ["a", "man", "play", "##s", "the", "guitar"]),
        ("playing guitars", ["play", "##ing", "guitar", "##s"]),
        ("unaffable", ["un", "##aff", "##able"]),
        ("unknown man", ["[UNK]", "man"]),  # no piece of its rest: the whole word is unknown
        ("guib", ["gui", "##b"]),
        ("CAFÉ cafe\u0301 café", ["cafe"] * 3),
        ("a&b<man>", ["a", "&", "[UNK]", "<", "man", ">"]),
        ("man中man", ["man", "中", "man"]),
        ("a\u00a0man\u3000the\u200bman", ["a", "man", "[UNK]"]),  # what cannot be seen parts no words
        ("the\x00\ufffd man", ["the", "man"]),
        ("12 2", ["1", "##2", "[UNK]"]),
        ("a" + "b" * 99, ["a"] + ["##b"] * 99),
        ("a" + "b" * 100, ["[UNK]"]),
        ("", []),
    ],
)
def test_words_are_cut_into_the_longest_pieces(tokenizer: TextTokenizer, text: str, wanted: list[str]) -> None:
    assert [PIECES[piece] for piece in tokenizer.pieces(text)] == wanted


def test_marks_are_words_of_their_own() -> None:
    assert list(words_of("Hello,world… “x” ^_^ $5 €5")) == [
        "hello", ",", "world", "…", "“", "x", "”", "^", "_", "^", "$", "5", "€5",
    ]  # fmt: skip


def test_texts_are_filled_up_and_cut(tokenizer: TextTokenizer) -> None:
    ids, seen = tokenizer(["A man!", "", "the " * 200])
    assert ids.shape == seen.shape == (3, MOST_PIECES) == (3, 77)
    assert (ids.dtype, seen.dtype) == (torch.int64, torch.bool)
    begin, end = PIECES.index("[CLS]"), PIECES.index("[SEP]")
    assert ids[0].tolist() == [begin, PIECES.index("a"), PIECES.index("man"), end] + [0] * 73
    assert ids[1].tolist() == [begin, end] + [0] * 75
    assert ids[2].tolist() == [begin] + [PIECES.index("the")] * 75 + [end]
    assert seen.sum(dim=1).tolist() == [4, 2, 77]
    assert seen[0, :4].all()


def test_vocabularies_with_other_line_ends_are_the_same(vocab: str, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_bytes("\r\n".join(PIECES).encode())
    one, other = TextTokenizer(vocab), TextTokenizer(str(tmp_path / "other.txt"))
    assert len(one) == len(other) == len(PIECES)
    assert one.pieces("a man ##s") == other.pieces("a man ##s")
    assert one.sha256 != other.sha256


def test_files_that_are_no_vocabulary_are_refused(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("[PAD]\n[CLS]\na\n")
    with pytest.raises(TokenizerError, match=r"no \[UNK\], \[SEP\] in it: give vocab.txt of bert-base-uncased"):
        TextTokenizer(str(tmp_path / "words.txt"))
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    with pytest.raises(TokenizerError, match=r"no \[PAD\], \[UNK\], \[CLS\], \[SEP\] in it"):
        TextTokenizer(str(tmp_path / "binary"))
    with pytest.raises(TokenizerError, match="it does not exist: check the path"):
        TextTokenizer(str(tmp_path / "absent.txt"))


@pytest.fixture(scope="module")
def model() -> Iterator[SegmentClip]:
    """A model with only what texts need, of one layer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trajtok_towers, "TEXT_LAYERS", 1)
        yield _text_side()


def _text_side() -> SegmentClip:
    with torch.device("meta"):
        made = SegmentClip(Sizes(dim=64, num_slots=8, grid=14, vit_layers=1, vit_heads=4, vit_dim=64))
    del made.vision_encoder
    del made.vision_proj
    made = made.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in made.named_parameters():
        mean = 1.0 if name.endswith("LayerNorm.weight") else 0.0
        torch.nn.init.normal_(parameter, mean, std=0.05, generator=generator)
    return made


def test_embeddings_are_those_of_the_text_tower(
    model: SegmentClip, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenmill.tokenizers.trajtok_text.TEXTS_AT_ONCE", 2)
    texts = ["A man!", "the guitar", "a man"]
    found = embed_texts(model, tokenizer, texts)
    assert found.shape == (3, 256)
    assert not found.requires_grad
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(found[0], found[2], atol=1e-5, rtol=0)
    assert found[0] @ found[1] < 0.999
    with torch.no_grad():
        wanted = model.embed_text(torch.tensor([[2, 11, 12, 3]]), torch.ones(1, 4, dtype=torch.bool))
    torch.testing.assert_close(found[1:2], wanted, atol=1e-5, rtol=0)
    assert embed_texts(model, tokenizer, []).shape == (0, 256)


def test_a_vocabulary_larger_than_the_tower_is_refused(model: SegmentClip, tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES[:4] + [f"w{i}" for i in range(30_519)]))
    with pytest.raises(TokenizerError, match="the vocabulary has 30523 pieces, the text tower 30522"):
        embed_texts(model, TextTokenizer(str(tmp_path / "vocab.txt")), ["a"])
