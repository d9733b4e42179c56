"""Digests: how content, values and rows get names that do not depend on the machine."""

import hashlib
import json
from typing import BinaryIO

HASH_CHUNK_BYTES = 1 << 20


def digest_of(value: object) -> str:
    """SHA-256 (64 hex digits) of a JSON-like value, the same for the same value on any machine."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def digest_of_stream(stream: BinaryIO) -> tuple[str, int]:
    """SHA-256 (64 hex digits) and length in bytes of all that `stream` still holds."""
    sha256, num_bytes = hashlib.sha256(), 0
    while chunk := stream.read(HASH_CHUNK_BYTES):
        sha256.update(chunk)
        num_bytes += len(chunk)
    return sha256.hexdigest(), num_bytes
