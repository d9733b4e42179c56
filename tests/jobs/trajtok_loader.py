"""A loader of pseudo-labels written from the description of TrajTok's own (arXiv:2602.22779), with its traps.

It shares nothing with what writes them but the labels of pixels, and it judges our exports.
"""

import io
import itertools
import json
import os
import random
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import av
import decord
import numpy as np
import torch
from PIL import Image

from tokenmill.tokenizers.trajtok_losses import IGNORED, labels_of

MOST_TRAJECTORIES = 128
MOST_ANNOTATIONS = 256
LABEL_SIDE = 56


class Rejected(Exception):
    """The loader passes over this sample."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What a training step is given of one sample; `masks_THW` and `graph_MT` are from before the crop.

    `labels_N` and `valid_M` are those of the patches of the crop, of all frames.
    """

    match_id: str
    caption: str
    frames_THWC: np.ndarray
    masks_THW: np.ndarray
    graph_MT: np.ndarray
    labels_N: torch.Tensor
    valid_M: torch.Tensor


def load_manifest(path: str, num_frames: int = 8, *, seed: int = 0, crop: bool = False) -> list[Sample]:
    """Every sample of a manifest of videos or images."""
    with open(path) as stream:
        entries = json.load(stream)
    assert isinstance(entries, list)
    names = [os.path.basename(entry.get("video") or entry["image"]) for entry in entries]
    assert len(set(names)) == len(names), "match ids are made of base names"
    dice = random.Random(seed)
    return [
        load_video(entry, num_frames, dice, crop=crop) if "video" in entry else load_image(entry, dice, crop=crop)
        for entry in entries
    ]


def load_video(entry: dict[str, Any], num_frames: int, dice: random.Random, *, crop: bool = False) -> Sample:
    video = entry["video"]
    assert video.count(".mp4") == 1, "the extension is replaced wherever it occurs"
    assert isinstance(entry["caption"], str)
    mask_path = entry.get("mask") or video.replace(".mp4", "_mask.npz")
    graph_path = entry.get("graph") or video.replace(".mp4", "_graph.npz")
    opened = video if os.path.exists(video) else video.replace(".mp4", "_short.mp4")
    frames = read_video(opened)
    if len(frames) < num_frames:
        raise Rejected(f"{len(frames)} frames, {num_frames} are wanted")
    frames = frames[middle_frames(len(frames), num_frames)]
    masks = np.load(mask_path)["arr_0"].astype(np.uint8)
    graph = np.load(graph_path)["tensor"]
    assert graph.dtype == np.int64
    if len(masks) != num_frames:
        chosen = random_frames(len(masks), num_frames, dice)
        masks, graph = masks[chosen], graph[:, chosen]
    return finished(video, entry["caption"], frames, masks, graph, dice, crop=crop)


def load_image(entry: dict[str, Any], dice: random.Random, *, crop: bool = False) -> Sample:
    image = entry["image"]
    base, extension = os.path.splitext(image)
    assert image.count(extension) == 1
    assert isinstance(entry["caption"], str)
    masks = np.load(f"{base}_mask.npz")["arr_0"].astype(np.uint8)
    assert masks.ndim == 2
    frame = np.asarray(Image.open(image).convert("RGB"))
    return finished(image, entry["caption"], frame[None], masks[None], implied_graph(masks), dice, crop=crop)


def load_tars(paths: list[str], *, seed: int = 0, crop: bool = False) -> Iterator[Sample]:
    """Samples of tars in the way of SA-1B: neighbours of one key, a picture and its annotations."""
    dice = random.Random(seed)
    for path in paths:
        with tarfile.open(path) as tar:
            members = [(one.name, tar.extractfile(one).read()) for one in tar]
        for (name, picture), (other, document) in zip(members[::2], members[1::2], strict=True):
            key = name.partition(".")[0]
            assert (name, other) == (f"{key}.jpg", f"{key}.json")
            found = json.loads(document)
            masks = painted(found["annotations"])
            frame = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
            caption = found["image"].get("caption", "")
            yield finished(name, caption, frame[None], masks[None], implied_graph(masks), dice, crop=crop)


def painted(annotations: list[dict[str, Any]]) -> np.ndarray:
    canvas = np.zeros(annotations[0]["segmentation"]["size"], np.int64)
    kept = [one for one in annotations if one["area"] / canvas.size >= 0.001]
    for number, one in enumerate(kept[:MOST_ANNOTATIONS], 1):
        canvas[decoded_rle(one["segmentation"])] = number
    return canvas.astype(np.uint8)


def load_instances(video: str, num_frames: int, *, caption: str = "", seed: int = 0, crop: bool = False) -> Sample:
    """A sample in the way of SA-V: a video of 6 frames a second, masks numbered by 24."""
    assert video.count(".mp4") == 1
    with open(video.replace(".mp4", "_instances.json")) as stream:
        objects = json.load(stream)
    frames = read_video(video)
    if len(frames) < num_frames:
        raise Rejected(f"{len(frames)} frames, {num_frames} are wanted")
    chosen = middle_frames(len(frames), num_frames)
    masks = np.zeros((num_frames, *frames.shape[1:3]), np.int64)
    graph = np.zeros((len(objects), num_frames), np.int64)
    for m, one in enumerate(objects.values()):
        assert one["start_frame"] == min(seg["frame_number"] for seg in one["segmentations"])
        by_number = {seg["frame_number"]: seg["rle"] for seg in one["segmentations"]}
        for t, index in enumerate(chosen):
            if 4 * index in by_number:
                masks[t][decoded_rle(by_number[4 * index])] = m + 1
                graph[m, t] = m + 1
    return finished(video, caption, frames[chosen], masks.astype(np.uint8), graph, random.Random(seed), crop=crop)


