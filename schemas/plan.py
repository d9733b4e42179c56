"""The record of a plan: which files hold it, and what it is for. Creating the record is the commit of the plan."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from .errors import CacheError
from .shard import FileEntry
from .tables import FORMAT_VERSION, check_format

PLAN_FOLDER = "plan"
_RECORD = re.compile(rf"{PLAN_FOLDER}/plan-(\d{{6,}})\.json")


def plan_name(number: int) -> str:
    """``plan/plan-<number>.json``: plans of a cache are numbered from 1, and each knows all earlier ones."""
    return f"{PLAN_FOLDER}/plan-{number:06d}.json"


def plan_number(name: str) -> int | None:
    """The number in the name of a plan's record; None for any other file."""
    found = _RECORD.fullmatch(name)
    return int(found[1]) if found else None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRecord:
    """One plan of a cache: its table of clips and its table of videos.

    `retries` is empty for a plan of new videos. A retry holds clips that failed in their latest attempt, and is only
    about the product versions named here (product: fingerprint), for which their shard has committed the failure.
    """

    number: int
    clips: FileEntry
    videos: FileEntry
    retries: Mapping[str, str]
    format_version: int = field(default=FORMAT_VERSION)

    @property
    def name(self) -> str:
        """Where the record lives inside the cache."""
        return plan_name(self.number)

    def to_json(self) -> bytes:
        """The record as it is stored."""
        return json.dumps(asdict(self), indent=1, sort_keys=True).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes, name: str) -> "PlanRecord":
        """The record stored in `data`; CacheError names the file where it is damaged or of another format."""
        try:
            values = json.loads(data)
            check_format(values["format_version"], name)
            values |= {"clips": FileEntry(**values["clips"]), "videos": FileEntry(**values["videos"])}
            return cls(**values)
        except (ValueError, KeyError, TypeError) as error:
            raise CacheError(f"{name}: damaged plan ({error}): {PLAN_REMEDY}") from error


PLAN_REMEDY = "delete the plan folder and run the recipe again: the same videos give the same shards"
