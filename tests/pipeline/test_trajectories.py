"""Trajectories keep their ids from clip to clip of a video."""

import numpy as np

from tokenmill.pipeline.linking import edge_of
from tokenmill.pipeline.segment import SegmentedClip, masks_of
from tokenmill.pipeline.trajectories import ClipLinks

SIDE = 64


def clip_of(number: int, video: str = "v", start_s: float | None = None) -> dict:
    start_s = float(number) if start_s is None else start_s
    return {"clip_id": f"{number:032x}"[::-1], "video_id": video, "start_s": start_s, "end_s": start_s + 1}


def segmented(number: int, *, swapped: bool = False) -> SegmentedClip:
    """A textured square that grows from clip to clip beside one that stays."""
    tracks = np.zeros((2, SIDE, SIDE), int)
    tracks[:, 4 : 20 + 8 * number, 4:24] = 2 if swapped else 1
    tracks[:, 10:40, 36:56] = 1 if swapped else 2
    texture = np.random.default_rng(0).integers(0, 60, (SIDE, SIDE, 1))
    frames = (texture + 90 * tracks[..., None]).astype(np.uint8).repeat(3, axis=3)
    masks = masks_of(tracks, 2, 128)
    rows = masks.tracks_THW
    return SegmentedClip(masks=masks, first=edge_of(frames[0], rows[0]), last=edge_of(frames[1], rows[1]))


def trajectory_ids(clips: list[dict], made: dict[str, SegmentedClip]) -> dict[str, list[str]]:
    links = ClipLinks()
    for clip in clips:
        if clip["clip_id"] in made:
            links.add(clip, made[clip["clip_id"]])
    return links.ids(clips)


def square_ids(clips: list[dict], made: dict[str, SegmentedClip]) -> list[tuple[str, str]]:
    """For every clip the id of the growing square and of the other."""
    ids = trajectory_ids(clips, made)
    found = []
    for clip in clips:
        tracks = made[clip["clip_id"]].masks.tracks_THW[0]
        found.append(tuple(ids[clip["clip_id"]][tracks[row, column] - 1] for row, column in ((12, 12), (25, 46))))
    return found


def test_what_goes_on_in_the_next_clip_keeps_its_id_whatever_its_size() -> None:
    clips = [clip_of(n) for n in range(4)]
    made = {clip["clip_id"]: segmented(n) for n, clip in enumerate(clips)}
    # The growing square is the smaller one first and the larger one later: its row changes, its id does not.
    rows = [one.masks.tracks_THW[0, 12, 12] for one in made.values()]
    assert len(set(rows)) == 2
    ids = square_ids(clips, made)
    assert len(set(ids)) == 1
    assert len(set(ids[0])) == 2
    assert all(one.startswith(clips[0]["clip_id"][:16]) for one in ids[0])
    assert square_ids(clips[::-1], made) == ids[::-1]


def test_ids_begin_anew_in_other_videos_after_a_gap_and_where_a_clip_is_missing() -> None:
    clips = [clip_of(0), clip_of(1, "w"), clip_of(2, start_s=5.0), clip_of(3, start_s=7.0)]
    made = {clip["clip_id"]: segmented(1) for clip in clips}
    assert len({one for pair in square_ids(clips, made) for one in pair}) == 8
    failed = [clip_of(n) for n in range(3)]
    made = {clip["clip_id"]: segmented(1) for clip in (failed[0], failed[2])}
    ids = trajectory_ids(failed, made)
    assert set(ids) == set(made)
    assert not set(ids[failed[0]["clip_id"]]) & set(ids[failed[2]["clip_id"]])
