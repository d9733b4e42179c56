"""Ctrl-C ends a job even where Python loses the exception."""

import contextlib
import os
import signal

import pytest

from tokenmill.jobs.interruption import heed_interrupts, raise_if_interrupted


def test_an_interrupt_that_was_swallowed_is_raised_again() -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        heed_interrupts()
        raise_if_interrupted()
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            raise_if_interrupted()
        heed_interrupts()
        raise_if_interrupted()
    finally:
        signal.signal(signal.SIGINT, before)


def test_where_interrupts_are_ignored_they_stay_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        heed_interrupts()
        os.kill(os.getpid(), signal.SIGINT)
        raise_if_interrupted()
    finally:
        signal.signal(signal.SIGINT, before)
