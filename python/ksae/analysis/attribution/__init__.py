# SPDX-License-Identifier: Apache-2.0
"""Which latents a model's answer comes from: their effects on a metric, the edges between them,
and how much of the metric the circuit of the strongest ones accounts for."""

from ksae.analysis.attribution.changes import Means, means
from ksae.analysis.attribution.edges import Edge, edges
from ksae.analysis.attribution.effects import Effects, SiteEffects, effects
from ksae.analysis.attribution.faithfulness import Point, curve
from ksae.analysis.attribution.frozen import frozen
from ksae.analysis.attribution.nodes import Node
from ksae.analysis.attribution.page import circuit_page
from ksae.analysis.attribution.sites import Metric, Site, logit_difference

__all__ = [
    "Edge",
    "Effects",
    "Means",
    "Metric",
    "Node",
    "Point",
    "Site",
    "SiteEffects",
    "circuit_page",
    "curve",
    "edges",
    "effects",
    "frozen",
    "logit_difference",
    "means",
]
