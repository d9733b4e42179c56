"""Clips of any length become tokens of trajectories, those of the networks; the rest is refused."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tokenmill.schemas.errors import RecipeError, TokenizerError
from tokenmill.tokenizers import trajtok_model
from tokenmill.tokenizers.base import TrajectoryBatch, TrajectoryTokenizer
from tokenmill.tokenizers.load import load_tokenizer
from tokenmill.tokenizers.trajtok_link import NO_TRAJECTORY
from tokenmill.tokenizers.trajtok_model import Sizes
from tokenmill.tokenizers.trajtok_tokenizer import TrajTokTokenizer, vision_of
from tokenmill.tokenizers.trajtok_towers import SegmentClip

from .trajtok_kit import GOLDEN, clip, filled, normalized

SIZES = Sizes(dim=128, num_slots=32, grid=28, level=2, vit_layers=4, vit_heads=4, vit_dim=128)
SHALLOW = replace(SIZES, depths=(1, 1, 1, 1))
OPTIONS = {"grid": 28, "vit_heads": 4}
NAME = "trajtok/trajvit2"
Load = Callable[..., TrajTokTokenizer]


def published(model: SegmentClip, path: Path, **more: torch.Tensor) -> str:
    """The path of a checkpoint with the layout of the published one, of whose text tower there are stand-ins."""
    text = {"text_encoder.embeddings.position_ids": torch.arange(512)[None], "text_proj.bias": torch.zeros(256)}
    state = model.state_dict() | text | {"temp": torch.tensor(0.07)} | more
    torch.save({"model": state, "meta": {"epoch": 19, "global_step": 7, "source_path": "latest.pth"}}, path)
    return str(path)


@pytest.fixture(scope="module")
def half() -> Iterator[None]:
    """Networks that see frames of half the sides."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trajtok_model, "IMAGE_SIDE", 112)
        yield


@pytest.fixture(scope="module")
def model(half: None) -> SegmentClip:
    made = filled(vision_of(SHALLOW), "").requires_grad_(False)
    assert isinstance(made, SegmentClip)
    return made


@pytest.fixture(scope="module")
def weights(model: SegmentClip, tmp_path_factory: pytest.TempPathFactory) -> str:
    return published(model, tmp_path_factory.mktemp("weights") / "model.pth")


@pytest.fixture
def load(weights: str) -> Load:
    """load(option=.., dtype=..): the tokenizer with those weights."""

    def tokenizer(*, weights: str = weights, dtype: str = "float32", compiled: bool = False, **options: Any):
        made = load_tokenizer(NAME, weights, dtype=dtype, compiled=compiled, options=OPTIONS | options)
        assert isinstance(made, TrajTokTokenizer)
        return made

    return tokenizer


def tensors_of(batch: TrajectoryBatch) -> dict[str, torch.Tensor]:
    return {name: value for name, value in asdict(batch).items() if isinstance(value, torch.Tensor)}


def test_tokens_of_an_official_checkpoint_are_the_golden_ones(tmp_path: Path) -> None:
    wanted = dict(np.load(GOLDEN / "small_T3_112_lv2.npz"))
    path = published(filled(vision_of(SIZES), ""), tmp_path / "model.pth")  # type: ignore[arg-type]
    frames = clip(int(wanted["T"]), int(wanted["size"]), int(wanted["seed"])).unsqueeze(0)
    tokenizer = load_tokenizer(NAME, path, options=OPTIONS | {"level": 2, "embedding": True})
    assert isinstance(tokenizer, TrajectoryTokenizer)
    found = tokenizer.encode(frames)
    others = found.assignment_BThw[0].numpy() != wanted["label_tok"]
    assert others.mean() < 1e-3
    same = ~np.isin(np.arange(32), np.concatenate([wanted["label_tok"][others], found.assignment_BThw[0][others]]))
    same = same.repeat(4)
    np.testing.assert_allclose(found.values_BNd[0][same], wanted["tokens_l2"][same], atol=1e-4)
    assert np.array_equal(found.valid_BN[0][same], wanted["valid_l2"][same])
    assert found.embedding_BCE is not None
    assert found.embedding_BCE[0, 0] @ torch.from_numpy(wanted["clip_embed_sdpa"]) > 0.9999


