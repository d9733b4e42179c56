"""Sets of masks, on exact ones made by hand."""

import numpy as np
import pytest
import torch

from tokenmill.pipeline import sam2_masks
from tokenmill.pipeline.sam2_masks import (
    at_size,
    distinct,
    good_masks,
    matched,
    newcomers,
    overlaps,
    painted,
    stability,
)

from .sam2_kit import boxes


def random_masks(num: int, seed: int, size: tuple[int, int] = (9, 11)) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random((num, *size)) < 0.4)


def test_stability_is_the_overlap_of_a_mask_with_thresholds_moved_both_ways() -> None:
    logits_NHW = torch.full((3, 4, 5), -9.0)
    logits_NHW[0, :2] = 0.5  # in the outer mask alone
    logits_NHW[0, 2:] = 9.0
    logits_NHW[1] = 9.0
    assert stability(logits_NHW).tolist() == [0.5, 1.0, 1.0]


def test_good_masks_are_rated_stable_and_large() -> None:
    logits_NHW = torch.full((5, 10, 10), -9.0)
    logits_NHW[:, :2, :5] = 9.0
    logits_NHW[3, :, 5:] = 0.5  # unstable
    logits_NHW[4] = -9.0
    logits_NHW[4, 0, :9] = 9.0  # small
    rated_N = torch.tensor([0.9, 0.7, float("nan"), 0.9, 0.9])
    good_N = good_masks(logits_NHW, rated_N, least_iou=0.8, least_stability=0.9, least_area=0.1)
    assert good_N.tolist() == [True, False, False, False, False]


@pytest.mark.parametrize("pixels_at_once", [1, 250, 1 << 26])
def test_overlaps_are_those_counted_pixel_by_pixel(pixels_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sam2_masks, "PIXELS_AT_ONCE", pixels_at_once)
    a, b = random_masks(5, 0), random_masks(4, 1)
    a[2] = b[3] = False
    expected = [[int((x & y).sum()) / max(1, int((x | y).sum())) for y in b] for x in a]
    assert overlaps(a, b).numpy() == pytest.approx(np.array(expected))
    assert overlaps(a[:0], b).shape == (0, 4)
    assert overlaps(a, b[:0]).shape == (5, 0)


def test_of_masks_that_overlap_too_much_the_first_stays() -> None:
    masks_NHW = boxes((0, 8, 0, 10), (0, 8, 0, 9), (0, 8, 0, 5), (8, 16, 0, 10), (8, 16, 1, 10))
    assert distinct(masks_NHW, 0.7).tolist() == [0, 2, 3]
    assert distinct(masks_NHW, 1.0).tolist() == [0, 1, 2, 3, 4]
    assert distinct(masks_NHW[:0], 0.7).tolist() == []


def test_smallest_mask_is_on_top() -> None:
    masks_NHW = boxes((4, 8, 4, 8), (0, 16, 0, 10), (2, 10, 2, 9), (0, 0, 0, 0))
    frame_HW = painted(masks_NHW, [5, 2, 9, 7])
    expected = np.zeros((16, 20), np.int32)
    expected[0:16, 0:10], expected[2:10, 2:9], expected[4:8, 4:8] = 2, 9, 5
    assert frame_HW.dtype == np.int32
    assert (frame_HW == expected).all()
    assert not painted(masks_NHW[:0], []).any()


def test_matching_takes_the_largest_sum_of_overlaps_not_the_best_pair_first() -> None:
    before = boxes((0, 10, 0, 10), (0, 10, 0, 7), size=(10, 20))
    found = boxes((0, 10, 0, 8), (0, 10, 0, 14), size=(10, 20))
    # 7/8 is the best pair; with it the other two would overlap by 10/14, 8/10 + 7/14 is less.
    assert matched(before, found, 0.5) == [(0, 1), (1, 0)]
    assert matched(before, found[:1], 0.5) == [(1, 0)]


def test_masks_below_the_least_overlap_are_not_matched_even_where_nothing_else_is_left() -> None:
    before, found = boxes((0, 10, 0, 10), (0, 4, 12, 16)), boxes((0, 10, 0, 4), (0, 4, 12, 16))
    assert matched(before, found, 0.5) == [(1, 1)]
    assert matched(before, found, 0.4) == [(0, 0), (1, 1)]
    assert matched(before[:0], found, 0.5) == matched(before, found[:0], 0.5) == []


def test_newcomers_are_the_largest_masks_on_the_uncovered_area() -> None:
    known = boxes((0, 16, 0, 10))
    found = boxes((0, 4, 12, 14), (0, 8, 8, 14), (0, 8, 4, 12), (8, 16, 10, 20))
    new = newcomers(found, known, room=9, least_share=0.5, num_pixels=4)
    assert torch.equal(new, found[[3, 1, 0]])
    assert torch.equal(newcomers(found, known, room=2, least_share=0.5, num_pixels=4), found[[3, 1]])
    assert torch.equal(newcomers(found, known, room=9, least_share=0.5, num_pixels=9), found[[3, 1]])
    assert len(newcomers(found, known, room=0, least_share=0.5, num_pixels=4)) == 0
    assert len(newcomers(found, known, room=-3, least_share=0.5, num_pixels=4)) == 0
    assert len(newcomers(found, boxes((0, 16, 0, 20)), room=9, least_share=0.1, num_pixels=1)) == 0


def test_what_is_left_of_a_mask_between_finer_ones_is_no_newcomer() -> None:
    found = boxes((0, 10, 0, 10), (0, 10, 0, 5), (0, 9, 5, 10))
    assert torch.equal(newcomers(found, found[:0], room=9, least_share=0.5, num_pixels=6), found[[1, 2]])
    assert torch.equal(newcomers(found, found[:0], room=9, least_share=0.5, num_pixels=5), found[[0, 1, 2]])


@pytest.mark.parametrize("pixels_at_once", [1, 1 << 26])
def test_masks_are_scaled_to_the_size_of_the_frame(pixels_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sam2_masks, "PIXELS_AT_ONCE", pixels_at_once)
    masks_NHW = boxes((0, 8, 0, 10), (4, 12, 0, 20))
    logits_NHW = masks_NHW.float() * 20 - 10
    assert torch.equal(at_size(logits_NHW, 16, 20), masks_NHW)
    assert torch.equal(at_size(logits_NHW, 32, 40), masks_NHW.repeat_interleave(2, 1).repeat_interleave(2, 2))
    assert at_size(logits_NHW, 1, 1).shape == (2, 1, 1)
    assert at_size(logits_NHW[:0], 5, 7).shape == (0, 5, 7)
