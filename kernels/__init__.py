# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of ksae (torch and triton only), installed as ``ksae.kernels``.

Importing this package does no work: from a checkout, tools that look for a package named
``kernels`` import it.
"""
