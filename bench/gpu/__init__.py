# SPDX-License-Identifier: Apache-2.0
"""What a GPU has to answer, in one command: run.py."""
