"""Masks by TrajTok's segmenter: those of the networks, at the size of the frames, linked over chunks."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tokenmill.jobs.segmenters import load_segmenter
from tokenmill.pipeline.segment import masks_of
from tokenmill.schemas.clip import Clip, ClipFrames, Sampling, Video
from tokenmill.schemas.errors import RecipeError, TokenizerError
from tokenmill.tokenizers import trajtok_model, trajtok_segmenter
from tokenmill.tokenizers.base import Settings
from tokenmill.tokenizers.trajtok import build_segmenter
from tokenmill.tokenizers.trajtok_model import Segmentation, Segmenter, Sizes
from tokenmill.tokenizers.trajtok_segmenter import TrajTokSegmenter
from tokenmill.tokenizers.trajtok_tokenizer import vision_of

from .trajtok_kit import clip, filled, normalized

SIDE = 56  # of what the networks see here, in place of 224
FINE = Sizes(dim=64, num_slots=16, grid=14, up=4, depths=(1, 1, 1, 1))
COARSE = Sizes(dim=64, num_slots=16, grid=14, vit_layers=1, vit_heads=4, vit_dim=64, depths=(1, 1, 1, 1))
SAMPLING = Sampling(fps=None, num_frames=2, height=SIDE, width=SIDE, resize="squash/bicubic", tail="pad")
Load = Callable[..., TrajTokSegmenter]


@pytest.fixture(scope="module")
def networks() -> Iterator[dict[str, Segmenter]]:
    """A segmenter with a finer head, and one without, for small frames."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trajtok_model, "IMAGE_SIDE", SIDE)
        patch.setattr(trajtok_segmenter, "IMAGE_SIDE", SIDE)
        fine = filled(build_segmenter(FINE), "vision_encoder.")
        whole = filled(vision_of(COARSE), "")
        yield {"fine": fine, "whole": whole}  # type: ignore[dict-item]


