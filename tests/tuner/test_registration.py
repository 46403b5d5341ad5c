# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Importing peft_lotra registers a method of PEFT, and changes nothing else."""

import copy
import json
import pickle

from helpers import adapt, run_python
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from peft_lotra import LoTRAConfig, LoTRAModel


def test_the_type_is_a_true_member_of_the_enumeration():
    member = PeftType.LOTRA

    assert type(member) is PeftType
    assert member == "LOTRA" == member.value == member.name
    assert PeftType("LOTRA") is PeftType["LOTRA"] is PeftType.__members__["LOTRA"] is member
    assert dict(PeftType.__members__)["LOTRA"] is member
    assert member in PeftType
    assert list(PeftType).count(member) == 1
    assert hash(member) == hash("LOTRA")
    assert copy.copy(member) is copy.deepcopy(member) is member
    assert json.dumps({"peft_type": member}) == '{"peft_type": "LOTRA"}'
    assert repr(member) == repr(PeftType.LORA).replace("LORA", "LOTRA")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(member, protocol)) is member


def test_the_type_is_mapped_to_its_config_its_model_and_its_prefix():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LOTRA] is LoTRAConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["LOTRA"] is LoTRAModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.LOTRA] == LoTRAModel.prefix == "lotra_"
    # upstream iterates over all of them
    assert all(kind in PEFT_TYPE_TO_CONFIG_MAPPING for kind in PeftType)


IMPORT = """
import sys, tempfile
import peft, torch, transformers
from peft import PeftConfig, PeftType, mapping
from peft.tuners.lora import LoraModel
from peft.tuners import tuners_utils
from transformers import PreTrainedModel, Trainer


def snapshot():
    kinds = [PreTrainedModel, Trainer, torch.nn.Module, torch.Tensor, torch.nn.Parameter, torch.optim.Optimizer]
    modules = [torch, torch.nn, torch.func, torch.nn.utils, torch.utils.data, torch.overrides, transformers]
    for name, module in sorted(sys.modules.items()):
        if name.split(".")[0] in ("peft", "accelerate", "safetensors", "huggingface_hub"):
            modules.append(module)
            kinds += [value for value in vars(module).values() if isinstance(value, type)]
    owners = ("peft", "torch", "transformers", "accelerate", "safetensors", "huggingface_hub")
    kinds = [kind for kind in kinds if kind.__module__.split(".")[0] in owners and kind is not peft.PeftType]
    found = {}
    for thing in (*modules, *kinds):
        for name, value in vars(thing).items():
            # modules that are imported later, what classes cache, and what transformers sets on torch's
            others = ("__warningregistry__", "_abc_impl", "__doc__", "smart_apply")
            if not isinstance(value, type(sys)) and name not in others:
                found[repr(thing), name] = value
    return found


# without the import, PEFT does not know the method
members = list(PeftType)
try:
    PeftConfig.from_pretrained("adapter")
except KeyError as error:
    assert error.args == ("LOTRA",)
else:
    raise AssertionError("no error")

assert "peft_lotra" not in sys.modules
before = snapshot()

# a foreign method of the same name is left in its place
member = str.__new__(PeftType, "LOTRA")
member._name_ = member._value_ = "LOTRA"
PeftType._member_names_.append("LOTRA")
PeftType._member_map_["LOTRA"] = PeftType._value2member_map_["LOTRA"] = member

class Foreign(peft.LoraConfig): ...

configs, models = mapping.PEFT_TYPE_TO_CONFIG_MAPPING, mapping.PEFT_TYPE_TO_TUNER_MAPPING
configs[member], models[member] = Foreign, LoraModel
try:
    import peft_lotra
except RuntimeError as error:
    assert "__main__.Foreign" in str(error) and "LOTRA" in str(error), error
else:
    raise AssertionError("no error")
assert configs.pop("LOTRA") is Foreign and models.pop("LOTRA") is LoraModel
assert PeftType._member_names_.pop() == "LOTRA" and list(PeftType) == members
del PeftType._member_map_["LOTRA"], PeftType._value2member_map_["LOTRA"]
for name in [name for name in sys.modules if name.startswith("peft_lotra")]:
    del sys.modules[name]

import peft_lotra
assert type(PeftConfig.from_pretrained("adapter")) is peft_lotra.LoTRAConfig
assert list(PeftType) == [*members, PeftType.LOTRA] and len(PeftType) == len(members) + 1
from peft_lotra.kan import KAN

base = KAN([3, 4, 2], norm="batch")
model = peft.get_peft_model(base, peft_lotra.LoTRAConfig(r=2, init_weights=False))
model(torch.zeros(2, 3))
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    peft_lotra.save_adapter(model, folder)
    base = model.unload()
    model = peft.PeftModel.from_pretrained(base, folder)
    model.load_adapter(folder, "other")
    peft_lotra.hotswap_adapter(model, folder)
model.eval()(torch.zeros(2, 3), adapter_names=["default", "other"])
model.merge_adapter()
model.unmerge_adapter()
model.merge_and_unload()
after = snapshot()
changed = [key for key in before if key not in after or after[key] is not before[key]]
added = [key for key in after if key not in before and key[0] in {owner for owner, _ in before}]
assert not changed, changed
assert not [key for key in added if not isinstance(after[key], type) and not key[1].startswith("__")], added
"""


def test_the_import_adds_a_method_and_patches_nothing_of_peft_torch_or_transformers(tmp_path):
    """A method of the same name stays, and is an error."""
    adapt().save_pretrained(tmp_path / "adapter")

    run_python(IMPORT, tmp_path)
