"""Calibrating a scorer by labels: what scale and bias make its scores probabilities."""

from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import minimize

from ..schemas.errors import CacheError
from ..schemas.relevance import Calibration, Rule
from .relevance import standardized

if TYPE_CHECKING:
    from .cache import TokenCache

WEAK = (
    1e-3  # of the square of the scale, beside the mean loss: labels that scores separate wholly would ask for infinity
)


def fit_calibration(cache: "TokenCache", scorer: str, rule: Rule, source: str | None = None) -> Calibration:
    """The calibration that makes the labels of a cache most likely, by the scores that `relevance` has of them.

    `source` chooses one source of labels. CacheError where no scored frame has a label, or all have the same.
    """
    rows = cache.sql(
        """select query_id || video_id as part, raw, label
           from relevance r left join (select query_id, clip_id, frame, max(label) as label from labels
                                       where ? is null or source = ? group by all) l
           using (query_id, clip_id, frame)
           where scorer = ? and query_id in (select query_id from labels)""",
        [source, source, scorer],
    )
    labels_N = rows["label"].to_numpy(zero_copy_only=False).astype(np.float64)
    is_labelled = np.isfinite(labels_N)
    found = set(labels_N[is_labelled].tolist())
    if found != {0.0, 1.0}:
        raise CacheError(
            f"{cache.folder.url}: {int(is_labelled.sum())} frames that {scorer} has scored are labelled, both labels"
            f" are wanted: tokenmill labels import CACHE FILE, and score their queries"
        )
    x_N = rows["raw"].to_numpy().astype(np.float64)
    if rule == "standardized":
        x_N = standardized(x_N, rows["part"].to_numpy(zero_copy_only=False))
    scale, bias = _logistic(x_N[is_labelled], labels_N[is_labelled])
    return Calibration(rule=rule, scale=scale, bias=bias)


def _logistic(x_N: np.ndarray, labels_N: np.ndarray) -> tuple[float, float]:
    """Scale and bias of the logistic regression of labels on one number."""
    width = max(float(x_N.std()), 1e-12)
    unit_N = (x_N - x_N.mean()) / width

    def loss(parameters: np.ndarray) -> float:
        logits_N = parameters[0] * unit_N + parameters[1]
        return float(np.mean(np.logaddexp(0, logits_N) - labels_N * logits_N) + WEAK * parameters[0] ** 2)

    scale, bias = minimize(loss, np.zeros(2)).x
    return float(scale / width), float(bias - scale * x_N.mean() / width)
