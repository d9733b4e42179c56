"""WebDataset tars: one sample per clip, with the tokens of several products, and an index for random access.

The members of a sample are neighbours: ``<clip_id>.<name>.npy`` for every product ``tokens/<name>``, and
``<clip_id>.json``. Headers name no time and no user, so that the same samples are the same bytes.
"""

import io
import json
import tarfile
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..schemas.digest import digest_of
from ..schemas.shard import VideoText
from ..schemas.tables import FORMAT_VERSION, with_format
from .token_file import FINGERPRINT, TokenLayout

LAYOUT_REVISION = 1
CLIP_KEYS = ("clip_id", "video_id", "uri", "start_s", "end_s", "num_valid", "frame_pts_s")
INDEX_SCHEMA = pa.schema(
    [
        pa.field("clip_id", pa.string(), nullable=False),
        pa.field("member", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("size_bytes", pa.int64(), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TarProduct:
    """A token product in a tar: the name of its tokenizer, and the layout of one clip's tokens."""

    tokenizer: str
    layout: TokenLayout

    @property
    def dtype(self) -> str:
        """The number type of the array: codes uint16 or int32, latents as they are, but bfloat16 as float32."""
        if self.layout.codebook_size is not None:
            return "int32" if self.layout.high_bits else "uint16"
        return "float32" if self.layout.dtype == "bfloat16" else self.layout.dtype

    def arrays(self, values_N: np.ndarray) -> np.ndarray:
        """Codes (N,...) or the bits of latents (N,...) as they are stored; numpy has no bfloat16, float32 is exact."""
        size = self.layout.codebook_size
        if size is not None and values_N.size and (values_N.min() < 0 or values_N.max() >= size):
            raise ValueError(f"codes reach from {values_N.min()} to {values_N.max()}, the codebook has {size}")
        if self.layout.dtype == "bfloat16":
            return (values_N.view("<u2").astype("<u4") << 16).view("<f4")
        return values_N.astype(np.dtype(self.dtype).newbyteorder("<"), copy=False)

    def to_json(self) -> dict[str, Any]:
        """What every sample says of the product; `dtype` is that of the values, also where they are stored wider."""
        size = self.layout.codebook_size
        return {
            "tokenizer": self.tokenizer,
            "dtype": self.dtype if size is not None else self.layout.dtype,
            "shape": self.layout.shape,
            "codebook_size": size,
            **({"levels": self.layout.levels} if self.layout.levels else {}),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A clip on its way into a tar: its row with the uri of its video, the video's text, and its members by name.

    A member is one array (``.npy``) or several by name (``.npz``).
    """

    clip: Mapping[str, Any]
    text: VideoText
    arrays: Mapping[str, np.ndarray | Mapping[str, np.ndarray]]


def tars_fingerprint(tokens: Mapping[str, str]) -> str:
    """The version of tars that hold products of these fingerprints, by product."""
    return digest_of({"format": FORMAT_VERSION, "layout": LAYOUT_REVISION, "tokens": dict(tokens)})


def index_path(tar_path: str) -> str:
    """Where the index of a tar lies, beside it."""
    return f"{tar_path.removesuffix('.tar')}.index.parquet"


def write_tar(path: str, samples: Iterable[Sample], products: Mapping[str, Mapping[str, Any]], version: str) -> int:
    """Write samples to the new local file `path`, and their index beside it; returns how many there were.

    `products` is what every sample says of each, by name. Both files carry `version`, so two versions of tars are never
    the same file.
    """
    shared = {"fingerprint": version, "products": dict(products)}
    places: list[dict[str, Any]] = []
    num_samples = 0
    with open(path, "xb") as stream:
        for sample in samples:
            num_samples += 1
            for member, data in _members(sample, shared):
                place = {"offset": _append(stream, member, data), "size_bytes": len(data)}
                places.append({"clip_id": sample.clip["clip_id"], "member": member, **place})
        stream.write(bytes(2 * tarfile.BLOCKSIZE))
    index = pa.Table.from_pylist(places, schema=with_format(INDEX_SCHEMA, **{FINGERPRINT.decode(): version}))
    pq.write_table(index, index_path(path), compression="zstd", write_page_checksum=True)
    return num_samples


def _members(sample: Sample, shared: Mapping[str, Any]) -> list[tuple[str, bytes]]:
    """Names and contents of a sample's members, by name."""
    clip, text = sample.clip, sample.text
    described = {key: clip[key] for key in CLIP_KEYS} | dict(shared)
    described |= {"caption": text.caption, "metadata": json.loads(text.metadata) if text.metadata else None}
    members = {
        f"{name}.npy" if isinstance(one, np.ndarray) else f"{name}.npz": _npy(one)
        if isinstance(one, np.ndarray)
        else _npz(one)
        for name, one in sample.arrays.items()
    }
    members["json"] = json.dumps(described, sort_keys=True, ensure_ascii=False).encode()
    return [(f"{clip['clip_id']}.{suffix}", members[suffix]) for suffix in sorted(members)]


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return stream.getvalue()


def _npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    """As numpy.savez_compressed, which would also store the time of day."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, array in arrays.items():
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), _npy(array), zipfile.ZIP_DEFLATED)
    return stream.getvalue()


def _append(stream: BinaryIO, member: str, data: bytes) -> int:
    """Write one member; returns where its data begins."""
    info = tarfile.TarInfo(member)  # of mode 644, user 0 and time 0
    info.size = len(data)
    stream.write(info.tobuf(tarfile.PAX_FORMAT))  # a plain ustar header, unless the name is longer than 100 letters
    offset = stream.tell()
    stream.write(data)
    stream.write(bytes(-len(data) % tarfile.BLOCKSIZE))
    return offset
