# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Parts of tensors, as FSDP spreads them over processes, are not saved."""

from __future__ import annotations

import pytest
from helpers import adapt

from peft_lotra.kan import KAN


def test_a_part_of_a_tensor_is_refused(tmp_path):
    model = adapt(KAN([3, 4, 2]))
    state = model.state_dict()
    key = "base_model.model.layers.1.lotra_factor_in.default"
    state[key] = state[key].flatten()[:5]  # as FSDP's views
    with pytest.raises(ValueError, match=r"layers.1.lotra_factor_in.default is spread over several processes"):
        model.save_pretrained(tmp_path / "adapter", state_dict=state)
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("*.json"))
