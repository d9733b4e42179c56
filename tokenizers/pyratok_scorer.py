"""Scoring frames by PyraTok's tokens (arXiv:2601.16210, temporal localization): the bits of the first level, which is
the finest in time on native grids, against what a text says of them.

The embedding of a frame is the mean over its sites of the signs of the bits, that of a text the signs that the model
expects for it. So tokens that are stored are scored without their video.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from ..schemas.errors import TokenizerError
from ..schemas.relevance import ScorerSpec
from .base import check_frames
from .pyratok_pyramid import PyramidFile
from .pyratok_quantizer import signs_of
from .pyratok_vae import on_device


class PyraTokScorer:
    """A pyramid that was trained with texts, as a FrameEncoder of the frames of one clip; TokenizerError for others."""

    def __init__(self, weights: str, device: str = "cpu") -> None:
        file = PyramidFile.read(weights)
        if file.pyramid.text_width is None:
            raise TokenizerError(
                f"weights {weights}: this pyramid was trained without texts and cannot score frames for them:"
                f" train one with model.text_width"
            )
        self._model, self._device = on_device(file.build(), device), device
        self._dim = file.sizes.z_dim
        self.spec = ScorerSpec(name="pyratok", dim=self._dim, weights_sha256=file.file.sha256)

    @torch.inference_mode()
    def embed_frames(self, frames_THWC: np.ndarray) -> np.ndarray:
        """float32 embeddings (T,D) of length 1 (0 where bits cancel out) of uint8 RGB frames, whose sides the model's
        stride divides.
        """
        frames_BTHWC = torch.from_numpy(frames_THWC).unsqueeze(0)
        check_frames(frames_BTHWC, self.spec.name)
        x_BCTHW = frames_BTHWC.to(self._device).movedim(-1, 1)
        return self.embed_codes(self._model.encode_levels(x_BCTHW)[0].ids_Bthw[0], len(frames_THWC))

    @torch.inference_mode()
    def embed_codes(self, codes_thw: torch.Tensor, num_frames: int) -> np.ndarray:
        """float32 embeddings (T,D) as of frames, of a clip's stored codes of the first level; ValueError for others."""
        stride = self._model.strides.levels[0][0]
        of_space = self._model.sizes.stride_thw[1:]
        num_codes = self._model.level_grids(num_frames, *of_space)[0][0]
        if codes_thw.ndim != 3 or len(codes_thw) != num_codes:
            raise ValueError(
                f"codes (t,h,w) of the first level of {num_frames} frames have t={num_codes}: {tuple(codes_thw.shape)=}"
            )
        low, high = (int(bound) for bound in codes_thw.long().aminmax())
        if not 0 <= low <= high < 1 << self._dim:
            raise ValueError(f"codes of this model are from 0 to {(1 << self._dim) - 1}: {low=} {high=}")
        signs_tC = signs_of(codes_thw, self._dim).mean((1, 2))
        latent_of_T = -(-torch.arange(num_frames, device=signs_tC.device) // stride)
        return F.normalize(signs_tC, dim=-1)[latent_of_T].cpu().numpy()

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """float32 embeddings (N,D) of length 1 of texts."""
        if not texts:
            return np.zeros((0, self._dim), np.float32)
        logits_ND = self._model.text_logits(self._model.embed_texts(texts))
        return F.normalize(torch.tanh(logits_ND / 2), dim=-1).cpu().numpy()  # the mean sign of a bit
