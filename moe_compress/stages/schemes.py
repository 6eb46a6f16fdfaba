"""The scheme of each method."""

from __future__ import annotations

from ..job import Job
from ..method_options import D2MoE, MCSMoE, MSMoE
from .factorise import Factorise
from .lowrank_sparse import LowRankSparse
from .merging import MergeExperts
from .prepare import Prepared
from .pruning import PruneExperts
from .scheme import Scheme


def scheme_of(job: Job, prepared: Prepared) -> Scheme:
    """What does the method that the recipe names."""
    options = prepared.recipe.method
    if isinstance(options, D2MoE):
        return Factorise(job, prepared, options)
    if isinstance(options, MSMoE):
        return MergeExperts(job, prepared, options)
    if isinstance(options, MCSMoE):
        return LowRankSparse(job, prepared, options)
    return PruneExperts(job, prepared, options)
