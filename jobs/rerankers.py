"""Routers as scorers of frames: over embeddings that a cache has, or over early layers of a model that sees them."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import pyarrow as pa
import torch

from ..pipeline.appended import append, read_table
from ..pipeline.cache import TokenCache
from ..pipeline.queries import add_queries
from ..pipeline.relevance import FrameScorer, encoders_of
from ..pipeline.rerank import FramesOf
from ..pipeline.scoring import text_vectors
from ..schemas.digest import digest_of
from ..schemas.errors import CacheError, TokenizerError
from ..schemas.relevance import Calibration, ScorerSpec
from ..schemas.tables import POLICY_SCHEMA
from ..tokenizers.early_layers import EarlyLayers, EarlyLayerScorer
from ..tokenizers.router import RouterFile, pair_features
from .reconstruct import source_of

POLICIES = "relevance/policies"


class PairScorer:
    """A relevance head over an encoder's embeddings, as a FrameScorer that is given embeddings (N,D) for frames."""

    def __init__(self, cache: TokenCache, file: RouterFile, encoder: str) -> None:
        self._cache, self._head, self._encoder = cache, file.relevance(), encoder
        self.spec = ScorerSpec(
            name="pair",
            dim=None,
            weights_sha256=digest_of([file.about.of, file.file.sha256]),
            calibration=Calibration(rule="sigmoid", scale=1.0, bias=0.0),
        )

    @torch.inference_mode()
    def score(self, frames_NHWC: np.ndarray, text: str) -> np.ndarray:
        """Logits (N,) float32 that frames matter to a query, by their embeddings."""
        text_ND = torch.from_numpy(text_vectors(self._cache, self._encoder, [text])).expand(len(frames_NHWC), -1)
        return self._head(pair_features(torch.from_numpy(frames_NHWC), text_ND)).numpy()


def load_reranker(cache: TokenCache, router: str, model: str | None, device: str) -> tuple[FrameScorer, FramesOf]:
    """The relevance head in the file `router` as a scorer, and what it looks at: frames decoded from their sources
    where it is over early layers of `model`, otherwise embeddings that the cache has.
    """
    file = RouterFile.read(router)
    if file.about.features == "early":
        return EarlyLayerScorer(router, _model_of(router, model), device), partial(_pixels, cache)
    encoder = encoder_of(cache, file)
    return PairScorer(cache, file, encoder), partial(_embeddings, cache, encoder)


def encoder_of(cache: TokenCache, file: RouterFile) -> str:
    """The encoder of the cache whose embeddings a router was trained on; CacheError where there is none."""
    for name, encoder in encoders_of(cache.info).items():
        if file.about.of in (encoder.spec["weights_sha256"], encoder.spec["name"]):
            return name
    raise CacheError(
        f"{cache.folder.url}: router {file.file.uri} was trained on embeddings of {file.about.of[:12]}, which the cache"
        f" has not: train one on an encoder that it has"
    )


def decide_policy(cache: TokenCache, router: str, model: str | None, device: str, text: str) -> float:
    """The probability that a query asks for a fragment of the video, by the policy head in the file `router`; it is
    kept in `policies`.
    """
    file = RouterFile.read(router)
    head = file.policy()
    if file.about.features == "early":
        layers = EarlyLayers(_model_of(router, model), file.about.layers or 0, device)
        if layers.sha256 != file.about.of:
            raise TokenizerError(
                f"weights {router}: this router was trained on another model than {model}: give that one"
            )
        features_NF = layers.text_features([text])
    else:
        features_NF = torch.from_numpy(text_vectors(cache, encoder_of(cache, file), [text]))
    with torch.inference_mode():
        p_fragment = head(features_NF.cpu().float()).softmax(-1)[0, 1].item()
    _keep_policy(cache, f"router:{file.file.sha256[:12]}", text, p_fragment)
    return p_fragment


def _keep_policy(cache: TokenCache, source: str, text: str, p_fragment: float) -> None:
    (query_id,) = add_queries(cache.folder, [text])
    policy = "fragment" if p_fragment >= 0.5 else "global"
    row = {"query_id": query_id, "source": source, "video_id": None, "policy": policy, "p_fragment": p_fragment}

    def lacking() -> pa.Table:
        there = read_table(cache.folder, POLICIES, POLICY_SCHEMA, ["query_id", "source"]).to_pylist()
        is_new = {"query_id": query_id, "source": source} not in there
        return pa.Table.from_pylist([row] if is_new else [], schema=POLICY_SCHEMA)

    append(cache.folder, POLICIES, lacking)


def _model_of(router: str, model: str | None) -> str:
    if model is None:
        raise TokenizerError(
            f"weights {router}: this router is over early layers of a vision-language model: give its folder"
            f" (--router-model)"
        )
    return model


def _pixels(cache: TokenCache, clip_id: str, frames: Sequence[int]) -> np.ndarray:
    _, frames_THWC = source_of(cache, clip_id)
    return frames_THWC[list(frames)]


def _embeddings(cache: TokenCache, encoder: str, clip_id: str, frames: Sequence[int]) -> np.ndarray:
    there = cache.read_frames(encoder, clip_id)
    return there.embeddings_KD[[there.frames.index(frame) for frame in frames]].astype(np.float32)
