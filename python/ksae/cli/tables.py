# SPDX-License-Identifier: Apache-2.0
"""What the commands print of an evaluation, and under which words."""

from __future__ import annotations

SUMMARY = {
    "fvu": "FVU (variance not explained)",
    "nmse": "NMSE",
    "explained_variance_centred": "explained variance, centred",
    "l0": "L0 (active latents a token)",
    "dead": "dead latents (never fired here)",
    "cosine": "cosine",
    "norm_ratio": "length of reconstruction / of x",
}
LM_SUMMARY = {
    "ce_clean": "cross-entropy, clean",
    "ce_sae": "cross-entropy, with the reconstruction",
    "ce_zero": "cross-entropy, zero-ablated",
    "ce_recovered": "recovered share",
    "kl_sae": "KL to clean, with the reconstruction",
    "kl_recovered": "KL recovered share",
}

ORACLE_SUMMARY = {
    "fvu_oracle": SUMMARY["fvu"],
    "l0_oracle": SUMMARY["l0"],
    "dead_oracle": SUMMARY["dead"],
    **{f"{k}_oracle": v for k, v in LM_SUMMARY.items() if k not in ("ce_clean", "ce_zero")},
}
