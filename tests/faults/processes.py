"""The processes that a process has started, directly or not, and what they are."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A running process and its command line."""

    pid: int
    command: str


def descendants(pid: int | None = None) -> list[Process]:
    """All living processes below `pid` (this process by default)."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            for parent in _parent_of(entry):
                children.setdefault(parent, []).append(int(entry.name))
    return list(_below(pid or os.getpid(), children))


def of_kind(kind: str, pid: int | None = None) -> list[Process]:
    """Those of a job's processes that are a ``token worker``, ``decode actor``, ``raylet``, or ``decoder``.

    What decoders are forked from counts as one.
    """
    marks = {
        "decoder": "from tokenmill.pipeline.zygote import main",
        "token worker": "ray::TokenWorker",
        "decode actor": "ray::DecodeActor",
        "raylet": "raylet/raylet",
    }
    return [process for process in descendants(pid) if marks[kind] in process.command]


def _below(pid: int, children: dict[int, list[int]]) -> Iterator[Process]:
    for child in children.get(pid, []):
        try:
            command = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            command = ""
        if command:  # empty: it has ended, and nobody has asked how
            yield Process(pid=child, command=command)
        yield from _below(child, children)


def _parent_of(entry: Path) -> Iterator[int]:
    try:
        status = (entry / "stat").read_text()
    except OSError:  # it has just ended
        return
    state, parent = status.rpartition(")")[2].split()[:2]
    if state != "Z":
        yield int(parent)
