# SPDX-License-Identifier: Apache-2.0
"""A folder of static pages that shows what each latent of a coder responds to and writes."""

from ksae.analysis.dashboard.build import Dashboard, Options, build
from ksae.analysis.dashboard.labels import read_labels
from ksae.analysis.dashboard.lens import Lens, logit_lens

__all__ = [
    "Dashboard",
    "Lens",
    "Options",
    "build",
    "logit_lens",
    "read_labels",
]
