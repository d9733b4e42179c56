"""Ctrl-C that cannot be lost: Python drops a KeyboardInterrupt raised where no exception can travel (a finalizer, a
callback of a C library), so it is also remembered and raised again between two steps of a job."""

import signal
import threading
from types import FrameType

_interrupted = threading.Event()


def heed_interrupts() -> None:
    """Remember Ctrl-C from now on; where SIGINT is ignored (a job in the background of a shell) it stays ignored."""
    _interrupted.clear()
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _remember)


def _remember(number: int, frame: FrameType | None) -> None:
    _interrupted.set()
    raise KeyboardInterrupt


def raise_if_interrupted() -> None:
    """KeyboardInterrupt if Ctrl-C came and was lost."""
    if _interrupted.is_set():
        raise KeyboardInterrupt
