# SPDX-License-Identifier: Apache-2.0
"""Questions that were answered once, with their data and reports."""