def test_every_chunk_has_the_tokens_of_the_networks(load: Load, model: SegmentClip) -> None:
    tokenizer, frames = load(level=1, chunk_frames=2, soft_mass=True), clip(5, 56, 1)
    found = tokenizer.encode(frames.unsqueeze(0))
    assert found.values_BNd.shape == (1, 3 * 64, 128)
    assert found.assignment_BThw.shape == (1, *tokenizer.grid_shape(5, 56, 56)) == (1, 5, 28, 28)
    assert found.chunk_frames == 2
    assert found.slots_N.tolist() == [slot for _ in range(3) for slot in range(32) for _ in range(2)]
    assert found.chunks_N.tolist() == [chunk for chunk in range(3) for _ in range(64)]
    dtypes = {name: value.dtype for name, value in tensors_of(found).items()}
    assert dtypes == {
        "values_BNd": torch.float32, "valid_BN": torch.bool, "slots_N": torch.int16, "chunks_N": torch.int16,
        "trajectories_BN": torch.int16, "assignment_BThw": torch.uint8, "mass_BN": torch.float32,
    }  # fmt: skip
    for chunk, part in enumerate(frames.split(2)):
        tokens, valid, seen = model.vision_encoder.traj_tokenizer(normalized(part), 1)
        rows = slice(64 * chunk, 64 * chunk + 64)
        torch.testing.assert_close(found.values_BNd[:, rows], tokens, atol=1e-4, rtol=0)
        assert torch.equal(found.valid_BN[:, rows], valid)
        labels = found.assignment_BThw[0, 2 * chunk : 2 * chunk + 2]
        assert torch.equal(labels.flatten(), seen.labels_BN[0].to(torch.uint8))
        assert sorted(set(labels.flatten().tolist())) == found.slots_N[rows][valid[0]].unique().tolist()
        assert found.mass_BN is not None
        torch.testing.assert_close(found.mass_BN[:, rows][:, ::2].sum(), torch.tensor(float(labels.numel())))
        torch.testing.assert_close(found.mass_BN[:, rows][:, ::2], seen.logits_BNK.softmax(-1).sum(1))


def test_linking_numbers_trajectories_over_chunks(load: Load) -> None:
    frames = clip(4, 56, 3).unsqueeze(0)
    for options, num_frames, same in (({}, 4, True), ({"link": "none"}, 4, False)):
        tokenizer = load(chunk_frames=1, **options)
        found = tokenizer.encode(torch.cat([frames[:, :1]] * num_frames, dim=1))
        numbers = [found.trajectories_BN[0, 32 * i : 32 * i + 32] for i in range(num_frames)]
        valid = found.valid_BN[0, :32]
        assert numbers[0][valid].tolist() == list(range(int(valid.sum())))
        assert all(torch.equal(one == NO_TRAJECTORY, ~valid) for one in numbers)
        assert all(torch.equal(one, numbers[0]) == same for one in numbers[1:])
        assert found.trajectories_BN.max() + 1 == int(valid.sum()) * (1 if same else num_frames)
    a_threshold = load(chunk_frames=1, link_threshold=1.0).encode(frames)
    assert a_threshold.trajectories_BN.max() + 1 == a_threshold.valid_BN.sum()


def test_clips_do_not_touch_and_one_frame_is_a_clip(load: Load) -> None:
    tokenizer, one = load(embedding=True), clip(1, 112, 4)
    assert not tokenizer.is_batched
    both = tokenizer.encode(torch.stack((one, clip(1, 112, 5))))
    alone = tokenizer.encode(one.unsqueeze(0))
    for name, value in tensors_of(both).items():
        assert torch.equal(value[:1] if name.split("_")[1].startswith("B") else value, tensors_of(alone)[name])
    assert not torch.equal(both.assignment_BThw[0], both.assignment_BThw[1])


@pytest.mark.parametrize(("height", "num_frames"), [(1, 1), (7, 1), (225, 1), (300, 2)])
def test_square_clips_of_any_size_have_the_same_grid(load: Load, height: int, num_frames: int) -> None:
    tokenizer = load()
    frames = torch.randint(256, (1, num_frames, height, height, 3), generator=torch.manual_seed(0)).to(torch.uint8)
    found = tokenizer.encode(frames)
    assert found.assignment_BThw.shape[1:] == tokenizer.grid_shape(num_frames, height, height) == (num_frames, 28, 28)
    assert found.values_BNd.isfinite().all()


def test_every_chunk_has_an_embedding(load: Load, model: SegmentClip) -> None:
    frames = clip(3, 56, 6)
    plain, official, masked = (
        load(chunk_frames=2, **options)
        for options in ({}, {"embedding": True}, {"embedding": True, "mask_mode": "masked"})
    )
    assert plain.embedding is None
    assert official.embedding is not None
    assert official.embedding.dim == 256
    assert official.embedding.options == {"mask_mode": "official_sdpa", "vit_heads": 4}
    assert plain.spec == official.spec == masked.spec
    tokens = plain.encode(frames.unsqueeze(0))
    assert tokens.embedding_BCE is None
    for tokenizer, is_masked in ((official, False), (masked, True)):
        parts = [model.vision_encoder(normalized(part), 0, masked=is_masked)[0] for part in frames.split(2)]
        wanted = torch.stack([F.normalize(model.embed_rows(rows), dim=-1) for rows in parts], dim=1)
        found = tokenizer.encode(frames.unsqueeze(0))
        assert found.embedding_BCE is not None
        torch.testing.assert_close(found.embedding_BCE, wanted, atol=1e-5, rtol=0)
        assert torch.equal(found.values_BNd, tokens.values_BNd)


