"""The scores of predicted trajectories, against examples worked out by hand."""

import math

import numpy as np
import pytest

from tokenmill.pipeline.mask_metrics import (
    entity_quality,
    frame_iou,
    overlaps_of,
    segmentation_tracking_quality,
    tube_iou,
)

TRUE = np.array([[[1, 1, 1, 1, 2, 2, 2, 2]]])


def tracks(*frames: list[int]) -> np.ndarray:
    """(T,1,W) int32."""
    return np.array(frames, np.int32)[:, None]


def scores(predicted: np.ndarray, true: np.ndarray) -> tuple[float, float, float]:
    table = overlaps_of(predicted, true)
    return tube_iou(table), entity_quality(table), segmentation_tracking_quality(table)


def test_the_truth_itself_scores_one_under_any_numbers():
    assert scores(TRUE, TRUE) == (1, 1, 1)
    assert scores(np.where(TRUE == 1, 900_000_000, 7), TRUE) == (1, 1, 1)


def test_scores_of_two_tubes_are_those_worked_out_by_hand():
    predicted = tracks([5, 5, 5, 6, 6, 6, 6, 0])
    # IoU: 5 and 1 share 3 of 4; 6 and 2 share 3 of 5; 6 and 1 share 1 of 7.
    tube, entity, stq = scores(predicted, TRUE)
    assert tube == pytest.approx((3 / 4 + 3 / 5) / 2)
    assert entity == pytest.approx((3 / 4 + 3 / 5) / 2)
    association = ((3 * 3 / 4 + 1 * 1 / 7) / 4 + (3 * 3 / 5) / 4) / 2
    assert stq == pytest.approx(math.sqrt(association * 7 / 8))


def test_a_tube_cut_in_two_counts_once_for_tubes_and_twice_for_association():
    predicted = tracks([1, 1, 1, 3, 2, 2, 2, 2])
    tube, entity, stq = scores(predicted, TRUE)
    assert tube == pytest.approx((3 / 4 + 1) / 2)
    assert entity == pytest.approx((3 / 4 + 1) / (2 + 1 / 2))
    assert stq == pytest.approx(math.sqrt(((3 * 3 / 4 + 1 * 1 / 4) / 4 + 1) / 2))


def test_a_pair_with_half_in_common_is_no_match_of_entities():
    table = overlaps_of(tracks([1, 1, 0, 0]), tracks([1, 1, 1, 1]))
    assert tube_iou(table) == 0.5
    assert entity_quality(table) == 0


def test_pixels_unknown_in_the_truth_are_ignored():
    true = tracks([0, 0, 1, 1], [2, 2, 0, 0])
    clean = scores(tracks([0, 0, 1, 1], [2, 2, 0, 0]), true)
    assert scores(tracks([1, 9, 1, 1], [2, 2, 2, 1]), true) == clean == (1, 1, 1)


def test_identities_that_change_cost_tubes_and_not_frames():
    true = tracks([1, 1, 2, 2], [1, 1, 2, 2])
    swapped = tracks([1, 1, 2, 2], [2, 2, 1, 1])
    assert frame_iou(swapped, true) == 1
    assert tube_iou(overlaps_of(swapped, true)) == pytest.approx(1 / 3)


def test_frames_without_truth_do_not_count():
    assert frame_iou(tracks([1, 1], [4, 4]), tracks([1, 1], [0, 0])) == 1


def test_no_prediction_scores_zero():
    assert scores(np.zeros_like(TRUE), TRUE) == (0, 0, 0)


def test_no_truth_scores_nothing():
    assert all(math.isnan(score) for score in scores(TRUE, np.zeros_like(TRUE)))
    assert math.isnan(frame_iou(TRUE, np.zeros_like(TRUE)))


def test_stq_agrees_with_the_equation_written_as_loops():
    random = np.random.default_rng(0)
    true, predicted = random.integers(0, 5, (3, 6, 7)), random.integers(0, 6, (3, 6, 7))
    known = true > 0
    association = []
    for g in range(1, 5):
        of_g = known & (true == g)
        total = 0.0
        for p in range(1, 6):
            of_p = known & (predicted == p)
            shared, missed, extra = (of_p & of_g).sum(), (of_g & ~of_p).sum(), (of_p & ~of_g).sum()
            total += shared * shared / (shared + missed + extra)
        association.append(total / of_g.sum())
    quality = (known & (predicted > 0)).sum() / known.sum()
    expected = math.sqrt(np.mean(association) * quality)
    assert segmentation_tracking_quality(overlaps_of(predicted, true)) == pytest.approx(expected, rel=1e-12)


def test_tracks_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"found predicted \(1, 1, 7\) and true \(1, 1, 8\)"):
        overlaps_of(TRUE[..., :7], TRUE)


def test_tracks_that_are_no_integers_are_refused():
    with pytest.raises(ValueError, match=r"true tracks must be integers \(T,H,W\), found float64 of shape \(1, 1, 8\)"):
        overlaps_of(TRUE, TRUE.astype(float))


def test_negative_tracks_are_refused():
    with pytest.raises(ValueError, match="predicted tracks are numbered from 1, 0 is none, found -1"):
        overlaps_of(TRUE - 2, TRUE)
