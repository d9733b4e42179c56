"""Garbage: files of a cache that no manifest of any version, no plan and no snapshot names."""

import contextlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from ..schemas.shard import CLIPS, EMBEDDINGS, FRAMES, MASKS, TOKENS, WEBDATASET, ShardManifest
from .cache_head import read_info
from .manifests import PACKED, committed_names, read_all, read_named
from .plan_file import CLIPS_PREFIX, VIDEOS_PREFIX, plans_of
from .snapshots import PINNED_PREFIX, pinned_manifests, read_snapshot, snapshot_numbers
from .storage import STAGING, Folder, FoundFile, storage_errors

GarbageKind = Literal["old manifest", "data", "packed", "plan", "snapshot", "leftover"]
DATA_FOLDERS = (CLIPS, *(kind.rstrip("/") for kind in (TOKENS, EMBEDDINGS, MASKS)), FRAMES, WEBDATASET)
BATCH_FILES = 500
# What a process leaves when it is killed: files aside, probes of a store, and indexes half built.
_LEFTOVER = re.compile(rf"{re.escape(STAGING)}/.+|(.+/)?\.[^/]+\.[0-9a-f]{{8}}|\.probe-[^/]+|\.index-[^/]+/.+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Garbage:
    """One file that nothing needs, and why."""

    kind: GarbageKind
    file: FoundFile


@dataclass(frozen=True, slots=True, kw_only=True)
class _Named:
    """The files that must stay, and the manifests of product versions that are not needed any more."""

    files: set[str]
    old_manifests: frozenset[str]


def find_garbage(folder: Folder, older_than_s: float, *, old_versions: bool = False) -> list[Garbage]:
    """All files that have not been touched for `older_than_s` and that nothing names.

    With `old_versions` also the manifests of product versions that are neither current nor pinned by a snapshot, and
    their files. CacheError or StorageError where a manifest, plan or snapshot cannot be read: what it names is unknown.
    """
    # Files before manifests: what is committed in between is named. The limit covers what is published meanwhile.
    files = folder.find("")
    packs = sorted((file for file in files if file.name.startswith(f"{PACKED}-")), key=lambda file: file.modified_s)
    named = _named(folder, old_versions=old_versions)
    found = []
    for file in files:
        kind = "old manifest" if file.name in named.old_manifests else _kind(file.name)
        kind = "packed" if file in packs[:-1] else kind  # copies: the newest has nearly all
        if kind and file.name not in named.files and file.modified_s <= time.time() - older_than_s:
            found.append(Garbage(kind=kind, file=file))
    # A manifest goes before its files: what stays after a crash is garbage too.
    return sorted(found, key=lambda one: (one.kind != "old manifest", one.file.name))


def remove_garbage(folder: Folder, garbage: Sequence[Garbage], older_than_s: float) -> Iterator[Garbage]:
    """Remove the files of `find_garbage`, each checked again right before, and empty folders of killed workers;
    yields the files that were removed.

    A job that needs such a file after all publishes it anew, so it is young, and then commits a manifest that names it.
    """
    seen = committed_names(folder)
    old_versions = any(one.kind == "old manifest" for one in garbage)
    for start in range(0, len(garbage), BATCH_FILES):
        appeared = committed_names(folder) - seen
        kept = {file.name for manifest in read_named(folder, sorted(appeared)) for file in manifest.files}
        if start == 0 or old_versions:  # a version may have become the current one again
            kept |= _named(folder, old_versions=old_versions).files
        for one in garbage[start : start + BATCH_FILES]:
            name = one.file.name
            if name not in kept and _is_older(folder, name, older_than_s):
                folder.remove(name)
                if folder.is_local and one.kind == "leftover":
                    with contextlib.suppress(OSError):  # its folder, once that is empty
                        os.removedirs(os.path.dirname(folder.path(name)))
                yield one
    folder.remove_empty_staging(older_than_s)


def _kind(name: str) -> GarbageKind | None:
    """What kind of garbage a file is that nothing names; None for files that gc does not judge."""
    if _LEFTOVER.fullmatch(name):
        return "leftover"
    if name.startswith(tuple(f"{data}/" for data in DATA_FOLDERS)):
        return "data"
    if name.startswith((f"{CLIPS_PREFIX}-", f"{VIDEOS_PREFIX}-")):
        return "plan"
    return "snapshot" if name.startswith(f"{PINNED_PREFIX}-") else None


def _named(folder: Folder, *, old_versions: bool) -> _Named:
    """What manifests, plans and snapshots name now."""
    current = set(read_info(folder).fingerprints.items())
    pinned: dict[str, ShardManifest] = {}
    files: set[str] = set()
    for number in snapshot_numbers(folder):
        snapshot = read_snapshot(folder, number)
        files |= {snapshot.name, snapshot.manifests, *snapshot.plans}
        pinned |= {manifest.name: manifest for manifest in pinned_manifests(folder, snapshot)}
    kept, old_manifests = list(pinned.values()), set()
    for manifest in read_all(folder):
        if old_versions and (manifest.product, manifest.fingerprint) not in current and manifest.name not in pinned:
            old_manifests.add(manifest.name)
        else:
            kept.append(manifest)
    for manifest in kept:
        files |= {manifest.name, *(file.name for file in manifest.files)}
    for plan in plans_of(folder):
        files |= {plan.record.name, plan.name, plan.videos_name}
    return _Named(files=files, old_manifests=frozenset(old_manifests))


def _is_older(folder: Folder, name: str, than_s: float) -> bool:
    """Whether the file is still there, and has not been written anew."""
    with storage_errors(folder.uri(name)), contextlib.suppress(FileNotFoundError):
        folder.fs.invalidate_cache()
        return folder.fs.modified(folder.path(name)).timestamp() <= time.time() - than_s
    return False
