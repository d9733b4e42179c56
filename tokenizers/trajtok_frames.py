"""TrajViT2 (TrajTok, arXiv:2602.22779) on single frames: each is a clip of one frame, in the space of texts."""

from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from ..schemas.errors import TokenizerError
from ..schemas.recipe import Section, parse_options
from ..schemas.relevance import ScorerSpec
from .base import Settings, check_frames
from .image_text import resized
from .trajtok import load_segment_clip
from .trajtok_model import IMAGE_SIDE
from .trajtok_segmenter import Grid, dtype_of
from .trajtok_text import TextTokenizer, embed_texts
from .trajtok_tokenizer import TrajTokTokenizer
from .trajtok_towers import EMBED, SegmentClip

VARIANT = "trajvit2"


class TrajTokFramesOptions(Section):
    """What embeddings depend on besides the weights, each as of the tokenizer; `vocab` is of texts."""

    vocab: str | None = Field(
        default=None, description="path or fsspec URL of bert-base-uncased's vocab.txt; null: frames alone"
    )
    grid: Grid = 56
    mask_mode: Literal["official_sdpa", "masked"] = "official_sdpa"
    vit_heads: int = Field(default=16, ge=1)
    add_mean_traj: bool = False
    attend_other_latents: bool = False


class TrajTokFrames:
    """The published model as a FrameEncoder. Its weights are checked here; either side is loaded when first used."""

    def __init__(self, settings: Settings) -> None:
        options = self._options = parse_options(TrajTokFramesOptions, settings.options)
        of_frames = options.model_dump(exclude={"vocab"})
        self._tokenizer = TrajTokTokenizer(
            VARIANT,
            Settings(
                weights=settings.weights,
                device=settings.device,
                dtype=settings.dtype,
                options=of_frames | {"embedding": True},
            ),
        )
        self._settings = settings
        self._words = TextTokenizer(options.vocab) if options.vocab else None
        words = {"vocab_sha256": self._words.sha256} if self._words else {}
        number_type = {} if settings.dtype == "float32" else {"dtype": settings.dtype}
        self.spec = ScorerSpec(
            name=self._tokenizer.spec.name,
            dim=EMBED,
            weights_sha256=self._tokenizer.spec.weights_sha256,
            options={**of_frames, **words, **number_type},
            takes_texts=self._words is not None,
        )

    @torch.inference_mode()
    def embed_frames(self, frames_NHWC: np.ndarray) -> np.ndarray:
        """float32 embeddings (N,256) of length 1 of uint8 RGB frames, which are squashed to the model's square."""
        frames = torch.from_numpy(np.array(frames_NHWC))
        check_frames(frames.unsqueeze(0), self.spec.name)
        if not len(frames):
            return np.zeros((0, EMBED), np.float32)
        x_NCHW = resized(frames.permute(0, 3, 1, 2).float(), (IMAGE_SIDE, IMAGE_SIDE), "bicubic")
        found = self._tokenizer.encode(x_NCHW.permute(0, 2, 3, 1).to(torch.uint8).unsqueeze(1)).embedding_BCE
        if found is None or not found.isfinite().all():
            raise TokenizerError(
                f"{self.spec.name}: the networks gave values that are not finite: set dtype to float32 or bfloat16, or"
                f" check the weights"
            )
        return found[:, 0].cpu().numpy()

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """float32 embeddings (N,256) of length 1; TokenizerError without `options.vocab`."""
        if self._words is None:
            raise TokenizerError(
                f"{self.spec.name} takes no texts without their vocabulary: set options.vocab to the path or URL of"
                f" vocab.txt, for instance hf://google-bert/bert-base-uncased/vocab.txt"
            )
        return embed_texts(self._text_tower, self._words, texts).numpy()

    @cached_property
    @torch.inference_mode(False)  # its parameters serve calls in and outside of that mode
    def _text_tower(self) -> SegmentClip:
        """The published model without its side of clips."""
        options, settings = self._options, self._settings
        model = load_segment_clip(
            settings.weights or "",
            options.grid,
            options.vit_heads,
            add_mean_traj=options.add_mean_traj,
            attend_other_latents=options.attend_other_latents,
        )
        del model.vision_encoder, model.vision_proj
        return model.to(settings.device, dtype_of(settings))
