# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The KAN layers of any library, described: where the coefficients are and what they mean."""

from . import derivatives, known  # noqa: F401  (teaches `jet` these layers; registers the known kinds)
