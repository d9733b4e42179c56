"""Resizing: close to torch's own antialiased kernels in float, and the same whatever is around."""

import numpy as np
import pytest
import torch

from tokenmill.pipeline.resize import parse_resize, resize_frame
from tokenmill.schemas.clip import Sampling


def sampling(height: int, width: int, resize: str) -> Sampling:
    return Sampling(fps=None, num_frames=1, height=height, width=width, resize=resize, tail="pad")


def hard_edges(height: int, width: int) -> np.ndarray:
    """Black and white noise: what overshoots most."""
    return np.random.default_rng(0).integers(0, 2, (height, width, 3), dtype=np.uint8) * 255


def reference(frame_HWC: np.ndarray, height: int, width: int, interpolation: str) -> np.ndarray:
    frame_1CHW = torch.from_numpy(frame_HWC.astype(np.float32)).permute(2, 0, 1)[None]
    scaled = torch.nn.functional.interpolate(frame_1CHW, size=(height, width), mode=interpolation, antialias=True)
    return scaled[0].permute(1, 2, 0).round().clamp(0, 255).numpy()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(32, 48), (33, 17), (90, 200), (1, 1)])
def test_squash_is_within_one_grey_level_of_float(size: tuple[int, int], interpolation: str) -> None:
    frame_HWC = hard_edges(72, 128)
    resized_HWC = resize_frame(frame_HWC, sampling(*size, f"squash/{interpolation}"))
    assert resized_HWC.dtype == np.uint8
    assert np.abs(resized_HWC - reference(frame_HWC, *size, interpolation)).max() <= 1


@pytest.mark.parametrize(
    ("source", "target", "cover"),
    [((72, 128), (32, 32), (32, 57)), ((128, 72), (32, 32), (57, 32)), ((20, 30), (64, 48), (64, 96))],
)
def test_center_crop_is_the_middle_of_the_covering_size(
    source: tuple[int, int], target: tuple[int, int], cover: tuple[int, int]
) -> None:
    frame_HWC = hard_edges(*source)
    resized_HWC = resize_frame(frame_HWC, sampling(*target, "center_crop/bilinear"))
    top, left = (cover[0] - target[0]) // 2, (cover[1] - target[1]) // 2
    expected_HWC = reference(frame_HWC, *cover, "bilinear")[top : top + target[0], left : left + target[1]]
    assert resized_HWC.shape == expected_HWC.shape
    assert np.abs(resized_HWC - expected_HWC).max() <= 1


def test_letterbox_shows_the_whole_frame_between_black_bars() -> None:
    frame_HWC = np.maximum(hard_edges(72, 128), 1)
    resized_HWC = resize_frame(frame_HWC, sampling(64, 64, "letterbox/bicubic"))
    assert not resized_HWC[:14].any()
    assert not resized_HWC[50:].any()
    assert np.abs(resized_HWC[14:50] - reference(frame_HWC, 36, 64, "bicubic")).max() <= 1


def test_a_sliver_keeps_one_line_in_the_letterbox() -> None:
    resized_HWC = resize_frame(np.full((1, 500, 3), 255, np.uint8), sampling(64, 64, "letterbox/bilinear"))
    assert (resized_HWC != 0).any(axis=(1, 2)).sum() == 1


@pytest.mark.parametrize("mode", ["center_crop", "squash", "letterbox"])
def test_a_frame_of_the_right_size_is_returned_untouched(mode: str) -> None:
    frame_HWC = hard_edges(24, 40)
    assert resize_frame(frame_HWC, sampling(24, 40, f"{mode}/bilinear")) is frame_HWC


def test_a_turned_view_resizes_like_its_copy() -> None:
    turned_HWC = np.rot90(hard_edges(48, 64))
    settings = sampling(20, 20, "squash/bilinear")
    np.testing.assert_array_equal(resize_frame(turned_HWC, settings), resize_frame(turned_HWC.copy(), settings))


@pytest.mark.parametrize("resize", ["center_crop/bilinear", "letterbox/bicubic"])
def test_pixels_do_not_depend_on_the_number_of_threads(resize: str) -> None:
    frame_HWC, settings = hard_edges(240, 320), sampling(64, 64, resize)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone_HWC = resize_frame(frame_HWC, settings)
        torch.set_num_threads(2)
        np.testing.assert_array_equal(resize_frame(frame_HWC, settings), alone_HWC)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("resize", ["crop/bilinear", "squash/nearest", "squash"])
def test_an_unknown_resize_is_refused_with_what_is_accepted(resize: str) -> None:
    with pytest.raises(ValueError, match=r"unknown: accepted are .*center_crop.*bilinear, bicubic"):
        parse_resize(resize)
