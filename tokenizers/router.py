"""The heads of a router (VideoRouter, arXiv:2605.05848): does a frame matter to a query, and does a query ask for the
whole video or for a fragment of it.

They are small networks over features that something else makes and that stay as they are: the embeddings of a
bi-encoder, or the early layers of a vision-language model. The paper leaves their sizes open.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from ..schemas.errors import TokenizerError
from .weights import (
    WeightsFile,
    check_tensors,
    description_of,
    fetch_weights,
    load_tensors,
    read_tensors,
    save_described,
)

METADATA_KEY = "tokenmill.router"
HIDDEN = 256


class RelevanceHead(nn.Module):
    """Two layers from the features of a frame and a query (N,F) to the logits (N,) that the frame matters to it."""

    def __init__(self, dim: int, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.layers = _layers(dim, hidden, 1)

    def forward(self, features_NF: torch.Tensor) -> torch.Tensor:
        return self.layers(features_NF).squeeze(-1)


class PolicyHead(nn.Module):
    """Two layers from the features of a query (N,F) to logits (N,2): it asks for the whole video, for a fragment."""

    def __init__(self, dim: int, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.layers = _layers(dim, hidden, 2)

    def forward(self, texts_NF: torch.Tensor) -> torch.Tensor:
        return self.layers(texts_NF)


def _layers(dim: int, hidden: int, outputs: int) -> nn.Sequential:
    # Embeddings have length 1, hidden states of a decoder lengths of their own: normed, one learning rate fits all.
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, outputs))


def pair_features(frames_ND: torch.Tensor, texts_ND: torch.Tensor) -> torch.Tensor:
    """float32 (N,4D) of the embeddings of frames and of their queries: both, their product, their absolute difference.

    Both are brought to length sqrt(D) before, so that a product counts as much as its factors: at length 1 it would be
    sqrt(D) times smaller, and a head would learn queries by heart instead of comparing.
    """
    frames_ND, texts_ND = (F.normalize(x_ND.float(), dim=-1) * x_ND.shape[-1] ** 0.5 for x_ND in (frames_ND, texts_ND))
    return torch.cat((frames_ND, texts_ND, frames_ND * texts_ND, (frames_ND - texts_ND).abs()), dim=-1)


def relevance_loss(logits_N: torch.Tensor, labels_N: torch.Tensor, pos_weight: float) -> torch.Tensor:
    """The mean binary cross-entropy of logits, in which frames that matter (label 1) count `pos_weight` times."""
    weight = torch.tensor(pos_weight, dtype=logits_N.dtype, device=logits_N.device)
    return F.binary_cross_entropy_with_logits(logits_N, labels_N.to(logits_N.dtype), pos_weight=weight)


def policy_loss(logits_N2: torch.Tensor, fragment_N: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy of logits; `fragment_N` says which queries ask for a fragment."""
    return F.cross_entropy(logits_N2, fragment_N.long())


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterAbout:
    """What the heads of a router take: features of whom, and of what sizes.

    ``pair`` features are `pair_features` of a bi-encoder's embeddings for relevance, and its embeddings of texts for
    the policy; ``early`` those of the first `layers` layers of a model. `of` names which one: the SHA-256 of its
    weights, or its name. The dim of an absent head is None; both heads have the same hidden size.
    """

    features: Literal["pair", "early"]
    of: str
    layers: int | None = None
    relevance_dim: int | None = None
    policy_dim: int | None = None
    hidden: int = HIDDEN

    def __post_init__(self) -> None:
        if self.features not in ("pair", "early") or (self.layers is None) == (self.features == "early"):
            raise ValueError(f"features are pair, or early with their layers: {self.features=} {self.layers=}")
        dims = [dim for dim in (self.relevance_dim, self.policy_dim) if dim is not None]
        if not dims or min(*dims, self.hidden, 1 if self.layers is None else self.layers) < 1:
            raise ValueError(f"a router has a head or two, of sizes from 1 on: {self}")


class RouterHeads(nn.Module):
    """The heads that a file holds, under the names that their tensors have in it."""

    def __init__(self, relevance: RelevanceHead | None, policy: PolicyHead | None) -> None:
        super().__init__()
        self.relevance, self.policy = relevance, policy


def _heads_of(about: RouterAbout) -> RouterHeads:
    return RouterHeads(
        None if about.relevance_dim is None else RelevanceHead(about.relevance_dim, about.hidden),
        None if about.policy_dim is None else PolicyHead(about.policy_dim, about.hidden),
    )


def save_router(
    path: str,
    about: RouterAbout,
    relevance: RelevanceHead | None,
    policy: PolicyHead | None,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Write a .safetensors file, whose metadata say what the heads take; the same router and `extra` give the same
    bytes. ValueError for heads that are not as `about` says.
    """
    found = RouterHeads(relevance, policy).state_dict()
    with torch.device("meta"):
        wanted = _heads_of(about).state_dict()
    if _shapes(found) != _shapes(wanted):
        raise ValueError(f"heads with the tensors {_shapes(wanted)} are wanted: {_shapes(found)}, {about=}")
    save_described(path, found, METADATA_KEY, {"about": dataclasses.asdict(about), "extra": dict(extra or {})})


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tensors.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterFile:
    """A file that `save_router` wrote, checked: where it lies, its tensors, and the `about` and `extra` given to it."""

    file: WeightsFile
    tensors: Mapping[str, torch.Tensor]
    about: RouterAbout
    extra: Mapping[str, str]

    @staticmethod
    def read(uri: str) -> "RouterFile":
        """The file at a path or URL; TokenizerError unless it is one of a router and every tensor fits."""
        file = fetch_weights(uri)
        said = description_of(file, METADATA_KEY, "a router", "give the file that training of a router wrote")
        try:
            about = RouterAbout(**said["about"])
            with torch.device("meta"):
                expected = _heads_of(about).state_dict()
        except (KeyError, TypeError, ValueError) as error:
            raise TokenizerError(
                f"weights {file.uri}: this version knows no router such as their metadata describe ({error}):"
                f" use the version that wrote them"
            ) from None
        tensors = read_tensors(file)
        check_tensors(tensors, expected, file, "the router that its metadata describe")
        return RouterFile(file=file, tensors=tensors, about=about, extra=said.get("extra", {}))

    def relevance(self) -> RelevanceHead:
        """The head that scores frames, with its weights; TokenizerError where there is none."""
        heads = self._build()
        if heads.relevance is None:
            raise self._lacks("relevance head, which scores frames", "policy")
        return heads.relevance

    def policy(self) -> PolicyHead:
        """The head that tells queries apart, with its weights; TokenizerError where there is none."""
        heads = self._build()
        if heads.policy is None:
            raise self._lacks("policy head, which tells queries for a fragment from others", "relevance")
        return heads.policy

    def _build(self) -> RouterHeads:
        heads = _heads_of(self.about)
        load_tensors(heads, self.tensors)
        return heads.eval().requires_grad_(False)

    def _lacks(self, head: str, has: str) -> TokenizerError:
        return TokenizerError(
            f"weights {self.file.uri}: this router has no {head}, only one for {has}: give a router that was trained"
            f" with it"
        )
