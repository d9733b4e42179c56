"""PyraTok (arXiv:2601.16210) as its code was released: a causal VAE, whose latents become stages of 16-bit ids."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..schemas.errors import TokenizerError
from .base import NO_CODE
from .pyratok_quantizer import WAN_STATISTICS, LatentStatistics, LevelIds, Quantized, ResidualSignQuantizer
from .pyratok_vae import VaeSizes, WanVae
from .weights import WeightsFile, check_tensors, fetch_folder, fetch_weights, load_tensors, read_tensors

FILES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")  # what else is named as weights is a folder of a model
OF_QUANTIZER, STAGES = "lapq_", "lapq_quantizer.layers."
FIXED = (".bitmask", ".codebook")  # tensors of the quantizer that say what its sizes say


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizerSizes:
    """What decides the shapes of the quantizer, and how it treats text; by default as released, without text.

    Embedded tokens of `text_input_dim` are brought to `text_embed_dim` over `text_hidden_dim`, unless they have it.
    """

    num_stages: int = 4
    text_embed_dim: int | None = None
    text_input_dim: int | None = None
    text_hidden_dim: int = 1024
    text_condition_heads: int = 2


class PyraTok(WanVae):
    """The VAE and the quantizer of its means, with the keys of the release. Methods take and give (B,C,T,H,W).

    `statistics`, where given, bring latents to the range of the quantizer, which is about -2 to 2; the release has none
    and relies on an encoder that was trained with the quantizer.
    """

    def __init__(self, sizes: VaeSizes, quantizer: QuantizerSizes, statistics: LatentStatistics | None = None) -> None:
        super().__init__(sizes)
        if statistics is not None and len(statistics.mean) != sizes.z_dim:
            raise ValueError(f"statistics of {sizes.z_dim} channels are wanted: {len(statistics.mean)=}")
        self.statistics = statistics
        self.lapq_text_mlp = _text_mlp(quantizer)
        self.lapq_quantizer = _quantizer(sizes, quantizer)

    def quantize(
        self, mean_BCthw: torch.Tensor, text_BLE: torch.Tensor | None = None, mask_BL: torch.Tensor | None = None
    ) -> Quantized:
        """What the quantizer makes, in float32, of the encoder's means; `text` and `mask` as it takes them.

        Its values are normalized where there are statistics: `restored` brings them back.
        """
        z_BCthw = mean_BCthw.float()
        if self.statistics is not None:
            z_BCthw = self.statistics.normalized(z_BCthw)
        if text_BLE is None or self.lapq_quantizer.text_condition_scale == 0:
            return self.lapq_quantizer(z_BCthw)
        return self.lapq_quantizer(z_BCthw, self.lapq_text_mlp(text_BLE), mask_BL)

    def restored(self, values_BCthw: torch.Tensor) -> torch.Tensor:
        """Latents for `decode`, of the quantizer's values."""
        return values_BCthw if self.statistics is None else self.statistics.restored(values_BCthw)

    def encode_levels(self, x_BCTHW: torch.Tensor) -> list[LevelIds]:
        """The ids of every stage, of frames as `encode` takes them; NO_CODE where latents are no numbers.

        A sign that could be another one could change all later stages: their margins are no larger.
        """
        mean_BCthw = self.encode(x_BCTHW).mean_BCthw
        made = self.quantize(mean_BCthw)
        is_lost_Bthw1 = ~mean_BCthw.isfinite().all(dim=1).unsqueeze(-1)
        ids_BthwQ = made.ids_BthwQ.masked_fill(is_lost_Bthw1, NO_CODE)
        margins_BthwQ = made.margins_BthwQ.cummin(-1).values
        levels = zip(ids_BthwQ.unbind(-1), margins_BthwQ.unbind(-1), strict=True)
        return [LevelIds(ids_Bthw=ids, margins_Bthw=margins) for ids, margins in levels]

    def latents_of_levels(self, ids: Sequence[torch.Tensor]) -> torch.Tensor:
        """Latents (B,C,t,h,w) for `decode`, of the ids (B,t,h,w) of all stages or of the first.

        TokenizerError for anything that is no ids of a clip.
        """
        if len({tuple(ids_Bthw.shape) for ids_Bthw in ids}) != 1:
            found = ", ".join(str(tuple(ids_Bthw.shape)) for ids_Bthw in ids) or "none"
            raise TokenizerError(
                f"ids of PyraTok's release are (B,t,h,w) of all of its {self.lapq_quantizer.num_stages} levels or of"
                f" the first, found {found}: pass them as they were made"
            )
        return self.latents_of(torch.stack(list(ids), dim=-1))

    def latents_of(self, ids_BthwQ: torch.Tensor) -> torch.Tensor:
        """Latents (B,C,t,h,w) for `decode`, of ids (B,t,h,w,Q) of all stages or of the first Q."""
        return self.restored(self.lapq_quantizer.decode(ids_BthwQ))


