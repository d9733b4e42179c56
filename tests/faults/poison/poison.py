"""Videos that do to their decoder what broken ones do: the last bytes of the file say what, and when.

`append(path, "decode segfault")` turns a good video into poison. Processes that have this folder on their PYTHONPATH
(see sitecustomize.py) act on it; all others see a good video.
"""

import ctypes
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MARK = b"tokenmill-poison "


def append(path: str, what: str) -> None:
    """Make the video at `path` poison: `what` is ``<probe|decode> <segfault|abort|hang|memory|raise|garbage|once>``."""
    text = MARK + what.encode().ljust(24)
    with open(path, "ab") as stream:
        stream.write((8 + len(text)).to_bytes(4, "big") + b"free" + text)


def act(path: str, step: str) -> str:
    """Do what the end of the file at `path` asks for in this step; returns what it was."""
    tail = Path(path).read_bytes()[-64:]
    found_step, _, what = tail.rpartition(MARK)[2].decode(errors="replace").strip().partition(" ")
    if MARK not in tail or found_step != step:
        return ""
    print(f"about to {what}", flush=True)
    if what == "segfault":
        ctypes.string_at(0)
    elif what == "abort":
        os.abort()
    elif what == "hang":
        ctypes.PyDLL(None).sleep(3600)  # with the interpreter's lock held, as a C library may
    elif what == "memory":
        held = []
        while True:
            held.append(bytearray(os.urandom(1 << 20)) * 32)
            time.sleep(0.02)
    elif what == "raise":
        raise RuntimeError("a bug of the decoder")
    elif what == "once" and not os.path.exists(f"{path}.died"):
        Path(f"{path}.died").touch()
        ctypes.string_at(0)
    return what


def poison_decode(module: Any) -> None:
    """Patch tokenmill.pipeline.decode."""
    decode: Callable[..., Iterator[Any]] = module.VideoDecoder.decode

    def poisoned(self: Any, path: str, clips: Any) -> Iterator[Any]:
        what = act(path, "decode")
        for result in decode(self, path, clips):
            if what == "garbage" and hasattr(result, "frames_THWC"):
                object.__setattr__(result, "frames_THWC", result.frames_THWC[:, :1])
            yield result

    module.VideoDecoder.decode = poisoned


def poison_probe(module: Any) -> None:
    """Patch tokenmill.pipeline.videos."""
    probe = module.probe_video

    def poisoned(path: str) -> Any:
        act(path, "probe")
        return probe(path)

    module.probe_video = poisoned
