"""A snapshot: the state of a cache that stays readable whatever is added later."""

import json
import re
from dataclasses import dataclass
from typing import Any

from .cache_info import CacheInfo
from .errors import CacheError
from .tables import FORMAT_VERSION, check_format

SNAPSHOTS = "snapshots"
_NAME = re.compile(rf"{SNAPSHOTS}/(\d+)\.json")


def snapshot_name(number: int) -> str:
    """``snapshots/<number>.json``: snapshots are numbered from 1."""
    return f"{SNAPSHOTS}/{number}.json"


def snapshot_number(name: str) -> int | None:
    """The number in the name of a snapshot; None for any other file."""
    found = _NAME.fullmatch(name)
    return int(found[1]) if found else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What was committed at one moment.

    `created` is UTC in ISO 8601. `plans` are the names of the plans' records. The contents of all pinned manifests
    (of the products' current versions) are in one file, `manifests`; `state` digests all that is pinned.
    """

    number: int
    created: str
    state: str
    info: CacheInfo
    plans: tuple[str, ...]
    manifests: str
    num_manifests: int

    @property
    def name(self) -> str:
        """Where the snapshot lives inside the cache."""
        return snapshot_name(self.number)

    def to_json(self) -> bytes:
        """The snapshot as it is stored."""
        values: dict[str, Any] = {key: getattr(self, key) for key in self.__slots__}
        values |= {"info": self.info.values(), "format_version": FORMAT_VERSION}
        return json.dumps(values, indent=1, sort_keys=True).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes, name: str) -> "Snapshot":
        """The snapshot stored in `data`; CacheError names the file where it is damaged or of another format."""
        try:
            values = json.loads(data)
            check_format(values.pop("format_version"), name)
            values |= {"info": CacheInfo.from_values(values["info"]), "plans": tuple(values["plans"])}
            return cls(**values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CacheError(f"{name}: damaged snapshot ({error}): what it pinned can no longer be read") from error
