# Copyright 2026 the peft-lotra authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Parts of tensors, as FSDP spreads them over processes, are not saved."""

from __future__ import annotations

import pytest
from helpers import adapt
from peft.tuners.tuners_utils import BaseTuner

from peft_lotra.kan import KAN


@pytest.mark.skipif(
    not hasattr(BaseTuner, "_get_adapter_state_dict"), reason="PEFT before 0.21 does not ask the tuner"
)
def test_a_part_of_a_tensor_is_refused(tmp_path):
    model = adapt(KAN([3, 4, 2]))
    state = model.state_dict()
    key = "base_model.model.layers.1.lotra_factor_in.default"
    state[key] = state[key].flatten()[:5]  # as FSDP's views
    with pytest.raises(ValueError, match=r"layers.1.lotra_factor_in.default is a part of a tensor, \(5,\)"):
        model.save_pretrained(tmp_path / "adapter", state_dict=state)
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("*.json"))
