"""Being asked to stop: the first Ctrl-C or SIGTERM lets running shards finish within a grace time, the second does not.

Python drops a KeyboardInterrupt raised where no exception can travel (a finalizer, a callback of a C library), so each
is also remembered and raised again between two steps of a job.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

STOPPED = 75  # EX_TEMPFAIL: the job was asked to stop, and the same command resumes it
INTERRUPTED = 130

_interrupted = threading.Event()
_draining = threading.Event()
_num_signals = 0
_grace_s: float | None = None  # None: nothing is running that could be finished


def heed_interrupts() -> None:
    """Heed Ctrl-C and SIGTERM from now on; where SIGINT is ignored (a job in the background of a shell) it stays so."""
    global _num_signals, _grace_s
    _num_signals, _grace_s = 0, None
    _interrupted.clear()
    _draining.clear()
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _on_signal)
    signal.signal(signal.SIGTERM, _on_signal)
    signal.signal(signal.SIGALRM, _on_grace_over)


@contextlib.contextmanager
def draining(grace_s: float) -> Iterator[threading.Event]:
    """An event that is set by the first signal: no shard is begun after it, those begun have `grace_s` to finish."""
    global _grace_s
    _grace_s = grace_s
    try:
        yield _draining
    finally:
        _grace_s = None
        signal.setitimer(signal.ITIMER_REAL, 0)


def exit_code() -> int:
    """What a job that was stopped ends with: 75 where it was asked once, 130 where a second signal cut it short."""
    return STOPPED if _num_signals < 2 else INTERRUPTED


@contextlib.contextmanager
def resumable() -> Iterator[None]:
    """Ends the process with one line and `exit_code` where the job inside is stopped."""
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        # A library that was called may have made an error of its own of the interrupt.
        if not isinstance(error, KeyboardInterrupt) and not _interrupted.is_set():
            raise
        how = "stopped" if exit_code() == STOPPED else "interrupted"
        print(f"tokenmill: {how}; what was committed is kept, the same command resumes", file=sys.stderr)
        sys.exit(exit_code())


def raise_if_interrupted() -> None:
    """KeyboardInterrupt if one came and was lost."""
    if _interrupted.is_set():
        raise KeyboardInterrupt


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _num_signals
    _num_signals += 1
    grace_s = _grace_s
    if grace_s is None or _num_signals > 1:
        return _interrupt()
    _draining.set()
    signal.setitimer(signal.ITIMER_REAL, max(grace_s, 1e-6))
    # Not through the display: the signal may have come in the middle of its own writing.
    said = f"\ntokenmill: stopping, what is running has {grace_s:g} s to finish; once more stops at once\n"
    with contextlib.suppress(OSError, AttributeError):  # where there is no standard error
        os.write(sys.__stderr__.fileno(), said.encode())  # pyright: ignore[reportOptionalMemberAccess]


def _on_grace_over(number: int, frame: FrameType | None) -> None:
    _interrupt()


def _interrupt() -> None:
    _interrupted.set()
    raise KeyboardInterrupt
