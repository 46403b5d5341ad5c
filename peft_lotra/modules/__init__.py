# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Modules of any network: calls of them with other parameters, and locks of what they exchange meanwhile."""
