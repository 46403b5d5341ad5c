# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Adapters in folders and on the Hub: the load, the push, and the model card."""
