"""What a scorer of frames is, and how what it says becomes a probability."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

Rule = Literal["sigmoid", "standardized"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """How a raw score becomes p in (0,1): the logistic function of ``scale * score + bias``.

    ``sigmoid`` takes the raw score itself: of scorers that were trained to give probabilities. ``standardized`` takes
    how far it is from the mean over the frames of its video, in their standard deviations (0 where all are alike): of
    scorers without an absolute scale.
    """

    rule: Rule
    scale: float
    bias: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and math.isfinite(self.bias)):
            raise ValueError(f"a calibration has finite numbers: {self.scale=} {self.bias=}")


STANDARDIZED = Calibration(rule="standardized", scale=2.0, bias=-1.0)  # until labels say better


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerSpec:
    """Everything about a scorer that decides its scores, apart from frames and texts.

    `dim` is the length of its embeddings, None for a scorer that looks at a frame and a text together. `takes_texts` is
    False where only frames can be compared with each other. `calibration` is its own; `revision` rises with every
    change of our code that changes scores.
    """

    name: str
    dim: int | None
    weights_sha256: str | None
    options: dict[str, Any] = field(default_factory=dict)
    takes_texts: bool = True
    calibration: Calibration = STANDARDIZED
    revision: int = 1
