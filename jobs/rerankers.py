"""Routers as scorers of frames: over embeddings that a cache has, or over early layers of a model that sees them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby

import numpy as np
import pyarrow as pa
import torch

from ..pipeline.cache import TokenCache
from ..pipeline.labels import add_policies
from ..pipeline.policy import choose_policy
from ..pipeline.queries import add_queries
from ..pipeline.relevance import encoders_of
from ..pipeline.rerank import Reranked, Reranker, Row, rerank
from ..pipeline.scoring import scores_for, text_vectors
from ..schemas.digest import digest_of
from ..schemas.errors import CacheError, DecodeError, TokenizerError
from ..schemas.relevance import Calibration, ScorerSpec
from ..tokenizers.early_layers import EarlyLayers, EarlyLayerScorer
from ..tokenizers.router import RouterFile, pair_features
from .reconstruct import source_of

PROBABILITY = Calibration(rule="sigmoid", scale=1.0, bias=0.0)  # of logits


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterUse:
    """A trained router: its file, the folder of the model that it is over (for early layers), how many frames it scores
    for each query, and on which device.
    """

    file: str
    model: str | None = None
    top: int = 100
    device: str = "cpu"


class PairScorer:
    """A relevance head over an encoder's embeddings, as a FrameScorer that is given embeddings (N,D) for frames."""

    def __init__(self, cache: TokenCache, file: RouterFile, encoder: str) -> None:
        self._head = file.relevance()
        self._vector = lru_cache(1)(partial(_text_vector, cache, encoder))
        self.spec = ScorerSpec(
            name="pair",
            dim=None,
            weights_sha256=digest_of([file.about.of, file.file.sha256]),
            calibration=PROBABILITY,
        )

    @torch.inference_mode()
    def score(self, frames_NHWC: np.ndarray, text: str) -> np.ndarray:
        """Logits (N,) float32 that frames matter to a query, by their embeddings."""
        text_ND = self._vector(text).expand(len(frames_NHWC), -1)
        return self._head(pair_features(torch.from_numpy(frames_NHWC), text_ND)).numpy()


def score_by_router(
    cache: TokenCache, texts: Sequence[str], router: RouterUse, *, first: str | None, where: str
) -> tuple[str, Reranked]:
    """Score the best frames of the encoder `first` by the router's relevance head; what `relevance` calls it."""
    reranker = load_reranker(cache, router)
    return reranker.name, rerank(cache, texts, reranker, top=router.top, first=first, where=where)


def load_reranker(cache: TokenCache, router: RouterUse) -> Reranker:
    """The relevance head of a router as a scorer. It looks at frames decoded from their sources where it is over early
    layers, otherwise at embeddings that the cache has.
    """
    file = RouterFile.read(router.file)
    name = f"router_{file.file.sha256[:8]}"  # routers stand side by side
    if file.about.features == "early":
        scorer = EarlyLayerScorer(router.file, _model_of(router), router.device)
        return Reranker(name=name, scorer=scorer, frames_of=partial(_pixels, cache))
    encoder = encoder_of(cache, file)
    return Reranker(name=name, scorer=PairScorer(cache, file, encoder), frames_of=partial(_embeddings, cache, encoder))


def encoder_of(cache: TokenCache, file: RouterFile) -> str:
    """The encoder of the cache whose embeddings a router was trained on; CacheError where there is none."""
    for name, encoder in encoders_of(cache.info).items():
        if file.about.of in (encoder.spec["weights_sha256"], encoder.spec["name"]):
            return name
    raise CacheError(
        f"{cache.folder.url}: router {file.file.uri} was trained on embeddings of {file.about.of[:12]}, which the cache"
        f" has not: train one on an encoder that it has"
    )


def decide_policy(cache: TokenCache, router: RouterUse, text: str) -> float:
    """The probability that a query asks for a fragment of the video, by the router's policy head; it is kept in
    `policies`.
    """
    file = RouterFile.read(router.file)
    head = file.policy()
    if file.about.features == "early":
        layers = EarlyLayers(_model_of(router), file.about.layers or 0, router.device)
        if layers.sha256 != file.about.of:
            raise TokenizerError(
                f"weights {router.file}: this router was trained on another model than {router.model}: give that one"
            )
        features_NF = layers.text_features([text])
    else:
        features_NF = _text_vector(cache, encoder_of(cache, file), text)
    with torch.inference_mode():
        p_fragment = head(features_NF.cpu().float()).softmax(-1)[0, 1].item()
    (query_id,) = add_queries(cache.folder, [text])
    policy = "fragment" if p_fragment >= 0.5 else "global"
    said = {"query_id": query_id, "source": f"router:{file.file.sha256[:8]}", "video_id": None}
    add_policies(cache.folder, [{**said, "policy": policy, "p_fragment": p_fragment}])
    return p_fragment


def policy_of(cache: TokenCache, text: str, scorer: str | None, where: str) -> str:
    """The policy that the encoder's p of all frames in scope says: a router has scored only the best of them."""
    return choose_policy(scores_for(cache, text, scorer, where)["p"].to_numpy()).policy


def _text_vector(cache: TokenCache, encoder: str, text: str) -> torch.Tensor:
    """float32 (1,D)."""
    return torch.from_numpy(text_vectors(cache, encoder, [text]))


def _model_of(router: RouterUse) -> str:
    if router.model is None:
        raise TokenizerError(
            f"weights {router.file}: this router is over early layers of a vision-language model: give its folder"
            f" (--router-model)"
        )
    return router.model


def _pixels(cache: TokenCache, rows: Sequence[Row]) -> Iterator[tuple[Sequence[Row], np.ndarray | str]]:
    """The frames of one clip after the other, decoded from their sources, or why they cannot be."""
    for clip_id, group in groupby(sorted(rows, key=lambda row: row["clip_id"]), key=lambda row: row["clip_id"]):
        chosen = list(group)
        try:
            _, frames_THWC = source_of(cache, clip_id)
        except DecodeError as error:
            yield chosen, str(error)
            continue
        yield chosen, frames_THWC[[row["frame"] for row in chosen]]


def _embeddings(
    cache: TokenCache, encoder: str, rows: Sequence[Row]
) -> Iterator[tuple[Sequence[Row], np.ndarray | str]]:
    """The embeddings of all these frames together."""
    asked = pa.table({"clip_id": [row["clip_id"] for row in rows], "frame": [row["frame"] for row in rows]})
    found = cache.answer(
        f"""select clip_id, frame, any_value(embedding) as embedding from frames_{encoder} semi join asked
            using (clip_id, frame) group by all""",
        [],
        asked=asked,
    ).to_pylist()
    vectors = {(row["clip_id"], row["frame"]): row["embedding"] for row in found}
    yield rows, np.array([vectors[row["clip_id"], row["frame"]] for row in rows], np.float32)
