"""TrajTok (arXiv:2602.22779) as a tokenizer: tokens of object trajectories, by the published weights."""

from dataclasses import replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field

from ..schemas.errors import TokenizerError, did_you_mean
from ..schemas.recipe import parse_options
from ..schemas.tokens import EmbeddingSpec, TokenizerSpec
from .base import Settings, TrajectoryBatch, check_frames, check_multiple
from .trajtok import sizes_of
from .trajtok_link import LinkOptions, linked
from .trajtok_model import IMAGE_SIDE, Sizes, soft_mass
from .trajtok_segmenter import IN_CLIP, IN_SEGMENTER, QUERIES, Grid, dtype_of, normalized, on_device
from .trajtok_towers import EMBED, SegmentClip
from .weights import WeightsFile, check_tensors, fetch_weights, read_tensors

Tensors = dict[str, torch.Tensor]  # by name, the first dimension that of clips

VARIANTS = ("trajvit2",)
TEXT_SIDE = ("text_encoder.", "text_proj.", "temp", "itm_head.")  # of a published file: not needed for clips
MOST_SLOTS = 256  # an assignment is uint8
MOST_TRAJECTORIES = 1 << 15  # their numbers are int16


class TrajTokOptions(LinkOptions):
    """What tokens depend on besides the weights; `mask_mode` and `vit_heads` are of embeddings alone."""

    level: int = Field(
        default=0, ge=0, description="2^level tokens for each trajectory, as far as the weights have them"
    )
    soft_mass: bool = Field(default=False, description="also how many patches each slot has by soft shares")
    grid: Grid = 56
    add_mean_traj: bool = Field(
        default=False, description="tokens begin from the mean of their patches: of own weights"
    )
    attend_other_latents: bool = Field(default=False, description="tokens see those of other slots: of own weights")
    embedding: bool = Field(default=False, description="also the clip in the space of texts")
    mask_mode: Literal["official_sdpa", "masked"] = Field(
        default="official_sdpa", description="whether the embedding sees slots that no patch belongs to, as published"
    )
    vit_heads: int = Field(default=16, ge=1, description="heads of the ViT: not in the weights")


