"""The videos and candidate frames of a cache, as those who label them name them."""

import bisect
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from ..schemas.errors import RecipeError
from .storage import Folder

NEAR_S = 0.5  # a time so near to a candidate frame is of it, even where candidates are closer
ROUNDING_S = 1e-6
MIN_PREFIX = 8  # digits of a video's id that may stand for it


class LabelledCache(Protocol):
    """What labels need of a cache."""

    @property
    def folder(self) -> Folder: ...

    def sql(self, query: str, parameters: Sequence[Any] = ()) -> pa.Table: ...


class Videos:
    """The videos of a cache, by all that may name one."""

    def __init__(self, cache: LabelledCache) -> None:
        self._by_uri: dict[str, set[str]] = {}
        self._by_file_name: dict[str, list[tuple[str, str]]] = {}
        self._uris: dict[str, str] = {}
        rows = cache.sql("""select video_id, uri, 0 as turn from videos
                            union all select video_id, uri, 1 from duplicates order by turn, video_id""")
        for video_id, uri in zip(rows["video_id"].to_pylist(), rows["uri"].to_pylist(), strict=True):
            self._by_uri.setdefault(uri, set()).add(video_id)
            self._by_file_name.setdefault(uri.rpartition("/")[2], []).append((uri, video_id))
            self._uris.setdefault(video_id, uri)
        self._ids = sorted(self._uris)

    def find(self, asked: str) -> str:
        """The id of the one video that `asked` names; RecipeError where it names none or several."""
        found = self._by_uri.get(asked) or {
            video_id
            for uri, video_id in self._by_file_name.get(asked.rpartition("/")[2], [])
            if uri.endswith(f"/{asked.lstrip('/')}")
        }
        if not found and len(asked) >= MIN_PREFIX:
            begin = bisect.bisect_left(self._ids, asked.lower())
            found = {video_id for video_id in self._ids[begin : begin + 2] if video_id.startswith(asked.lower())}
        if len(found) != 1:
            how_many = "several videos are" if found else "no video of the cache is"
            raise RecipeError(
                f"{how_many} called {asked!r}; accepted: a uri, the end of its path, or {MIN_PREFIX} digits or more of"
                f' its id: tokenmill sql CACHE "select video_id, uri from videos"'
            )
        return next(iter(found))

    def name_of(self, video_id: str) -> str:
        """What names a video and no other: its uri, or its id."""
        uri = self._uris.get(video_id, "")
        return uri if len(self._by_uri.get(uri, ())) == 1 else video_id


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateFrames:
    """The candidates of a video: places (clip_id, frame), and which of the K different frames of the video each is.

    Clips that overlap share frames.
    """

    places: pa.Table
    frame_N: np.ndarray
    numbers_K: np.ndarray
    pts_K: np.ndarray
    fps: float | None

    def times_of(self, places: Collection[tuple[str, int]]) -> list[float]:
        """When the different frames at `places` are shown, in the order of time."""
        rows = zip(self.places["clip_id"].to_pylist(), self.places["frame"].to_pylist(), strict=True)
        found = sorted({self.frame_N[i] for i, place in enumerate(rows) if place in places})
        return [float(self.pts_K[k]) for k in found]

    def nearest(self, time_s: float) -> int | None:
        """The frame nearest to a time, of two the first; None where it is too far."""
        apart_K = np.abs(self.pts_K - time_s)
        near_s = max(NEAR_S, float(np.median(np.diff(self.pts_K))) / 2 if len(apart_K) > 1 else 0)
        return int(apart_K.argmin()) if apart_K.min() <= near_s + ROUNDING_S else None

    def time_of(self, number: int) -> float:
        """When the frame `number` of the video is shown, also between and beyond the candidates."""
        first, last = int(self.numbers_K[0]), int(self.numbers_K[-1])
        if first <= number <= last:
            return float(np.interp(number, self.numbers_K, self.pts_K))
        fps = (last - first) / (self.pts_K[-1] - self.pts_K[0]) if last > first else self.fps or ROUNDING_S
        return float(
            self.pts_K[0] + (number - first) / fps if number < first else self.pts_K[-1] + (number - last) / fps
        )


def frames_of(cache: LabelledCache, video_ids: Collection[str]) -> dict[str, CandidateFrames]:
    """The candidates of these videos, of those that have any."""
    if not video_ids:
        return {}  # also of a cache that has no frames
    rows = cache.sql(
        """select f.video_id, f.clip_id, f.frame, f.frame_number, f.pts_s, v.fps
           from frames f left join videos v on v.video_id = f.video_id
           where f.video_id in (select unnest(?::varchar[])) order by f.video_id, f.frame_number, f.clip_id""",
        [sorted(video_ids)],
    ).combine_chunks()
    if not rows.num_rows:
        return {}
    indices = rows["video_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    ends = [*np.flatnonzero(np.diff(indices)) + 1, rows.num_rows]
    parts = [rows.slice(begin, end - begin) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
    return {part["video_id"][0].as_py(): _frames_in(part) for part in parts}


def _frames_in(rows: pa.Table) -> CandidateFrames:
    numbers_K, first_K, frame_N = np.unique(rows["frame_number"].to_numpy(), return_index=True, return_inverse=True)
    return CandidateFrames(
        places=rows.select(["clip_id", "frame"]),
        frame_N=frame_N,
        numbers_K=numbers_K,
        pts_K=rows["pts_s"].to_numpy()[first_K],
        fps=rows["fps"][0].as_py(),
    )
