"""TrajTok (arXiv:2602.22779), one token per object trajectory: its networks, with the official keys."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn

from ..schemas.errors import TokenizerError
from .trajtok_layers import Rope3dPerceiver
from .trajtok_model import Segmenter, Sizes
from .trajtok_towers import TEXT_LAYERS, SegmentClip, SegmentVit, TextEncoder
from .weights import WeightsFile, check_tensors, fetch_weights, load_tensors, read_tensors

Model = TypeVar("Model", bound=nn.Module)

# Of the checkpoint of a segmenter, what it was trained with; of that of a whole model, what it does not use.
BESIDE_SEGMENTER = ("text_encoder.", "vision_proj.", "text_proj.", "temp", "itm_head.")
BESIDE_CLIP = ("itm_head.", "text_encoder.embeddings.position_ids")


def build_segmenter(sizes: Sizes | None = None) -> Segmenter:
    """The segmenter, of the published sizes (with its high-resolution head) unless told otherwise; random weights."""
    return Segmenter(sizes or Sizes(up=4)).eval()


def build_segment_vit(sizes: Sizes | None = None) -> SegmentVit:
    """Segmenter, encoder of trajectories and ViT (TrajViT2), of the published sizes unless told otherwise."""
    return SegmentVit(sizes or Sizes()).eval()


def build_text_encoder() -> TextEncoder:
    """The text tower: the first nine layers of BERT-base; random weights."""
    return TextEncoder().eval()


def build_rope3d_perceiver(dim: int, depth: int = 2) -> Rope3dPerceiver:
    """The perceiver that connects slots to other patch features, `dim` channels of both; random weights."""
    return Rope3dPerceiver(dim, depth).eval()


def load_segmenter(weights: str, grid: int = 56) -> Segmenter:
    """The segmenter of a published segmenter checkpoint, by path or URL; TokenizerError unless every tensor fits.

    Widths follow from the tensors, except `grid`, the patches to a side of a frame.
    """
    file = fetch_weights(weights)
    tensors = {name: value for name, value in read_tensors(file).items() if not name.startswith(BESIDE_SEGMENTER)}
    tensors = {name.removeprefix("vision_encoder."): value for name, value in tensors.items()}
    sizes = sizes_of(tensors, "", grid, file)
    with torch.device("meta"):
        model = build_segmenter(sizes)
    return _loaded(model, tensors, file)


def load_segment_clip(
    weights: str,
    grid: int = 56,
    vit_heads: int = 16,
    *,
    add_mean_traj: bool = False,
    attend_other_latents: bool = False,
) -> SegmentClip:
    """The whole model (TrajViT2 and text tower) of a published checkpoint, by path or URL, as `load_segmenter`.

    Widths follow from the tensors, except `grid` and the number of heads of the ViT; nor do the variants of Sizes.
    """
    file = fetch_weights(weights)
    tensors = {name: value for name, value in read_tensors(file).items() if not name.startswith(BESIDE_CLIP)}
    tensors = {name: value for name, value in tensors.items() if not _is_unused_layer(name)}
    sizes = sizes_of(tensors, "vision_encoder.traj_tokenizer.segmenter.", grid, file, vit_heads)
    sizes = replace(sizes, add_mean_traj=add_mean_traj, attend_other_latents=attend_other_latents)
    with torch.device("meta"):
        model = SegmentClip(sizes).eval()
    return _loaded(model, tensors, file)


def sizes_of(
    tensors: Mapping[str, torch.Tensor], prefix: str, grid: int, weights: WeightsFile, vit_heads: int = 16
) -> Sizes:
    """The sizes of the model that `tensors` are of, whose segmenter's keys begin with `prefix`."""
    queries = tensors.get(f"{prefix}trajectory_perceiver.latents")
    if queries is None or queries.ndim != 2:
        raise TokenizerError(
            f"weights {weights.uri}: no tensor {prefix}trajectory_perceiver.latents of two dimensions: they are not"
            f" those of TrajTok: give model.pth of a published segmenter or model"
        )
    encoder = prefix.removesuffix("segmenter.")
    vit = f"{encoder.removesuffix('traj_tokenizer.')}vision_encoder.vit.encoder.layer."
    num_slots, dim = queries.shape
    _, per_slot, feature_dim = _shape(tensors, f"{encoder}latents", (num_slots, 1, dim))
    token_dim, _ = _shape(tensors, f"{encoder}output_projector.weight", (dim, dim))
    vit_dim, _ = _shape(tensors, f"{vit}0.attention.attention.query.weight", (token_dim, token_dim))
    stages = range(_count(tensors, f"{prefix}patch_encoder.proj.") or len(Sizes().depths))
    return Sizes(
        dim=dim,
        num_slots=num_slots,
        grid=grid,
        depth=_count(tensors, f"{prefix}trajectory_perceiver.layers."),
        level=per_slot.bit_length() - 1,
        up=_times_finer(tensors, f"{prefix}patch_decoder_high_res.conv_up."),
        vit_layers=_count(tensors, vit),
        vit_heads=vit_heads,
        vit_dim=vit_dim,
        feature_dim=feature_dim,
        token_dim=token_dim,
        depths=tuple(_count(tensors, f"{prefix}patch_encoder.backbone.stages.{i}.") for i in stages),
        widths=tuple(
            _shape(tensors, f"{prefix}patch_encoder.proj.{i}.weight", (dim, 96 << i, 1, 1))[1] for i in stages
        ),
    )


def _shape(tensors: Mapping[str, torch.Tensor], name: str, otherwise: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a tensor, where there is one with that many dimensions."""
    found = tuple(tensors[name].shape) if name in tensors else otherwise
    return found if len(found) == len(otherwise) else otherwise


def _times_finer(tensors: Mapping[str, torch.Tensor], prefix: str) -> int | None:
    """How much finer the grid is behind convolutions each of which, but for the last, doubles the sides."""
    shapes = [tensors[name].ndim for name in tensors if name.startswith(prefix) and name.endswith(".weight")]
    return 1 << (shapes.count(4) - 1) if 4 in shapes else None


def _count(tensors: Mapping[str, torch.Tensor], prefix: str) -> int:
    return len({name[len(prefix) :].partition(".")[0] for name in tensors if name.startswith(prefix)})


def _is_unused_layer(name: str) -> bool:
    layer = re.match(r"text_encoder\.encoder\.layer\.(\d+)\.", name)
    return layer is not None and int(layer[1]) >= TEXT_LAYERS


def _loaded(model: Model, tensors: Mapping[str, torch.Tensor], weights: WeightsFile) -> Model:
    """`model`, made on no device, with `tensors` on the CPU."""
    check_tensors(tensors, model.state_dict(), weights, type(model).__name__)
    model = model.to_empty(device="cpu")
    load_tensors(model, tensors)
    return model.requires_grad_(False)
