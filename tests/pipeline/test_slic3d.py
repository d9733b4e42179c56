"""Trajectories without weights."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from tokenmill.pipeline.mask_metrics import overlaps_of, tube_iou
from tokenmill.pipeline.segment import masks_of
from tokenmill.pipeline.slic3d import Slic3d, Slic3dOptions, shrunk, windows
from tokenmill.schemas.clip import Clip, ClipFrames, Video
from tokenmill.schemas.errors import RecipeError
from tokenmill.schemas.recipe import parse_options

from ..tokenizers.trajtok_kit import clip_with_ids


def decoded(frames_THWC: np.ndarray, num_valid: int | None = None) -> ClipFrames:
    times = tuple(t / 25 for t in range(num_valid or len(frames_THWC)))
    video = Video(uri="none", size_bytes=0, digest="0" * 64)
    clip = Clip(clip_id="c", video=video, start_s=0, end_s=1000, frame_pts_s=times)
    numbers = tuple(range(len(times)))
    return ClipFrames(clip=clip, frames_THWC=frames_THWC, decoded_pts_s=times, frame_numbers=numbers, decoder="none")


def tracks_of(frames_THWC: np.ndarray, num_valid: int | None = None, **options: float) -> np.ndarray:
    return Slic3d(Slic3dOptions.model_validate(options)).segment(decoded(frames_THWC, num_valid))


def scene(num_frames: int, side: int, seed: int, noise: float = 0) -> tuple[np.ndarray, np.ndarray]:
    frames, ids = clip_with_ids(num_frames, side, seed, 5)
    noisy = frames.numpy() + np.random.default_rng(seed).normal(0, noise, frames.shape)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8), ids.numpy().astype(np.int32) + 1


@pytest.mark.parametrize(("noise", "least"), [(0, 0.96), (8, 0.94)])
def test_moving_shapes_are_found_raw_and_as_a_product(noise: float, least: float):
    raw, product = [], []
    for seed in (0, 1, 2):
        frames, ids = scene(16, 224, seed, noise)
        tracks = tracks_of(frames)
        assert tracks.dtype == np.int32
        assert tracks.min() >= 1
        raw.append(tube_iou(overlaps_of(tracks, ids)))
        product.append(tube_iou(overlaps_of(masks_of(tracks, 16, 128).tracks_THW, ids)))
    assert np.mean(raw) > least
    assert np.mean(product) > least - 0.02


def bouncing(num_frames: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Four squares that go up and down in columns of their own, over a background that changes slowly."""
    y, x = np.mgrid[0:side, 0:side]
    frames, ids = np.empty((num_frames, side, side, 3)), np.ones((num_frames, side, side), np.int32)
    colours = np.array([[220, 60, 60], [60, 200, 80], [70, 90, 230], [230, 220, 60]])
    for t in range(num_frames):
        frames[t] = 110 + 25 * np.sin((x + t) / 30)[..., None]
        for k, colour in enumerate(colours):
            middle = side / 2 + side / 4 * np.sin(t / (9 + 2 * k))
            inside = (abs(y - middle) < side / 10) & (abs(x - side * (2 * k + 1) / 8) < side / 12)
            frames[t][inside] = colour + 12 * np.sin((x + y - middle) / 3)[inside][:, None]
            ids[t][inside] = k + 2
    return np.clip(np.rint(frames), 0, 255).astype(np.uint8), ids


def test_trajectories_keep_their_numbers_through_300_frames():
    frames, ids = bouncing(300, 80)
    tracks = tracks_of(frames)
    assert len(windows(300, 16)) == 20
    for k in range(1, 6):
        numbers = {
            int(np.bincount(tracks[start:stop][ids[start:stop] == k]).argmax()) for start, stop in windows(300, 16)
        }
        assert len(numbers) == 1, k
    assert len(np.unique(tracks)) < 12
    assert tube_iou(overlaps_of(tracks, ids)) > 0.9


