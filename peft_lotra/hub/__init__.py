# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Adapters in folders and on the Hub: the load, the push, and the model card."""

from .card import write_model_card
from .load import load_adapters
from .push import push_to_hub


__all__ = ["load_adapters", "push_to_hub", "write_model_card"]
