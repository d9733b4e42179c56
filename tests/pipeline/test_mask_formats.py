"""Run lengths as pycocotools writes them, and masks from and to the JSON of SA-1B and SA-V."""

import hashlib
from typing import Any

import numpy as np
import pytest

from tokenmill.pipeline.mask_formats import (
    annotations_of,
    by_area,
    decode_rle,
    encode_rle,
    ids_of_annotations,
    instances_by_frame,
    instances_of,
    tracks_of_graph,
    tracks_of_instances,
)

SMALL = np.array([[0, 1, 1, 0], [1, 1, 0, 0], [0, 1, 1, 1]], bool)
# As pycocotools 2.0.11 writes them.
COCO = [
    (SMALL, "11130M10"),
    (np.ones((3, 5), bool), "0?"),
    (np.zeros((1, 1), bool), "1"),
    (np.ones((1, 1), bool), "01"),
]


def disk() -> np.ndarray:
    rows, columns = np.ogrid[:512, :512]
    return (rows - 200) ** 2 + (columns - 250) ** 2 < 140**2


def noise(seed: int, *size: int) -> np.ndarray:
    dice = np.random.default_rng(seed)
    return dice.random(size) < dice.random()


@pytest.mark.parametrize(("mask_HW", "counts"), COCO, ids=["small", "full", "empty pixel", "pixel"])
def test_run_lengths_are_those_of_coco(mask_HW: np.ndarray, counts: str) -> None:
    assert encode_rle(mask_HW) == {"size": list(mask_HW.shape), "counts": counts}
    np.testing.assert_array_equal(decode_rle({"size": mask_HW.shape, "counts": counts}), mask_HW)
    np.testing.assert_array_equal(decode_rle({"size": mask_HW.shape, "counts": counts.encode()}), mask_HW)


def test_run_lengths_of_many_characters_are_those_of_coco() -> None:
    """The digests are of what pycocotools 2.0.11 writes."""
    counts = encode_rle(disk())["counts"]
    assert counts.startswith("heg1Q1h>>D:F:G8I6J6J6J6K4K6K4L4K6K4M2M4L4L4L4M2M4M2M4M2M4M2N")
    digest = hashlib.sha256(counts.encode()).hexdigest()
    assert digest == "ef4558c06d941b436fdfa6200d7421ed50f6fffbe13b1c9eef169b9840b8e8f2"


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (17, 23), (64, 64), (300, 2)])
def test_run_lengths_lead_back_to_the_mask(size: tuple[int, int]) -> None:
    for seed in range(20):
        mask_HW = noise(seed, *size)
        np.testing.assert_array_equal(decode_rle(encode_rle(mask_HW)), mask_HW)


