"""Pseudo-labels as other programs write them: COCO's run lengths, SA-1B's annotations, SA-V's instances.

Everything here is a function of values. ValueError says in one line what is wrong with what was read.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

LEAST_SHARE = 0.001  # of a picture's area: readers of SA-1B skip smaller annotations
MOST_ANNOTATIONS = 256  # that are read of a picture
SAV_FPS = 6  # frames of a video of SA-V
SAV_STEP = 4  # numbers from one of them to the next: they count the 24 frames of a second of the original
FIRST_CHAR = 48
MOST_PIXELS = 1 << 28  # of a mask that is read
LONGEST_NUMBER = 12  # characters of 5 bits: more do not fit 64 bits
SHIFTS = 5 * np.arange(LONGEST_NUMBER)


def encode_rle(mask_HW: np.ndarray) -> dict[str, Any]:
    """A boolean mask as COCO's compressed run lengths, ``{"size": [H, W], "counts": str}``.

    Runs go down the columns and alternate, the first is of zeros. From the fourth on each is written as its difference
    to the run before the last, in groups of 5 bits from the lowest, as characters from ``0`` on.
    """
    flat = np.asarray(mask_HW, bool).ravel(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate([[0], edges, [flat.size]]))
    if flat[0]:
        runs = np.insert(runs, 0, 0)
    numbers = runs.astype(np.int64)
    numbers[3:] -= runs[1:-2]
    return {"size": [int(size) for size in mask_HW.shape], "counts": _text_of(numbers)}


def decode_rle(rle: Mapping[str, Any]) -> np.ndarray:
    """The boolean mask (H,W) of COCO's run lengths, compressed (text or bytes) or as a list of numbers."""
    try:
        size, counts = rle["size"], rle["counts"]
        height, width = (int(side) for side in size)
    except (KeyError, TypeError, ValueError):
        raise ValueError("run lengths need a size [h, w] and counts") from None
    if isinstance(counts, (str, bytes)):
        numbers = _numbers_of(counts)
        runs = numbers.copy()
        runs[1::2] = np.cumsum(numbers[1::2])
        runs[2::2] = np.cumsum(numbers[2::2])
    else:
        try:
            runs = np.array(counts, np.int64).reshape(-1)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"counts are text or a list of whole numbers, found {str(counts)[:40]!r}") from None
    if height < 1 or width < 1 or height * width > MOST_PIXELS or (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(f"the runs cover {runs.sum()} pixels, {runs.min(initial=0)} the least, of a size {size}")
    is_inside = np.arange(len(runs)) % 2 == 1
    return np.repeat(is_inside, runs).reshape(width, height).T


def _text_of(numbers_N: np.ndarray) -> str:
    """Numbers as characters: 5 bits each, the lowest first, and a sixth that says that the number goes on."""
    rest_NG = numbers_N[:, None] >> SHIFTS
    is_last_NG = (rest_NG >= -16) & (rest_NG < 16)  # what is left fits 5 bits with its sign
    last_N = is_last_NG.argmax(axis=1)
    chars_NG = (rest_NG & 31) | np.where(is_last_NG, 0, 32)
    kept_NG = np.arange(LONGEST_NUMBER) <= last_N[:, None]
    return (chars_NG[kept_NG] + FIRST_CHAR).astype(np.uint8).tobytes().decode()


def _numbers_of(text: str | bytes) -> np.ndarray:
    """What `_text_of` wrote."""
    data = text.encode("ascii", "replace") if isinstance(text, str) else text
    chars = np.frombuffer(data, np.uint8).astype(np.int64) - FIRST_CHAR
    if (chars < 0).any() or (chars > 63).any() or (len(chars) and chars[-1] & 32):
        raise ValueError(f"damaged run lengths: {str(text)[:40]!r} is not COCO's compressed form")
    ends = np.flatnonzero(chars < 32)
    starts = np.append(0, ends + 1)[:-1].astype(np.int64)
    lengths = ends - starts + 1
    if lengths.max(initial=0) > LONGEST_NUMBER:
        raise ValueError(f"damaged run lengths: a number of {lengths.max()} characters")
    place = np.arange(len(chars)) - np.repeat(starts, lengths)
    parts = (chars & 31) << (5 * place)
    numbers = np.add.reduceat(parts, starts) if len(starts) else parts
    return np.where(chars[ends] & 16, numbers - (np.int64(1) << (5 * lengths)), numbers)


def by_area(ids_HW: np.ndarray) -> np.ndarray:
    """The segments of a picture numbered from 1, the largest first; 0 stays 0."""
    areas = np.bincount(ids_HW.ravel())
    areas[0] = 0
    order = np.argsort(-areas, kind="stable")
    order = order[areas[order] > 0]
    numbers = np.zeros(len(areas), ids_HW.dtype)
    numbers[order] = np.arange(1, len(order) + 1)
    return numbers[ids_HW]


def annotations_of(ids_HW: np.ndarray) -> list[dict[str, Any]]:
    """The segments of a picture as SA-1B's annotations, in the order of their ids; 0 is none."""
    found = (ids_HW == i for i in range(1, int(ids_HW.max()) + 1))
    return [{"segmentation": encode_rle(one_HW), "area": int(one_HW.sum())} for one_HW in found if one_HW.any()]


def ids_of_annotations(annotations: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """The picture (H,W) int32 that SA-1B's annotations make, painted in their order, numbered from 1.

    As readers do, annotations of less than LEAST_SHARE of the picture are skipped, and those after MOST_ANNOTATIONS.
    """
    canvas_HW: np.ndarray | None = None
    number = 0
    for annotation in annotations:
        mask_HW = decode_rle(annotation["segmentation"])
        if canvas_HW is None:
            canvas_HW = np.zeros(mask_HW.shape, np.int32)
        _check_size(mask_HW, canvas_HW)
        area = annotation.get("area", mask_HW.sum())
        if area >= LEAST_SHARE * mask_HW.size and number < MOST_ANNOTATIONS:
            number += 1
            canvas_HW[mask_HW] = number
    if canvas_HW is None:
        raise ValueError("no annotations, so their size is not known")
    return canvas_HW


def instances_of(tracks_THW: np.ndarray, most: int) -> dict[str, dict[str, Any]]:
    """The tracks 1 to `most` of a clip as SA-V's instances, by number from 0; frames are those of a 6 fps video."""
    found: dict[int, list[dict[str, Any]]] = {}
    for t, tracks_HW in enumerate(tracks_THW):
        for number in np.unique(tracks_HW).tolist():
            if 0 < number <= most:
                segmentation = {"frame_number": SAV_STEP * t, "rle": encode_rle(tracks_HW == number)}
                found.setdefault(number, []).append(segmentation)
    return {
        str(number - 1): {
            "start_frame": shown[0]["frame_number"],
            "end_frame": shown[-1]["frame_number"],
            "segmentations": shown,
        }
        for number, shown in sorted(found.items())
    }


def instances_by_frame(instances: Mapping[str, Any]) -> dict[int, list[tuple[int, Mapping[str, Any]]]]:
    """SA-V's instances by the frames of the video that show them: numbers from 1 in their order, and run lengths."""
    found: dict[int, list[tuple[int, Mapping[str, Any]]]] = {}
    for number, instance in enumerate(instances.values(), 1):
        for segmentation in instance["segmentations"]:
            frame, rest = divmod(segmentation["frame_number"], SAV_STEP)
            if not rest and segmentation.get("rle"):
                found.setdefault(frame, []).append((number, segmentation["rle"]))
    return found


def tracks_of_instances(shown: Sequence[tuple[int, Mapping[str, Any]]]) -> np.ndarray:
    """The picture (H,W) int32 that the instances of one frame make; later ones are on top."""
    canvas_HW: np.ndarray | None = None
    for number, rle in shown:
        mask_HW = decode_rle(rle)
        if canvas_HW is None:
            canvas_HW = np.zeros(mask_HW.shape, np.int32)
        _check_size(mask_HW, canvas_HW)
        canvas_HW[mask_HW] = number
    return np.zeros((1, 1), np.int32) if canvas_HW is None else canvas_HW


def _check_size(mask_HW: np.ndarray, canvas_HW: np.ndarray) -> None:
    if mask_HW.shape != canvas_HW.shape:
        raise ValueError(f"masks of one picture differ in size: {mask_HW.shape} and {canvas_HW.shape}")


def tracks_of_graph(ids_THW: np.ndarray, graph_MT: np.ndarray) -> np.ndarray:
    """For every pixel 1 + the row of the graph that has its id in its frame (int32), 0 where none has.

    Of several rows with one id in a frame the first counts.
    """
    tracks_THW = np.zeros(ids_THW.shape, np.int32)
    for t, frame_HW in enumerate(ids_THW):
        ids, inverse = np.unique(frame_HW, return_inverse=True)
        rows = {int(graph_MT[m, t]): 1 + m for m in reversed(range(len(graph_MT)))}
        rows[0] = 0
        numbers = np.array([rows.get(int(i), 0) for i in ids], np.int32)
        tracks_THW[t] = numbers[inverse].reshape(frame_HW.shape)
    return tracks_THW
