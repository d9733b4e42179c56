"""sam2: the way through a clip on exact masks, and with real networks, tiny and at random."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tokenmill.pipeline.sam2 import Sam2, Sam2Options, tracks_of
from tokenmill.pipeline.segment import masks_of
from tokenmill.schemas.errors import RecipeError, TokenizerError
from tokenmill.schemas.recipe import parse_options

from .sam2_kit import as_clip, footage, save, shapes, still, texture

SHA256 = "0" * 64
LOOSE = {"points_per_side": 3, "predicted_iou": 0.0, "stability": 0.0, "key_every": 4, "check_every": 2}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads gain nothing in networks this small, and cost much where other work runs beside the tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class TrueNetwork:
    """Knows the true objects (labels_THW, 0 is none): its masks are exact, but for what it is told to get wrong."""

    def __init__(self, labels_THW: np.ndarray, *, drift: int = 0) -> None:
        self.labels_THW = labels_THW
        self.drift = drift  # pixels that followed objects are too far to the right
        self.followed: list[tuple[int, ...]] = []
        self.most_followed = 0
        self.points_at: dict[int, int] = {}

    def decode(self, t: int, points_P2: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each point its object's mask, and a wrong one that is rated low."""
        self.points_at[t] = self.points_at.get(t, 0) + len(points_P2)
        height, width = self.labels_THW.shape[1:]
        masks = []
        for x, y in points_P2:
            label = self.labels_THW[t, int(y * height), int(x * width)]
            masks += [(self.labels_THW[t] == label) & (label > 0), np.ones((height, width), bool)]
        logits_NHW = torch.from_numpy(np.stack(masks)).float() * 20 - 10
        return logits_NHW, torch.tensor([0.9, 0.1] * len(points_P2))

    def prompt(self, t: int, masks_NHW: torch.Tensor) -> None:
        objects = []
        for mask_HW in masks_NHW.numpy():
            labels, counts = np.unique(self.labels_THW[t][mask_HW], return_counts=True)
            objects.append(int(labels[counts.argmax()]))
        self.followed.append(tuple(objects))
        self.most_followed = max(self.most_followed, len([n for group in self.followed for n in group]))

    def follow(self, t: int) -> torch.Tensor:
        frame_HW = np.roll(self.labels_THW[t], self.drift, axis=1)
        masks = [frame_HW == n if n else np.zeros_like(frame_HW, bool) for group in self.followed for n in group]
        return torch.from_numpy(np.stack(masks)) if masks else torch.zeros((0, *frame_HW.shape), dtype=torch.bool)

    def forget(self) -> None:
        self.followed.clear()


def moving(num_frames: int, *, enters: int | None = None, leaves: int | None = None) -> np.ndarray:
    """True objects (T,32,40): two boxes that move right by one pixel a frame, and one that enters or leaves."""
    labels_THW = np.zeros((num_frames, 32, 40), np.int32)
    for t in range(num_frames):
        labels_THW[t, 2:10, 2 + t % 20 : 12 + t % 20] = 1
        labels_THW[t, 14:20, 1 + t % 20 : 16 + t % 20] = 2
        if (enters is None or t >= enters) and (leaves is None or t < leaves):
            labels_THW[t, 24:30, 8:28] = 3
    return labels_THW


def renamed(tracks_THW: np.ndarray, labels_THW: np.ndarray) -> dict[int, set[int]]:
    """Of each true object the labels of its pixels, 0 where it was missed."""
    return {int(n): {int(i) for i in np.unique(tracks_THW[labels_THW == n])} for n in np.unique(labels_THW) if n}


@pytest.mark.parametrize("key_every", [1, 3, 4, 100])
def test_objects_keep_their_label_through_the_chunks_of_a_shot(key_every: int) -> None:
    labels_THW = moving(12)
    tracks_THW = tracks_of(still(12), TrueNetwork(labels_THW), Sam2Options(key_every=key_every, points_per_side=12))
    assert tracks_THW.dtype == np.int32
    assert sorted(renamed(tracks_THW, labels_THW).values(), key=min) == [{1}, {2}, {3}]
    assert ((tracks_THW > 0) == (labels_THW > 0)).all()


