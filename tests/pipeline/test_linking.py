"""Linking trajectories from picture to picture, and from window to window."""

import numpy as np
import pytest

from tokenmill.pipeline.linking import Edge, Joiner, edge_of, links

from ..tokenizers.trajtok_kit import clip_with_ids


def edge(frames_THWC: np.ndarray, ids_THW: np.ndarray, t: int, first_number: int) -> Edge:
    return edge_of(frames_THWC[t], np.where(ids_THW[t] > 0, ids_THW[t] + first_number, 0))


@pytest.fixture(scope="module")
def scene() -> tuple[np.ndarray, np.ndarray]:
    """Five shapes that move by up to 3 % of the side in a frame, the background being 6."""
    frames, ids = clip_with_ids(8, 224, 2, 5)
    return frames.numpy(), np.where(ids.numpy() == 0, 6, ids.numpy()).astype(np.int32)


@pytest.mark.parametrize("later", [1, 6])
def test_every_shape_is_linked_to_itself_also_after_six_frames(scene: tuple[np.ndarray, np.ndarray], later: int):
    found = links(edge(*scene, 0, 10), edge(*scene, later, 70))
    assert found == {70 + k: 10 + k for k in range(1, 7)}


def test_nothing_is_linked_to_a_picture_that_shows_something_else(scene: tuple[np.ndarray, np.ndarray]):
    frames, ids = scene
    assert links(edge(frames, ids, 0, 0), edge(255 - frames, ids, 0, 0)) == {}


def test_pixels_of_no_track_are_never_linked():
    random = np.random.default_rng(0)
    frame = random.integers(0, 256, (40, 50, 3)).astype(np.uint8)
    tracks = np.zeros((40, 50), np.int64)
    tracks[5:20, 5:20] = 2**31 - 1
    assert links(edge_of(frame, tracks), edge_of(frame, tracks)) == {2**31 - 1: 2**31 - 1}
    assert links(edge_of(frame, tracks), edge_of(frame, 0 * tracks)) == {}
    assert links(edge_of(frame, 0 * tracks), edge_of(frame, 0 * tracks)) == {}


def test_links_are_one_to_one_where_a_segment_falls_apart():
    frame = np.full((64, 64, 3), 90, np.uint8)
    whole, parts = np.full((64, 64), 3), np.full((64, 64), 8)
    parts[:, 40:] = 9
    assert links(edge_of(frame, whole), edge_of(frame, parts)) == {8: 3}
    assert links(edge_of(frame, parts), edge_of(frame, whole)) == {3: 8}


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (7, 3), (33, 35), (300, 20), (1080, 1920)])
def test_frames_of_any_size_make_small_edges_that_link_to_themselves(shape: tuple[int, int]):
    frame = np.zeros((*shape, 3), np.uint8)
    one = edge_of(frame, np.ones(shape, np.uint8))
    assert max(one.grey_hw.shape) == min(112, max(shape))
    assert links(one, one) == {1: 1}


def test_an_edge_is_luma_and_keeps_the_numbers_of_tracks():
    frame = np.zeros((2, 2, 3), np.uint8)
    frame[0] = (255, 0, 0)
    one = edge_of(frame, np.array([[0, 1], [2, 70_000]]))
    assert one.grey_hw.tolist() == [[77, 77], [0, 0]]
    assert one.tracks_hw.tolist() == [[0, 1], [2, 70_000]]


def test_edges_of_other_sizes_are_refused():
    small, large = (edge_of(np.zeros((n, n, 3), np.uint8), np.ones((n, n), np.int32)) for n in (20, 30))
    with pytest.raises(ValueError, match=r"edges of one size are linked, found \(20, 20\) before \(30, 30\)"):
        links(small, large)


def test_a_frame_with_tracks_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"a frame \(8, 9, 3\) needs tracks of its height and width, found \(9, 8\)"):
        edge_of(np.zeros((8, 9, 3), np.uint8), np.zeros((9, 8), np.int32))


def test_an_edge_with_a_large_picture_is_refused():
    with pytest.raises(ValueError, match=r"at most 112 pixels a side, found uint8 \(113, 2\)"):
        Edge(grey_hw=np.zeros((113, 2), np.uint8), tracks_hw=np.zeros((113, 2), np.int32))


def test_an_edge_with_tracks_of_another_type_is_refused():
    with pytest.raises(ValueError, match=r"tracks must be int32 beside a picture \(3, 2\), found int64 \(3, 2\)"):
        Edge(grey_hw=np.zeros((3, 2), np.uint8), tracks_hw=np.zeros((3, 2), np.int64))


COLOURS = np.array([[0.0, 0, 0], [100, 50, 0], [100, 55, 0]])


def window(*columns: int | None) -> np.ndarray:
    """Frames (T,20,40) of background 0 with a square of segment 1 at this column, where there is one."""
    segments = np.zeros((len(columns), 20, 40), np.int64)
    for frame, column in zip(segments, columns, strict=True):
        if column is not None:
            frame[8:14, column : column + 6] = 1
    return segments


def test_windows_go_on_with_the_numbers_of_their_common_frame():
    joiner = Joiner(most_difference=10)
    assert joiner.join(window(3, 4, 5), COLOURS[:2], 0).tolist() == [1, 2]
    swapped = 1 - window(5, 6, 7)
    assert joiner.join(swapped, COLOURS[1::-1], 2).tolist() == [2, 1]


def test_a_trajectory_that_comes_back_keeps_its_number():
    joiner = Joiner(most_difference=10)
    joiner.join(window(3, 4, 5), COLOURS[:2], 0)
    joiner.join(np.where(window(5, None, None) == 1, 1, 0), COLOURS[:2], 2)
    assert joiner.join(window(None, None, 9), COLOURS[[0, 2]], 4).tolist() == [1, 2]


def test_a_trajectory_of_another_colour_or_far_away_is_new():
    for colour, column in (([100, 70, 0], 9), (COLOURS[2], 34)):
        joiner = Joiner(most_difference=10)
        joiner.join(window(3, 4, None), COLOURS[:2], 0)
        assert joiner.join(window(None, column), np.array([COLOURS[0], colour]), 2).tolist() == [1, 3]


def test_parts_of_one_window_that_follow_each_other_are_one_trajectory():
    segments = window(3, 4, None, None, 6, 7)
    segments[4:][segments[4:] == 1] = 2
    assert Joiner(most_difference=10).join(segments, COLOURS, 0).tolist() == [1, 2, 2]
    assert Joiner(most_difference=4).join(segments, COLOURS, 0).tolist() == [1, 2, 3]
