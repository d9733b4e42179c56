"""Trajectories across the clips of a video: what goes on in the next clip keeps its id."""

from collections.abc import Mapping, Sequence
from typing import Any

from .linking import links
from .segment import SegmentedClip

ROOT_DIGITS = 16  # of a clip's id, in the ids of the trajectories that begin in it


def trajectory_ids(clips: Sequence[Mapping[str, Any]], segmented: Mapping[str, SegmentedClip]) -> dict[str, list[str]]:
    """For each segmented clip the ids of its trajectories, in their order.

    A trajectory has the id of the one that it continues in the clip before, where that clip ends when this one begins
    and was segmented in the same shard; otherwise ``<digits of its clip's id>-<row>``.
    """
    ids: dict[str, list[str]] = {}
    before: Mapping[str, Any] | None = None
    for clip in sorted(clips, key=lambda clip: (clip["video_id"], clip["start_s"], clip["clip_id"])):
        clip_id = clip["clip_id"]
        if clip_id not in segmented:
            continue
        now, known = segmented[clip_id], {}
        if before and (before["video_id"], before["end_s"]) == (clip["video_id"], clip["start_s"]):
            earlier = ids[before["clip_id"]]
            found = links(segmented[before["clip_id"]].last, now.first)
            known = {track: earlier[track_before - 1] for track, track_before in found.items()}
        root = clip_id[:ROOT_DIGITS]
        ids[clip_id] = [known.get(row + 1, f"{root}-{row}") for row in range(len(now.masks.graph_MT))]
        before = clip
    return ids
