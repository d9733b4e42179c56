"""What judges frames: a model that describes them, thinks of questions about them, and answers these."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from ..schemas.errors import RecipeError, TokenmillError
from .relevance import COLOURS


class UnclearError(TokenmillError):
    """A judge said something that cannot be understood; others may be asked, and the same one later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionAnswer:
    """A question about a video, and what is to be answered; RecipeError where one is empty."""

    question: str
    answer: str

    def __post_init__(self) -> None:
        if not self.question.strip() or not self.answer.strip():
            raise RecipeError(f"a question and its answer are wanted: found {self.question!r} and {self.answer!r}")


@runtime_checkable
class Judge(Protocol):
    """Looks at frames and answers in words. Frames are uint8 RGB of one size, in the order of time.

    What it says is stored and never asked for twice, so it should say the same of the same frames. UnclearError where
    what it says cannot be understood.
    """

    @property
    def name(self) -> str:
        """Who it is: another name for everything that changes what it says."""
        ...

    def describe(self, frames_NHWC: np.ndarray) -> str:
        """What is to be seen, in detail."""
        ...

    def ask(self, description: str) -> list[QuestionAnswer]:
        """Questions that a description answers, each with its answer."""
        ...

    def answer(self, frames_NHWC: np.ndarray, question: str) -> str:
        """The answer to a question, by these frames alone; there may be none."""
        ...

    def agrees(self, question: str, wanted: str, given: str) -> bool:
        """Whether an answer that was given means the same as the one that is wanted."""
        ...


class FakeJudge:
    """Knows colours: of which one a frame is by its mean. It says yes where it sees all that a question names."""

    name = "fake"

    def describe(self, frames_NHWC: np.ndarray) -> str:
        return " ".join(dict.fromkeys(_colour_of(frame_HWC) for frame_HWC in frames_NHWC))

    def ask(self, description: str) -> list[QuestionAnswer]:
        return [QuestionAnswer(question=f"Is anything {colour}?", answer="yes") for colour in _named(description)]

    def answer(self, frames_NHWC: np.ndarray, question: str) -> str:
        named, seen = _named(question), {_colour_of(frame_HWC) for frame_HWC in frames_NHWC}
        return "yes" if named and seen.issuperset(named) else "no"

    def agrees(self, question: str, wanted: str, given: str) -> bool:
        return wanted.casefold() == given.casefold()


def _named(text: str) -> Sequence[str]:
    return [word for word in re.findall("[a-z]+", text.lower()) if word in COLOURS]


def _colour_of(frame_HWC: np.ndarray) -> str:
    mean = frame_HWC.mean((0, 1))
    return min(COLOURS, key=lambda colour: float(np.abs(mean - COLOURS[colour]).sum()))
