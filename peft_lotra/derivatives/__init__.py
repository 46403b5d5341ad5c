# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Derivatives of KANs by jets: values, first and second derivatives pushed through the layers together."""

from .. import kan  # noqa: F401 (first, since its end imports `api`)
