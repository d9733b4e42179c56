"""Timelines show what was selected: as much colour as tokens, frames at their times, every video."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tokenmill.pipeline.selection import PLAN_SCHEMA
from tokenmill.pipeline.timeline import CURVE_INK, TIER_INKS, WIDTH, draw_timeline

FPS = 4.0


def clips_of(num_videos: int = 1, num_clips: int = 2) -> pa.Table:
    """Clips of 8 frames, two seconds each."""
    return pa.Table.from_pylist(
        [
            {
                "clip_id": f"{video}-{clip}",
                "video_id": f"video {video}",
                "start_s": 2.0 * clip,
                "end_s": 2.0 * clip + 2,
                "frame_pts_s": [2.0 * clip + n / FPS for n in range(8)],
            }
            for video in range(num_videos)
            for clip in range(num_clips)
        ]
    )


def plan_of(*rows: tuple[str, float, float, int, int]) -> pa.Table:
    """Rows of (clip, from second, to second, tier, tokens)."""
    values: list[dict[str, Any]] = [
        {
            "video_id": f"video {clip[0]}", "clip_id": clip, "step": 0, "start_s": start_s, "end_s": end_s, "p": 0.5,
            "tier": tier, "num_tokens": tokens, "ranges": [],
        }
        for clip, start_s, end_s, tier, tokens in rows
    ]  # fmt: skip
    return pa.Table.from_pylist(values, schema=PLAN_SCHEMA)


def scored_of(clips: pa.Table) -> pa.Table:
    rows = [
        {"clip_id": clip_id, "frame": frame, "p": frame / 8}
        for clip_id in clips["clip_id"].to_pylist()
        for frame in (0, 7)
    ]
    return pa.Table.from_pylist(rows)


def area(picture: np.ndarray, colour: tuple[int, int, int], top: int = 80) -> int:
    """Pixels of a colour, below the legend."""
    return int((picture[top:] == colour).all(-1).sum())


def test_bars_have_as_much_area_as_tokens_by_time() -> None:
    clips = clips_of()
    plan = plan_of(("0-0", 0, 1, 4, 256), ("0-0", 1, 2, 1, 32), ("0-1", 2, 4, 3, 128))
    picture = draw_timeline(plan, scored_of(clips), clips, {}, "a query", budget=500)
    assert (picture.shape[1:], picture.dtype) == ((WIDTH, 3), np.uint8)
    most, middle, least = (area(picture, TIER_INKS[i]) for i in (3, 2, 0))
    assert middle == pytest.approx(most, rel=0.03)
    assert least == pytest.approx(most / 8, rel=0.1)
    assert area(picture, CURVE_INK) > 500


def test_steps_of_one_time_lie_on_top_of_each_other() -> None:
    clips = clips_of()
    apart = draw_timeline(plan_of(("0-0", 0, 2, 1, 4), ("0-1", 2, 4, 1, 4)), scored_of(clips), clips, {}, "q")
    over = draw_timeline(plan_of(("0-0", 0, 2, 1, 4), ("0-0", 0, 2, 1, 4)), scored_of(clips), clips, {}, "q")
    assert area(over, TIER_INKS[3]) == pytest.approx(area(apart, TIER_INKS[3]) / 2, rel=0.03)  # and twice as high
    ends = draw_timeline(plan_of(("0-0", 0, 2 + 1e-9, 1, 4), ("0-1", 2, 4, 1, 4)), scored_of(clips), clips, {}, "q")
    assert np.array_equal(ends, apart)  # clips that meet to the last bit of a double do not overlap


def test_frames_are_shown_in_order_above_the_first_video() -> None:
    clips = clips_of()
    plain = draw_timeline(plan_of(), scored_of(clips), clips, {}, "q")
    reds = [(250, 0, 0), (200, 0, 0), (150, 0, 0)]
    frames = {0.5 * n: np.full((9, 16, 3), red, np.uint8) for n, red in enumerate(reds)}
    shown = draw_timeline(plan_of(), scored_of(clips), clips, frames, "q")
    assert shown.shape[0] > plain.shape[0]
    columns = [np.flatnonzero((shown == red).all(-1).any(0)) for red in reds]
    assert all(len(one) > 100 for one in columns)
    assert columns[0][-1] < columns[1][0] <= columns[1][-1] < columns[2][0]
    many = {0.1 * n: frames[0.5] for n in range(30)}  # more than there is room for: they are made smaller
    assert draw_timeline(plan_of(), scored_of(clips), clips, many, "q").shape == shown.shape


def test_every_video_has_a_place() -> None:
    plan = plan_of(*((f"{video}-0", 0, 2, 1, 10) for video in range(5)))
    one, five = (draw_timeline(plan, scored_of(clips), clips, {}, "q") for clips in (clips_of(1), clips_of(5)))
    assert five.shape[0] > 1.7 * one.shape[0]
    blue = (five[80:] == TIER_INKS[3]).all(-1)
    starts = [int((np.diff(part.any(0).astype(int)) == 1).sum()) for part in (blue[: one.shape[0] - 90], blue[-200:])]
    assert starts == [3, 2]


def test_what_has_no_clips_is_refused_and_what_has_no_tokens_is_drawn() -> None:
    clips = clips_of()
    assert draw_timeline(plan_of(), scored_of(clips).slice(0, 0), clips, {}, "q" * 400).shape[1] == WIDTH
    with pytest.raises(ValueError, match="one clip or more, found none"):
        draw_timeline(plan_of(), scored_of(clips), clips.slice(0, 0), {}, "q")
