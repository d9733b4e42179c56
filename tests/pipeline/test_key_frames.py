"""Key frames: cuts of made and of real clips, and the chunks between key frames."""

import numpy as np
import pytest

from tokenmill.pipeline.key_frames import changes_of, chunks_of, cuts_among
from tokenmill.pipeline.sam2 import Sam2Options

from .sam2_kit import footage, shapes, texture

CUT = Sam2Options().cut_change


def test_hard_cut_gets_a_key_frame() -> None:
    frames_THWC = np.concatenate([shapes(6), np.repeat(texture(7)[None], 5, axis=0)])
    assert [(c.first, c.last, c.is_linked) for c in chunks_of(frames_THWC, 100, CUT)] == [(0, 5, False), (6, 10, False)]


@pytest.mark.parametrize("step", [1, 2])
def test_all_cuts_of_real_footage_are_found_and_nothing_else(step: int) -> None:
    assert cuts_among(changes_of(footage(0, 100)[::step]), CUT) == [-(-cut // step) for cut in (30, 76)]


def test_pan_is_no_cut() -> None:
    wide_HWC = texture(3, 48, 256)
    frames_THWC = np.stack([wide_HWC[:, 8 * t : 8 * t + 64] for t in range(20)])
    assert cuts_among(changes_of(frames_THWC), CUT) == []


def test_same_colours_elsewhere_are_no_cut() -> None:
    frames_THWC = np.stack([texture(3), texture(3)[:, ::-1]])
    assert cuts_among(changes_of(frames_THWC), CUT) == []


def test_fade_is_no_cut() -> None:
    frames_THWC = np.stack([(texture(3) * (1 - t / 16)).astype(np.uint8) for t in range(17)])
    assert cuts_among(changes_of(frames_THWC), CUT) == []


def test_frames_that_are_all_of_other_shots_are_all_key_frames() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)]
    frames_THWC = np.stack([np.full((8, 8, 3), colour, np.uint8) for colour in colours])
    assert [(c.first, c.last) for c in chunks_of(frames_THWC, 2, CUT)] == [(t, t) for t in range(5)]


def test_certain_change_is_a_cut_among_large_ones_and_a_smaller_one_is_none() -> None:
    assert cuts_among(np.array([0, 0.2, 0.2, 0.2, 0.2]), 0.18) == []
    assert cuts_among(np.array([0, 0.2, 0.4, 0.2, 0.2]), 0.18) == [2]
    assert cuts_among(np.array([0, 0.4, 0.4, 0.4, 0.4]), 0.18) == [1, 2, 3, 4]


@pytest.mark.parametrize("num_frames", [1, 2, 3, 8, 9, 10, 17])
@pytest.mark.parametrize("key_every", [1, 2, 8, 100])
def test_chunks_cover_a_shot_and_share_their_key_frames(num_frames: int, key_every: int) -> None:
    chunks = chunks_of(np.zeros((num_frames, 1, 1, 3), np.uint8), key_every, CUT)
    assert chunks[0].first == 0
    assert chunks[-1].last == num_frames - 1
    assert [c.is_linked for c in chunks] == [False] + [True] * (len(chunks) - 1)
    assert [c.first for c in chunks[1:]] == [c.last for c in chunks[:-1]]
    assert all(c.last > c.first and c.last - c.first <= max(key_every, 1) + 1 for c in chunks if num_frames > 1)
