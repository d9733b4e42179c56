"""Trajectories across the clips of a video: what goes on in the next clip keeps its id."""

from collections.abc import Mapping, Sequence
from typing import Any

from .linking import Edge, links
from .segment import SegmentedClip

ROOT_DIGITS = 16  # of a clip's id, in the ids of the trajectories that begin in it

Moment = tuple[str, float]  # a video and a time of it in seconds


class ClipLinks:
    """Which trajectories go on from clip to clip, found as soon as both clips are there; the order does not matter.

    A clip is linked to the one that ends where it begins. Of clips without their neighbours the edges are held.
    """

    def __init__(self) -> None:
        self._firsts: dict[Moment, tuple[str, Edge]] = {}
        self._lasts: dict[Moment, tuple[str, Edge]] = {}
        self._before: dict[str, tuple[str, dict[int, int]]] = {}
        self._counts: dict[str, int] = {}

    def add(self, clip: Mapping[str, Any], segmented: SegmentedClip) -> None:
        """Take in one clip, by its row."""
        clip_id, video_id = clip["clip_id"], clip["video_id"]
        begins, ends = (video_id, clip["start_s"]), (video_id, clip["end_s"])
        self._counts[clip_id] = len(segmented.masks.graph_MT)
        if before := self._lasts.pop(begins, None):
            self._before[clip_id] = before[0], links(before[1], segmented.first)
        else:
            self._firsts[begins] = clip_id, segmented.first
        if after := self._firsts.pop(ends, None):
            self._before[after[0]] = clip_id, links(segmented.last, after[1])
        else:
            self._lasts[ends] = clip_id, segmented.last

    def ids(self, clips: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
        """The ids of the trajectories of every clip that was added, in their order; `clips` are the rows of all.

        A trajectory has the id of the one that it continues in the clip before; one that begins has
        ``<digits of its clip's id>-<row>``.
        """
        ids: dict[str, list[str]] = {}
        for clip in sorted(clips, key=lambda clip: (clip["video_id"], clip["start_s"])):
            clip_id = clip["clip_id"]
            if clip_id not in self._counts:
                continue
            before, found = self._before.get(clip_id, ("", {}))
            known = {track: ids[before][track_before - 1] for track, track_before in found.items()}
            root = clip_id[:ROOT_DIGITS]
            ids[clip_id] = [known.get(row + 1, f"{root}-{row}") for row in range(self._counts[clip_id])]
        return ids
