# SPDX-License-Identifier: Apache-2.0
"""What a dashboard holds in the formats of other tools: Neuronpedia, SAEDashboard, delphi."""

from ksae.analysis.exports.delphi import delphi
from ksae.analysis.exports.neuronpedia import neuronpedia
from ksae.analysis.exports.saedashboard import saedashboard

__all__ = ["delphi", "neuronpedia", "saedashboard"]
