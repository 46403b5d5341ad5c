# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""LoTRA on KAN layers beside LoRA on linear ones. In a process of its own: `enable_mixed` changes PEFT for good."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


SET_UP = """
import pytest, tempfile, torch
from peft import LoraConfig, PeftMixedModel, get_peft_model
from peft.tuners.mixed import model as mixed_tuners
from torch import nn
from helpers import nested, lotra_layers
from peft_lotra import LoTRAConfig, enable_mixed

torch.manual_seed(0)
x = torch.rand(6, 3) * 1.8 - 0.9

def mixed():
    model = get_peft_model(nested(), LoTRAConfig(r=2, init_weights=False), adapter_name="kan", mixed=True)
    model.add_adapter("head", LoraConfig(r=2, target_modules=["head"], init_lora_weights=False))
    model.set_adapter(["kan", "head"])
    return model
"""


def run(code: str) -> None:
    support = str(Path(__file__).parents[1] / "support")
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {support!r})\n{SET_UP}\n{code}"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_mixed_models():
    run("""
# not without being asked
with pytest.raises(ValueError, match="'LOTRA' is not compatible with the `PeftMixedModel`"):
    mixed()
# another version of PEFT is refused, and left alone
before, layers = mixed_tuners.COMPATIBLE_TUNER_TYPES, mixed_tuners.Layers
del mixed_tuners.Layers
with pytest.raises(RuntimeError, match="peft.tuners.mixed.model has no Layers"):
    enable_mixed()
assert mixed_tuners.COMPATIBLE_TUNER_TYPES is before and "lotra_" not in mixed_tuners.PREFIXES
mixed_tuners.Layers = layers

enable_mixed()
enable_mixed()

model = mixed().eval()
assert len(lotra_layers(model)) == 4
y = model(x)
outputs = {}
for adapters in (["kan"], ["head"], ["kan", "head"]):
    model.set_adapter(adapters)
    outputs[tuple(adapters)] = model(x)
assert torch.equal(outputs["kan", "head"], y)
with model.disable_adapter():
    plain = model(x)
assert len({round(float(v.sum()), 4) for v in (plain, *outputs.values())}) == 4

# both are trained
model.train()
model(x).square().sum().backward()
trained = {n for n, p in model.named_parameters() if p.grad is not None}
assert any("lotra_core" in n for n in trained) and any("lora_A" in n for n in trained)
assert all("lotra_" in n or "lora_" in n for n in trained)
before = {n: p.detach().clone() for n, p in model.named_parameters()}
torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01).step()
assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == trained
model.eval()

y = model(x)
merged = model.merge_and_unload()
torch.testing.assert_close(merged(x), y, rtol=1e-5, atol=1e-5)
assert not any("lotra" in n or "lora" in n for n, _ in merged.named_modules())
assert [type(m).__name__ for m in merged.modules()] == [type(m).__name__ for m in nested().modules()]

# loading, deleting and unloading
base = nested()
state = {k: v.clone() for k, v in base.state_dict().items()}
plain = get_peft_model(base, LoTRAConfig(r=2, init_weights=False)).eval()
y = plain(x)
folder = tempfile.mkdtemp()
plain.save_pretrained(folder)

fresh = nested()
fresh.load_state_dict(state)
model = PeftMixedModel.from_pretrained(fresh, folder, adapter_name="kan").eval()
torch.testing.assert_close(model(x), y, rtol=0, atol=0)
model.add_adapter("head", LoraConfig(r=2, target_modules=["head"], init_lora_weights=False))
model.set_adapter(["kan", "head"])
assert not torch.allclose(model(x), y)
model.delete_adapter("head")
torch.testing.assert_close(model(x), y, rtol=0, atol=0)
unloaded = model.unload()
assert all(torch.equal(v, state[k]) for k, v in unloaded.state_dict().items())

# what is no KAN layer is refused as ever, and LoRA alone is as it was
with pytest.raises(ValueError, match="is not a KAN layer"):
    get_peft_model(nested(), LoTRAConfig(target_modules=["head"]), mixed=True)
lora = get_peft_model(nested(), LoraConfig(target_modules=["head"]), mixed=True)
lora.merge_and_unload()
with pytest.raises(ValueError, match="`target_modules`"):
    get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(), mixed=True)
""")
