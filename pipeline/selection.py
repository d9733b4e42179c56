"""Budgeted retrieval: from how much frames matter to exactly the tokens that a budget allows, and no other bytes.

The unit is one step of the grid in time (after VideoRouter, arXiv:2605.05848, where it is a frame), the whole clip
where levels have grids of their own, and a trajectory where tokens stand for these.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import torch
from isal import isal_zlib

from ..schemas.errors import REPAIR_REMEDY, CacheError, RecipeError
from .allocation import Policy
from .byte_ranges import RANGE_TYPE, ByteRange, opened, read_ranges
from .cache import TokenCache
from .policy import choose_policy, tokens_given
from .tiers import chosen_tiers, frames_of_steps, spans_of, tiers_of, tokens_of
from .token_file import TokenFile
from .trajectory_file import TrajectoryFile

FRAMES = 1 << 32  # more than a clip has

PLAN_SCHEMA = pa.schema(
    [
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("clip_id", pa.string(), nullable=False),
        pa.field("step", pa.int32(), nullable=False),  # its place on the grid's axis of time; or the trajectory
        pa.field("start_s", pa.float64(), nullable=False),
        pa.field("end_s", pa.float64(), nullable=False),
        pa.field("p", pa.float64(), nullable=False),
        pa.field("tier", pa.int32(), nullable=False),  # from 1, that of fewest tokens
        pa.field("num_tokens", pa.int64(), nullable=False),
        pa.field("ranges", pa.list_(pa.field("element", RANGE_TYPE, nullable=False)), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionSettings:
    """How a budget is spent: see `allocate` for policies, floor and fill, and `choose_policy` for ``auto``.

    `tiers` are those to use, by their numbers of tokens; None for all that the product has. `p_fragment` is what a head
    says of the query. With `verify` the row groups of what is read are read whole, and checked, before.
    """

    policy: Literal["auto"] | Policy = "auto"
    tiers: tuple[int, ...] | None = None
    floor: int = 0
    fill: bool = False
    p_fragment: float | None = None
    verify: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The tokens that a budget allows, in the order of time.

    `plan` (PLAN_SCHEMA) has a row for each step, by video, time and step, with the bytes of the cache's files that it
    is read from; `tokens` are those of each row, `num_tokens` together. A step of codes is int32 (h,w), or (h,w,m) of
    the first m levels; of latents (h,w,d); thinned out in space where its tier is (`tiers.filled`). A clip of levels on
    grids of their own is (n,), and a trajectory (k,d). `policy` is the one used, and `reason` why. `bytes_read` counts
    the bytes of tokens; footers, and the small columns of trajectories, are not among them. `num_left_out` clips in
    scope have no tokens.
    """

    plan: pa.Table
    policy: str
    reason: str
    num_tokens: int
    bytes_read: int
    tokens: list[torch.Tensor]
    num_left_out: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scope:
    """Clips in scope by video and time, where their tokens lie, and candidate frames: `keys_K` are clip * FRAMES +
    frame, rising.
    """

    clips: list[dict[str, Any]]
    keys_K: np.ndarray
    p_K: np.ndarray
    num_left_out: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Units:
    """What can be had: steps `steps_U` of clips `clips_U`, which cover frames `begins_U` to `ends_U` and matter p_U."""

    clips_U: np.ndarray
    steps_U: np.ndarray
    begins_U: np.ndarray
    ends_U: np.ndarray
    p_U: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """One row of the plan, how its tokens follow from its bytes, and its row groups, with the CRC-32 of each."""

    row: dict[str, Any]
    ranges: list[ByteRange]
    tokens: Callable[[Sequence[bytes]], torch.Tensor]
    groups: Mapping[ByteRange, int | None]

    @property
    def place_in_time(self) -> tuple[Any, ...]:
        return tuple(self.row[name] for name in ("video_id", "start_s", "step", "clip_id"))


