"""What a scorer of frames is."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerSpec:
    """Everything about a scorer that decides its embeddings, which have `dim` numbers, apart from frames and texts.

    `revision` rises with every change of our code that changes them.
    """

    name: str
    dim: int
    weights_sha256: str | None
    options: dict[str, Any] = field(default_factory=dict)
    revision: int = 1
