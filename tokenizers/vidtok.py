"""VidTok (Tang et al. 2024, arXiv:2412.13061): grids of codes or latents, by the official weights."""

import os
import warnings
from dataclasses import dataclass
from functools import cached_property

import torch

from ..schemas.errors import TokenizerError
from ..schemas.tokens import TokenizerSpec
from .base import NO_CODE, Settings, check_codes, check_frames, check_latents, check_multiple
from .vidtok_model import VidTok
from .vidtok_variants import FSQ_LEVEL, NAMES, Variant, variant_of
from .weights import check_tensors, fetch_weights, load_tensors, read_tensors

TRAINING_ALONE = ("loss.", "model_ema.")  # tensors of a checkpoint that its networks do not have
# Frames of a clip in work at a time: few stay in a processor's caches, and 16 bound the memory of a GPU.
PART_FRAMES = {"cpu": 4, "cuda": 16}


def build(variant: str) -> VidTok:
    """The networks of `variant`, for instance kl_causal_288_8chn_v1_1, with random weights; TokenizerError for
    another name.
    """
    return VidTok(variant_of(variant)).eval()


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """How a clip of `num_frames` is cut: `count` windows of `frames`, which are encoded by themselves.

    The last one is filled up by repeating the clip's last frame.
    """

    num_frames: int
    count: int
    frames: int

    @staticmethod
    def of(num_frames: int, variant: Variant) -> "Windows":
        """One window where the variant streams, or the clip is no longer than one and gives whole tokens."""
        stride, longest = variant.stride_thw[0], variant.window_frames
        fits = num_frames <= longest and (num_frames - variant.is_causal) % stride == 0
        if variant.streams or fits:
            return Windows(num_frames=num_frames, count=1, frames=num_frames)
        return Windows(num_frames=num_frames, count=-(-num_frames // longest), frames=longest)

    @staticmethod
    def most_of(num_tokens: int, variant: Variant) -> "Windows":
        """The longest clip whose grid has so many tokens in time."""
        per_window = -(-variant.window_frames // variant.stride_thw[0])
        if not variant.streams and num_tokens > per_window:
            return Windows.of(num_tokens // per_window * variant.window_frames, variant)
        first = variant.stride_thw[0] - 1 if variant.is_causal and not variant.streams else 0
        return Windows.of(num_tokens * variant.stride_thw[0] - first, variant)

    def num_tokens(self, stride: int) -> int:
        """How many tokens the clip has in time."""
        return self.count * -(-self.frames // stride)


class VidTokTokenizer:
    """A variant with its weights, which are checked here and loaded when they are first used."""

    def __init__(self, name: str, settings: Settings) -> None:
        variant = self._variant = variant_of(name)
        if settings.weights is None:
            raise TokenizerError(
                f"vidtok/{name} needs its weights: set weights to the path or URL of vidtok_{name}.ckpt, from"
                f" hf://microsoft/VidTok/checkpoints (docs/tokenizers.md)"
            )
        if settings.logvar and variant.regularizer != "kl":
            raise TokenizerError(f"vidtok/{name} makes codes, which have no variance: remove logvar")
        _warn_of_another_name(variant, settings.weights)
        self._settings, self._device = settings, torch.device(settings.device)
        self._dtype: torch.dtype = getattr(torch, settings.dtype)
        self._weights = fetch_weights(settings.weights)
        self._tensors = self._read()  # of the file that was just digested, whatever takes its place
        size = FSQ_LEVEL**variant.channels if variant.regularizer == "fsq" else None
        self.spec = TokenizerSpec(
            name=f"vidtok/{name}",
            kind="discrete" if size else "continuous",
            codebook_size=size,
            latent_dim=None if size else variant.channels * (1 + settings.logvar),
            stride_thw=variant.stride_thw,
            weights_sha256=self._weights.sha256,
            dtype=settings.dtype,
            compiled=settings.compiled,
        )

    @property
    def is_batched(self) -> bool:
        """On the CPU clips go one by one, which is as quick and takes less memory."""
        return self._device.type != "cpu"

    def grid_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """The (t,h,w) grid of a clip of this size; TokenizerError unless the stride divides height and width."""
        f, s, _ = self.spec.stride_thw
        check_multiple("num_frames", num_frames, 1, self.spec.name)
        check_multiple("height", height, s, self.spec.name)
        check_multiple("width", width, s, self.spec.name)
        return Windows.of(num_frames, self._variant).num_tokens(f), height // s, width // s

    @torch.inference_mode()
    def encode(self, frames_BTHWC: torch.Tensor) -> torch.Tensor:
        """int32 codes (B,t,h,w), or latents (B,t,h,w,d): means, and after them logvars if these are wanted.

        Frames are uint8 RGB (B,T,H,W,3); TokenizerError for others. Clip by clip on the CPU, together on a GPU.
        """
        check_frames(frames_BTHWC, self.spec.name)
        self.grid_shape(*frames_BTHWC.shape[1:4])
        at_once = len(frames_BTHWC) if self.is_batched else 1
        return torch.cat([self._encode(frames) for frames in frames_BTHWC.split(at_once)])

    @torch.inference_mode()
    def decode(self, tokens: torch.Tensor, num_frames: int | None = None) -> torch.Tensor:
        """uint8 RGB frames (B,T,H,W,3) of tokens as `encode` gives them, for clips of `num_frames`.

        None stands for the longest clips with such a grid. TokenizerError for tokens of another kind or length.
        """
        if self.spec.codebook_size:
            check_codes(tokens, self.spec.codebook_size, self.spec.name)
        else:
            check_latents(tokens, self.spec.latent_dim or 0, self.spec.name)
        windows = self._windows_of(tokens.shape[1], num_frames)
        return torch.cat([self._decode(one, windows) for one in tokens.split(1)])

    @torch.inference_mode()
    def margins(self, frames_BTHWC: torch.Tensor) -> torch.Tensor | None:
        """FSQ: how far (B,t,h,w) each latent is from another code, in steps between levels (see Fsq.margins)."""
        model = self._model
        if model.fsq is None:
            return None
        return torch.cat([model.fsq.margins(self._latents(one).movedim(1, -1)) for one in frames_BTHWC.split(1)])

    def _windows_of(self, num_tokens: int, num_frames: int | None) -> Windows:
        """The windows of a clip with so many tokens in time; TokenizerError where clips of this length have others."""
        stride = self.spec.stride_thw[0]
        longest = Windows.most_of(num_tokens, self._variant)
        if longest.num_tokens(stride) != num_tokens:
            window = Windows.of(self._variant.window_frames, self._variant)
            raise TokenizerError(
                f"{self.spec.name}: no clip has {num_tokens} tokens in time: each window of {window.frames} frames has"
                f" {window.num_tokens(stride)}"
            )
        windows = longest if num_frames is None else Windows.of(num_frames, self._variant)
        if windows.num_tokens(stride) != num_tokens:
            raise TokenizerError(
                f"{self.spec.name}: clips of {num_frames} frames do not have {num_tokens} tokens in time:"
                f" {longest.num_frames} frames have"
            )
        return windows

    @cached_property
    @torch.inference_mode(False)  # its parameters serve calls in and outside of that mode
    def _model(self) -> VidTok:
        with torch.device("meta"):
            model = VidTok(self._variant)
        model = model.to_empty(device="cpu").eval().requires_grad_(False)
        load_tensors(model, self._tensors)
        self._tensors = {}
        if self._device.type == "cuda":  # float32 means float32
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        model = model.to(self._device, self._dtype)
        if self._settings.compiled:
            model.encoder.compile()
        return model

    @cached_property
    def _copies(self) -> "torch.cuda.Stream":
        """Where frames are copied to a GPU, beside the batch that it computes."""
        return torch.cuda.Stream(self._device)

    def _on_device(self, frames_BTHWC: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cpu":
            return frames_BTHWC.cpu()
        if frames_BTHWC.device.type != "cpu":
            return frames_BTHWC.to(self._device)
        with torch.cuda.stream(self._copies):
            copied = frames_BTHWC.pin_memory().to(self._device, non_blocking=True)
        now = torch.cuda.current_stream(self._device)
        now.wait_stream(self._copies)
        copied.record_stream(now)
        return copied

    def _read(self) -> dict[str, torch.Tensor]:
        """The tensors of the networks, all of them and no others; they are read when they are used."""
        tensors = {k: v for k, v in read_tensors(self._weights).items() if not k.startswith(TRAINING_ALONE)}
        with torch.device("meta"):
            expected = VidTok(self._variant).state_dict()
        check_tensors(tensors, expected, self._weights, f"vidtok/{self._variant.name}")
        return tensors

    @property
    def _part_frames(self) -> int | None:
        if not self._variant.is_causal:
            return None
        return max(PART_FRAMES[self._device.type], self.spec.stride_thw[0])

    def _latents(self, frames_BTHWC: torch.Tensor) -> torch.Tensor:
        """What the encoder makes (B,C,t,h,w) of clips, before it is regularised."""
        windows = Windows.of(frames_BTHWC.shape[1], self._variant)
        x_BTHWC = self._on_device(frames_BTHWC)
        missing = windows.count * windows.frames - windows.num_frames
        if missing:
            x_BTHWC = torch.cat((x_BTHWC, x_BTHWC[:, -1:].expand(-1, missing, -1, -1, -1)), dim=1)
        parts = x_BTHWC.movedim(-1, 1).split(windows.frames, dim=2)
        part = None if self._settings.compiled else self._part_frames  # what is compiled has no memory of earlier parts
        return torch.cat([self._model.encode_latent(x_BCTHW, part) for x_BCTHW in parts], dim=2)

    def _encode(self, frames_BTHWC: torch.Tensor) -> torch.Tensor:
        h_BCthw = self._latents(frames_BTHWC)
        if self._model.fsq:
            codes_Bthw = self._model.quantize(h_BCthw)[1]
            return codes_Bthw.masked_fill_(~h_BCthw.isfinite().all(dim=1), NO_CODE)
        mean, logvar = self._model.posterior(h_BCthw)
        return (torch.cat((mean, logvar), dim=1) if self._settings.logvar else mean).movedim(1, -1)

    def _decode(self, tokens: torch.Tensor, windows: Windows) -> torch.Tensor:
        stride = self._variant.stride_thw[0]
        tokens = tokens.to(self._device)
        if self._model.fsq:
            z_BCthw = self._model.indices_to_latent(tokens)
        else:
            z_BCthw = tokens[..., : self._variant.channels].movedim(-1, 1)
        part = self._part_frames // stride if self._part_frames else None
        frames: list[torch.Tensor] = []
        for z in z_BCthw.split(windows.num_tokens(stride) // windows.count, dim=2):
            window = torch.cat([_to_uint8(x_BCTHW) for x_BCTHW in self._model.decode_parts(z, part)], dim=1)
            frames.append(window[:, -windows.frames :])
        return torch.cat(frames, dim=1)[:, : windows.num_frames]


def _to_uint8(x_BCTHW: torch.Tensor) -> torch.Tensor:
    """Frames (B,T,H,W,3), cut off below the grey level as the official scripts do."""
    return x_BCTHW.movedim(1, -1).float().clamp(-1, 1).add_(1).mul_(127.5).to(torch.uint8)


def _warn_of_another_name(variant: Variant, weights: str) -> None:
    """Versions cannot be told apart by their tensors: 1.1 loads as 1.0 and gives wrong tokens, and the reverse."""
    stem = os.path.splitext(os.path.basename(weights))[0]
    name = stem.removeprefix("vidtok").lstrip("_-")
    says_later = "v1_1" in name or "v1.1" in name
    is_official = name.removesuffix("_v1_1") in {known.removesuffix("_v1_1") for known in NAMES}
    if says_later != variant.streams and (says_later or is_official):
        found = "1.1" if says_later else "1.0"
        warnings.warn(
            f"weights {weights}: by its name the file holds version {found}, and vidtok/{variant.name} is version"
            f" {variant.version}: they load, and give wrong tokens, if the name is right",
            stacklevel=4,
        )