def select_tokens(
    cache: TokenCache, product: str, scored: pa.Table, budget: int, settings: SelectionSettings
) -> Selection:
    """The tokens of a product (`tokens/<name>`) that `budget` allows for frames that matter as `scored` says.

    `scored` has clip_id, frame (int32, of those sampled, from 0) and p (0 to 1) of all candidate frames in scope; a
    clip may have few. A step matters as the most important candidate that it covers, or else as the nearest one of its
    clip. Steps of padding alone are not offered. Digests are of whole row groups, so parts are not checked against them
    unless `settings.verify`. RecipeError for budgets, tiers and policies that cannot be, CacheError where no clip in
    scope has tokens, or where parts cannot be read of a file.
    """
    if budget < 1:
        raise RecipeError(f"budget: found {budget}; accepted: tokens from 1 on")
    if settings.policy not in ("auto", *get_args(Policy)):
        raise RecipeError(f"policy: found {settings.policy!r}; accepted: auto, {', '.join(get_args(Policy))}")
    scope = _scope_of(cache, product, scored)
    if cache.has_trajectories(product):
        return _select_trajectories(cache, product, scope, budget, settings)
    return _select_steps(cache, product, scope, budget, settings)


def _scope_of(cache: TokenCache, product: str, scored: pa.Table) -> _Scope:
    encoded = scored["clip_id"].combine_chunks().dictionary_encode()
    ids = encoded.dictionary.to_pylist()
    clips = cache.answer(
        """select c.clip_id, c.video_id, c.start_s, c.end_s, c.num_valid, c.frame_pts_s, l.name, l.row_in_file
           from clips c join locations l on l.clip_id = try_cast(c.clip_id as uuid)
           where l.product = ? and c.clip_id in (select clip_id from asked)
           order by c.video_id, c.start_s, c.clip_id""",
        [product],
        asked=pa.table({"clip_id": pa.array(ids, pa.string())}),
    )
    if not clips.num_rows:
        raise CacheError(
            f"{cache.folder.url}: none of the {len(ids)} clips in scope has tokens of {product}: score frames of clips"
            f' that do (tokenmill sql CACHE "select clip_id from tokens_{product.partition("/")[2]}")'
        )
    numbers = {clip_id: number for number, clip_id in enumerate(clips["clip_id"].to_pylist())}
    clips_K = np.array([numbers.get(clip_id, -1) for clip_id in ids], np.int64)[encoded.indices.to_numpy()]
    p = scored["p"].to_numpy().astype(np.float64)[clips_K >= 0]
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("one number from 0 to 1 for each frame is wanted")
    keys = (clips_K * FRAMES + scored["frame"].to_numpy())[clips_K >= 0]
    order = np.lexsort((p, keys))
    is_last = np.append(keys[order][1:] != keys[order][:-1], True)
    return _Scope(
        clips=clips.to_pylist(),
        keys_K=keys[order][is_last],
        p_K=p[order][is_last],
        num_left_out=len(ids) - clips.num_rows,
    )


