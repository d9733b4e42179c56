"""TrajTok (arXiv:2602.22779), one token per object trajectory: its networks, with the official keys."""

from .trajtok_layers import Rope3dPerceiver
from .trajtok_model import Segmenter, Sizes
from .trajtok_towers import SegmentVit, TextEncoder


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
