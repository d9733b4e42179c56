"""How a frame looks, without weights: its colours in 8x8 places, for comparing frames with frames."""

from collections.abc import Sequence

import numpy as np
from skimage.color import rgb2lab

from ..schemas.errors import TokenizerError
from ..schemas.relevance import ScorerSpec
from .relevance import unit

PLACES = 8  # to a side of a frame
MID_GREY = (50.0, 0.0, 0.0)  # in CIE Lab
COLOUR = 2.0  # how much a and b count beside lightness
KEPT = 0.5  # of the mean colour: what all places share says less about a shot than where they differ
LAB_STEPS = 64  # per unit: rounding hides what processors disagree about in the last digit


class LookEncoder:
    """Mean colours of 8x8 places in CIE Lab (D65, of scikit-image), about mid grey, as a FrameEncoder without texts."""

    spec = ScorerSpec(name="look", dim=3 * PLACES**2, weights_sha256=None, takes_texts=False)

    def embed_frames(self, frames_NHWC: np.ndarray) -> np.ndarray:
        """float32 embeddings (N,192) of length 1 (0 of a frame that is mid grey all over) of uint8 RGB frames.

        TokenizerError for frames with a side below 8.
        """
        height, width = frames_NHWC.shape[1:3]
        if min(height, width) < PLACES:
            raise TokenizerError(
                f"look takes frames of {PLACES}x{PLACES} pixels or more, found {height}x{width}: set clips.height and"
                f" clips.width"
            )
        colours_Nhwc = rgb2lab(_means(_means(frames_NHWC / 255.0, 1), 2))
        colours_Nhwc = (np.rint(colours_Nhwc * LAB_STEPS) / LAB_STEPS - MID_GREY) * (1, COLOUR, COLOUR)
        colours_Nhwc -= (1 - KEPT) * colours_Nhwc.mean((1, 2), keepdims=True)
        return unit(colours_Nhwc.reshape(len(frames_NHWC), 3 * PLACES**2))

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """TokenizerError: it takes no texts."""
        raise TokenizerError(
            "look compares frames with frames and takes no texts: search by an example, or with an encoder of texts"
            " (transformers, open_clip)"
        )


def _means(values: np.ndarray, axis: int) -> np.ndarray:
    """The means of PLACES parts of an axis, which differ by one pixel at most in size."""
    begins = np.arange(PLACES + 1) * values.shape[axis] // PLACES
    sums = np.add.reduceat(values, begins[:-1], axis=axis)
    return sums / np.diff(begins).reshape([-1 if i == axis else 1 for i in range(values.ndim)])