def _relevance(scope: _Scope, clips_U: np.ndarray, begins_U: np.ndarray, ends_U: np.ndarray) -> np.ndarray:
    """How much frames `begins_U` to `ends_U` of clips matter (U,): as the best candidate there, or the nearest one."""
    keys_K = scope.keys_K
    low, high = (np.searchsorted(keys_K, clips_U * FRAMES + frames_U) for frames_U in (begins_U, ends_U))
    best_U = np.maximum.reduceat(np.append(scope.p_K, 0), np.stack((low, high), 1).ravel())[::2]
    before, after = np.maximum(low - 1, 0), np.minimum(low, len(keys_K) - 1)
    far = 2 * FRAMES
    to_before = np.where(keys_K[before] // FRAMES == clips_U, begins_U - keys_K[before] % FRAMES, far)
    to_after = np.where(keys_K[after] // FRAMES == clips_U, keys_K[after] % FRAMES - ends_U + 1, far)
    to_before, to_after = (np.where(distance > 0, distance, far) for distance in (to_before, to_after))
    nearest_U = scope.p_K[np.where(to_before <= to_after, before, after)]
    return np.where(low < high, best_U, nearest_U)


def _units_of(cache: TokenCache, product: str, scope: _Scope) -> _Units:
    """The steps of all clips that are not padding alone, or the whole clips where levels have grids of their own."""
    entry, num_frames = cache.info.products[product], cache.info.recipe["clips"]["num_frames"]
    if len(entry.shape) == 1:
        begins_t, ends_t = np.zeros(1, np.int64), np.full(1, num_frames)
    else:
        steps = frames_of_steps(num_frames, entry.shape[0], entry.tokenizer or {})
        begins_t, ends_t = steps.begins_t, steps.ends_t
    num_valid_C = np.array([clip["num_valid"] for clip in scope.clips], np.int64)
    ends_Ct = np.minimum(ends_t, num_valid_C[:, None])
    clips_U, steps_U = np.nonzero(begins_t < ends_Ct)
    begins_U, ends_U = begins_t[steps_U], ends_Ct[clips_U, steps_U]
    p_U = _relevance(scope, clips_U, begins_U, ends_U)
    return _Units(clips_U=clips_U, steps_U=steps_U, begins_U=begins_U, ends_U=ends_U, p_U=p_U)


def _select_steps(
    cache: TokenCache, product: str, scope: _Scope, budget: int, settings: SelectionSettings
) -> Selection:
    entry = cache.info.products[product]
    tiers = {one.num_tokens: one for one in chosen_tiers(tiers_of(entry.shape, entry.levels), settings.tiers, product)}
    policy, reason = _decided(scope, settings)
    units = _units_of(cache, product, scope)
    given_U = tokens_given(units.p_U, budget, policy, list(tiers), settings.floor, fill=settings.fill)
    pieces: list[_Piece] = []
    for name, members in _by_file(scope, units.clips_U, np.flatnonzero(given_U)).items():
        with opened(cache.folder, name, TokenFile) as file:
            for u in members:
                clip, step, tier = scope.clips[units.clips_U[u]], int(units.steps_U[u]), tiers[int(given_U[u])]
                spans, row = spans_of(file.layout, step, tier), clip["row_in_file"]
                begins = {span.column: file.place(row, span.column)[0] for span in spans}
                groups = (file.group_place(row, column) for column in begins)
                frames = int(units.begins_U[u]), int(units.ends_U[u])
                piece = _Piece(
                    row=_row(clip, step, frames, float(units.p_U[u]))
                    | {"tier": tier.number, "num_tokens": tier.num_tokens},
                    ranges=[ByteRange(name, begins[one.column] + one.begin, one.end - one.begin) for one in spans],
                    tokens=partial(tokens_of, layout=file.layout, step=step, tier=tier),
                    groups={ByteRange(name, offset, size): checksum for offset, size, checksum in groups},
                )
                pieces.append(piece)
    return _read(cache, scope, pieces, (policy, reason), verify=settings.verify)


def _decided(scope: _Scope, settings: SelectionSettings) -> tuple[Policy, str]:
    if settings.policy != "auto":
        return settings.policy, "it was asked for"
    decision = choose_policy(scope.p_K, p_fragment=settings.p_fragment)
    return decision.policy, decision.reason


def _by_file(scope: _Scope, clips_U: np.ndarray, units: np.ndarray) -> dict[str, list[int]]:
    """The units that are in each file."""
    found: dict[str, list[int]] = {}
    for u in units.tolist():
        found.setdefault(scope.clips[clips_U[u]]["name"], []).append(u)
    return found


def _row(clip: Mapping[str, Any], step: int, frames: tuple[int, int], p: float) -> dict[str, Any]:
    """What the plan says of frames of a clip: they last until another one than the last of them is shown."""
    times_s = [*clip["frame_pts_s"], clip["end_s"]]
    last_s = times_s[frames[1] - 1]
    end_s = next((later for later in times_s[frames[1] :] if later > last_s), times_s[-1])
    start_s = times_s[frames[0]]
    return {key: clip[key] for key in ("video_id", "clip_id")} | {
        "step": step,
        "start_s": start_s,
        "end_s": end_s,
        "p": p,
    }


def _read(
    cache: TokenCache, scope: _Scope, pieces: list[_Piece], decided: tuple[str, str], *, verify: bool
) -> Selection:
    """The selection of these pieces, in the order of time."""
    pieces = sorted(pieces, key=lambda piece: piece.place_in_time)
    num_checked = _check_groups(cache, pieces) if verify else 0
    parts, num_read = read_ranges(cache.folder, [one for piece in pieces for one in piece.ranges])
    ends = np.cumsum([len(piece.ranges) for piece in pieces]).tolist()
    tokens = [piece.tokens(parts[end - len(piece.ranges) : end]) for piece, end in zip(pieces, ends, strict=True)]
    rows: list[dict[str, Any]] = [piece.row | {"ranges": [one._asdict() for one in piece.ranges]} for piece in pieces]
    return Selection(
        plan=pa.Table.from_pylist(rows, schema=PLAN_SCHEMA),
        policy=decided[0],
        reason=decided[1],
        num_tokens=sum(row["num_tokens"] for row in rows),
        bytes_read=num_checked + num_read,
        tokens=tokens,
        num_left_out=scope.num_left_out,
    )


def _check_groups(cache: TokenCache, pieces: Sequence[_Piece]) -> int:
    """How many bytes were read to check the row groups that pieces are of; CacheError where one is damaged."""
    groups = {one: checksum for piece in pieces for one, checksum in piece.groups.items()}
    num_read = 0
    for one, checksum in groups.items():
        (data,), num_bytes = read_ranges(cache.folder, [one])
        num_read += num_bytes
        if checksum is not None and isal_zlib.crc32(data) != checksum:
            raise CacheError(
                f"{cache.folder.uri(one.name)}: the row group of {one.size} bytes at {one.offset} is damaged (its"
                f" CRC-32 does not match): {REPAIR_REMEDY}"
            )
    return num_read


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trajectory:
    """A trajectory of clip number `clip`: its piece, and `share` of a frame's area that it has where it is seen."""

    clip: int
    share: float
    piece: _Piece

    @property
    def rank(self) -> tuple[float, ...]:
        """The smaller, the sooner it is taken."""
        return -self.piece.row["p"], -self.share, self.clip, self.piece.row["step"]


def _select_trajectories(
    cache: TokenCache, product: str, scope: _Scope, budget: int, settings: SelectionSettings
) -> Selection:
    """Whole trajectories, those that matter most first, up to the first that does not fit."""
    if settings.tiers is not None or settings.policy != "auto" or settings.floor or settings.fill:
        raise RecipeError(
            f"{product}: trajectories are taken whole: leave policy at auto, and tiers, floor and fill out"
        )
    found: list[_Trajectory] = []
    clips_C = np.arange(len(scope.clips))
    for name, members in _by_file(scope, clips_C, clips_C).items():
        with opened(cache.folder, name, TrajectoryFile) as file:
            for c in members:
                found += _trajectories_of(scope, c, file, name)
    found = sorted(found, key=lambda one: one.rank)
    costs = np.cumsum([one.piece.row["num_tokens"] for one in found])
    pieces = [one.piece for one in found[: int(np.searchsorted(costs, budget, side="right"))]]
    reason = "trajectories are taken whole, those that matter most first"
    return _read(cache, scope, pieces, ("whole", reason), verify=settings.verify)


def _trajectories_of(scope: _Scope, c: int, file: TrajectoryFile, name: str) -> list[_Trajectory]:
    """The trajectories of a clip that are seen in frames that are not padding."""
    clip = scope.clips[c]
    outline, (begin, width) = file.outline(clip["row_in_file"]), file.place(clip["row_in_file"])
    offset, size, checksum = file.group_place(clip["row_in_file"])
    tracks_Thw = outline.tracks_Thw[: clip["num_valid"]]
    frames_T = np.arange(len(tracks_Thw))
    p_T = _relevance(scope, np.full(len(frames_T), c), frames_T, frames_T + 1)
    made: list[_Trajectory] = []
    for number in np.unique(outline.trajectories_N).tolist():
        share_T = (tracks_Thw == number + 1).mean((1, 2))
        seen = np.flatnonzero(share_T)
        if not len(seen):
            continue
        rows = np.flatnonzero(outline.trajectories_N == number)
        runs = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
        about = _row(clip, number, (int(seen[0]), int(seen[-1]) + 1), float(p_T[seen].max()))
        piece = _Piece(
            row=about | {"tier": 1, "num_tokens": len(rows)},
            ranges=[ByteRange(name, begin + int(run[0]) * width, len(run) * width) for run in runs],
            tokens=partial(_trajectory_tokens, dtype=file.layout.dtype, dim=file.layout.num_values),
            groups={ByteRange(name, offset, size): checksum},
        )
        made.append(_Trajectory(clip=c, share=float(share_T[seen].mean()), piece=piece))
    return made


def _trajectory_tokens(parts: Sequence[bytes], dtype: str, dim: int) -> torch.Tensor:
    """The tokens (k,d) of a trajectory, of the bytes of its rows."""
    kinds = {"float16": "<f2", "float32": "<f4", "bfloat16": "<i2"}
    values = torch.from_numpy(np.frombuffer(b"".join(parts), kinds[dtype]).reshape(-1, dim).copy())
    return values.view(torch.bfloat16) if dtype == "bfloat16" else values
