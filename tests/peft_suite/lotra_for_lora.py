# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Pytest plugin that lets PEFT's tests of LoRA on linear layers test LoTRA on KAN layers; see `run.py`.

While it is loaded, `peft.LoraConfig` is `LoTRAConfig` (which then understands LoRA's names of its arguments), and
`nn.Linear` in the test modules is a KAN layer. The lists of test cases are exchanged for those below, and what tests
another method, or something that LoTRA does not have, is deselected.
"""

import functools
import importlib.util
import inspect
import sys
from dataclasses import fields
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType

import peft
import pytest
import torch
from stand_ins import LAYER_KINDS
from torch import nn

from peft_lotra import LoTRAConfig, LoTRALayer, register_kan_layer


# Tests by name (or `name[parameters]`), with the reason why they are deselected.
NOT_APPLICABLE = {
    "they load models or adapters from the Hub": """
        test_from_pretrained test_from_pretrained_cache_dir test_save_pretrained_with_runtime_config
        test_mixed_adapter_batches_lora_opt_timing test_inject_from_state_dict_and_from_config_target_same_layers""",
    "they test options that LoTRA does not have (others say so themselves and are skipped)": """
        test_nested_config_survives_save_load_roundtrip test_plain_lora_and_dora_adapters_merge_matches_forward
        test_multiple_active_dora_adapters_merge_matches_forward""",
    "they adapt embeddings, convolutions or attention": """
        test_save_pretrained_targeting_lora_to_embedding_layer test_unload_adapter_multihead_attention
        test_save_pretrained_targeting_lora_to_embedding_layer_non_transformers
        test_mixed_adapter_batches_lora_conv1d_emb test_mixed_adapter_batches_lora_conv2d
        test_mixed_adapter_batches_lora_conv1d_emb_multiple_modules_to_save test_mixed_adapter_batches_mha_raises""",
    "they save embeddings of the base, which LoTRA never does: loading would write over those of the base": """
        test_save_embedding_layers_excludes_similarly_named_sibling""",
    "they read the parameters or the repr of LoRA": """
        test_multirank test_multirank_2 test_repr_lora_linear test_loading_adapter_preserves_custom_requires_grad
        test_save_pretrained_warns_for_unsharded_state_dict""",
    "LoTRA's `add_weighted_adapter` has no pruning, no average of factors, and no sum of `modules_to_save`": """
        test_multiple_adapters_mixed_modules_to_save_merging_adapters test_add_weighted_adapter_with_different_scaling
        test_multiple_adapters_same_modules_to_save_merging_adapters_raises
        test_add_weighted_adapter_subtraction_with_negative_weights
        test_add_weighted_adapter_negative_weight_negates_adapter""",
    "they register custom LoRA layers (LoTRA has `register_kan_layer`)": """
        test_custom_lora_layer_used test_training_works test_saving_and_loading
        test_custom_lora_layer_issues_warning test_target_layer_without_in_features_out_features""",
    "they want pickles, which LoTRA refuses": """
        test_save_pretrained_pickle""",
    "they want a file to equal its config, to which LoTRA adds digests": """
        test_from_json_file""",
    "PeftMixedModel takes the methods that it names only": """
        test_add_adapter_rejects_duplicate_name_without_mutation[True]""",
    "the default of LoTRA is all KAN layers, whatever the type of the model": """
        test_default_target_modules_not_set_raises test_default_target_modules_not_set_model_type_set_raises
        test_default_target_modules_list_of_str test_default_target_modules_str""",
}
DESELECTED = {name for names in NOT_APPLICABLE.values() for name in names.split()}
# Tests that mention these load models from the Hub, or adapt embeddings, convolutions or attention.
OTHER_MODELS = {"AutoModelForCausalLM", "AutoModelForSequenceClassification", "StableDiffusionPipeline"}
OTHER_MODELS |= {"hub_online_once", "ModelEmbConv1D", "ModelConv2D", "ModelMha"}

TARGETS = {
    "default targets": {},
    "all-kan": {"target_modules": "all-kan"},
    "regex": {"target_modules": r".*0"},
    "first layer": {"target_modules": ["lin0"]},
    "last layer": {"target_modules": ["lin1"]},
    "both layers": {"target_modules": ["lin0", "lin1"]},
    "module saved": {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
    "module adapted and saved": {"target_modules": ["lin0", "lin1"], "modules_to_save": ["lin1"]},
    "ranks": {"r": (2, 3, 4)},
    "patterns": {"r": 2, "rank_pattern": {"lin1": (1, 3, 2)}, "alpha_pattern": {"lin0": 3.0}},
    "alpha": {"alpha": 2.5},
    "init": {"init_weights": True},
    "without residual": {"adapt_residual": False},
}
# model_id -> layer of (in_features, out_features)
LAYERS = {name: LAYER_KINDS[name] for name in ("own", "efficient-kan", "fast-kan")}
CASES = [(f"{id} {name}", id, LoTRAConfig, kwargs) for id in LAYERS for name, kwargs in TARGETS.items()]
PAIRS = [
    ("Same", "lotra", LoTRAConfig, {"target_modules": ["lin0"]}, {"target_modules": ["lin0"], "r": 2}),
    ("Different", "lotra", LoTRAConfig, {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}),
]
for pair in PAIRS:
    for kwargs in pair[3:]:
        kwargs["init_weights"] = False
LISTS = {"TEST_CASES": CASES, "ALL_PEFT_CONFIG_CLASSES": [LoTRAConfig], "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": PAIRS}


class Linear(nn.Linear):
    """A KAN layer y[o] = sum W[o, i, k] sin(k x[i]) + b[o] that has, and saves, what a linear layer has."""

    SIZE = 3

    def __init__(self, in_features, out_features, bias=True, **kwargs):
        super().__init__(in_features * self.SIZE, out_features, bias, **kwargs)
        self.in_features = in_features

    def forward(self, x):
        frequencies = torch.arange(1, self.SIZE + 1, device=x.device)
        return nn.functional.linear(torch.sin(x[..., None] * frequencies).flatten(-2), self.weight, self.bias)


def _copy(module, **changes):
    copy = ModuleType(module.__name__)
    copy.__dict__.update({**vars(module), **changes})
    return copy


kan_nn = _copy(nn, Linear=Linear)
kan_torch = _copy(torch, nn=kan_nn)
register_kan_layer(
    "peft-suite", matches=Linear, coefficients=("weight", "o (i k)"), axes=lambda layer: {"k": layer.SIZE}
)


def _with_lora_names(init):
    only_lora = {field.name for field in fields(peft.LoraConfig)} - {field.name for field in fields(LoTRAConfig)}
    names = {"init_lora_weights": "init_weights", "lora_alpha": "alpha"}

    @functools.wraps(init)
    def wrapper(self, *args, **kwargs):
        kwargs = {names.get(name, name): value for name, value in kwargs.items()}
        if missing := only_lora & kwargs.keys():
            pytest.skip(f"LoTRA has no {', '.join(sorted(missing))}")
        init(self, *args, **kwargs)

    return wrapper


LoTRAConfig.__init__ = _with_lora_names(LoTRAConfig.__init__)
peft.LoraConfig = LoTRAConfig

# PEFT's test utilities import these for tests that are not run here.
for package, name in {"datasets": "load_dataset", "diffusers": "StableDiffusionPipeline"}.items():
    if importlib.util.find_spec(package) is None:
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__spec__ = ModuleSpec(package, None)
        setattr(sys.modules[package], name, None)


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc):
    _adapt(metafunc.module)


@functools.cache
def _adapt(module):
    for name, cases in LISTS.items():
        if hasattr(module, name):
            getattr(module, name)[:] = cases
    for cls in vars(module).values():
        if hasattr(cls, "prepare_inputs_for_testing"):  # the tests count from 0 to 89, the grids cover [-1, 1]
            cls.prepare_inputs_for_testing = lambda self: {"X": torch.arange(90).view(9, 10) / 45 - 1}
    for name, copy in {"nn": kan_nn, "torch": kan_torch}.items():
        if hasattr(module, name):
            setattr(module, name, copy)
    if hasattr(module, "MockTransformerWrapper"):
        module.MockTransformerWrapper.from_pretrained = functools.partial(_make_model, module.MLP)
    if hasattr(module, "TestRequiresGrad"):
        check = module.TestRequiresGrad.check_requires_grad
        module.TestRequiresGrad.check_requires_grad = lambda self, model, *names: check(
            self, model, *_expected(model, names)
        )


def _make_model(mlp_cls, model_id, dtype=None):
    torch.manual_seed(0)
    model = mlp_cls()
    model.lin0, model.lin1 = LAYERS[model_id](10, 20), LAYERS[model_id](20, 2)
    for parameter in model.parameters():  # as made, some return all but 0, and so would the gradients of the tests
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model.to(dtype or torch.float32)


def _expected(model, names):
    """Return the parameters of LoTRA that stand for LoRA's. A full mode has no factor."""
    parameters = dict(model.named_parameters())
    expected = []
    for name in names:
        layer, is_factor, rest = name.partition(".lora_A.")
        if is_factor:
            adapter = rest.removesuffix(".weight")
            components = [f"{layer}.{component}.{adapter}" for component in LoTRALayer.adapter_layer_names]
            expected += [component for component in components if component in parameters]
        elif ".lora_B." not in name:
            expected.append(name)
    return expected


def pytest_collection_modifyitems(config, items):
    kept = [item for item in items if _is_about_lotra(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


def _is_about_lotra(item):
    if {item.name, item.originalname} & DESELECTED:
        return False
    values = list(item.callspec.params.values()) if hasattr(item, "callspec") else []
    classes = [value if isinstance(value, type) else type(value) for value in values]
    configs = [cls for cls in classes if issubclass(cls, peft.PeftConfig)]
    if configs:
        return LoTRAConfig in configs
    if _mentions(inspect.unwrap(item.function).__code__, OTHER_MODELS):
        return False
    fixtures = [fixture.func for fixtures in item._fixtureinfo.name2fixturedefs.values() for fixture in fixtures]
    functions = [item.function, *(fixture for fixture in fixtures if fixture.__module__ == item.module.__name__)]
    return any(_mentions(inspect.unwrap(function).__code__, {"LoraConfig", "PeftType"}) for function in functions)


def _mentions(code, names):
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return not names.isdisjoint(code.co_names) or any(_mentions(part, names) for part in inner)
