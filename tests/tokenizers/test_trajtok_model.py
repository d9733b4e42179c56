"""TrajTok's networks have the official keys and give the golden values."""

import importlib.util
import json
import math
from collections.abc import Iterator
from dataclasses import replace
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
)
from tokenmill.tokenizers.trajtok_layers import Perceiver, Rotary, through_layers
from tokenmill.tokenizers.trajtok_model import IMAGE_SIDE, Segmentation, Sizes, mean_features, soft_mass
from tokenmill.tokenizers.trajtok_towers import SegmentVit

from .trajtok_kit import GOLDEN, TINY, clip, filled, normalized, parameter, vit_of

ROOT = Path(__file__).parent.parent.parent
KEYS = json.loads((GOLDEN / "keys.json").read_text())
SMALL = Sizes(dim=128, num_slots=32, grid=28, level=2, vit_layers=4, vit_heads=4, vit_dim=128)
FINE = Sizes(dim=128, num_slots=32, grid=28, up=4)


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """Without gradients, and on one thread: several wait for each other where the machine has more to do."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(num_threads)


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


@pytest.fixture(scope="module")
def published() -> SegmentVit:
    """The model of the published size."""
    return vit_of(Sizes())


@pytest.fixture(scope="module")
def small() -> SegmentVit:
    return vit_of(SMALL)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        pytest.param("full_T1_224", "published", marks=pytest.mark.slow),
        ("full_T4_224", "published"),
        ("small_T3_112_lv2", "small"),
    ],
)
def test_slots_tokens_and_clips_are_the_golden_ones(name: str, model: str, request: pytest.FixtureRequest) -> None:
    wanted, whole = golden(name), request.getfixturevalue(model)
    encoder, frames = whole.traj_tokenizer, frames_of(wanted)
    found = encoder.segmenter(frames)
    np.testing.assert_allclose(found.logits_BNK[0][wanted["logit_idx"]], wanted["logits"], atol=5e-5)
    np.testing.assert_allclose(found.patches_BND[0][wanted["feat_idx"]], wanted["patch_features"], atol=1e-4)
    np.testing.assert_allclose(found.queries_BKD[0], wanted["traj_queries"], atol=1e-4)
    labels = torch.from_numpy(wanted["label"]).long().flatten()
    others = (found.labels_BN[0] != labels).nonzero().flatten().tolist()
    assert set(others) <= set(wanted.get("near_tie_idx", np.array([])).tolist())

    labels = torch.from_numpy(wanted.get("label_tok", wanted["label"])).long().reshape(1, -1)
    np.testing.assert_allclose(soft_mass(found.logits_BNK)[0], wanted["softmax_mass"], rtol=1e-5)
    if frames.shape[2] != IMAGE_SIDE:  # tokens are made of resized frames, slots are not
        found = encoder(frames)[2]
        means = mean_features(found.patches_BND, found.logits_BNK)[0]
        np.testing.assert_allclose(means, wanted["mean_pool"], atol=1e-4)
    for level in range(encoder.latents.shape[1].bit_length()):
        tokens, valid = encoder.read(found, frames.shape[1], level, labels)
        np.testing.assert_allclose(tokens[0], wanted[f"tokens_l{level}"], atol=1e-4)
        assert np.array_equal(valid[0], wanted[f"valid_l{level}"])
        check_clips(whole, tokens, valid, wanted, level)


def check_clips(
    model: SegmentVit, tokens: torch.Tensor, valid: torch.Tensor, wanted: dict[str, Any], level: int
) -> None:
    """What the ViT makes of tokens, with unused slots and without, and of that the embedding."""
    dim = tokens.shape[-1]
    weight, bias = parameter("vision_proj.weight", (256, dim)), parameter("vision_proj.bias", (256,))
    for kind, seen in (("sdpa_maskignored", None), ("eager_masked", valid)):
        rows = model.norm(model.vision_encoder(tokens, seen))[0]
        if (stored := wanted.get(f"vit_l{level}_{kind}")) is not None:
            np.testing.assert_allclose(rows[: len(stored)], stored, atol=1e-4)
        embedding = wanted.get(f"clip_embed_{kind.partition('_')[0]}")
        if f"tokens_l{level + 1}" not in wanted and embedding is not None:
            np.testing.assert_allclose(F.normalize(F.linear(rows[0], weight, bias), dim=-1), embedding, atol=1e-5)


def test_the_finer_masks_are_the_golden_ones() -> None:
    with torch.device("meta"):
        model = build_segmenter(FINE)
    wanted, model = golden("highres_T2_112"), filled(model, "vision_encoder.")
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
    with torch.device("meta"):
        model = build_text_encoder()
    wanted, model = golden("text"), filled(model, "text_encoder.")
    hidden = model(torch.from_numpy(wanted["input_ids"]).long(), torch.from_numpy(wanted["attention_mask"]).bool())
    np.testing.assert_allclose(hidden[:, 0], wanted["cls_hidden"], atol=1e-4)
    np.testing.assert_allclose(hidden[:, 1], wanted["tok1_hidden"], atol=1e-4)
    weight, bias = parameter("text_proj.weight", (256, 768)), parameter("text_proj.bias", (256,))
    np.testing.assert_allclose(F.normalize(F.linear(hidden[:, 0], weight, bias), dim=-1), wanted["embed"], atol=1e-5)


@pytest.fixture(scope="module")
def plain() -> Any:
    """The specification in plain PyTorch, which benchmarks compare with."""
    spec = importlib.util.spec_from_file_location("plain_trajtok", ROOT / "benchmarks" / "plain_trajtok.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.PlainTrajTok


def check_against(wanted: dict[str, torch.Tensor], made: tuple[torch.Tensor, ...]) -> None:
    """Whether SegmentVit gives what the plain rendering gives, once patches have the same labels."""
    rows, tokens, valid, found = made
    assert isinstance(found, Segmentation)
    torch.testing.assert_close(found.logits_BNK, wanted["logits"], atol=5e-5, rtol=0)
    torch.testing.assert_close(tokens, wanted["tokens"], atol=1e-4, rtol=0)
    torch.testing.assert_close(rows, wanted["rows"], atol=1e-4, rtol=0)
    assert torch.equal(valid, wanted["valid"])
    if "fine_logits" in wanted:
        torch.testing.assert_close(found.fine_logits_BNK, wanted["fine_logits"], atol=5e-5, rtol=0)
    top = wanted["logits"].topk(2, dim=-1)
    is_clear = top.values[..., 0] - top.values[..., 1] > 1e-4
    assert is_clear.float().mean() > 0.9
    assert torch.equal(found.labels_BN[is_clear], top.indices[..., 0][is_clear])


@pytest.mark.parametrize(
    ("changes", "num_frames", "side", "level"),
    [
        ({}, 1, 224, 0),
        ({}, 1, 1, 1),
        ({}, 5, 97, 2),
        ({"grid": 28, "dim": 96, "num_slots": 5, "vit_dim": 96}, 3, 64, 1),  # more patches than go through at once
        ({"grid": 7, "depth": 3}, 9, 48, 0),
        ({"add_mean_traj": True}, 2, 64, 1),
        ({"attend_other_latents": True}, 2, 64, 1),
        ({"add_mean_traj": True, "attend_other_latents": True, "vit_dim": 96, "token_dim": 72}, 2, 64, 0),
        ({"up": 1}, 1, 64, 0),
        ({"up": 2}, 1, 64, 0),
        ({"up": 4}, 1, 64, 0),
        ({"up": 8}, 1, 64, 0),
    ],
)
def test_the_networks_are_the_specification_read_plainly(
    changes: dict[str, Any], num_frames: int, side: int, level: int, plain: Any
) -> None:
    sizes = replace(TINY, **changes)
    model = vit_of(sizes)
    x = torch.cat([normalized(clip(num_frames, side, seed)) for seed in (4, 5)])
    for masked in (False, True):
        wanted = plain(sizes, model.state_dict())(x, level, masked=masked)
        check_against(wanted, model(x, level, wanted["labels"], masked=masked))


@pytest.mark.parametrize("side", [1, 5, 14, 20])
@pytest.mark.parametrize("changes", [{}, {"add_mean_traj": True}])
def test_tokens_are_read_from_the_features_of_another_model(side: int, changes: dict[str, Any], plain: Any) -> None:
    sizes = replace(TINY, feature_dim=96, **changes)
    model = vit_of(sizes)
    x, features = normalized(clip(3, 64, 6)), torch.randn(1, 3 * side**2, 96)
    wanted = plain(sizes, model.state_dict())(x, 1, features=features)
    check_against(wanted, model(x, 1, wanted["labels"], features_BND=features))
    assert torch.equal(model(x, 1, features_BND=features)[2], wanted["valid"])


def test_similarities_are_scaled_by_twenty_at_most(plain: Any) -> None:
    model, x = vit_of(TINY), normalized(clip(1, 64, 6))
    for log_scale, largest in ((30.0, 20.0), (1.0, 2.4)):
        model.traj_tokenizer.segmenter.log_scale.fill_(log_scale)
        found = model.traj_tokenizer.segmenter(x)
        cosines = F.cosine_similarity(
            model.traj_tokenizer.segmenter.patch_decoder_low_res(found.patches_BND).unsqueeze(2),
            model.traj_tokenizer.segmenter.traj_seg_head_low_res(found.queries_BKD).unsqueeze(1),
            dim=-1,
        )
        scale = min(20.0, 1 + math.log1p(math.exp(log_scale)))
        assert scale < largest + 0.1
        torch.testing.assert_close(found.logits_BNK, scale * cosines, atol=1e-4, rtol=0)


def test_patches_with_the_label_of_no_slot_are_read_by_none(plain: Any) -> None:
    model, x = vit_of(TINY), normalized(clip(2, 64, 6))
    labels = torch.randint(-1, 10, (1, 2 * 14**2), generator=torch.Generator().manual_seed(0))
    labels[labels == 3] = -1
    wanted = plain(TINY, model.state_dict())(x, 1, labels)
    check_against(wanted, model(x, 1, labels))
    assert wanted["valid"][0].view(8, 2).all(1).tolist() == [True, True, True, False, True, True, True, True]


@pytest.mark.parametrize("sees_all_latents", [False, True])
def test_hiding_patches_and_gathering_them_by_slot_give_the_same(sees_all_latents: bool) -> None:
    torch.manual_seed(0)
    perceiver = Perceiver(64, 2, sees_all_latents=sees_all_latents)
    patches, latents = torch.randn(2, 2500, 64), torch.randn(2, 12, 64)
    labels = torch.randint(-1, 7, (2, 2500))
    labels[0] = 5  # all others have nothing but what every slot may see
    with torch.enable_grad():
        gathered = perceiver(patches, latents, labels, 6)
        hidden = through_layers(perceiver.layers, perceiver.norm_lat, perceiver.norm_ctx(patches), latents, labels, 6)
        gradients = [torch.autograd.grad(out.square().sum(), perceiver.parameters()) for out in (gathered, hidden)]
    torch.testing.assert_close(gathered, hidden, atol=1e-5, rtol=0)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_what_slots_are_teaches_the_backbone_nothing() -> None:
    segmenter = build_segmenter(TINY)
    x = normalized(clip(1, 64, 6))
    with torch.enable_grad():
        segmenter(x).queries_BKD.sum().backward()
    assert all(parameter.grad is None for parameter in segmenter.patch_encoder.parameters())
    assert all(parameter.grad is not None for parameter in segmenter.trajectory_perceiver.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_positions_keep_all_digits_in_other_arithmetic(dtype: torch.dtype) -> None:
    model, x = vit_of(TINY), normalized(clip(3, 64, 6))
    _, tokens, _, found = model(x, 1)
    coarse = vit_of(TINY).to(dtype)
    other_rows, other_tokens, _, other = coarse(x.to(dtype), 1, found.labels_BN)
    assert other_tokens.dtype == other_rows.dtype == dtype
    assert coarse.traj_tokenizer.traj_feature_updater.layers[0][0].rotary_emb.freqs.dtype == torch.float32
    assert F.cosine_similarity(other_tokens.float(), tokens, dim=-1).min() > 0.99
    assert (found.labels_BN == other.labels_BN).float().mean() > 0.9
    # Neighbours far behind 2^16 are still told apart, and nothing overflows.
    angles = Rotary(64).to(dtype)(torch.tensor([70_000, 70_001]))
    torch.testing.assert_close((angles[0, 1] - angles[0, 0]).item(), 1.0, atol=1e-2, rtol=0)


def test_images_are_clips_of_one_frame() -> None:
    model, images = vit_of(TINY), torch.cat([normalized(clip(1, 64, seed))[0] for seed in (1, 2)])
    assert torch.equal(model(images)[0], model(images.unsqueeze(1))[0])
    found = [model.traj_tokenizer.segmenter(some).logits_BNK[:1] for some in (images, images[:1])]
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)


def test_sizes_that_cannot_be_are_refused() -> None:
    model = vit_of(TINY)
    encoder, frames = model.traj_tokenizer, torch.zeros(1, 2, 64, 64, 3)
    refusals = {
        r"square frames, found 64x48: resize": lambda: model(frames[..., :48, :]),
        r"\(B,T,H,W,3\) or images \(B,H,W,3\), found \(1, 2, 3, 64, 64\): permute": lambda: model(
            frames.mT.mT.movedim(-1, 2)
        ),
        r"32 pixels a side or more, found 31x64": lambda: encoder.segmenter(frames[:, :, :31]),
        r"levels 0 to 2, found level=3": lambda: model(frames, 3),
        r"levels 0 to 2, found level=-1": lambda: model(frames, -1),
        r"reads patches of 64 channels, found \(1, 8, 32\)": lambda: model(frames, features_BND=torch.zeros(1, 8, 32)),
        r"square grid for each frame, found \(1, 9, 64\) for 1 clips of 2 frames": (
            lambda: model(frames, features_BND=torch.zeros(1, 9, 64))
        ),
        r"a label each, found \(1, 7\)": lambda: model(frames, 0, torch.zeros(1, 7, dtype=torch.long)),
        r"1, 2, 4 or 8 times finer, found up=3": lambda: replace(TINY, up=3),
    }
    for message, refused in refusals.items():
        with pytest.raises(TokenizerError, match=message):
            refused()


def test_clips_of_a_batch_do_not_touch() -> None:
    model = vit_of(TINY)
    one, other = (normalized(clip(2, 112, seed)) for seed in (1, 2))
    both = model(torch.cat((one, other)), 1)
    for i, frames in enumerate((one, other)):
        rows, tokens, valid, _ = model(frames, 1)
        torch.testing.assert_close(both[0][i : i + 1], rows, atol=1e-4, rtol=0)
        torch.testing.assert_close(both[1][i : i + 1], tokens, atol=1e-4, rtol=0)
        assert torch.equal(both[2][i : i + 1], valid)
    assert not torch.equal(both[0][0], both[0][1])
