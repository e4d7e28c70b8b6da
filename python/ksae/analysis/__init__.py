# SPDX-License-Identifier: Apache-2.0
"""What a trained coder does: metrics, evaluation, steering, contexts, pictures."""