def test_plain_counts_are_read_too() -> None:
    np.testing.assert_array_equal(decode_rle({"size": [3, 4], "counts": [1, 1, 1, 4, 1, 1, 2, 1]}), SMALL)


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        ({"size": [3, 4]}, r"need a size \[h, w\] and counts"),
        ({"size": 3, "counts": "1"}, r"need a size \[h, w\] and counts"),
        ({"size": [3, 4, 5], "counts": "1"}, r"need a size \[h, w\] and counts"),
        ({"size": [3, 4], "counts": {}}, "text or a list of whole numbers"),
        ({"size": [3, 4], "counts": ["x"]}, "text or a list of whole numbers"),
        ({"size": [3, 4], "counts": [5, 6]}, "the runs cover 11 pixels"),
        ({"size": [3, 4], "counts": [14, -2]}, "the runs cover 12 pixels, -2 the least"),
        ({"size": [3, 4], "counts": ""}, "the runs cover 0 pixels"),
        ({"size": [0, 4], "counts": []}, "the runs cover 0 pixels"),
        ({"size": [1 << 20, 1 << 20], "counts": [1 << 40]}, "of a size"),
        ({"size": [3, 4], "counts": "1 1"}, "not COCO's compressed form"),
        ({"size": [3, 4], "counts": "11é"}, "runs cover|not COCO's compressed form"),
        ({"size": [3, 4], "counts": "1113P"}, "not COCO's compressed form"),
        ({"size": [3, 4], "counts": "P" * 20 + "1"}, "a number of 21 characters"),
    ],
)
def test_wrong_run_lengths_are_refused(rle: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_rle(rle)


def test_segments_are_numbered_from_the_largest() -> None:
    ids_HW = np.array([[9, 9, 0, 4], [7, 7, 7, 4]], np.uint8)
    np.testing.assert_array_equal(by_area(ids_HW), [[3, 3, 0, 2], [1, 1, 1, 2]])
    assert by_area(ids_HW).dtype == np.uint8
    assert not by_area(np.zeros((3, 3), np.uint8)).any()


def test_annotations_lead_back_to_the_picture() -> None:
    ids_HW = by_area(np.random.default_rng(0).integers(0, 6, (30, 41), dtype=np.uint8))
    annotations = annotations_of(ids_HW)
    assert [one["area"] for one in annotations] == sorted((one["area"] for one in annotations), reverse=True)
    np.testing.assert_array_equal(ids_of_annotations(annotations), ids_HW)


def test_annotations_are_painted_in_their_order() -> None:
    left, all_HW = np.zeros((4, 4), bool), np.ones((4, 4), bool)
    left[:, :2] = True
    below, above = ({"segmentation": encode_rle(one)} for one in (all_HW, left))
    np.testing.assert_array_equal(ids_of_annotations([below, above])[0], [2, 2, 1, 1])
    np.testing.assert_array_equal(ids_of_annotations([above, below])[0], [2, 2, 2, 2])


def test_small_annotations_and_those_after_256_are_skipped() -> None:
    dot = np.zeros((40, 40), bool)
    dot[0, 0] = True
    rows = [np.zeros((40, 40), bool) for _ in range(257)]
    for number, row in enumerate(rows):
        row[number % 40, number // 40 * 2 : number // 40 * 2 + 2] = True
    annotations = [{"segmentation": encode_rle(one), "area": int(one.sum())} for one in (dot, *rows)]
    ids_HW = ids_of_annotations(annotations)
    assert ids_HW[0, 0] == 1  # of the first row: one pixel of 1600 is too small
    assert ids_HW.max() == 256
    assert not ids_HW[256 % 40, 256 // 40 * 2]


def test_annotations_of_several_sizes_or_none_are_refused() -> None:
    one, other = ({"segmentation": encode_rle(np.ones(size, bool))} for size in ((3, 4), (4, 3)))
    with pytest.raises(ValueError, match=r"differ in size: \(4, 3\) and \(3, 4\)"):
        ids_of_annotations([one, other])
    with pytest.raises(ValueError, match="no annotations"):
        ids_of_annotations([])


def test_instances_lead_back_to_the_tracks() -> None:
    tracks_THW = np.random.default_rng(0).integers(0, 5, (6, 20, 31), dtype=np.int32)
    tracks_THW[2][tracks_THW[2] == 3] = 0
    tracks_THW[4] = 0
    instances = instances_of(tracks_THW, 255)
    assert list(instances) == ["0", "1", "2", "3"]
    assert [one["frame_number"] for one in instances["2"]["segmentations"]] == [0, 4, 12, 20]
    assert (instances["2"]["start_frame"], instances["2"]["end_frame"]) == (0, 20)
    shown = instances_by_frame(instances)
    assert sorted(shown) == [0, 1, 2, 3, 5]
    for t in shown:
        np.testing.assert_array_equal(tracks_of_instances(shown[t]), tracks_THW[t])
    assert tracks_of_instances([]).tolist() == [[0]]


def test_instances_between_frames_of_the_video_or_without_masks_are_none() -> None:
    rle = encode_rle(np.ones((2, 2), bool))
    segmentations = [{"frame_number": n, "rle": rle} for n in (2, 8)] + [{"frame_number": 4, "rle": None}]
    assert instances_by_frame({"7": {"segmentations": segmentations}}) == {2: [(1, rle)]}


def test_instances_hold_no_more_than_asked_and_no_absent_track() -> None:
    tracks_THW = np.array([[[1, 3, 4, 5]]], np.int32)
    assert list(instances_of(tracks_THW, 4)) == ["0", "2", "3"]


def test_tracks_follow_the_graph_and_ids_outside_of_it_are_none() -> None:
    ids_THW = np.array([[[1, 2, 3, 9, 0]], [[1, 2, 3, 9, 0]]], np.uint8)
    graph_MT = np.array([[1, 3], [2, 0], [2, 1], [200, 200]])
    np.testing.assert_array_equal(tracks_of_graph(ids_THW, graph_MT)[:, 0], [[1, 2, 0, 0, 0], [3, 0, 1, 0, 0]])
    assert not tracks_of_graph(ids_THW, graph_MT[:0]).any()
