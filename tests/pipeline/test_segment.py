"""Masks obey what trainers ask of them: few ids, one to a pixel, borders, rows by area, empty ones dropped."""

import numpy as np
import pytest

from tokenmill.pipeline.segment import FakeSegmenter, MaskMaker, SegmentedClip, masks_of
from tokenmill.schemas.clip import Clip, ClipFailure, ClipFrames, Sampling, Video
from tokenmill.schemas.masks import MOST_IDS, ClipMasks, SegmenterSpec

SAMPLING = Sampling(fps=None, num_frames=4, height=8, width=8, resize="squash/bilinear", tail="pad")


def assert_obeys_the_rules(masks: ClipMasks, most: int) -> None:
    assert (masks.masks_THW == 0).any(axis=(1, 2)).all()
    areas = masks.areas_MT[:, : masks.num_valid].sum(axis=1)
    assert (np.diff(areas) <= 0).all()
    assert (areas > 0).all()
    assert len(areas) <= most
    for t, mask in enumerate(masks.masks_THW):
        ids = masks.graph_MT[:, t]
        assert sorted(ids[ids > 0].tolist()) == np.unique(mask[mask > 0]).tolist()


def squares(num_frames: int = 4) -> np.ndarray:
    """A background of 7, a large square of 3 and a small one of 900 that moves."""
    tracks = np.full((num_frames, 24, 32), 7)
    tracks[:, 4:16, 4:16] = 3
    for t in range(num_frames):
        tracks[t, 2:6, 20 + t : 24 + t] = 900
    return tracks


def test_trajectories_are_numbered_by_area_and_keep_their_pixels() -> None:
    masks = masks_of(squares(), 4, 128)
    assert_obeys_the_rules(masks, 128)
    assert masks.graph_MT.tolist() == [[1] * 4, [2] * 4, [3] * 4]
    # Borders are taken from the larger of two neighbours: the smallest segment keeps all of its pixels.
    np.testing.assert_array_equal(masks.masks_THW == 3, squares() == 900)
    np.testing.assert_array_equal(masks.tracks_THW, masks.masks_THW)


def test_segments_that_touch_have_a_border_of_one_pixel() -> None:
    masks = masks_of(squares(1), 1, 128).masks_THW[0].astype(int)
    for a, b in ((masks[:, 1:], masks[:, :-1]), (masks[1:], masks[:-1])):
        assert not ((a != b) & (a > 0) & (b > 0)).any()
    assert (masks == 0).sum() == 4 * 12 + 4 * 4 + 1


def test_a_clip_of_one_segment_has_a_pixel_of_none_in_every_frame() -> None:
    masks = masks_of(np.ones((3, 4, 4), int), 3, 128)
    assert_obeys_the_rules(masks, 128)
    assert (masks.masks_THW == 0).sum(axis=(1, 2)).tolist() == [1, 1, 1]


def test_a_clip_without_segments_has_an_empty_graph() -> None:
    masks = masks_of(np.zeros((3, 4, 4), int), 3, 128)
    assert masks.graph_MT.shape == (0, 3)
    assert not masks.masks_THW.any()


@pytest.mark.parametrize("most", [1, 100, 255, 256, 5000])
@pytest.mark.parametrize("offset", [0, 1, 10**12, -500])
def test_any_number_of_segments_fits_into_a_byte(most: int, offset: int) -> None:
    tracks = np.random.default_rng(0).integers(0, 900, (3, 40, 40)) + offset
    masks = masks_of(tracks, 3, most)
    assert_obeys_the_rules(masks, most)
    assert masks.masks_THW.max() <= MOST_IDS
    kept = masks.tracks_THW[0]
    # Every pixel that is left names one track of the source, whatever its id in the frame.
    for row in np.unique(kept[kept > 0])[:20]:
        assert len(np.unique(tracks[masks.tracks_THW == row])) == 1


def test_what_is_seen_in_padding_alone_is_no_trajectory() -> None:
    tracks = squares()
    tracks[3:, 20:, :4] = 55
    masks = masks_of(tracks, 3, 128)
    assert len(masks.graph_MT) == 3
    assert not masks.masks_THW[3, 20:, :3].any()


def frames_of(num_clips: int) -> list[ClipFrames]:
    video = Video(uri="v", size_bytes=1, digest="uri:v")
    made = []
    for i in range(num_clips):
        clip = Clip(clip_id=f"{i:032x}", video=video, start_s=i, end_s=i + 1, frame_pts_s=(i, i + 0.2, i + 0.4))
        frames = np.zeros((4, 8, 8, 3), np.uint8)
        frames[:, :, 4:] = 200
        made.append(
            ClipFrames(clip=clip, frames_THWC=frames, decoded_pts_s=(), frame_numbers=(0, 1, 2), decoder="fake")
        )
    return made


class Picky(FakeSegmenter):
    """Fails the clip of an id."""

    spec = SegmenterSpec(name="picky")

    def segment(self, one: ClipFrames) -> np.ndarray | ClipFailure:
        failure = ClipFailure(clip_id=f"{1:032x}", step="segment", reason="picky")
        return failure if one.clip.clip_id == failure.clip_id else super().segment(one)


def test_a_clip_has_masks_with_its_first_and_last_real_frames_or_a_failure() -> None:
    maker = MaskMaker(segmenter=Picky(), sampling=SAMPLING, max_trajectories=128)
    first, second = (maker.make(one) for one in frames_of(2))
    assert isinstance(second, ClipFailure)
    assert isinstance(first, SegmentedClip)
    assert first.masks.graph_MT.shape == (2, 4)
    assert first.masks.num_valid == 3
    np.testing.assert_array_equal(first.first.tracks_hw, first.masks.tracks_THW[0])
    np.testing.assert_array_equal(first.last.tracks_hw, first.masks.tracks_THW[2])