class TrajTokTokenizer:
    """A published model with its weights, which are checked here and loaded when they are first used."""

    def __init__(self, variant: str, settings: Settings) -> None:
        if variant not in VARIANTS:
            near = did_you_mean(variant, list(VARIANTS))
            raise TokenizerError(f"trajtok has no variant {variant!r}{near}: accepted are {', '.join(VARIANTS)}")
        name = f"trajtok/{variant}"
        options = self._options = parse_options(TrajTokOptions, settings.options)
        if settings.logvar:
            raise TokenizerError(f"{name} makes tokens that have no variance: remove logvar")
        if settings.weights is None:
            raise TokenizerError(
                f"{name} needs its weights: set weights to the path or URL of model.pth, from"
                f" hf://michaelzch001/trajtok-trajvitv2 (docs/tokenizers.md)"
            )
        self._settings = settings
        weights = fetch_weights(settings.weights)
        self._tensors = {k: v for k, v in read_tensors(weights).items() if not k.startswith(TEXT_SIDE)}
        self._sizes = self._checked(weights, name)
        stride = IMAGE_SIDE // options.grid
        self.spec = TokenizerSpec(
            name=name,
            kind="trajectory",
            codebook_size=None,
            latent_dim=self._sizes.token_dim or self._sizes.dim,
            stride_thw=(1, stride, stride),
            weights_sha256=weights.sha256,
            dtype=settings.dtype,
            compiled=settings.compiled,
            options=options.model_dump(mode="json", exclude={"embedding", "mask_mode", "vit_heads"}),
        )

    @property
    def is_batched(self) -> bool:
        """On the CPU clips go one by one, so that their tokens do not depend on each other."""
        return torch.device(self._settings.device).type != "cpu"

    @property
    def embedding(self) -> EmbeddingSpec | None:
        """What `encode` gives of whole clips; None where `options.embedding` is not set."""
        if not self._options.embedding:
            return None
        return EmbeddingSpec(dim=EMBED, options=self._options.model_dump(include={"mask_mode", "vit_heads"}))

    def grid_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """The (T,h,w) of the assignment, whatever the size of frames, which are resized; TokenizerError unless they are
        square and no more than int16 can number trajectories of.
        """
        name, grid, per_chunk = self.spec.name, self._options.grid, self._options.chunk_frames
        check_multiple("num_frames", num_frames, 1, name)
        check_multiple("height", height, 1, name)
        if height != width:
            raise TokenizerError(
                f"{name} takes square clips, found {height}x{width}: set clips.height={IMAGE_SIDE},"
                f" clips.width={IMAGE_SIDE} and clips.resize=squash"
            )
        longest = MOST_TRAJECTORIES // self._sizes.num_slots * per_chunk
        if num_frames > longest:
            raise TokenizerError(
                f"{name} takes clips of up to {longest} frames in chunks of {per_chunk}, found {num_frames}:"
                f" set clips.num_frames={longest} or less"
            )
        return num_frames, grid, grid

    @torch.inference_mode()
    def encode(self, frames_BTHWC: torch.Tensor) -> TrajectoryBatch:
        """The tokens of uint8 RGB frames (B,T,H,W,3), on the networks' device; TokenizerError for others.

        A clip goes through in chunks of `chunk_frames` (the last may be shorter), each by itself; linking gives their
        trajectories numbers of the clip.
        """
        check_frames(frames_BTHWC, self.spec.name)
        self.grid_shape(*frames_BTHWC.shape[1:4])
        chunks = [self._look(part) for part in frames_BTHWC.split(self._options.chunk_frames, dim=1)]
        whole, per_slot, num = _joined(chunks, dim=1), 2**self._options.level, self._sizes.num_slots
        slots_K = torch.arange(num, dtype=torch.int16)
        return TrajectoryBatch(
            values_BNd=whole["tokens"],
            valid_BN=whole["valid"].repeat_interleave(per_slot, dim=1),
            slots_N=slots_K.repeat_interleave(per_slot).repeat(len(chunks)),
            chunks_N=torch.arange(len(chunks), dtype=torch.int16).repeat_interleave(num * per_slot),
            trajectories_BN=self._trajectories(whole).repeat_interleave(per_slot, dim=1),
            assignment_BThw=whole["labels"],
            chunk_frames=self._options.chunk_frames,
            mass_BN=whole["mass"].repeat_interleave(per_slot, dim=1) if "mass" in whole else None,
            embedding_BCE=whole.get("embedding"),
        )

    def _trajectories(self, whole: Tensors) -> torch.Tensor:
        """The number (B,C*K) int16 of every slot's trajectory."""
        chunks_of_slots = (-1, self._sizes.num_slots)
        queries = whole["queries"].unflatten(1, chunks_of_slots).cpu().numpy()
        valid = whole["valid"].unflatten(1, chunks_of_slots).cpu().numpy()
        numbers = [linked(*clip, self._options.threshold) for clip in zip(queries, valid, strict=True)]
        return torch.from_numpy(np.stack(numbers)).flatten(1).to(torch.int16)

    def _look(self, frames_BTHWC: torch.Tensor) -> Tensors:
        """What the networks find in one chunk of clips, which are computed together or one by one."""
        at_once = len(frames_BTHWC) if self.is_batched else 1
        return _joined([self._look_at_once(part) for part in frames_BTHWC.split(at_once)], dim=0)

    def _look_at_once(self, frames_BTHWC: torch.Tensor) -> Tensors:
        """Tokens (B,M,d), and validity (B,K), features (B,K,D) and soft mass (B,K) of slots; labels (B,T,h,w); and
        embeddings (B,1,E). Tokens are no numbers where patches cannot be assigned for that reason.
        """
        options, vision = self._options, self._model.vision_encoder
        x_BTHWC = normalized(frames_BTHWC.to(self._settings.device), dtype_of(self._settings))
        made: Tensors = {}
        if options.embedding:
            rows, tokens, valid, found = vision(x_BTHWC, options.level, masked=options.mask_mode == "masked")
            made["embedding"] = F.normalize(self._model.embed_rows(rows).float(), dim=-1).unsqueeze(1)
        else:
            tokens, valid, found = vision.traj_tokenizer(x_BTHWC, options.level)
        if options.soft_mass:
            made["mass"] = soft_mass(found.logits_BNK.float())
        is_lost_B = ~found.logits_BNK.isfinite().flatten(1).all(dim=1)
        made["tokens"] = tokens.masked_fill(is_lost_B[:, None, None], float("nan"))
        made["valid"], made["queries"] = valid[:, :: 2**options.level], found.queries_BKD.float()
        made["labels"] = found.labels_BN.to(torch.uint8).unflatten(1, (-1, options.grid, options.grid))
        return made

    @cached_property
    @torch.inference_mode(False)  # its parameters serve calls in and outside of that mode
    def _model(self) -> SegmentClip:
        """The networks that the options ask for."""
        with torch.device("meta"):
            model = vision_of(self._sizes)
        if not self._options.embedding:
            del model.vision_proj, model.vision_encoder.vision_encoder, model.vision_encoder.norm
        tensors, self._tensors = self._tensors, {}
        model = on_device(model, tensors, self._settings)
        if self._settings.compiled:
            model.vision_encoder.traj_tokenizer.segmenter.patch_encoder.compile()
        return model

    def _checked(self, weights: WeightsFile, name: str) -> Sizes:
        """The sizes of the networks, by their tensors; TokenizerError unless all are there and fit the options."""
        options = self._options
        if IN_CLIP + QUERIES not in self._tensors and IN_SEGMENTER + QUERIES in self._tensors:
            raise TokenizerError(
                f"weights {weights.uri}: they are those of TrajTok's segmenter alone, which makes masks and no tokens:"
                f" give model.pth of hf://michaelzch001/trajtok-trajvitv2, or make masks of it: masks.<name>.segmenter"
            )
        sizes = sizes_of(self._tensors, IN_CLIP, options.grid, weights, options.vit_heads)
        if options.level > sizes.level:
            raise TokenizerError(
                f"{name} has up to {2**sizes.level} tokens for a trajectory with weights {weights.uri}, found"
                f" options.level={options.level}: accepted are 0 to {sizes.level}"
            )
        if sizes.vit_dim % options.vit_heads:
            raise TokenizerError(
                f"{name}: {sizes.vit_dim} channels of weights {weights.uri} are no multiple of"
                f" options.vit_heads={options.vit_heads}: published are 16"
            )
        if sizes.num_slots > MOST_SLOTS:
            raise TokenizerError(
                f"weights {weights.uri}: {sizes.num_slots} slots, {name} takes up to {MOST_SLOTS}: give published ones"
            )
        sizes = replace(sizes, add_mean_traj=options.add_mean_traj, attend_other_latents=options.attend_other_latents)
        with torch.device("meta"):
            check_tensors(self._tensors, vision_of(sizes).state_dict(), weights, name)
        return sizes


def vision_of(sizes: Sizes) -> SegmentClip:
    """The networks that clips go through, without those of texts; random weights."""
    model = SegmentClip(sizes)
    del model.text_encoder, model.text_proj, model.temp
    return model.eval()


def _joined(parts: list[Tensors], dim: int) -> Tensors:
    return {name: torch.cat([part[name] for part in parts], dim=dim) for name in parts[0]}
