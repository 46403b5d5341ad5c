# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Thousands of adapters of one base: stored as rows of one matrix, served in one batch."""
