# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A bank on a stand-in for the Hub: pushed, loaded, and one adapter of it without the others."""

import json
import re

import pytest
import torch
from behaving import X, adapted, apart, net, python
from peft import get_peft_model_state_dict

from peft_lotra import AdapterBank


SCRIPT = """
from hub_server import start_hub
hub = start_hub("user")
import json, torch
from behaving import X, adapted, net
from peft import get_peft_model_state_dict
from peft_lotra import AdapterBank
bank, model = AdapterBank(net()), adapted(net())
state = get_peft_model_state_dict(model)
for number in range(300):
    bank.add(f"customer {number}", state)
bank.add("anna", {key: part + 0.1 for key, part in state.items()})
bank.add("ben", adapted(net(), r=1))

def answer(bank, name):
    with torch.no_grad():
        y = bank.attach()(X, adapter_names=[name] * len(X))
    bank.detach()
    return y

found = {"pushed": str(bank.push_to_hub("user/bank", base_code="base = make()"))}
found["files"] = {name: len(blob.content) for name, blob in hub.repos["user/bank"].files("main").items()}
found["card"] = hub.repos["user/bank"].files("main")["README.md"].content.decode()
before = hub.sent
some = AdapterBank.load(net(), "user/bank", names=["ben", "anna"])
found["sent"], found["names"] = hub.sent - before, some.names
found["same"] = [torch.equal(answer(some, name), answer(bank, name)) for name in some.names]
whole = AdapterBank.load(net(), "user/bank")
found["whole"] = whole.names == bank.names and torch.equal(answer(whole, "ben"), answer(bank, "ben"))
bank.push_to_hub("user/bank", revision="next")
found["next"] = len(AdapterBank.load(net(), "user/bank", names=["ben"], revision="next"))
for error in ("user/nothing", "user/bank"):
    try:
        AdapterBank.load(net(), error, names=["cleo"])
    except Exception as raised:
        found[error] = f"{type(raised).__name__}: {raised}"
print(json.dumps(found))
"""


def test_pushed_and_pulled(tmp_path):
    found = json.loads(python(SCRIPT, tmp_path).splitlines()[-1])
    assert found["same"] == [True, True] and found["names"] == ["ben", "anna"]
    assert found["whole"] and found["next"] == 1
    assert found["sent"] < 0.2 * found["files"]["adapter_bank.safetensors"]
    assert set(found["files"]) == {".gitattributes", "README.md", "adapter_bank.safetensors"}
    card = found["card"]
    assert "302 adapters" in card and "base = make()" in card and 'names=["customer 0"]' in card
    assert card.count("| `customer") == 100
    assert re.match(r"---\n(.*\n)*library_name: peft\n(.*\n)*---\n", card)
    assert "RepositoryNotFoundError" in found["user/nothing"] and "no adapter 'cleo'" in found["user/bank"]


def test_some_adapters_of_a_folder(tmp_path):
    bank, model = AdapterBank(net()), adapted(net())
    for name in ("a", "b", "c"):
        bank.add(name, get_peft_model_state_dict(model) if name == "c" else adapted(net(), r=1))
    bank.save(tmp_path)
    some = AdapterBank.load(net(), tmp_path, names=["c"])
    with torch.no_grad():
        assert some.names == ["c"] and apart(some.attach()(X, adapter_names=["c"] * 8), model(X)) < 1e-5
    with pytest.raises(ValueError, match="'d'"):
        AdapterBank.load(net(), tmp_path, names=["c", "d"])
    with pytest.raises(ValueError, match="There is no"):
        AdapterBank.load(net(), tmp_path / "nothing", names=["c"])
    with pytest.raises(ValueError, match="empty"):
        AdapterBank(net()).push_to_hub("user/bank")