def test_objects_get_other_labels_after_a_cut() -> None:
    labels_THW = moving(8)
    frames_THWC = np.concatenate([still(5), np.repeat(texture(7, 32, 40)[None], 3, axis=0)])
    tracks_THW = tracks_of(frames_THWC, TrueNetwork(labels_THW), Sam2Options())
    assert set(np.unique(tracks_THW[:5])) == {0, 1, 2, 3}
    assert set(np.unique(tracks_THW[5:])) == {0, 4, 5, 6}


def test_entering_object_is_found_when_the_uncovered_area_is_checked() -> None:
    labels_THW = moving(16, enters=3)
    network = TrueNetwork(labels_THW)
    tracks_THW = tracks_of(still(16), network, Sam2Options(key_every=100, check_every=2))
    assert np.unique(tracks_THW[labels_THW == 3]).tolist() == [0, 3]
    assert (tracks_THW[4:][labels_THW[4:] == 3] == 3).all()
    assert not tracks_THW[3][labels_THW[3] == 3].any()
    assert 0 < network.points_at[4] < network.points_at[0] == 32 * 32
    assert renamed(tracks_THW[:, :22], labels_THW[:, :22]) == {1: {2}, 2: {1}} or {1: {1}, 2: {2}}


def test_without_checks_an_entering_object_is_found_on_the_next_key_frame() -> None:
    labels_THW = moving(16, enters=3)
    network = TrueNetwork(labels_THW)
    tracks_THW = tracks_of(still(16), network, Sam2Options(key_every=8, check_every=0))
    assert not tracks_THW[:8][labels_THW[:8] == 3].any()
    assert (tracks_THW[8:][labels_THW[8:] == 3] == 3).all()
    assert set(network.points_at) == {0, 8}


def test_object_that_left_ends_and_comes_back_as_another() -> None:
    labels_THW = moving(24, leaves=6)
    labels_THW[12:, 24:30, 8:28] = 3
    tracks_THW = tracks_of(still(24), TrueNetwork(labels_THW), Sam2Options(key_every=4, check_every=0))
    (first,) = np.unique(tracks_THW[:6][labels_THW[:6] == 3])
    (later,) = np.unique(tracks_THW[12:][labels_THW[12:] == 3])
    assert 0 < first < later == 4


def test_key_frames_correct_what_following_got_wrong() -> None:
    labels_THW = moving(9)
    tracks_THW = tracks_of(still(9), TrueNetwork(labels_THW, drift=2), Sam2Options(key_every=4, check_every=0))
    right_T = [((tracks_THW[t] > 0) == (labels_THW[t] > 0)).all() for t in range(9)]
    assert right_T == [True, False, False, False, True, False, False, False, False]
    assert tracks_THW.max() == 3


@pytest.mark.parametrize("max_objects", [1, 2])
def test_no_more_than_max_objects_are_followed_and_those_are_the_largest(max_objects: int) -> None:
    labels_THW = moving(12)
    network = TrueNetwork(labels_THW)
    tracks_THW = tracks_of(still(12), network, Sam2Options(max_objects=max_objects, key_every=4, check_every=2))
    assert network.most_followed == max_objects
    assert {n for n, found in renamed(tracks_THW, labels_THW).items() if found != {0}} == set([3, 2][:max_objects])


def test_objects_are_prompted_in_batches_and_forgotten_after_each_chunk() -> None:
    network = TrueNetwork(moving(40))
    groups: list[list[tuple[int, ...]]] = []
    forget = network.forget
    network.forget = lambda: (groups.append(list(network.followed)), forget())[1]  # type: ignore[method-assign]
    tracks_of(still(40), network, Sam2Options(objects_per_batch=2, key_every=8, points_per_side=8))
    assert [[len(group) for group in groups_of] for groups_of in groups] == [[], *[[2, 1]] * 4]


def test_frame_after_which_nothing_follows_is_not_searched() -> None:
    network = TrueNetwork(moving(9))
    tracks_of(still(9), network, Sam2Options(key_every=100, check_every=4, points_per_side=8))
    assert set(network.points_at) == {0, 4}


