"""Which experts stay, and which of them each other expert joins.

Source: arXiv 2310.01334 section 3.1. Frequencies are taken relative to each layer's most used expert, which stays, and
the rest of the global quota goes to the highest of all layers, so that counts adapt to how evenly a layer routes. Each
other expert joins the dominant expert of its layer that it is most alike. Differences: exactly the asked number stays,
also where frequencies are equal; groups may have a greatest size; and average linkage over all experts (as arXiv
2410.08589) stands beside the paper's grouping.

Cost: sorts of E and E^2 numbers a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.spatial.distance import squareform

Floats = NDArray[np.floating]
Ids = NDArray[np.intp]


def ranking(score_E: Floats) -> Ids:
    """Experts from the highest score to the lowest; of equal ones the lower id first."""
    return np.argsort(-score_E, kind="stable")


def adaptive_counts(scores: Sequence[Floats], num_kept: int, at_least: Sequence[int]) -> list[int]:
    """How many experts each layer keeps when the highest scores of all layers stay.

    Args:
        scores: (E,) of each layer, comparable between layers. Of equal ones those of the first layers stay.
        num_kept: experts to keep in all layers together; between the sum of `at_least` and all of them.
        at_least: the fewest that each layer keeps.

    Returns:
        One count a layer, `num_kept` in all.
    """
    assert sum(at_least) <= num_kept <= sum(map(len, scores))
    layer = np.concatenate([np.full(len(score), i) for i, score in enumerate(scores)])
    place = np.concatenate([np.arange(len(score)) for score in scores])  # 0 for a layer's best
    share = np.concatenate([score[ranking(score)] for score in scores])
    is_optional = place >= np.asarray(at_least)[layer]
    order = np.lexsort((place, layer, -share, is_optional))
    return [int(n) for n in np.bincount(layer[order[:num_kept]], minlength=len(scores))]


def dominant_experts(score_E: Floats, count: int, num_router_groups: int = 1) -> Ids:
    """The `count` experts of highest score, ascending.

    Args:
        score_E: one score an expert.
        count: how many.
        num_router_groups: consecutive blocks of experts that each keep the same number, for routers that choose
            among groups of experts first; divides E and `count`.
    """
    blocks = score_E.reshape(num_router_groups, -1)
    chosen = [ranking(block)[: count // num_router_groups] + i * blocks.shape[1] for i, block in enumerate(blocks)]
    return np.sort(np.concatenate(chosen))


def join_dominant(similarity_EE: Floats, dominant: Ids, max_size: int | None = None) -> Ids:
    """The dominant expert that each expert joins: the one it is most alike, of equal ones the lowest id.

    Args:
        similarity_EE: higher is more alike.
        dominant: ids of the experts that stay.
        max_size: experts a group holds at most, its dominant one included; the most alike pairs join first.

    Returns:
        (E,) id of a dominant expert; a dominant expert's is its own.
    """
    num_experts = len(similarity_EE)
    joined = np.full(num_experts, -1)
    joined[dominant] = dominant
    others = np.flatnonzero(joined < 0)
    pairs = similarity_EE[np.ix_(others, dominant)]
    if max_size is None:
        joined[others] = dominant[pairs.argmax(1)]
        return joined
    assert max_size * len(dominant) >= num_experts
    room = np.full(len(dominant), max_size - 1)
    open_pairs = pairs.astype(np.float64)
    for _ in others:
        open_pairs[:, room == 0] = -np.inf
        row, column = np.unravel_index(open_pairs.argmax(), open_pairs.shape)
        joined[others[row]] = dominant[column]
        open_pairs[row] = -np.inf
        room[column] -= 1
    return joined


def cluster_experts(similarity_EE: Floats, count: int, score_E: Floats) -> Ids:
    """`count` clusters by average linkage of 1 - similarity; each is led by its expert of highest score.

    Returns:
        (E,) id of the leader of each expert's cluster.
    """
    if count == len(score_E):
        return np.arange(count)
    distance = 1 - (similarity_EE + similarity_EE.T) / 2
    np.fill_diagonal(distance, 0)
    labels = cut_tree(linkage(squareform(distance, checks=False), "average"), n_clusters=[count])[:, 0]
    order = ranking(score_E)
    first = dict(zip(labels[order][::-1], order[::-1], strict=True))  # the best comes last and stays
    return np.array([first[label] for label in labels])


def join_in_turn(similarity_EE: Floats, dominant: Ids, score_E: Floats, max_size: int) -> Ids:
    """Few large groups, most experts alone: from the most salient dominant expert on, each takes the nearest left.

    Args:
        similarity_EE: higher is more alike.
        dominant: ids of the experts that stay.
        score_E: saliency.
        max_size: experts a group holds at most, its dominant one included.

    Returns:
        As `join_dominant`.
    """
    assert max_size * len(dominant) >= len(similarity_EE)
    joined = np.full(len(similarity_EE), -1)
    joined[dominant] = dominant
    for leader in dominant[ranking(score_E[dominant])]:
        others = np.flatnonzero(joined < 0)
        nearest = others[ranking(similarity_EE[leader, others])[: max_size - 1]]
        joined[nearest] = leader
    return joined
