"""The tables of the index that come from manifests and plans: their columns, and the rows of each."""

import json
from dataclasses import asdict

import pyarrow as pa

from ..schemas.cache_info import ProductInfo
from ..schemas.shard import ShardManifest
from .account import ProductAccount
from .plan_file import Plan

# Of the tables that users do not see: `file` is the number of a file in this index.
FILE_NUMBER = pa.field("file", pa.uint32())
MANIFEST_SCHEMA = pa.schema(
    [
        pa.field("name", pa.string()),
        pa.field("product", pa.string()),
        # As its store lists it; null in the index of a snapshot, whose manifests are copies.
        pa.field("size_bytes", pa.int64()),
        pa.field("modified_s", pa.float64()),
        pa.field("content", pa.string()),  # a digest
    ]
)
INDEXED_PLAN_SCHEMA = pa.schema(
    [pa.field("name", pa.string()), pa.field("clips", pa.string()), pa.field("videos", pa.string())]
)
RUN_SCHEMA = pa.schema([pa.field("part", pa.string()), pa.field("num_rows", pa.int64())])
META_SCHEMA = pa.schema([pa.field("key", pa.string()), pa.field("value", pa.string())])

FILE_SCHEMA = pa.schema(
    [
        pa.field("product", pa.string()),
        pa.field("shard_id", pa.string()),
        pa.field("name", pa.string()),
        pa.field("size_bytes", pa.int64()),
        pa.field("sha256", pa.string()),
        pa.field("num_rows", pa.int64()),
        pa.field("rest_sha256", pa.string()),
    ]
)
ROW_GROUP_SCHEMA = pa.schema(
    [
        pa.field("name", pa.string()),
        pa.field("row_group", pa.int32()),
        pa.field("column", pa.string()),
        pa.field("num_rows", pa.int64()),
        pa.field("num_values", pa.int64()),
        pa.field("offset", pa.int64()),
        pa.field("size_bytes", pa.int64()),
        pa.field("crc32", pa.int64()),
    ]
)
SHARD_SCHEMA = pa.schema(
    [
        pa.field("shard_id", pa.string()),
        pa.field("product", pa.string()),
        pa.field("fingerprint", pa.string()),
        pa.field("num_clips", pa.int64()),
        pa.field("num_failures", pa.int64()),
        pa.field("size_bytes", pa.int64()),
        pa.field("host", pa.string()),
        pa.field("decode_s", pa.float64()),
        pa.field("segment_s", pa.float64()),
        pa.field("embed_s", pa.float64()),
        pa.field("tokenize_s", pa.float64()),
        pa.field("write_s", pa.float64()),
    ]
)
PLAN_SHARD_SCHEMA = pa.schema(
    [
        pa.field("shard_id", pa.string()),
        pa.field("num_clips", pa.int64()),
        pa.field("plan", pa.int64()),
        pa.field("is_retry", pa.bool_()),
    ]
)
FAILURE_SCHEMA = pa.schema(
    [
        pa.field("clip_id", pa.string()),
        pa.field("shard_id", pa.string()),
        pa.field("product", pa.string()),
        pa.field("status", pa.string()),
        pa.field("step", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("attempts", pa.int64()),
        pa.field("log_tail", pa.string()),
    ]
)
PRODUCT_SCHEMA = pa.schema(
    [
        pa.field("product", pa.string()),
        pa.field("fingerprint", pa.string()),
        pa.field("tokenizer", pa.string()),
        pa.field("segmenter", pa.string()),
        pa.field("encoder", pa.string()),
        pa.field("kind", pa.string()),
        pa.field("codebook_size", pa.int64()),
        pa.field("dtype", pa.string()),
        pa.field("shape", pa.list_(pa.int32())),
        pa.field("levels", pa.list_(pa.list_(pa.int32()))),
        pa.field("options", pa.string()),
    ]
)


def plan_rows(plan: Plan) -> list[dict]:
    """The shards of a plan (PLAN_SHARD_SCHEMA)."""
    return [
        {"shard_id": shard_id, "num_clips": num_clips, "plan": plan.record.number, "is_retry": plan.is_retry}
        for shard_id, num_clips in plan.shards()
    ]


def failed_rows(account: ProductAccount) -> list[dict]:
    """The clips that failed for a product in their latest attempt (FAILURE_SCHEMA)."""
    return [
        {**asdict(clip.failure), "shard_id": clip.shard_id, "product": account.product}
        for clip in account.failed.values()
    ]


def failure_rows(manifest: ShardManifest) -> list[dict]:
    """The clips that failed in a manifest's shard (FAILURE_SCHEMA), with the attempts of this shard alone."""
    return [
        {**asdict(failure), "shard_id": manifest.shard_id, "product": manifest.product} for failure in manifest.failures
    ]


def product_row(name: str, entry: ProductInfo) -> dict:
    """One product (PRODUCT_SCHEMA)."""
    tokenizer = entry.tokenizer or {}
    options = (entry.tokenizer or entry.segmenter or entry.encoder or {}).get("options")
    return {
        "product": name,
        "fingerprint": entry.fingerprint,
        "tokenizer": tokenizer.get("name"),
        "segmenter": (entry.segmenter or {}).get("name"),
        "encoder": (entry.encoder or {}).get("name"),
        "kind": tokenizer.get("kind"),
        "codebook_size": tokenizer.get("codebook_size"),
        "dtype": tokenizer.get("dtype"),
        "shape": list(entry.shape),
        "levels": [list(grid) for grid in entry.levels] or None,
        "options": json.dumps(options, sort_keys=True) if options else None,
    }


def file_rows(manifest: ShardManifest) -> list[dict]:
    """The files of a manifest (FILE_SCHEMA)."""
    return [
        {
            "product": manifest.product,
            "shard_id": manifest.shard_id,
            "name": file.name,
            "size_bytes": file.size_bytes,
            "sha256": file.sha256,
            "num_rows": file.num_rows,
            "rest_sha256": file.rest_sha256,
        }
        for file in manifest.files
    ]


def shard_row(manifest: ShardManifest) -> dict:
    """What a shard committed of a product (SHARD_SCHEMA)."""
    return {
        "shard_id": manifest.shard_id,
        "product": manifest.product,
        "fingerprint": manifest.fingerprint,
        "num_clips": manifest.num_rows,
        "num_failures": len(manifest.failures),
        "size_bytes": sum(file.size_bytes for file in manifest.files),
        "host": manifest.host,
        **{f"{step}_s": manifest.timings_s.get(step) for step in ("decode", "segment", "embed", "tokenize", "write")},
    }