def test_padding_has_the_tracks_of_the_last_real_frame_and_decides_nothing():
    frames, _ = scene(12, 64, 0)
    padded = np.concatenate([frames[:7], np.repeat(frames[6:7], 5, axis=0)])
    tracks = tracks_of(padded, num_valid=7)
    assert (tracks[7:] == tracks[6]).all()
    np.testing.assert_array_equal(tracks[:7], tracks_of(frames[:7]))


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 224, 224), (2, 1, 9), (3, 5, 400), (17, 33, 47), (40, 8, 8), (2, 540, 960), (5, 1, 5000)]
)
def test_clips_of_any_size_have_a_track_in_every_pixel(shape: tuple[int, int, int]):
    frames = np.random.default_rng(1).integers(0, 256, (*shape, 3)).astype(np.uint8)
    tracks = tracks_of(frames)
    assert tracks.shape == shape
    assert tracks.min() >= 1


@pytest.mark.parametrize("value", [0, 255])
def test_frames_of_one_colour_are_one_trajectory(value: int):
    assert (tracks_of(np.full((20, 40, 30, 3), value, np.uint8)) == 1).all()


def test_two_halves_are_two_trajectories_with_the_border_where_it_is():
    frames = np.zeros((4, 150, 230, 3), np.uint8)
    frames[:, :, 77:] = (200, 180, 40)
    tracks = tracks_of(frames)
    assert len(np.unique(tracks)) == 2
    assert (tracks[:, :, :77] == tracks[0, 0, 0]).all()
    assert (tracks[:, :, 77:] == tracks[0, 0, -1]).all()


def test_a_clip_has_the_same_tracks_alone_and_among_others():
    (one, _), (other, _) = scene(5, 48, 0), scene(5, 48, 1)
    segmenter = Slic3d(Slic3dOptions())
    alone = segmenter.segment(decoded(one))
    segmenter.segment(decoded(other))
    np.testing.assert_array_equal(segmenter.segment(decoded(one)), alone)


def test_tracks_are_the_same_bytes_every_time_and_for_any_number_of_threads():
    frames, _ = scene(6, 224, 3, noise=8)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 4):
            torch.set_num_threads(threads)
            found.append(tracks_of(frames))
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(*found)


def test_windows_share_one_frame_and_are_about_equally_long():
    assert windows(1, 16) == [(0, 1)]
    assert windows(16, 16) == [(0, 16)]
    assert windows(17, 16) == [(0, 9), (8, 17)]
    for num_frames in range(2, 200):
        spans = windows(num_frames, 16)
        assert spans[0][0] == 0
        assert spans[-1][1] == num_frames
        assert all(one[1] - 1 == two[0] for one, two in pairwise(spans))
        assert max(stop - start for start, stop in spans) <= 16


def test_frames_are_shrunk_to_one_area_and_never_enlarged():
    assert shrunk(np.zeros((2, 224, 224, 3), np.uint8), 112).shape == (2, 112, 112, 3)
    assert shrunk(np.zeros((2, 448, 112, 3), np.uint8), 112).shape == (2, 224, 56, 3)
    assert shrunk(np.zeros((2, 30, 50, 3), np.uint8), 112).shape == (2, 30, 50, 3)


def test_the_spec_names_options_and_versions():
    spec = Slic3d(Slic3dOptions(cut=30)).spec
    assert spec.name == "slic3d"
    assert spec.options["cut"] == 30
    assert {"scikit-image", "scipy", "numpy", "resize_revision", "link_revision", "side"} <= set(spec.options)


def test_a_wrong_option_is_refused_by_name():
    with pytest.raises(RecipeError, match=r"options\.cutt: unknown key \(did you mean.*cut"):
        parse_options(Slic3dOptions, {"cutt": 3})
    with pytest.raises(RecipeError, match=r"options\.window: found 1; accepted: greater than or equal to 2"):
        parse_options(Slic3dOptions, {"window": 1})