def _text_mlp(quantizer: QuantizerSizes) -> nn.Module:
    before, hidden, behind = quantizer.text_input_dim, quantizer.text_hidden_dim, quantizer.text_embed_dim
    if before is None or behind is None or before == behind:
        return nn.Identity()
    return nn.Sequential(nn.Linear(before, hidden), nn.SiLU(), nn.Linear(hidden, behind))


def _quantizer(sizes: VaeSizes, quantizer: QuantizerSizes) -> ResidualSignQuantizer:
    return ResidualSignQuantizer(
        sizes.z_dim,
        quantizer.num_stages,
        text_embed_dim=quantizer.text_embed_dim,
        text_condition_heads=quantizer.text_condition_heads,
    )


def build_vae(**dims: Any) -> WanVae:
    """The VAE alone, with random weights; `dims` are fields of VaeSizes, by default those of Wan 2.1."""
    return WanVae(VaeSizes(**dims)).eval()


def build_release(
    sizes: VaeSizes | None = None,
    quantizer: QuantizerSizes | None = None,
    statistics: LatentStatistics | None = None,
) -> PyraTok:
    """The model of the release, of the published sizes unless told otherwise, with random weights."""
    return PyraTok(sizes or VaeSizes(), quantizer or QuantizerSizes(), statistics).eval()


def load_release(weights: str, *, normalized: bool = False) -> PyraTok:
    """The model of a published checkpoint: a file, or the folder of a diffusers model, by path or URL.

    TokenizerError unless every tensor fits. `normalized` as in `ReleaseFile.build`.
    """
    return ReleaseFile.read(weights).build(normalized=normalized)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseFile:
    """A published checkpoint, checked: where it lies, its tensors, the config of a folder, and sizes by its tensors."""

    file: WeightsFile
    tensors: Mapping[str, torch.Tensor]
    config: Mapping[str, Any]
    sizes: VaeSizes
    quantizer: QuantizerSizes

    @staticmethod
    def read(weights: str) -> "ReleaseFile":
        """The file, or the folder of a diffusers model, at a path or URL; TokenizerError unless every tensor fits.

        A VAE of Wan 2.1 has none of the quantizer, which has no learned part in what it does without text.
        """
        file, tensors, config = _read(weights)
        sizes, quantizer = vae_sizes_of(tensors, file), quantizer_sizes_of(tensors)
        with torch.device("meta"):
            expected = PyraTok(sizes, quantizer).state_dict()
        has_quantizer = any(name.startswith(OF_QUANTIZER) for name in tensors)
        found = {name: value for name, value in tensors.items() if not name.endswith(FIXED)}
        expected = {
            name: value
            for name, value in expected.items()
            if not name.endswith(FIXED) and (has_quantizer or not name.startswith(OF_QUANTIZER))
        }
        check_tensors(found, expected, file, "PyraTok's release or of the VAE of Wan 2.1")
        return ReleaseFile(file=file, tensors=found, config=config, sizes=sizes, quantizer=quantizer)

    def level_grids(self, num_frames: int, height: int, width: int) -> tuple[tuple[int, int, int], ...]:
        """The (t,h,w) grid of every level of a clip: those of its latents."""
        return (self.sizes.grid_of(num_frames, height, width),) * self.quantizer.num_stages

    def statistics(self) -> LatentStatistics:
        """Those of the folder's config.json, or of Wan 2.1 for as many channels; TokenizerError without either."""
        found = WAN_STATISTICS
        if self.config.get("latents_mean") and self.config.get("latents_std"):
            try:
                found = LatentStatistics(mean=self.config["latents_mean"], std=self.config["latents_std"])
            except (TypeError, ValueError) as error:
                raise TokenizerError(
                    f"weights {self.file.uri}: latents_mean and latents_std of config.json are not usable ({error}):"
                    f" mend them, or do not normalize"
                ) from None
        if len(found.mean) != self.sizes.z_dim:
            raise TokenizerError(
                f"weights {self.file.uri}: its latents have {self.sizes.z_dim} channels, and there are statistics of"
                f" {len(found.mean)}: give a folder whose config.json has latents_mean and latents_std, or do not"
                f" normalize"
            )
        return found

    def build(self, *, normalized: bool = False) -> PyraTok:
        """The model with these weights; `normalized` latents are quantized with the `statistics`: for a VAE that was
        not trained with the quantizer.
        """
        with torch.device("meta"):
            model = PyraTok(self.sizes, self.quantizer, self.statistics() if normalized else None).eval()
        model = model.to_empty(device="cpu")
        model.lapq_quantizer = _quantizer(self.sizes, self.quantizer).eval()  # with what no file needs to hold
        load_tensors(model, {**model.state_dict(), **self.tensors})
        return model.requires_grad_(False)


