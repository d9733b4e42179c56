"""The Arrow schema of every stored table."""

import pyarrow as pa

from .errors import CacheError

FORMAT_VERSION = 1  # of every file that a cache is made of
FORMAT_KEY = b"tokenmill.format"

# What a source lists, one row per video, before anything is opened. `uri` is an absolute path or fsspec URL,
# with a fragment for a video inside a larger file. `stamp` is what the store says without reading (size and
# modification time or etag): equal stamps mean that the content has not changed. The columns from `digest` on
# are null where the source does not say. `digest` is 64 hex digits of SHA-256, or "uri:" and a digest of the
# URI where the user vouches that URIs do not change. `metadata` is a JSON object.
SOURCE_SCHEMA = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("stamp", pa.string(), nullable=False),
        pa.field("caption", pa.string()),
        pa.field("metadata", pa.string()),
        pa.field("digest", pa.string()),
        pa.field("size_bytes", pa.int64()),
        pa.field("num_frames", pa.int64()),
        pa.field("fps", pa.float64()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
    ]
)

# One row per video that the plan has seen. `status` is planned, failed (it could not be read: see reason),
# quarantined (it killed, outlasted or outgrew its reader), duplicate (same content as another: see reason) or empty
# (too short for one clip when tails are dropped). A retry has the rows of the videos that its clips are of.
VIDEO_SCHEMA = pa.schema(
    [
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("size_bytes", pa.int64()),
        pa.field("num_frames", pa.int64()),
        pa.field("fps", pa.float64()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("duration_s", pa.float64()),
        pa.field("codec", pa.string()),
        pa.field("caption", pa.string()),
        pa.field("metadata", pa.string()),
        pa.field("num_clips", pa.int64(), nullable=False),
        pa.field("num_dropped_frames", pa.int64(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("attempts", pa.int32()),
        pa.field("log_tail", pa.string()),
    ]
)

# The plan: one row per clip, one row group per shard. `frame_pts_s` are the times to sample.
PLAN_SCHEMA = pa.schema(
    [
        pa.field("shard_id", pa.string(), nullable=False),
        pa.field("clip_id", pa.string(), nullable=False),
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("start_s", pa.float64(), nullable=False),
        pa.field("end_s", pa.float64(), nullable=False),
        pa.field("frame_pts_s", pa.list_(pa.field("element", pa.float64(), nullable=False)), nullable=False),
    ]
)

# What was decoded: one row per committed clip. `frame_pts_s` are the times of the frames that were found.
CLIP_SCHEMA = pa.schema(
    [
        pa.field("clip_id", pa.string(), nullable=False),
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("start_s", pa.float64(), nullable=False),
        pa.field("end_s", pa.float64(), nullable=False),
        pa.field("num_valid", pa.uint32(), nullable=False),
        pa.field("frame_pts_s", pa.list_(pa.field("element", pa.float64(), nullable=False)), nullable=False),
        pa.field("decoder", pa.string(), nullable=False),
    ]
)

# Masks: one row per clip that could be segmented. `graph` and `masks` are packed planes (docs/formats.md).
TRAJECTORY_TYPE = pa.struct(
    [
        pa.field("trajectory_id", pa.string(), nullable=False),
        pa.field("area", pa.int64(), nullable=False),
        pa.field("first_frame", pa.int32(), nullable=False),
        pa.field("last_frame", pa.int32(), nullable=False),
        pa.field("num_frames", pa.int32(), nullable=False),
        pa.field("start_s", pa.float64(), nullable=False),
        pa.field("end_s", pa.float64(), nullable=False),
    ]
)
MASK_SCHEMA = pa.schema(
    [
        pa.field("clip_id", pa.string(), nullable=False),
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("num_valid", pa.uint32(), nullable=False),
        pa.field("frame_pts_s", pa.list_(pa.field("element", pa.float64(), nullable=False)), nullable=False),
        pa.field("num_frames", pa.uint32(), nullable=False),
        pa.field("height", pa.uint32(), nullable=False),
        pa.field("width", pa.uint32(), nullable=False),
        pa.field("num_trajectories", pa.uint32(), nullable=False),
        pa.field("trajectories", pa.list_(pa.field("element", TRAJECTORY_TYPE, nullable=False)), nullable=False),
        pa.field("graph", pa.binary(), nullable=False),
        pa.field("masks", pa.binary(), nullable=False),
    ]
)

# Tokens of trajectories, apart from the tokens themselves: one row per clip. `assignment` is packed planes.
UINT16S = pa.list_(pa.field("element", pa.uint16(), nullable=False))
TRAJECTORY_TOKENS_SCHEMA = pa.schema(
    [
        pa.field("clip_id", pa.string(), nullable=False),
        pa.field("num_valid", pa.uint32(), nullable=False),
        pa.field("num_tokens", pa.uint32(), nullable=False),
        pa.field("chunk_frames", pa.uint32(), nullable=False),
        pa.field("slots", UINT16S, nullable=False),
        pa.field("chunks", UINT16S, nullable=False),
        pa.field("trajectories", UINT16S, nullable=False),
        pa.field("mass", pa.list_(pa.field("element", pa.float32(), nullable=False))),
        pa.field("assignment", pa.binary(), nullable=False),
        pa.field("assignment_shape", pa.list_(pa.field("element", pa.int32(), nullable=False)), nullable=False),
    ]
)

# Candidate frames: one row per clip, the same frames in every product of a recipe's frames. Scores say how much a frame
# matters without a query (docs/relevance.md). Embeddings are float16 of length 1, one for each frame.
FRAME_TYPE = pa.struct(
    [
        pa.field("frame", pa.int32(), nullable=False),  # its place among the frames of the clip, from 0
        pa.field("frame_number", pa.int64(), nullable=False),  # its place in the video, from 0
        pa.field("pts_s", pa.float64(), nullable=False),
        pa.field("is_key_frame", pa.bool_(), nullable=False),
        pa.field("motion", pa.float32(), nullable=False),
        pa.field("novelty", pa.float32(), nullable=False),
        pa.field("sharpness", pa.float32(), nullable=False),
        pa.field("shot_change", pa.float32(), nullable=False),
        pa.field("is_shot_start", pa.bool_(), nullable=False),
    ]
)
FRAME_SCHEMA = pa.schema(
    [
        pa.field("clip_id", pa.string(), nullable=False),
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("frames", pa.list_(pa.field("element", FRAME_TYPE, nullable=False)), nullable=False),
    ]
)
EMBEDDED_FRAMES_SCHEMA = pa.schema(
    [
        pa.field("clip_id", pa.string(), nullable=False),
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("frames", pa.list_(pa.field("element", pa.int32(), nullable=False)), nullable=False),
        pa.field("pts_s", pa.list_(pa.field("element", pa.float64(), nullable=False)), nullable=False),
    ]
)

# Queries and what is known of frames for them: tables below relevance/, which only grow. `version` is the fingerprint
# of the product (or the digest of the scorer) that a score was made by, `source` who says so. A `label` is 1 where the
# frame is needed for the answer.
QUERY_SCHEMA = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
    ]
)
QUERY_EMBEDDING_SCHEMA = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("scorer", pa.string(), nullable=False),
        pa.field("version", pa.string(), nullable=False),
        pa.field("embedding", pa.list_(pa.field("element", pa.float32(), nullable=False)), nullable=False),
    ]
)
# `rule`, `scale` and `bias` are the calibration of its scores; `spec` is the scorer's, as JSON.
SCORER_SCHEMA = pa.schema(
    [
        pa.field("scorer", pa.string(), nullable=False),
        pa.field("version", pa.string(), nullable=False),
        pa.field("rule", pa.string(), nullable=False),
        pa.field("scale", pa.float64(), nullable=False),
        pa.field("bias", pa.float64(), nullable=False),
        pa.field("spec", pa.string(), nullable=False),
    ]
)
SCORE_SCHEMA = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("scorer", pa.string(), nullable=False),
        pa.field("version", pa.string(), nullable=False),
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("clip_id", pa.string(), nullable=False),
        pa.field("frame", pa.int32(), nullable=False),
        pa.field("raw", pa.float32(), nullable=False),
    ]
)
LABEL_SCHEMA = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("clip_id", pa.string(), nullable=False),
        pa.field("frame", pa.int32(), nullable=False),
        pa.field("label", pa.int8(), nullable=False),
    ]
)
POLICY_SCHEMA = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("video_id", pa.string()),
        pa.field("policy", pa.string(), nullable=False),
        pa.field("p_fragment", pa.float32(), nullable=False),
    ]
)
VERDICT_SCHEMA = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("judge", pa.string(), nullable=False),
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("step", pa.string(), nullable=False),
        pa.field("clip_ids", pa.list_(pa.field("element", pa.string(), nullable=False)), nullable=False),
        pa.field("frames", pa.list_(pa.field("element", pa.int32(), nullable=False)), nullable=False),
        pa.field("said", pa.string(), nullable=False),
        pa.field("verdict", pa.bool_()),
    ]
)

# What the store said of every source when it was last read: equal stamps spare a second reading.
STAMP_SCHEMA = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("stamp", pa.string(), nullable=False),
        pa.field("video_id", pa.string(), nullable=False),
    ]
)


def check_format(found: object, name: str) -> None:
    """CacheError where the file `name` is of another format version."""
    if found != FORMAT_VERSION:
        raise CacheError(f"{name}: format version {found}, this tokenmill reads {FORMAT_VERSION}")


def with_format(schema: pa.Schema, **footer: str) -> pa.Schema:
    """`schema` with the format version and `footer` in its metadata, as stored files carry them."""
    return schema.with_metadata({FORMAT_KEY: str(FORMAT_VERSION), **footer})
