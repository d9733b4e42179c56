"""TrajTok's networks have the official keys and give the golden values."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tokenmill.tokenizers.trajtok import (
    build_rope3d_perceiver,
    build_segment_vit,
    build_segmenter,
    build_text_encoder,
)
from tokenmill.tokenizers.trajtok_model import Sizes
from tokenmill.tokenizers.trajtok_towers import SegmentVit

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
