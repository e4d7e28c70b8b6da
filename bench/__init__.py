# SPDX-License-Identifier: Apache-2.0
"""`ksae bench`: ops, whole steps, growth, quality, roofline, side by side with other libraries.

Suites are listed in suites.py; each fills rows (record.py), which compare.py, figures.py and
report.py read. costs.py and measure.py import nothing of this folder: scripts can use them alone.
"""