def test_of_masks_of_one_object_the_best_rated_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    labels_THW = moving(2)
    network = TrueNetwork(labels_THW)
    exact = network.decode

    def decode(t: int, points_P2: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each point first its mask moved by a pixel and rated well, then the true mask, rated better."""
        logits_NHW, _ = exact(t, points_P2)
        pairs_P2HW = torch.stack([logits_NHW[::2].roll(1, dims=1), logits_NHW[::2]], dim=1)
        return pairs_P2HW.flatten(0, 1), torch.tensor([0.85, 0.95] * len(points_P2))

    monkeypatch.setattr(network, "decode", decode)
    tracks_THW = tracks_of(still(2), network, Sam2Options(points_per_side=12, same_iou=0.5))
    assert ((tracks_THW > 0) == (labels_THW > 0)).all()


def test_only_the_best_candidates_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenmill.pipeline.sam2.MOST_CANDIDATES", 1)
    tracks_THW = tracks_of(still(1), TrueNetwork(moving(1)), Sam2Options(points_per_side=8))
    assert tracks_THW.max() == 1


def test_clip_in_which_nothing_is_found_is_all_zero() -> None:
    tracks_THW = tracks_of(still(5), TrueNetwork(np.zeros((5, 32, 40), np.int32)), Sam2Options(points_per_side=4))
    assert tracks_THW.shape == (5, 32, 40)
    assert not tracks_THW.any()
    assert len(masks_of(tracks_THW, 5, 128).graph_MT) == 0


def test_frame_of_one_pixel_is_one_object() -> None:
    labels_THW = np.ones((3, 1, 1), np.int32)
    assert (tracks_of(still(3, (1, 1)), TrueNetwork(labels_THW), Sam2Options()) == 1).all()


def test_many_small_objects_are_all_kept_apart() -> None:
    labels_HW = np.kron(np.arange(1, 201, dtype=np.int32).reshape(10, 20), np.ones((4, 4), np.int32))
    labels_THW = np.repeat(labels_HW[None], 5, axis=0)
    options = Sam2Options(max_objects=255, objects_per_batch=7, key_every=2)
    tracks_THW = tracks_of(still(5, (40, 80)), TrueNetwork(labels_THW), options)
    assert all(len(found) == 1 for found in renamed(tracks_THW, labels_THW).values())
    assert len(np.unique(tracks_THW)) == 200


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("sam2"))


def segmenter(folder: str, dtype: str = "float32", **options: Any) -> Sam2:
    return Sam2(folder, SHA256, "cpu", dtype, Sam2Options(**LOOSE | options))


@pytest.fixture(scope="module")
def loose(checkpoint: str) -> Sam2:
    return segmenter(checkpoint, max_objects=4)


def check_tracks(tracks_THW: Any, frames_THWC: np.ndarray, most: int) -> None:
    """Tracks have the size of the frames, labels from 0, and at most so many objects in a frame."""
    assert tracks_THW.shape == frames_THWC.shape[:3]
    assert tracks_THW.dtype == np.int32
    assert tracks_THW.min() >= 0
    assert all(len(np.unique(frame[frame > 0])) <= most for frame in tracks_THW)
    masks_of(tracks_THW, len(tracks_THW), 128)


@pytest.mark.parametrize("size", [(48, 64), (64, 64), (90, 33), (7, 5)])
def test_clips_of_any_size_become_tracks(loose: Sam2, size: tuple[int, int]) -> None:
    frames_THWC = shapes(6, 48, 64)[:, : size[0], : size[1]] if size < (49, 65) else still(6, size)
    tracks_THW = loose.segment(as_clip(frames_THWC))
    check_tracks(tracks_THW, frames_THWC, 4)
    assert tracks_THW.any()


def test_real_clip_with_a_cut_becomes_tracks_that_do_not_pass_it(loose: Sam2) -> None:
    frames_THWC = footage(24, 36)
    tracks_THW = loose.segment(as_clip(frames_THWC))
    check_tracks(tracks_THW, frames_THWC, 4)
    before, after = (set(np.unique(part)) - {0} for part in (tracks_THW[:6], tracks_THW[6:]))
    assert before
    assert after
    assert not before & after


def test_some_labels_persist_from_chunk_to_chunk(loose: Sam2) -> None:
    frames_THWC = shapes(9)
    tracks_THW = loose.segment(as_clip(frames_THWC))
    assert set(np.unique(tracks_THW[1])) & set(np.unique(tracks_THW[7])) - {0}


def test_one_frame_becomes_tracks(loose: Sam2) -> None:
    frames_THWC = shapes(1)
    tracks_THW = loose.segment(as_clip(frames_THWC))
    check_tracks(tracks_THW, frames_THWC, 4)
    assert tracks_THW.any()


def test_padding_repeats_the_tracks_of_the_last_real_frame(loose: Sam2) -> None:
    frames_THWC = shapes(8)
    padded_THWC = np.concatenate([frames_THWC[:5], np.repeat(frames_THWC[4:5], 3, axis=0)])
    tracks_THW, real_THW = loose.segment(as_clip(padded_THWC, 5)), loose.segment(as_clip(frames_THWC[:5]))
    assert (tracks_THW[:5] == real_THW).all()
    assert (tracks_THW[5:] == real_THW[4]).all()


def test_same_clip_gives_the_same_tracks_alone_and_among_others(checkpoint: str, loose: Sam2) -> None:
    one, other = as_clip(shapes(5)), as_clip(still(3, (20, 30)))
    first, later = loose.segment(one), segmenter(checkpoint, max_objects=4)
    later.segment(other)
    assert (later.segment(one) == first).all()


def test_frames_may_be_read_only_and_lie_backwards_in_memory(loose: Sam2) -> None:
    frames_THWC = np.ascontiguousarray(shapes(2)[:, ::-1, ::-1])[:, ::-1, ::-1]
    frames_THWC.flags.writeable = False
    tracks_THW, plain_THW = loose.segment(as_clip(frames_THWC)), loose.segment(as_clip(shapes(2)))
    assert (np.asarray(tracks_THW) == np.asarray(plain_THW)).all()


def test_images_can_be_seen_at_another_size(checkpoint: str) -> None:
    frames_THWC = shapes(3)
    one = segmenter(checkpoint, image_size=128, max_objects=4)
    tracks_THW = one.segment(as_clip(frames_THWC))
    check_tracks(tracks_THW, frames_THWC, 4)
    assert tracks_THW.any()
    assert one.spec.options["image_size"] == 128


def test_bfloat16_arithmetic_gives_tracks(checkpoint: str) -> None:
    frames_THWC = shapes(5)
    one = segmenter(checkpoint, "bfloat16", max_objects=4)
    tracks_THW = one.segment(as_clip(frames_THWC))
    check_tracks(tracks_THW, frames_THWC, 4)
    assert tracks_THW.any()
    assert one.spec.dtype == "bfloat16"


def test_weights_stored_in_bfloat16_load(tmp_path: Path) -> None:
    tracks_THW = segmenter(save(tmp_path, torch.bfloat16), max_objects=4).segment(as_clip(shapes(3)))
    assert tracks_THW.any()


def test_spec_names_all_that_decides_the_masks(checkpoint: str) -> None:
    import transformers

    spec = segmenter(checkpoint, max_objects=7).spec
    assert (spec.name, spec.weights_sha256, spec.dtype, spec.revision) == ("sam2", SHA256, "float32", 1)
    assert set(spec.options) == {*Sam2Options.model_fields, "transformers"}
    assert spec.options["transformers"] == transformers.__version__
    assert spec.options["max_objects"] == 7
    json.dumps(dict(spec.options))


def test_picture_of_a_frame_is_computed_once(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one, calls = segmenter(checkpoint, objects_per_batch=1, max_objects=3), []
    model: Any = one._model
    compute = model.get_image_features
    monkeypatch.setattr(model, "get_image_features", lambda *a, **k: (calls.append(1), compute(*a, **k))[1])
    one.segment(as_clip(shapes(9)))
    assert len(calls) == 9


def test_sam2_imports_without_transformers_and_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("tokenmill.pipeline.sam2", "tokenmill.pipeline.sam2_network"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    sam2 = importlib.import_module("tokenmill.pipeline.sam2")
    with pytest.raises(TokenizerError, match=r"sam2 needs transformers.*pip install 'tokenmill\[sam2\]'"):
        sam2.Sam2("somewhere", SHA256, "cpu", "float32", sam2.Sam2Options())


def test_float16_is_refused(checkpoint: str) -> None:
    with pytest.raises(TokenizerError, match=r"sam2 computes in float32 or bfloat16.*found dtype 'float16'"):
        segmenter(checkpoint, "float16")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"image_size": 100}, "options.image_size: found 100; accepted: .*multiple of 32"),
        ({"image_size": 32}, "options.image_size: found 32"),
        ({"max_objects": 256}, "options.max_objects: found 256"),
        ({"key_every": 0}, "options.key_every: found 0"),
        ({"link_iou": 0}, "options.link_iou: found 0"),
        ({"point_per_side": 3}, "options.point_per_side: unknown key.*points_per_side"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        parse_options(Sam2Options, options)
