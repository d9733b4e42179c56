"""Planes of small integers (masks, assignments) in few bytes, without loss."""

import numpy as np
import pyarrow as pa

ZSTD_LEVEL = 12


def pack_planes(planes_THW: np.ndarray) -> bytes:
    """uint8 planes (T,H,W) as zstd of their runs or of the planes themselves, whichever is smaller.

    The first byte names the form: ``r`` for runs in the order of time, rows and columns (lengths as little-endian
    uint32, all lowest bytes first, then the values), ``p`` for the planes with time innermost.
    """
    codec = pa.Codec("zstd", compression_level=ZSTD_LEVEL)
    flat = planes_THW.ravel()
    starts = np.flatnonzero(np.append(True, flat[1:] != flat[:-1])[: flat.size])
    lengths = np.diff(starts, append=flat.size).astype("<u4")
    runs = lengths.view(np.uint8).reshape(-1, 4).T.tobytes() + flat[starts].tobytes()
    planes = np.moveaxis(planes_THW, 0, -1).tobytes()
    return min((b"r" + _packed(runs, codec), b"p" + _packed(planes, codec)), key=len)


def unpack_planes(packed: bytes, shape_thw: tuple[int, int, int]) -> np.ndarray:
    """The planes (T,H,W) that `pack_planes` was given; ValueError where these are not planes of that shape."""
    num = int(np.prod(shape_thw))
    form, num_bytes = packed[:1], int.from_bytes(packed[1:5], "little")
    try:
        data = np.frombuffer(pa.Codec("zstd").decompress(packed[5:], num_bytes, asbytes=True), np.uint8)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"packed planes are damaged: {error}") from None
    if form == b"p" and len(data) == num:
        t, h, w = shape_thw
        return np.ascontiguousarray(np.moveaxis(data.reshape(h, w, t), -1, 0))
    if form == b"r" and len(data) % 5 == 0:
        num_runs = len(data) // 5
        lengths = data[: 4 * num_runs].reshape(4, num_runs).T.copy().view("<u4")[:, 0]
        if int(lengths.sum(dtype=np.int64)) == num:
            return np.repeat(data[4 * num_runs :], lengths).reshape(shape_thw)
    raise ValueError(f"packed planes of form {form!r} with {len(data)} bytes are none of shape {shape_thw}")


def _packed(data: bytes, codec: pa.Codec) -> bytes:
    return len(data).to_bytes(4, "little") + codec.compress(data, asbytes=True)
