"""Pruning: whole experts are left out, those whose outputs matter least.

reap     mean over routed tokens of g ||expert_e(x)||            arXiv 2510.13999
taylor   sum over routed tokens of (d . y)^2                     y output of down, d gradient of the loss there:
         the squared first-order change of the loss were the expert not there
frequency, random
"""

from __future__ import annotations

import numpy as np

from ..calibration.statistics import LayerStatistics
from ..method_options import Prune
from .grouping import Floats


def pruning_scores(statistics: LayerStatistics, options: Prune, index: int) -> Floats:
    """(E,) scores of one layer's experts; the highest stay.

    Args:
        statistics: with `num_tokens`, `saliency_sum` and `taylor_sum`.
        options: the method.
        index: place of the layer among the MoE layers.
    """
    tokens = statistics["num_tokens"].double().numpy()
    if options.saliency == "reap":
        scores = statistics["saliency_sum"].double().numpy() / np.maximum(tokens, 1)
    elif options.saliency == "taylor":
        scores = statistics["taylor_sum"].double().numpy()
    elif options.saliency == "frequency":
        scores = tokens
    else:
        scores = np.random.default_rng([options.seed, index]).random(len(tokens))
    return scores.astype(np.float64)