def finished(
    path: str,
    caption: str,
    frames: np.ndarray,
    masks: np.ndarray,
    graph: np.ndarray,
    dice: random.Random,
    *,
    crop: bool,
) -> Sample:
    """What is done to all samples: ids agree, masks have the size of frames, one crop for both, labels of patches."""
    masks, graph = masks.copy(), graph.copy()
    masks[masks > graph.max()] = 0
    graph[graph > masks.max()] = 0
    graph = graph[(graph != 0).any(axis=1)][:MOST_TRAJECTORIES]
    masks = nearest(masks, *frames.shape[1:3])
    top, left, height, width = crop_box(*masks.shape[1:], dice) if crop else (0, 0, *masks.shape[1:])
    window = slice(top, top + height), slice(left, left + width)
    cropped = torch.from_numpy(masks[:, *window].astype(np.int64))
    labels, valid = labels_of(cropped[None], torch.from_numpy(graph)[None], LABEL_SIDE)
    return Sample(
        match_id=os.path.basename(path), caption=caption, frames_THWC=frames, masks_THW=masks, graph_MT=graph,
        labels_N=labels[0], valid_M=valid[0],
    )  # fmt: skip


def check_batch(samples: list[Sample]) -> None:
    """What the official labels assert of a batch: its least label is that of pixels of no segment.

    Sampled patches of small clips may miss the few such pixels, so it is asked at full size, and of every frame.
    """
    for sample in samples:
        assert (sample.masks_THW == 0).any(axis=(1, 2)).all()
        for masks, ids in zip(sample.masks_THW, sample.graph_MT.T, strict=True):
            labels = full_labels(masks, ids)
            assert labels.min() == IGNORED
            assert (labels > IGNORED).any() == ids.any()


def full_labels(masks: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The trajectory of every pixel of one frame, as row of the graph; IGNORED where it is of none."""
    labels = np.full(masks.shape, IGNORED)
    for m in reversed(np.flatnonzero(ids)):
        labels[masks == ids[m]] = m
    return labels


def implied_graph(masks: np.ndarray) -> np.ndarray:
    return np.arange(1, int(masks.max()) + 1)[:, None]


def read_video(path: str) -> np.ndarray:
    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def read_by_decord(path: str) -> np.ndarray:
    """What decord reads; of frames narrower than 80 pixels it cannot always."""
    reader = decord.VideoReader(path, num_threads=1)
    return reader.get_batch(range(len(reader))).asnumpy()


def frame_rate(path: str) -> float:
    return decord.VideoReader(path, num_threads=1).get_avg_fps()


def middle_frames(length: int, num_frames: int) -> list[int]:
    bounds = np.linspace(0, length, num_frames + 1).astype(int)
    return [int(low + high - 1) // 2 for low, high in itertools.pairwise(bounds)]


def random_frames(length: int, num_frames: int, dice: random.Random) -> list[int]:
    """One frame of each interval but its last: of intervals of two the first, so exactly twice as many do no harm."""
    bounds = np.linspace(0, length, num_frames + 1).astype(int)
    return [dice.randrange(low, max(low + 1, high - 1)) for low, high in itertools.pairwise(bounds)]


def nearest(masks: np.ndarray, height: int, width: int) -> np.ndarray:
    rows, columns = np.arange(height) * masks.shape[1] // height, np.arange(width) * masks.shape[2] // width
    return masks[:, rows[:, None], columns]


def crop_box(height: int, width: int, dice: random.Random) -> tuple[int, int, int, int]:
    """A crop of 0.2 to all of the area, between 3:4 and 4:3."""
    for _ in range(10):
        area, ratio = height * width * dice.uniform(0.2, 1), dice.uniform(3 / 4, 4 / 3)
        h, w = round((area / ratio) ** 0.5), round((area * ratio) ** 0.5)
        if 1 <= h <= height and 1 <= w <= width:
            return dice.randint(0, height - h), dice.randint(0, width - w), h, w
    return 0, 0, height, width


def decoded_rle(rle: dict[str, Any]) -> np.ndarray:
    """COCO's run lengths, character by character."""
    runs: list[int] = []
    position, text = 0, rle["counts"]
    while position < len(text):
        value = shift = 0
        while True:
            char = ord(text[position]) - 48
            value |= (char & 31) << shift
            shift += 5
            position += 1
            if not char & 32:
                break
        if char & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
    height, width = rle["size"]
    flat, start = np.zeros(height * width, bool), 0
    for number, run in enumerate(runs):
        flat[start : start + run] = number % 2
        start += run
    assert start == flat.size
    return flat.reshape(width, height).T
