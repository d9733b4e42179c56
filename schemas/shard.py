"""Shards: the work before it is done, and what was committed after."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from .clip import Clip, ClipFailure
from .errors import CacheError
from .tables import FORMAT_VERSION, check_format

CLIPS = "clips"
WEBDATASET = "webdataset"
SHORT_DIGEST = 12


FRAMES = "frames"  # candidate frames; their embeddings are frames/<name>
TOKENS, EMBEDDINGS, MASKS = "tokens/", "embeddings/", "masks/"  # how the products of a kind begin


def tokens_product(name: str) -> str:
    """The product that the recipe's section `tokens.<name>` makes."""
    return f"{TOKENS}{name}"


def masks_product(name: str) -> str:
    """The product that the recipe's section `masks.<name>` makes."""
    return f"{MASKS}{name}"


def frames_product(name: str) -> str:
    """The product that the recipe's section `frames.encoders.<name>` makes."""
    return f"{FRAMES}/{name}"


def holds_values(product: str) -> bool:
    """Whether the files of a product hold tokens or embeddings, which can be memory-mapped."""
    return product.startswith((TOKENS, EMBEDDINGS, f"{FRAMES}/"))


def is_of_frames(product: str) -> bool:
    """Whether a product is of candidate frames: themselves, or their embeddings."""
    return product == FRAMES or product.startswith(f"{FRAMES}/")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPlan:
    """Clips that are made, committed and retried together, in the plan's order."""

    shard_id: str
    clips: tuple[Clip, ...]

    def __post_init__(self) -> None:
        if not self.clips:
            raise ValueError(f"shard {self.shard_id} has no clips")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One published file: its name inside the cache, and what its bytes must be.

    `rest_sha256` is of all its bytes but the tokens, which have checksums of their own; None for files without tokens.
    """

    name: str
    size_bytes: int
    sha256: str
    num_rows: int
    rest_sha256: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardManifest:
    """What one shard committed of one product: written once, never edited.

    `fingerprint` names the product's version. `clips_per_video` counts rows by video digest. Rows and failures
    together are the clips that the plan gave to the shard. `batch_splits` counts model calls that did not fit into
    memory and were made in halves: across batch shapes sums may differ in their last bits.
    """

    shard_id: str
    product: str
    fingerprint: str
    files: tuple[FileEntry, ...]
    failures: tuple[ClipFailure, ...]
    clips_per_video: Mapping[str, int]
    host: str
    timings_s: Mapping[str, float]
    batch_splits: int = 0
    format_version: int = field(default=FORMAT_VERSION)

    @property
    def name(self) -> str:
        """Where the manifest lives inside the cache."""
        return manifest_name(self.shard_id, self.product, self.fingerprint)

    @property
    def num_rows(self) -> int:
        """How many clips were committed."""
        return sum(file.num_rows for file in self.files)

    def to_json(self) -> bytes:
        """The manifest as it is stored."""
        return json.dumps(asdict(self), indent=1, sort_keys=True).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes, name: str) -> "ShardManifest":
        """The manifest stored in `data`; CacheError names the file where it is damaged or of another format."""
        try:
            values = json.loads(data)
            check_format(values["format_version"], name)
            values["files"] = tuple(FileEntry(**entry) for entry in values["files"])
            values["failures"] = tuple(ClipFailure(**entry) for entry in values["failures"])
            return cls(**values)
        except (ValueError, KeyError, TypeError) as error:
            raise CacheError(f"{name}: damaged manifest ({error}): delete it and run the recipe again") from error


def manifest_name(shard_id: str, product: str, fingerprint: str) -> str:
    """``manifests/<product>/<shard>-<version>.json``: one for every shard of every product version."""
    return f"manifests/{product}/{shard_id}-{fingerprint[:SHORT_DIGEST]}.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoText:
    """What a source says of a video in words: its caption, and its metadata as the text of a JSON object."""

    caption: str | None = None
    metadata: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTask:
    """A shard and the products that it still lacks.

    `texts` are captions and metadata by video digest, of those videos that have any; only tars need them.
    """

    plan: ShardPlan
    products: tuple[str, ...]
    texts: Mapping[str, VideoText] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardProgress:
    """What has happened since the last report, while a shard is being made.

    `timings_s` are the seconds that the worker waited for decoded frames (``decode``) and that each step took, such as
    its tokenizers (``tokenize``); `queue_bytes` are frames decoded ahead; `num_retries` counts requests to a store made
    again.
    """

    shard_id: str
    num_clips: int = 0
    num_frames: int = 0
    num_tokens: int = 0
    failures: tuple[ClipFailure, ...] = ()
    timings_s: Mapping[str, float] = field(default_factory=dict)
    queue_bytes: int = 0
    num_retries: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLost:
    """A worker that died with its shard in hand, for the `attempts`th time; at the last one the shard is given up."""

    shard_id: str
    reason: str
    attempts: int
    is_given_up: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardReceipt:
    """A finished shard: one manifest per product that it lacked.

    `num_lost_races` counts manifests that another worker had committed first; its files stand. Where `is_committed`
    is False the files are published, and the driver has yet to commit the manifests.
    """

    shard_id: str
    manifests: tuple[ShardManifest, ...]
    num_lost_races: int
    is_committed: bool = True

    @property
    def write_s(self) -> float:
        """Seconds that writing, publishing and committing took."""
        return sum(manifest.timings_s.get("write", 0.0) for manifest in self.manifests)
