"""Values are checked when they are made."""

from typing import Any

import numpy as np
import pytest

from tokenmill.schemas.clip import Clip, ClipFrames, FrameBatch, Sampling, Video
from tokenmill.schemas.digest import digest_of
from tokenmill.schemas.masks import ClipMasks
from tokenmill.schemas.shard import ShardPlan
from tokenmill.schemas.tokens import TokenGrid, TokenizerSpec, TrajectoryTokens

VIDEO = Video(uri="/a.mp4", size_bytes=3, digest="d" * 64)
CLIP = Clip(clip_id="c", video=VIDEO, start_s=0.0, end_s=1.0, frame_pts_s=(0.0, 0.5))
SAMPLING: dict[str, Any] = {
    "fps": None, "num_frames": 4, "height": 8, "width": 8, "resize": "squash/bilinear", "tail": "pad",
}  # fmt: skip
SPEC: dict[str, Any] = {
    "name": "x", "kind": "discrete", "codebook_size": 4, "latent_dim": None,
    "stride_thw": (1, 1, 1), "weights_sha256": None, "dtype": "float32",
}  # fmt: skip
FRAMES_THWC = np.zeros((4, 8, 8, 3), np.uint8)


GRAPH_MT = np.zeros((3, 1), np.int64)


def trajectory_tokens(values_Nd: np.ndarray, num_slots: int, assignment: np.ndarray | None = None) -> TrajectoryTokens:
    slots = np.arange(num_slots)
    return TrajectoryTokens(
        values_Nd=values_Nd,
        slots_N=slots,
        chunks_N=slots,
        trajectories_N=slots,
        assignment_Thw=np.zeros((1, 2, 2), np.uint8) if assignment is None else assignment,
        chunk_frames=1,
        num_valid=1,
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Video(uri="", size_bytes=0, digest="d"), "needs a uri and a digest"),
        (lambda: Sampling(**SAMPLING | {"height": 0}), "sizes must be positive"),
        (lambda: Sampling(**SAMPLING | {"fps": 0.0}), "a frame rate must be positive"),
        (lambda: Clip(clip_id="c", video=VIDEO, start_s=0, end_s=1, frame_pts_s=()), "clip c has no frames"),
        (lambda: Clip(clip_id="c", video=VIDEO, start_s=1, end_s=1, frame_pts_s=(1.0,)), "clip c is empty"),
        (lambda: ShardPlan(shard_id="s", clips=()), "shard s has no clips"),
        (
            lambda: ClipFrames(
                clip=CLIP, frames_THWC=FRAMES_THWC[..., :2], decoded_pts_s=(), frame_numbers=(), decoder=""
            ),
            r"must be \(T,H,W,3\) uint8",
        ),
        (
            lambda: FrameBatch(clips=(CLIP,), frames_BTHWC=FRAMES_THWC, num_valid_B=(1,)),
            r"must be \(B,T,H,W,3\) uint8",
        ),
        (
            lambda: FrameBatch(clips=(CLIP,), frames_BTHWC=FRAMES_THWC[None], num_valid_B=(1, 2)),
            "1 clips, 2 lengths, 1 rows",
        ),
        (lambda: TokenizerSpec(**SPEC | {"codebook_size": None}), "discrete tokens need a codebook of 2 or more"),
        (lambda: TokenizerSpec(**SPEC | {"kind": "continuous"}), "continuous tokens need a positive latent_dim"),
        (lambda: TokenizerSpec(**SPEC | {"stride_thw": (0, 1, 1)}), "strides must be positive"),
        (
            lambda: TokenGrid(values_thw=np.zeros((2, 2)), num_valid=1),
            r"a token grid is \(t,h,w\), \(t,h,w,d\) or \(n,\)",
        ),
        (lambda: TokenGrid(values_thw=np.zeros((2, 2, 2)), num_valid=0), "one real frame or more"),
        (
            lambda: trajectory_tokens(np.zeros(3), 3),
            r"trajectory tokens are \(N,d\), found \(3,\)",
        ),
        (
            lambda: trajectory_tokens(np.zeros((3, 2)), 2),
            r"slots_N must be \(N,\) beside tokens \(3, 2\), found \(2,\)",
        ),
        (
            lambda: trajectory_tokens(np.zeros((3, 2)), 3, assignment=np.zeros((1, 2, 2))),
            r"an assignment is \(T,h,w\) uint8, found float64",
        ),
        (
            lambda: ClipMasks(masks_THW=np.zeros((1, 2, 2)), graph_MT=GRAPH_MT, num_valid=1),
            r"masks must be \(T,H,W\) uint8, found float64",
        ),
        (
            lambda: ClipMasks(masks_THW=np.zeros((2, 2, 2), np.uint8), graph_MT=GRAPH_MT, num_valid=1),
            r"a graph must be \(M,T\) int64 beside masks \(2, 2, 2\)",
        ),
        (
            lambda: ClipMasks(masks_THW=np.zeros((1, 2, 2), np.uint8), graph_MT=GRAPH_MT, num_valid=2),
            "of 1 frames one or more are real, found self.num_valid=2",
        ),
    ],
)
def test_a_value_that_cannot_be_is_refused_at_birth(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_clips_stack_into_a_batch_in_their_order() -> None:
    decoded = [
        ClipFrames(
            clip=CLIP,
            frames_THWC=np.full_like(FRAMES_THWC, i),
            decoded_pts_s=(0.0, 0.5),
            frame_numbers=(0, 1),
            decoder="fake",
        )
        for i in range(3)
    ]
    batch = FrameBatch.stack(decoded)
    assert batch.frames_BTHWC[:, 0, 0, 0, 0].tolist() == [0, 1, 2]
    assert batch.num_valid_B == (2, 2, 2)


def test_a_digest_depends_on_values_and_not_on_their_order() -> None:
    assert digest_of({"a": 1, "b": [1.5, None]}) == digest_of({"b": [1.5, None], "a": 1})
    assert digest_of({"a": 1}) != digest_of({"a": 2})
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest_of(float("nan"))
