"""The published variants of VidTok: names, sizes and where each halves time and space."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from ..schemas.errors import TokenizerError, did_you_mean

WIDTH = 128  # channels of the first level
FSQ_LEVEL = 8  # levels of every channel


@dataclass(frozen=True, slots=True, kw_only=True)
class Resampling:
    """The levels (0 is full resolution) after which the encoder halves, and the decoder doubles, space and time."""

    space_down: tuple[int, ...]
    time_down: tuple[int, ...]
    space_up: tuple[int, ...]
    time_up: tuple[int, ...]
    widths: tuple[int, ...] = (1, 2, 4, 4)


RESAMPLINGS = {
    "488": Resampling(space_down=(0, 1, 2), time_down=(1, 2), space_up=(1, 2, 3), time_up=(1, 2)),
    "41616": Resampling(
        space_down=(0, 1, 2, 3), time_down=(2, 3), space_up=(1, 2, 3, 4), time_up=(1, 2), widths=(1, 2, 4, 4, 4)
    ),
    "288": Resampling(space_down=(0, 1, 2), time_down=(1,), space_up=(1, 2, 3), time_up=(2,)),
    "444": Resampling(space_down=(1, 2), time_down=(1, 2), space_up=(1, 2), time_up=(1, 2)),
    "888": Resampling(space_down=(0, 1, 2), time_down=(0, 1, 2), space_up=(1, 2, 3), time_up=(1, 2, 3)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One published model. `channels` are those of the decoder's input, and the encoder of a KL model gives twice as
    many.
    """

    name: str
    regularizer: Literal["fsq", "kl"]
    is_causal: bool
    version: Literal["1.0", "1.1"]
    channels: int
    resampling: Resampling

    @property
    def stride_thw(self) -> tuple[int, int, int]:
        """Frames, rows and columns of one token."""
        space = 2 ** len(self.resampling.space_down)
        return 2 ** len(self.resampling.time_down), space, space

    @property
    def streams(self) -> bool:
        """Whether clips of any length are one clip to it, with frames seen in the order of time."""
        return self.version == "1.1"

    @property
    def window_frames(self) -> int:
        """Frames of the independent windows that longer clips are cut into, where it does not stream."""
        return 17 if self.is_causal else 16


_NAME = re.compile(r"(fsq|kl)_(causal|noncausal)_(\d+)_(\d+)(?:chn)?(_v1_1)?")

NAMES = (
    "fsq_causal_488_4096", "fsq_causal_488_32768", "fsq_causal_488_262144", "fsq_causal_41616_262144",
    "fsq_noncausal_488_262144", "fsq_noncausal_41616_262144",
    "kl_causal_488_4chn", "kl_causal_488_8chn", "kl_causal_488_16chn", "kl_causal_288_8chn", "kl_causal_444_4chn",
    "kl_causal_41616_4chn", "kl_noncausal_488_4chn", "kl_noncausal_488_16chn", "kl_noncausal_41616_4chn",
    "kl_noncausal_41616_16chn",
    "fsq_causal_488_32768_v1_1", "fsq_causal_41616_262144_v1_1", "fsq_causal_888_32768_v1_1",
    "kl_causal_288_8chn_v1_1", "kl_causal_41616_16chn_v1_1", "kl_causal_488_4chn_v1_1", "kl_causal_488_16chn_v1_1",
)  # fmt: skip


def variant_of(name: str) -> Variant:
    """The variant called `name`, for instance fsq_causal_488_32768; TokenizerError for any other name."""
    found = _NAME.fullmatch(name)
    if name not in NAMES or found is None:
        raise TokenizerError(
            f"vidtok has no variant {name!r}{did_you_mean(name, list(NAMES))}: accepted are {', '.join(NAMES)}"
        )
    regularizer, causality, compression, size, version = found.groups()
    return Variant(
        name=name,
        regularizer="fsq" if regularizer == "fsq" else "kl",
        is_causal=causality == "causal",
        version="1.1" if version else "1.0",
        channels=round(math.log(int(size), FSQ_LEVEL)) if regularizer == "fsq" else int(size),
        resampling=RESAMPLINGS[compression],
    )
