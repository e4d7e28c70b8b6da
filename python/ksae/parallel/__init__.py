# SPDX-License-Identifier: Apache-2.0
"""Training spread over ranks: who holds which latents, and what ranks exchange."""