def vae_sizes_of(tensors: Mapping[str, torch.Tensor], weights: WeightsFile) -> VaeSizes:
    """The sizes of the VAE that `tensors` are of; TokenizerError where they are of something else."""
    try:
        base_dim = len(tensors["encoder.conv_in.bias"])
        levels = range(_count(tensors, "decoder.up_blocks."))
        widths = [len(tensors[f"decoder.up_blocks.{i}.resnets.0.conv1.bias"]) for i in reversed(levels)]
        up = [f"decoder.up_blocks.{i}.upsamplers.0.time_conv.bias" in tensors for i in reversed(levels)]
        return VaeSizes(
            base_dim=base_dim,
            z_dim=len(tensors["quant_conv.bias"]) // 2,
            dim_mult=tuple(width // base_dim for width in widths),
            num_res_blocks=_count(tensors, "decoder.up_blocks.0.resnets.") - 1,
            temperal_downsample=tuple(up[1:]),
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise TokenizerError(
            f"weights {weights.uri}: they are not those of PyraTok's release or of the VAE of Wan 2.1 ({error}): give"
            f" the file of its tensors, or its folder with config.json"
        ) from None


def quantizer_sizes_of(tensors: Mapping[str, torch.Tensor]) -> QuantizerSizes:
    """The sizes of the quantizer that is among `tensors`; those without text where there is none."""
    projection, mlp = tensors.get(f"{STAGES}0.text_proj.weight"), tensors.get("lapq_text_mlp.0.weight")
    usual = QuantizerSizes()
    hidden_dim, input_dim = (usual.text_hidden_dim, None) if mlp is None else mlp.shape
    return QuantizerSizes(
        num_stages=_count(tensors, STAGES) or usual.num_stages,
        text_embed_dim=None if projection is None else projection.shape[1],
        text_input_dim=input_dim,
        text_hidden_dim=hidden_dim,
    )


def _count(tensors: Mapping[str, torch.Tensor], prefix: str) -> int:
    return len({name[len(prefix) :].partition(".")[0] for name in tensors if name.startswith(prefix)})


def _read(weights: str) -> tuple[WeightsFile, dict[str, torch.Tensor], dict[str, Any]]:
    """The file or folder, its tensors, and the config of a folder."""
    if weights.lower().endswith(FILES):
        file = fetch_weights(weights)
        return file, read_tensors(file), {}
    folder = fetch_folder(weights)
    tensors, config = {}, {}
    for name in sorted(os.listdir(folder.path)):
        path = os.path.join(folder.path, name)
        if name.endswith(".safetensors"):
            tensors |= read_tensors(replace(folder, path=path))
        elif name == "config.json":
            config = _config(path, folder)
    return folder, tensors, config


def _config(path: str, folder: WeightsFile) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as stream:
            config = json.load(stream)
    except ValueError as error:
        raise TokenizerError(f"weights {folder.uri}: config.json is not JSON: {error}: download it again") from None
    return config if isinstance(config, dict) else {}
