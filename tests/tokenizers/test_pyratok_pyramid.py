"""Levels of the pyramid lie on their grids, add up to latents, come back from ids to the bit, and load by name."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tokenmill.schemas.errors import TokenizerError
from tokenmill.tokenizers.base import NO_CODE
from tokenmill.tokenizers.pyratok import build_vae
from tokenmill.tokenizers.pyratok_levels import Strides, pooled, spread
from tokenmill.tokenizers.pyratok_pyramid import (
    METADATA_KEY,
    Pyramid,
    PyramidFile,
    PyramidSizes,
    build_pyramid,
    save_pyramid,
)
from tokenmill.tokenizers.pyratok_quantizer import LatentStatistics, LevelIds, signs_of
from tokenmill.tokenizers.pyratok_text import MOST_WORDS, EmbeddedText, WordEmbedding
from tokenmill.tokenizers.pyratok_vae import EncoderStream, VaeSizes

from .pyratok_kit import TINY, draw, filled

SIZES = replace(VaeSizes(**TINY), z_dim=8)
STATISTICS = LatentStatistics(mean=[0.1 * i for i in range(8)], std=[0.2 + 0.1 * i for i in range(8)])
GRIDS = pytest.mark.parametrize("native_grid", [False, True])


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def tiny(*, native_grid: bool = False, **more: Any) -> Pyramid:
    """A pyramid of four levels of 8 bits, whose weights are a function of their names."""
    pyramid = PyramidSizes(native_grid=native_grid, text_width=6, text_vocabulary=50, **more)
    return filled(build_pyramid(SIZES, pyramid, STATISTICS), "pyramid.")


def video(num_frames: int = 9, height: int = 16, width: int = 24, batch: int = 2) -> torch.Tensor:
    """Frames (B,3,T,H,W) in [-1,1]."""
    return draw("video", (batch, 3, num_frames, height, width)).tanh()


def ids_in(levels: Sequence[LevelIds]) -> list[torch.Tensor]:
    return [level.ids_Bthw for level in levels]


def assert_same(found: Sequence[LevelIds], wanted: Sequence[LevelIds]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.ids_Bthw, other.ids_Bthw)
        assert torch.equal(one.margins_Bthw, other.margins_Bthw)


def test_pooling_leaves_the_first_frame_alone_in_time() -> None:
    x = torch.arange(10.0).view(1, 1, 5, 1, 2)  # frames (0,1), (2,3), (4,5), (6,7), (8,9)
    assert pooled(x, (2, 1, 1)).flatten().tolist() == [0, 1, 3, 4, 7, 8]
    assert pooled(x, (4, 1, 2)).flatten().tolist() == [0.5, 5.5]
    assert pooled(x[:, :, 1:], (2, 1, 2)).flatten().tolist() == [3.5, 7.5]
    assert pooled(x[:, :, :1], (4, 1, 1)).flatten().tolist() == [0, 1]
    assert pooled(x, (4, 1, 2), torch.amin).flatten().tolist() == [0, 2]
    assert spread(torch.tensor([1.0, 2.0]).view(1, 1, 2, 1, 1), (2, 1, 2)).flatten().tolist() == [1, 1, 2, 2, 2, 2]
    for shape, ratio in (((1, 1, 3, 1, 1), (4, 1, 1)), ((1, 1, 1, 3, 2), (1, 2, 2)), ((1, 1, 1, 2, 3), (1, 2, 2))):
        with pytest.raises(ValueError, match="are not pooled by"):
            pooled(torch.zeros(shape), ratio)


def test_the_published_sizes_have_four_levels_on_one_grid_or_on_their_own() -> None:
    with torch.device("meta"):
        native = build_pyramid(VaeSizes(), PyramidSizes(native_grid=True))
    assert native.taps == ("down2", "down5", "down8", "mid")
    assert [level.proj.in_features for level in native.levels] == [96, 192, 384, 384]
    assert native.level_grids(17, 256, 512) == ((17, 128, 256), (9, 64, 128), (5, 32, 64), (5, 32, 64))
    assert native.level_grids(15, 256, 512) == native.level_grids(17, 256, 512)
    native.strides = Strides.of(VaeSizes(), native_grid=False)
    assert native.level_grids(17, 256, 512) == ((5, 32, 64),) * 4
    assert native.level_grids(1, 256, 256) == ((1, 32, 32),) * 4


def test_keys_are_those_of_the_vae_and_the_pyramid() -> None:
    keys = list(tiny().state_dict())
    vae = list(build_vae(**asdict(SIZES)).state_dict())
    assert keys[: len(vae)] == vae
    assert all(key.startswith("pyramid.") for key in keys[len(vae) :])
    without = build_pyramid(SIZES, PyramidSizes(text_width=None)).state_dict()
    assert [key for key in without if key.startswith("pyramid.levels.3.")] == [
        f"pyramid.levels.3.{name}" for name in ("norm.gamma", "proj.weight", "proj.bias")
    ]


def test_each_level_takes_signs_of_what_the_levels_before_have_left() -> None:
    model = tiny(native_grid=True)
    encoded = model.encode(video(), model.taps, in_groups=False)
    found = model.quantize(encoded)
    total = torch.zeros(())
    for i, (y, level) in enumerate(zip(found.y, model.levels, strict=True)):
        guess = level.proj(level.norm(encoded.taps[model.taps[i]].movedim(1, -1))).movedim(-1, 1)
        if i in (1, 2):  # halved over time, rows and columns; the first frame over rows and columns alone
            total = F.avg_pool3d(total, (1, 2, 2))
            total = torch.cat((total[:, :, :1], F.avg_pool3d(total[:, :, 1:], (2, 1, 1))), dim=2)
        torch.testing.assert_close(y, 2**i * (guess - total), rtol=0, atol=1e-4)
        signs = y.sign()
        assert torch.equal(found.signs[i], signs)
        total = total + signs / 2**i
    assert torch.equal(found.values_BCthw, total)
    model.levels[0].proj.requires_grad_(False).weight.zero_()
    model.levels[0].proj.bias.zero_()
    assert (model.encode_levels(video())[0].ids_Bthw == 255).all()  # 0 is positive


@GRIDS
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint16])
def test_ids_come_back_as_the_very_values(*, native_grid: bool, dtype: torch.dtype) -> None:
    model = tiny(native_grid=native_grid)
    found = model.quantize(model.encode(video(), model.taps, in_groups=False))
    ids = [ids.to(dtype) for ids in ids_in(model.ids_of_levels(found))]
    assert [tuple(level.shape[1:]) for level in ids] == list(model.level_grids(9, 16, 24))
    assert torch.equal(model.values_of_levels(ids), found.values_BCthw)
    latents = STATISTICS.restored(found.values_BCthw)
    assert torch.equal(model.latents_of_levels(ids), latents)
    assert torch.equal(model.decode_levels(ids), model.decode(latents))
    assert model.decode_levels(ids).shape == (2, 3, 9, 16, 24)


def test_each_further_level_adds_at_most_half_as_much() -> None:
    model = tiny()
    ids = ids_in(model.encode_levels(video()))
    whole = model.values_of_levels(ids)
    for m in range(1, 5):
        first = model.values_of_levels(ids[:m])
        assert (whole - first).abs().max() <= 2.0 ** (1 - m) - 2.0**-3
        assert model.decode_levels(ids[:m]).shape == (2, 3, 9, 16, 24)
    assert torch.equal(model.values_of_levels(ids[:1]), signs_of(ids[0], 8).movedim(-1, 1))


def test_first_levels_on_grids_of_their_own_are_pooled_to_the_latents() -> None:
    model = tiny(native_grid=True)
    ids = ids_in(model.encode_levels(video()))
    signs = signs_of(ids[0], 8).movedim(-1, 1)
    assert torch.equal(model.values_of_levels(ids[:1]), pooled(signs, (4, 4, 4)))
    assert model.values_of_levels(ids[:2]).shape == (2, 8, 3, 2, 3)


@GRIDS
def test_groups_of_frames_give_the_ids_of_whole_clips(*, native_grid: bool) -> None:
    model = tiny(native_grid=native_grid)
    in_groups, whole = (model.encode_levels(video(13), in_groups=value) for value in (True, False))
    for one, other in zip(in_groups, whole, strict=True):
        sure = one.margins_Bthw > 1e-4
        assert sure.float().mean() > 0.9
        assert torch.equal(one.ids_Bthw[sure], other.ids_Bthw[sure])
        torch.testing.assert_close(one.margins_Bthw[sure], other.margins_Bthw[sure], rtol=0, atol=2e-5)


def test_frames_in_any_pieces_give_the_same_ids() -> None:
    model, x = tiny(native_grid=True), video(13)
    stream = EncoderStream(model, model.taps)
    parts = [part for piece in x.split([2, 5, 6], dim=2) for part in stream.push(piece)]
    levels = zip(*(model.ids_of_levels(model.quantize(part)) for part in [*parts, *stream.finish()]), strict=True)
    found = [torch.cat([part.ids_Bthw for part in level], dim=1) for level in levels]
    for one, other in zip(found, ids_in(model.encode_levels(x)), strict=True):
        assert torch.equal(one, other)


@GRIDS
def test_later_frames_change_no_earlier_id(*, native_grid: bool) -> None:
    model, x = tiny(native_grid=native_grid), video(13)
    whole = ids_in(model.encode_levels(x))
    for num_frames in (1, 5, 9):
        other = ids_in(model.encode_levels(torch.cat((x[:, :, :num_frames], -x[:, :, num_frames:]), dim=2)))
        for grid, one, changed in zip(model.level_grids(num_frames, 16, 24), whole, other, strict=True):
            assert torch.equal(one[:, : grid[0]], changed[:, : grid[0]])
            assert (one[:, grid[0] :] != changed[:, grid[0] :]).any()


@pytest.mark.parametrize("num_frames", [1, 2, 4, 5, 6, 11])
def test_clips_of_any_length_keep_all_frames(num_frames: int) -> None:
    model, x = tiny(native_grid=True), video(num_frames)
    found = model.encode_levels(x)
    assert [tuple(ids.shape[1:]) for ids in ids_in(found)] == list(model.level_grids(num_frames, 16, 24))
    missing = -(num_frames - 1) % 4
    assert_same(found, model.encode_levels(torch.cat((x, x[:, :, -1:].expand(-1, -1, missing, -1, -1)), dim=2)))
    changed = x.clone()
    changed[:, :, -1] *= -1
    assert any((a != b).any() for a, b in zip(ids_in(model.encode_levels(changed)), ids_in(found), strict=True))


def test_margins_are_those_of_a_level_and_of_the_levels_before() -> None:
    model = tiny(native_grid=True)
    found = model.quantize(model.encode(video(), model.taps))
    levels = model.ids_of_levels(found)
    first, second = (y.abs().amin(1, keepdim=True) / 2**i for i, y in enumerate(found.y[:2]))
    assert torch.equal(levels[0].margins_Bthw, first[:, 0])
    assert torch.equal(levels[1].margins_Bthw, second.minimum(pooled(first, (2, 2, 2), torch.amin))[:, 0])
    assert (levels[3].margins_Bthw <= levels[2].margins_Bthw).all()


def test_what_is_no_number_has_no_code_at_its_level_and_at_later_ones() -> None:
    model = tiny(native_grid=True)
    encoded = model.encode(video(), model.taps)
    encoded.taps["down1"][1, 0, 3, 5, 2] = torch.nan
    levels = model.ids_of_levels(model.quantize(encoded))
    assert [(ids == NO_CODE).nonzero().tolist() for ids in ids_in(levels)] == [
        [[1, 3, 5, 2]],
        [[1, 2, 2, 1]],
        [[1, 1, 1, 0]],
        [[1, 1, 1, 0]],
    ]
    assert all(level.margins_Bthw.min() == 0 for level in levels)
    with pytest.raises(TokenizerError, match="ids of PyraTok's pyramid are from 0 to 255, found -1 to"):
        model.decode_levels(ids_in(levels))


def test_text_moves_ids_by_its_scale_alone() -> None:
    model, x = tiny(), video()
    text = model.embed_texts(["a red square", "two dogs"])
    without = model.encode_levels(x)
    assert_same(model.encode_levels(x, text, 0.0), without)
    moved = model.encode_levels(x, text)
    assert all((a != b).any() for a, b in zip(ids_in(moved), ids_in(without), strict=True))
    other = ids_in(model.encode_levels(x, model.embed_texts(["a red square", "three dogs"])))
    for one, level in zip(ids_in(moved), other, strict=True):
        assert torch.equal(one[:1], level[:1])
    assert any((one[1:] != level[1:]).any() for one, level in zip(ids_in(moved), other, strict=True))


def test_padding_behind_a_mask_changes_no_id() -> None:
    model, x = tiny(), video()
    text = model.embed_texts(["a red square", "two dogs run"])
    words = torch.cat((text.text_BLE, torch.full((2, 4, 6), 9.0)), dim=1)
    mask = F.pad(text.mask_BL, (0, 4))
    padded, unmasked = (EmbeddedText(text_BLE=words, mask_BL=value) for value in (mask, torch.ones_like(mask)))
    wanted = model.encode_levels(x, text)
    for one, other in zip(model.encode_levels(x, padded), wanted, strict=True):
        assert torch.equal(one.ids_Bthw, other.ids_Bthw)
        torch.testing.assert_close(one.margins_Bthw, other.margins_Bthw, rtol=0, atol=1e-5)
    assert any((a != b).any() for a, b in zip(ids_in(model.encode_levels(x, unmasked)), ids_in(wanted), strict=True))
    torch.testing.assert_close(model.text_logits(padded), model.text_logits(text))


def test_clips_without_text_beside_others_are_as_if_alone() -> None:
    model, x = tiny(), video()
    found = ids_in(model.encode_levels(x, model.embed_texts([None, "two dogs"])))
    without, with_text = (
        ids_in(model.encode_levels(x)),
        ids_in(model.encode_levels(x, model.embed_texts(["", "two dogs"]))),
    )
    for level, one, other in zip(found, without, with_text, strict=True):
        assert torch.equal(level[0], one[0])
        assert torch.equal(level[1], other[1])
    assert any((one[0] != other[0]).any() for one, other in zip(without, with_text, strict=True))  # "" is a text


def test_words_are_what_counts_in_texts() -> None:
    words = filled(WordEmbedding(4, 1000), "words.")
    text = words(["A red, RED square!", "a red red square", "red a square", "...", "", None])
    assert torch.equal(text.text_BLE[0], text.text_BLE[1])
    assert not torch.equal(text.text_BLE[0], text.text_BLE[2])
    assert text.mask_BL.sum(1).tolist() == [4, 4, 3, 1, 1, 0]
    assert torch.equal(text.text_BLE[3, 0], words.table.weight[-1])
    torch.testing.assert_close(text.mean_BE[2], text.text_BLE[2, :3].mean(0))
    assert not text.mean_BE[5].any()
    assert words(["word " * 100]).mask_BL.shape == (1, MOST_WORDS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_quantized_in_float32(dtype: torch.dtype) -> None:
    model, x = tiny(native_grid=True), video(5)
    wanted = model.quantize(model.encode(x, model.taps, in_groups=False))
    model = model.to(dtype)
    found = model.quantize(model.encode(x, model.taps, in_groups=False), model.embed_texts(["a dog", None]))
    assert {y.dtype for y in (*found.y, *found.signs, found.values_BCthw)} == {torch.float32}
    torch.testing.assert_close(found.y[0][1], wanted.y[0][1], rtol=0, atol=0.2)
    assert torch.equal(model.values_of_levels(ids_in(model.ids_of_levels(found))), found.values_BCthw)


@GRIDS
def test_a_saved_pyramid_loads_as_it_was(tmp_path: Path, *, native_grid: bool) -> None:
    model, x = tiny(native_grid=native_grid), video(5)
    path = str(tmp_path / "model.safetensors")
    save_pyramid(model, path, {"step": "12", "data": "clips"})
    file = PyramidFile.read(path)
    assert (file.sizes, file.pyramid, file.statistics) == (SIZES, model.pyramid_sizes, STATISTICS)
    assert file.extra == {"step": "12", "data": "clips"}
    assert file.level_grids(9, 16, 24) == model.level_grids(9, 16, 24)
    loaded = file.build()
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    for (key, value), (other, wanted) in zip(loaded.state_dict().items(), model.state_dict().items(), strict=True):
        assert key == other
        assert torch.equal(value, wanted), key
    text = model.embed_texts(["a dog", "two"])
    assert_same(loaded.encode_levels(x, text), model.encode_levels(x, text))
    ids = ids_in(model.encode_levels(x))
    assert torch.equal(loaded.decode_levels(ids), model.decode_levels(ids))


def test_the_same_pyramid_gives_the_same_bytes(tmp_path: Path) -> None:
    extra = {name: name for name in "abcdefgh"}
    for name in ("a", "b"):
        save_pyramid(tiny(), str(tmp_path / name), dict(reversed(extra.items())) if name == "b" else extra)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with safe_open(tmp_path / "a", framework="pt") as file:
        assert json.loads(file.metadata()[METADATA_KEY])["mode"] == "pyramid"


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_pyramid(tiny(), str(path))
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        said = json.loads(file.metadata()[METADATA_KEY])

    def refusal(metadata: Any, tensors: dict[str, torch.Tensor]) -> pytest.ExceptionInfo[TokenizerError]:
        save_file(tensors, path, metadata=None if metadata is None else {METADATA_KEY: json.dumps(metadata)})
        with pytest.raises(TokenizerError) as caught:
            PyramidFile.read(str(path))
        return caught

    assert refusal(None, tensors).match("not those of a PyraTok pyramid.*give the file that training wrote")
    assert refusal({**said, "mode": "other"}, tensors).match("their metadata describe no pyramid")
    assert refusal({**said, "vae": {"depth": 3}}, tensors).match("this version knows no pyramid such as .*depth")
    assert refusal({"mode": "pyramid"}, tensors).match("this version knows no pyramid such as")
    name = "pyramid.levels.2.proj.bias"
    assert refusal(said, {**tensors, name: torch.zeros(3)}).match("the PyraTok pyramid that its metadata.*proj.bias is")
    assert refusal(said, {key: tensors[key] for key in tensors if key != name}).match(rf"1 missing \({name}\)")
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(TokenizerError, match=r"not those of a PyraTok pyramid, a \.safetensors file with tokenmill"):
        PyramidFile.read(str(path))


def _ids(dtype: torch.dtype = torch.int64) -> list[torch.Tensor]:
    return [torch.zeros(1, *grid, dtype=dtype) for grid in ((9, 8, 8), (5, 4, 4), (3, 2, 2), (3, 2, 2))]


@pytest.mark.parametrize(
    "ids",
    [
        [],
        [*_ids(), _ids()[-1]],
        _ids(torch.float32),
        _ids(torch.bool),
        [_ids()[0][0]],
        [torch.zeros(0, 1, 4, 4).long()],
    ],
)
def test_what_is_no_id_is_refused(ids: list[torch.Tensor]) -> None:
    with pytest.raises(TokenizerError, match=r"ids of PyraTok's pyramid are integers \(B,t,h,w\) of each of its 4"):
        tiny(native_grid=True).decode_levels(ids)


@pytest.mark.parametrize("ids", [_ids()[1:], _ids()[::-1], [_ids()[0][:, 1:]], [_ids()[0][:, :, 1:]], _ids()[:1] * 2])
def test_levels_that_do_not_fit_each_other_are_refused(ids: list[torch.Tensor]) -> None:
    with pytest.raises(TokenizerError, match="levels of PyraTok's pyramid that fit each other have shapes such as"):
        tiny(native_grid=True).decode_levels(ids)


@pytest.mark.parametrize("wrong", [-1, 256])
def test_ids_out_of_range_are_refused(wrong: int) -> None:
    ids = _ids()
    ids[2][0, 1, 1, 0] = wrong
    with pytest.raises(TokenizerError, match="ids of PyraTok's pyramid are from 0 to 255, found"):
        tiny(native_grid=True).decode_levels(ids)


def test_texts_and_sizes_that_cannot_be_are_refused() -> None:
    model, x = tiny(), video(1)
    with pytest.raises(ValueError, match=r"text is \(B,L,E\) with B=2, E=6"):
        model.encode_levels(x, model.embed_texts(["one"]))
    with pytest.raises(ValueError, match=r"text is \(B,L,E\) with B=2, E=6"):
        model.encode_levels(x, WordEmbedding(5, 10)(["a", "b"]))
    without = build_pyramid(SIZES, PyramidSizes(text_width=None))
    with pytest.raises(ValueError, match="this pyramid takes no text: build it with text_width"):
        without.embed_texts(["a"])
    with pytest.raises(ValueError, match=r"text is \(B,L,E\), its mask bool"):
        EmbeddedText(text_BLE=torch.zeros(1, 2, 3), mask_BL=torch.ones(1, 2))
    with pytest.raises(ValueError, match="1 to 16 bits, which the heads divide"):
        build_pyramid(replace(SIZES, z_dim=17), PyramidSizes(text_width=None))
    with pytest.raises(ValueError, match="1 to 16 bits, which the heads divide"):
        build_pyramid(replace(SIZES, z_dim=9), PyramidSizes())
    with pytest.raises(ValueError, match="statistics of 4 channels are wanted"):
        build_pyramid(replace(SIZES, z_dim=4), PyramidSizes(), STATISTICS)
    with pytest.raises(ValueError, match="sizes from 1 on"):
        PyramidSizes(text_vocabulary=0)