def test_variants_of_the_encoder_can_be_asked_for(load: Load, model: SegmentClip) -> None:
    frames = clip(1, 112, 6)
    plain = load(level=1).encode(frames.unsqueeze(0)).values_BNd
    for option in ("add_mean_traj", "attend_other_latents"):
        variant = vision_of(replace(SHALLOW, **{option: True}))
        variant.load_state_dict(model.state_dict())
        with torch.no_grad():
            wanted = variant.vision_encoder.traj_tokenizer(normalized(frames), 1)[0]
        tokenizer = load(level=1, **{option: True})
        found = tokenizer.encode(frames.unsqueeze(0)).values_BNd
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
        assert (found - plain).abs().max() > 1e-2
        assert tokenizer.spec.options[option] is True


def test_tokens_may_be_of_another_width(load: Load, tmp_path: Path) -> None:
    tokenizer = load(weights=published(vision_of(replace(SHALLOW, token_dim=64, vit_dim=64)), tmp_path / "model.pth"))
    assert tokenizer.spec.latent_dim == 64
    assert tokenizer.encode(clip(1, 112, 6).unsqueeze(0)).values_BNd.shape == (1, 32, 64)


def test_the_spec_tells_all_that_decides_the_tokens(load: Load, weights: str) -> None:
    spec = load(level=1, chunk_frames=4, link_threshold=0.5).spec
    assert (spec.kind, spec.latent_dim, spec.codebook_size, spec.stride_thw) == ("trajectory", 128, None, (1, 8, 8))
    assert json.loads(json.dumps(asdict(spec)))["options"] == {
        "chunk_frames": 4, "link": "queries", "link_threshold": 0.5, "level": 1, "soft_mass": False, "grid": 28,
        "add_mean_traj": False, "attend_other_latents": False,
    }  # fmt: skip
    assert spec.weights_sha256 is not None
    assert len(spec.weights_sha256) == 64
    assert load().spec.options != load(soft_mass=True).spec.options
    assert load_tokenizer("fake").spec.options == {}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_number_types_keep_positions_exact(load: Load, dtype: str) -> None:
    frames = clip(2, 56, 7).unsqueeze(0)
    exact, other = load(embedding=True), load(dtype=dtype, embedding=True)
    wanted, found = exact.encode(frames), other.encode(frames)
    assert found.values_BNd.dtype == getattr(torch, dtype)
    assert other.spec.dtype == dtype
    assert found.embedding_BCE is not None
    assert found.embedding_BCE.dtype == torch.float32
    freqs = [value for name, value in other._model.named_buffers() if name.endswith("freqs")]
    assert freqs
    assert all(one.dtype == torch.float32 for one in freqs)
    assert (found.assignment_BThw == wanted.assignment_BThw).float().mean() > 0.9
    assert (found.embedding_BCE * wanted.embedding_BCE).sum() > 0.98


def test_calls_outside_of_inference_mode_keep_no_gradients(load: Load) -> None:
    tokenizer, frames = load(), clip(1, 112, 8).unsqueeze(0)
    with torch.inference_mode():
        first = tokenizer.encode(frames)
    with torch.enable_grad():
        second = tokenizer.encode(frames)
    assert not second.values_BNd.requires_grad
    assert torch.equal(first.values_BNd, second.values_BNd)


def test_values_that_are_no_numbers_show(load: Load) -> None:
    tokenizer, frames = load(link="queries", chunk_frames=1), clip(2, 112, 9).unsqueeze(0)
    tokenizer._model.vision_encoder.traj_tokenizer.segmenter.log_scale.fill_(float("nan"))
    assert tokenizer.encode(frames).values_BNd.isnan().all()


def test_only_what_is_used_is_loaded(load: Load) -> None:
    names = [set(name.split(".")[0] for name in load(**o)._model.state_dict()) for o in ({}, {"embedding": True})]
    assert names == [{"vision_encoder"}, {"vision_encoder", "vision_proj"}]
    assert not any("vit" in name for name in load()._model.state_dict())


