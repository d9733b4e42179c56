"""TrajTok's networks have the official keys and give the golden values."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tokenmill.schemas.errors import TokenizerError
from tokenmill.tokenizers.trajtok import (
    build_rope3d_perceiver,
    build_segment_vit,
    build_segmenter,
    build_text_encoder,
    load_segment_clip,
    load_segmenter,
)
from tokenmill.tokenizers.trajtok_model import Sizes
from tokenmill.tokenizers.trajtok_towers import SegmentClip, SegmentVit

from .trajtok_kit import GOLDEN, clip, filled, normalized, parameter

KEYS = json.loads((GOLDEN / "keys.json").read_text())
SMALL = Sizes(dim=128, num_slots=32, grid=28, level=2, vit_layers=4, vit_heads=4, vit_dim=128)
FINE = Sizes(dim=128, num_slots=32, grid=28, up=4)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def golden(name: str) -> dict[str, Any]:
    return dict(np.load(GOLDEN / f"{name}.npz"))


def frames_of(values: dict[str, Any]) -> torch.Tensor:
    return normalized(clip(int(values["T"]), int(values["size"]), int(values["seed"])))


def keys_of(model: nn.Module) -> list:
    return [[key, list(value.shape)] for key, value in model.state_dict().items()]


def test_state_dicts_are_the_official_ones() -> None:
    with torch.device("meta"):
        models = {
            "segmenter_full_release": build_segmenter(),
            "segmentvit_full": build_segment_vit(),
            "segmentvit_small_lv2": build_segment_vit(SMALL),
            "segmenter_highres_small": build_segmenter(FINE),
            "rope3d_dim192": build_rope3d_perceiver(192),
        }
        text = keys_of(build_text_encoder())
    for name, model in models.items():
        assert keys_of(model) == KEYS[name]
    # Layers from the tenth on, and the numbers of positions, are in the official file and not used.
    unused = ("embeddings.position_ids", *(f"encoder.layer.{i}." for i in (9, 10, 11)))
    assert text == [entry for entry in KEYS["text_encoder"] if not entry[0].startswith(unused)]


@pytest.mark.parametrize(
    ("name", "sizes"), [("full_T1_224", Sizes()), ("full_T4_224", Sizes()), ("small_T3_112_lv2", SMALL)]
)
def test_slots_tokens_and_clips_are_the_golden_ones(name: str, sizes: Sizes) -> None:
    wanted, model = golden(name), filled(build_segment_vit(sizes), "vision_encoder.")
    assert isinstance(model, SegmentVit)
    frames = frames_of(wanted)
    found = model.traj_tokenizer.segmenter(frames)
    np.testing.assert_allclose(found.logits_BNK[0][wanted["logit_idx"]], wanted["logits"], atol=5e-5)
    np.testing.assert_allclose(found.patches_BND[0][wanted["feat_idx"]], wanted["patch_features"], atol=1e-4)
    np.testing.assert_allclose(found.queries_BKD[0], wanted["traj_queries"], atol=1e-4)
    labels = torch.from_numpy(wanted["label"]).long().flatten()
    others = (found.labels_BN[0] != labels).nonzero().flatten().tolist()
    assert set(others) <= set(wanted.get("near_tie_idx", np.array([])).tolist())

    labels = torch.from_numpy(wanted.get("label_tok", wanted["label"])).long().reshape(1, -1)
    weight, bias = parameter("vision_proj.weight", (256, sizes.dim)), parameter("vision_proj.bias", (256,))
    for level in range(sizes.level + 1):
        for kind, masked in (("sdpa_maskignored", False), ("eager_masked", True)):
            rows, tokens, valid, _ = model(frames, level, labels, masked=masked)
            np.testing.assert_allclose(tokens[0], wanted[f"tokens_l{level}"], atol=1e-4)
            assert np.array_equal(valid[0], wanted[f"valid_l{level}"])
            if (stored := wanted.get(f"vit_l{level}_{kind}")) is not None:
                np.testing.assert_allclose(rows[0, : len(stored)], stored, atol=1e-4)
            embedding = wanted.get(f"clip_embed_{kind.partition('_')[0]}")
            if level == sizes.level and embedding is not None:
                np.testing.assert_allclose(
                    F.normalize(F.linear(rows[0, 0], weight, bias), dim=-1), embedding, atol=1e-5
                )


def test_the_finer_masks_are_the_golden_ones() -> None:
    wanted, model = golden("highres_T2_112"), filled(build_segmenter(FINE), "vision_encoder.")
    found = model(frames_of(wanted))
    np.testing.assert_allclose(found.logits_BNK[0][wanted["low_idx"]], wanted["low"], atol=5e-5)
    np.testing.assert_allclose(found.fine_logits_BNK[0][wanted["high_idx"]], wanted["high"], atol=5e-5)
    assert np.array_equal(found.fine_logits_BNK[0].argmax(-1), wanted["high_label"].flatten())


def test_slots_by_3d_positions_are_the_golden_ones() -> None:
    wanted = golden("rope3d_dim192")
    t, side, dim, num_slots = (int(wanted[key]) for key in ("T", "hw", "dim", "K"))
    random = np.random.Generator(np.random.Philox(key=int(wanted["seed"])))
    patches, latents = (random.standard_normal((1, n, dim)).astype(np.float32) for n in (t * side * side, num_slots))
    labels = torch.from_numpy(random.integers(0, num_slots - 2, (1, t * side * side)))
    model = filled(build_rope3d_perceiver(dim), "cross_attn.")
    slots = model(torch.from_numpy(patches), torch.from_numpy(latents), labels, (t, side, side))
    np.testing.assert_allclose(slots[0], wanted["out"], atol=1e-4)


def test_texts_are_the_golden_ones() -> None:
    wanted, model = golden("text"), filled(build_text_encoder(), "text_encoder.")
    hidden = model(torch.from_numpy(wanted["input_ids"]).long(), torch.from_numpy(wanted["attention_mask"]).bool())
    np.testing.assert_allclose(hidden[:, 0], wanted["cls_hidden"], atol=1e-4)
    np.testing.assert_allclose(hidden[:, 1], wanted["tok1_hidden"], atol=1e-4)
    weight, bias = parameter("text_proj.weight", (256, 768)), parameter("text_proj.bias", (256,))
    np.testing.assert_allclose(F.normalize(F.linear(hidden[:, 0], weight, bias), dim=-1), wanted["embed"], atol=1e-5)


def test_clips_of_a_batch_do_not_touch() -> None:
    model = filled(build_segment_vit(SMALL), "vision_encoder.")
    one, other = (normalized(clip(2, 112, seed)) for seed in (1, 2))
    both = model(torch.cat((one, other)), 1)
    for i, frames in enumerate((one, other)):
        rows, tokens, valid, _ = model(frames, 1)
        torch.testing.assert_close(both[0][i : i + 1], rows, atol=1e-4, rtol=0)
        torch.testing.assert_close(both[1][i : i + 1], tokens, atol=1e-4, rtol=0)
        assert torch.equal(both[2][i : i + 1], valid)
    assert not torch.equal(both[2][0], both[2][1])


def test_published_files_load_without_what_they_do_not_need(tmp_path: Path) -> None:
    sizes = Sizes(dim=64, num_slots=8, grid=14, level=1, vit_layers=2, vit_heads=4, vit_dim=64)
    model = SegmentClip(sizes)
    state = model.state_dict()
    segmenter = build_segmenter(Sizes(dim=64, num_slots=8, grid=14, up=4))
    more = {
        "itm_head.weight": torch.zeros(2, 2),
        "text_encoder.embeddings.position_ids": torch.arange(512)[None],
        "text_encoder.encoder.layer.9.crossattention.self.query.weight": torch.zeros(768, 768),
    }
    torch.save({"model": state | more, "meta": {"epoch": 3}}, tmp_path / "clip.pth")
    only = {f"module.vision_encoder.{key}": value for key, value in segmenter.state_dict().items()}
    torch.save({"model": only | {"module.temp": torch.zeros(())}, "meta": {}}, tmp_path / "segmenter.pth")

    loaded = load_segment_clip(str(tmp_path / "clip.pth"), grid=14, vit_heads=4)
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, state[key])
    found = load_segmenter(str(tmp_path / "segmenter.pth"), grid=14)
    frames = normalized(clip(1, 56, 3))
    assert torch.equal(found(frames).fine_logits_BNK, segmenter(frames).fine_logits_BNK)
    rows = loaded.vision_encoder(frames, 1)[0]
    assert rows.shape == (1, 17, 64)
    torch.testing.assert_close(loaded.embed_rows(rows).norm(dim=-1), torch.ones(1))
    texts = loaded.embed_text(torch.tensor([[101, 7, 102, 0]]), torch.tensor([[True, True, True, False]]))
    torch.testing.assert_close(texts.norm(dim=-1), torch.ones(1))


def test_other_files_are_refused(tmp_path: Path) -> None:
    torch.save({"model": {"x": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(TokenizerError, match=r"no tensor trajectory_perceiver.latents .* not those of TrajTok"):
        load_segmenter(str(tmp_path / "other.pth"))
    state = build_segmenter(Sizes(dim=64, num_slots=8, grid=14)).state_dict()
    state.pop("log_scale")
    torch.save({"model": {f"vision_encoder.{key}": value for key, value in state.items()}}, tmp_path / "less.pth")
    with pytest.raises(TokenizerError, match=r"not those of Segmenter: of 400 tensors 1 missing \(log_scale\)"):
        load_segmenter(str(tmp_path / "less.pth"))
