# SPDX-License-Identifier: Apache-2.0
"""What all suites use: rows, time, memory, processes, reports and pictures."""