def test_the_tokens_are_those_of_the_file_that_was_digested(load: Load, weights: str, tmp_path: Path) -> None:
    path, frames = tmp_path / "model.pth", clip(1, 112, 4).unsqueeze(0)
    shutil.copyfile(weights, path)
    tokenizer = load(weights=str(path))
    (tmp_path / "other").write_bytes(b"something else")
    (tmp_path / "other").replace(path)
    assert torch.equal(tokenizer.encode(frames).values_BNd, load().encode(frames).values_BNd)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # compilers have warnings of their own
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_networks_give_the_same_tokens(load: Load) -> None:
    frames, compiled = clip(3, 112, 1).unsqueeze(0), load(compiled=True, chunk_frames=2)
    assert compiled.spec.compiled
    wanted, found = load(chunk_frames=2).encode(frames), compiled.encode(frames)
    torch.testing.assert_close(found.values_BNd, wanted.values_BNd, atol=1e-3, rtol=0)


def test_clips_of_other_shapes_are_refused(load: Load) -> None:
    tokenizer = load()
    with pytest.raises(
        TokenizerError, match=r"square clips, found 56x64: set clips.height=224, .* clips.resize=squash"
    ):
        tokenizer.grid_shape(8, 56, 64)
    with pytest.raises(TokenizerError, match="whose num_frames is a multiple of 1, found 0"):
        tokenizer.grid_shape(0, 56, 56)
    with pytest.raises(TokenizerError, match="whose height is a multiple of 1, found 0"):
        tokenizer.grid_shape(8, 0, 0)
    assert tokenizer.grid_shape(8192, 224, 224) == (8192, 28, 28)
    with pytest.raises(
        TokenizerError, match=r"up to 8192 frames in chunks of 8, found 8193: set clips.num_frames=8192"
    ):
        tokenizer.grid_shape(8193, 224, 224)
    with pytest.raises(TokenizerError, match=r"encodes uint8 RGB frames of shape \(B,T,H,W,3\), found torch.float32"):
        tokenizer.encode(torch.zeros(1, 1, 8, 8, 3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "trajtok/trajvit"}, r"no variant 'trajvit' \(did you mean 'trajvit2'\?\): accepted are trajvit2"),
        ({"name": NAME}, "needs its weights: set weights .* hf://michaelzch001/trajtok-trajvitv2"),
        ({"name": NAME, "logvar": True}, "tokens that have no variance: remove logvar"),
        ({"name": NAME, "weights": "/no/model.pth"}, "weights /no/model.pth: it does not exist: check the path"),
    ],
)
def test_what_cannot_be_loaded_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(**settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": 30}, "options.grid: found 30; accepted: a divisor of 224; of the published weights 56"),
        (
            {"levels": 1},
            r"options.levels: unknown key \(did you mean 'level'\?\); accepted are add_mean_traj, attend",
        ),
        ({"mask_mode": "mask"}, r"options.mask_mode: found 'mask' \(did you mean 'masked'\?\)"),
        ({"link_threshold": 2}, "options.link_threshold: found 2; accepted: less than or equal to 1"),
        ({"chunk_frames": 0}, "options.chunk_frames: found 0; accepted: greater than or equal to 1"),
    ],
)
def test_options_that_are_none_are_refused(load: Load, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(**options)


def test_options_that_the_weights_do_not_have_are_refused(load: Load) -> None:
    with pytest.raises(TokenizerError, match=r"up to 4 tokens .*, found options.level=3: accepted are 0 to 2"):
        load(level=3)
    with pytest.raises(TokenizerError, match=r"128 channels of weights .* no multiple of options.vit_heads=5"):
        load(vit_heads=5)


def test_other_weights_are_refused(load: Load, model: SegmentClip, tmp_path: Path) -> None:
    segmenter = model.vision_encoder.traj_tokenizer.segmenter.state_dict()
    state = {f"vision_encoder.{name}": value for name, value in segmenter.items()}
    torch.save({"model": state, "meta": {}}, tmp_path / "segmenter.pth")
    with pytest.raises(
        TokenizerError, match=r"segmenter alone, which makes masks and no tokens: give model.pth of hf:"
    ):
        load(weights=str(tmp_path / "segmenter.pth"))
    torch.save({"model": {"x": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(TokenizerError, match="they are not those of TrajTok"):
        load(weights=str(tmp_path / "other.pth"))
    more = published(model, tmp_path / "more.pth", extra=torch.zeros(1))
    with pytest.raises(TokenizerError, match=r"not those of trajtok/trajvit2: of \d+ tensors 1 not known \(extra\)"):
        load(weights=more)


def test_too_many_slots_are_refused(load: Load, tmp_path: Path) -> None:
    sizes = Sizes(dim=64, num_slots=257, grid=28, vit_layers=1, vit_heads=4, vit_dim=64, depths=(1, 1, 1, 1))
    with pytest.raises(TokenizerError, match="257 slots, trajtok/trajvit2 takes up to 256"):
        load(weights=published(vision_of(sizes), tmp_path / "model.pth"))
