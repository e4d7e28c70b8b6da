# SPDX-License-Identifier: Apache-2.0
"""`ksae bench`: ops, whole steps, growth, quality, roofline, side by side with other libraries.

Suites are listed in suites/__init__.py; each fills rows (harness/record.py), which compare.py,
figures.py and report.py of harness/ read.
"""
