# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Adapters go to the Hub, and come back: with a stand-in for it, in a process of its own."""

import json

import pytest
from behaving import python


SCRIPT = """
from hub_server import start_hub
hub = start_hub("user")
import json, torch
from behaving import X, adapted, add, net
from peft import PeftModel
from peft_lotra import hotswap_adapter, push_to_hub

def comes_back(model, repo, **kwargs):
    return torch.equal(PeftModel.from_pretrained(net(), repo, **kwargs).eval()(X), model(X))

model, second, several, other = (adapted() for _ in range(4))
push_to_hub(model, "user/one")
found = {"pushed": comes_back(model, "user/one")}
push_to_hub(second, "user/one", revision="v2")
found["revision"] = comes_back(second, "user/one", revision="v2") and comes_back(model, "user/one")
model.push_to_hub("user/method")
found["method"] = comes_back(model, "user/method")
model.save_pretrained("folder")
push_to_hub("folder", "user/folder", private=True)
found["folder"] = comes_back(model, "user/folder") and hub.repos["user/folder"].private
hotswap_adapter(other, "user/one")
found["hotswap"] = torch.equal(other(X), model(X))
add(several, "other")
push_to_hub(several, "user/several")
several.set_adapter("other")
found["several"] = comes_back(several, "user/several", subfolder="other")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return json.loads(python(SCRIPT, tmp_path_factory.mktemp("hub")).splitlines()[-1])


@pytest.mark.parametrize("way", ["pushed", "revision", "method", "folder", "hotswap", "several"])
def test_what_comes_back(found, way):
    assert found[way] is True
