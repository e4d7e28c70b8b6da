# SPDX-License-Identifier: Apache-2.0
"""What is compared: ksae's own steps, those of other libraries, and their processes."""
