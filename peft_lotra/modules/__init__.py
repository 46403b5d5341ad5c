# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Helpers for any `nn.Module`, checks of arguments, and reports."""