@pytest.fixture(scope="module")
def files(networks: dict[str, Segmenter], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Checkpoints as published: of the segmenter alone, and of the whole model."""
    folder = tmp_path_factory.mktemp("weights")
    alone = {f"module.vision_encoder.{key}": value for key, value in networks["fine"].state_dict().items()}
    beside = {"module.temp": torch.zeros(()), "module.text_proj.bias": torch.zeros(4)}
    torch.save({"model": alone | beside, "meta": {"epoch": 2}}, folder / "fine.pth")
    torch.save({"model": networks["whole"].state_dict(), "meta": {}}, folder / "whole.pth")
    return {name: str(folder / f"{name}.pth") for name in networks}


@pytest.fixture
def load(files: dict[str, str]) -> Load:
    """load(name, option=..): the segmenter of such a file."""

    def segmenter(name: str = "fine", dtype: str = "float32", **options: Any) -> TrajTokSegmenter:
        settings = Settings(weights=files[name], dtype=dtype, options={"grid": 14} | options)
        made = load_segmenter("trajtok", settings, SAMPLING)
        assert isinstance(made, TrajTokSegmenter)
        return made

    return segmenter


def frames_of(num_frames: int, height: int, width: int, seed: int) -> np.ndarray:
    """Moving shapes, as a decoder gives them: nothing may write to them."""
    frames = clip(num_frames, max(height, width), seed).numpy()[:, :height, :width]
    frames.setflags(write=False)
    return frames


def decoded(frames_THWC: np.ndarray) -> ClipFrames:
    times = tuple(0.1 * t for t in range(len(frames_THWC)))
    video = Video(uri="a.mp4", size_bytes=1, digest="d" * 64)
    clip = Clip(clip_id="c", video=video, start_s=0, end_s=9, frame_pts_s=times)
    numbers = tuple(range(len(times)))
    return ClipFrames(clip=clip, frames_THWC=frames_THWC, decoded_pts_s=times, frame_numbers=numbers, decoder="none")


def labels_of(found: Segmentation, num_frames: int) -> np.ndarray:
    logits = found.logits_BNK if found.fine_logits_BNK is None else found.fine_logits_BNK
    side = int((logits.shape[1] / num_frames) ** 0.5)
    return logits[0].argmax(-1).view(num_frames, side, side).numpy()


def same_partition(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays of labels differ by the names of labels alone."""
    pairs = set(zip(one.ravel().tolist(), other.ravel().tolist(), strict=True))
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


@pytest.mark.parametrize("name", ["fine", "whole"])
def test_tracks_are_those_of_the_networks(load: Load, networks: dict[str, Any], name: str) -> None:
    frames = frames_of(3, SIDE, SIDE, 1)
    network = networks["fine"] if name == "fine" else networks["whole"].vision_encoder.traj_tokenizer.segmenter
    with torch.no_grad():
        wanted = labels_of(network(normalized(torch.from_numpy(frames.copy()))), 3)
    assert wanted.shape == ((3, SIDE, SIDE) if name == "fine" else (3, 14, 14))
    wanted = wanted.repeat(SIDE // wanted.shape[1], axis=1).repeat(SIDE // wanted.shape[2], axis=2)
    found = load(name).segment(decoded(frames))
    assert isinstance(found, np.ndarray)
    assert (found.dtype, found.shape) == (np.int32, (3, SIDE, SIDE))
    assert same_partition(found, wanted)
    assert np.unique(found).tolist() == list(range(1, len(np.unique(wanted)) + 1))
    assert len(np.unique(wanted)) > 2


@pytest.mark.parametrize(("height", "width", "num_frames"), [(100, 64, 2), (31, 200, 1), (1, 1, 1), (3, 5, 9)])
def test_frames_of_any_size_are_squashed_and_masks_have_their_size(
    load: Load, networks: dict[str, Segmenter], height: int, width: int, num_frames: int
) -> None:
    frames = frames_of(num_frames, height, width, 2)
    found = load().segment(decoded(frames))
    assert isinstance(found, np.ndarray)
    assert found.shape == (num_frames, height, width)
    assert found.min() >= 1
    if num_frames <= 8:
        x = torch.from_numpy(frames.copy()).permute(0, 3, 1, 2).float()
        x = F.interpolate(x, size=(SIDE, SIDE), mode="bicubic", antialias=True).round().clamp(0, 255)
        with torch.no_grad():
            wanted = labels_of(networks["fine"](normalized(x.permute(0, 2, 3, 1))), num_frames)
        wanted = wanted[:, np.arange(height) * SIDE // height][:, :, np.arange(width) * SIDE // width]
        assert same_partition(found, wanted)


def test_chunks_are_linked_unless_that_is_not_wanted(load: Load) -> None:
    frames = np.repeat(frames_of(1, SIDE, SIDE, 3), 3, axis=0)
    linked, single = (load(chunk_frames=1, link=link).tracks(frames) for link in ("queries", "none"))
    assert np.array_equal(linked[0], linked[1])
    assert np.array_equal(linked[0], linked[2])
    num = linked.max()
    assert [sorted({*np.unique(frame)}) for frame in single] == [
        list(range(1 + i * num, 1 + i * num + num)) for i in range(3)
    ]
    none_alike = load(chunk_frames=1, link_threshold=0.999).tracks(frames_of(3, SIDE, SIDE, 3))
    assert none_alike.max() > num


def test_small_trajectories_are_left_out_if_they_are_small_in_every_frame(load: Load) -> None:
    frames = frames_of(3, SIDE, SIDE, 4)
    all_THW = load().tracks(frames)
    shares = np.stack([np.bincount(one.ravel(), minlength=all_THW.max() + 1) for one in all_THW]) / SIDE**2
    changing = np.ptp(shares, axis=0).argmax()
    min_area = float(shares[:, changing].mean() + shares[:, changing].max()) / 2  # what it has in some frames alone
    large_THW = load(min_area=min_area).tracks(frames)
    is_large = shares.max(axis=0) >= min_area
    assert 1 <= is_large.sum() < all_THW.max()
    assert np.array_equal(large_THW, np.where(is_large[all_THW], all_THW, 0))


def test_tracks_become_masks_and_clips_do_not_touch(load: Load) -> None:
    clips = [decoded(frames_of(2, 40, 60, seed)) for seed in (5, 6)]
    segmenter = load()
    for one, tracks in [(one, segmenter.segment(one)) for one in clips]:
        assert isinstance(tracks, np.ndarray)
        assert np.array_equal(tracks, load().segment(one))
        masks = masks_of(tracks, num_valid=2, most=128)
        assert (masks.masks_THW == 0).any(axis=(1, 2)).all()
        assert len(masks.graph_MT) > 1


def test_the_spec_tells_all_that_decides_the_masks(load: Load) -> None:
    spec = load(min_area=0.01, link="none").spec
    assert spec.name == "trajtok"
    assert spec.options == {
        "chunk_frames": 8, "link": "none", "link_threshold": 0.0, "grid": 14, "min_area": 0.01,
    }  # fmt: skip
    assert spec.weights_sha256 != load("whole").spec.weights_sha256
    assert load(dtype="bfloat16").spec.dtype == "bfloat16"


def test_other_number_types_give_nearly_the_same_masks(load: Load) -> None:
    frames = frames_of(2, SIDE, SIDE, 7)
    assert (load(dtype="bfloat16").tracks(frames) == load().tracks(frames)).mean() > 0.8


def test_values_that_are_no_numbers_are_refused(load: Load) -> None:
    segmenter = load()
    segmenter._model.log_scale.fill_(float("nan"))
    with pytest.raises(TokenizerError, match="values that are not finite: set dtype to float32 or bfloat16"):
        segmenter.tracks(frames_of(1, SIDE, SIDE, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": 15}, f"options.grid: found 15; accepted: a divisor of {SIDE}"),
        ({"min_area": 1}, "options.min_area: found 1; accepted: less than 1"),
        ({"link": "query"}, r"options.link: found 'query' \(did you mean 'queries'\?\)"),
        ({"level": 1}, "options.level: unknown key; accepted are chunk_frames, grid, link"),
    ],
)
def test_options_that_are_none_are_refused(load: Load, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(**options)


def test_other_weights_are_refused(networks: dict[str, Segmenter], tmp_path: Path) -> None:
    def load(state: dict[str, torch.Tensor]) -> None:
        torch.save({"model": state}, tmp_path / "model.pth")
        TrajTokSegmenter(Settings(weights=str(tmp_path / "model.pth"), options={"grid": 14}))

    with pytest.raises(TokenizerError, match=r"trajtok needs its weights: .* hf://michaelzch001/trajtok-segmenter or"):
        TrajTokSegmenter(Settings())
    with pytest.raises(TokenizerError, match=r"no tensor vision_encoder.trajectory_perceiver.latents, and none that"):
        load({"x": torch.zeros(1)})
    state = {f"vision_encoder.{key}": value for key, value in networks["fine"].state_dict().items()}
    with pytest.raises(TokenizerError, match=r"not those of TrajTok's segmenter: of \d+ tensors 1 not known \(more\)"):
        load(state | {"more": torch.zeros(1)})
    with pytest.raises(TokenizerError, match=r"tensors 1 missing \(log_scale\)"):
        load({key: value for key, value in state.items() if not key.endswith("log_scale")})
