# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The code of the card that builds the base: the tests run the code."""

from __future__ import annotations

import ast

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import ViTConfig, ViTModel

from peft_lotra import LoTRAConfig
from peft_lotra.hub.base_code import (
    check_base_code,
    check_base_model,
    hub_id,
    literal,
    source_of_config,
    source_of_model,
)
from peft_lotra.kan import KAN, KANConfig, KANModel


class Network(nn.Module):
    """A network without arguments."""

    def __init__(self):
        super().__init__()
        self.kan = KAN([2, 3, 1])


def built(code: str) -> nn.Module:
    namespace = {}
    exec(code, namespace)
    return namespace["base"]


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    "text", ["plain", 'a"b', "a\\", "a\nb", "```", "<!-- -->", "\x1b[2J", "\u202e", "é", "\U0001f600"]
)
def test_literal(text):
    code = literal(text)
    assert ast.literal_eval(code) == text and code.isascii() and code.isprintable() and not set("`<") & set(code)


class TestHubId:
    @pytest.mark.parametrize("name", [None, "", "/home/ann/kan", "a/b/c", "ann/k an", "."])
    def test_no_repository(self, name):
        assert hub_id(name) is None

    def test_a_folder_hides_a_repository(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert hub_id("ann/kan") == "ann/kan"
        (tmp_path / "ann" / "kan").mkdir(parents=True)
        assert hub_id("ann/kan") is None

    def test_check(self):
        check_base_model(None)
        check_base_model("ann/kan")
        with pytest.raises(ValueError, match="`base_model` is './kan', expected a repository .* pass `base_code`"):
            check_base_model("./kan")


class TestSourceOfModel:
    @pytest.mark.parametrize(
        "base",
        [
            KAN([2, 3, 1]),
            KAN([2, 3, 1], grid_size=4, spline_order=2, grid_range=(0.0, 2.0)),
            KANModel(KANConfig(widths=(2, 4, 1), grid_size=7)),
            ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)),
            Network(),
        ],
        ids=lambda base: type(base).__name__,
    )
    def test_the_code_builds_the_architecture(self, base):
        source = source_of_model(base, LoTRAConfig())
        rebuilt = built(source.code)
        assert type(rebuilt) is type(base) and shapes(rebuilt) == shapes(base)
        assert source.model is None and not source.auto and "which are not on the Hub" in source.code
        if isinstance(base, KAN):
            assert torch.equal(rebuilt.layers[0].grid_bounds, base.layers[0].grid_bounds)

    def test_an_adapted_network(self):
        kan = KAN([2, 3, 1], grid_size=4)
        expected = source_of_model(kan, LoTRAConfig()).code
        get_peft_model(kan, LoTRAConfig())
        assert source_of_model(kan, LoTRAConfig()).code == expected

    @pytest.mark.parametrize("base", [KAN([2, 3, 1], norm="layer"), nn.Sequential(KAN([2, 1])), nn.Linear(2, 1)])
    def test_unknown_arguments(self, base):
        code = source_of_model(base, LoTRAConfig()).code
        assert code.startswith("base = ...") and type(base).__name__ in code

    def test_layers_that_differ(self):
        kan = KAN([2, 3, 1])
        kan.layers[1] = KAN([3, 1], grid_size=8).layers[0]
        assert source_of_model(kan, LoTRAConfig()).code.startswith("base = ...")

    def test_a_base_on_the_hub(self):
        model = KANModel(KANConfig(widths=(2, 4, 1)))
        source = source_of_model(model, LoTRAConfig(revision="v1"), "ann/kan")
        assert source.model == "ann/kan" and source.auto
        assert source.code.endswith('base = KANModel.from_pretrained("ann/kan", revision="v1")')
        # a class without from_pretrained
        source = source_of_model(KAN([2, 1]), LoTRAConfig(), "ann/kan")
        assert not source.auto and "those of ann/kan on the Hub" in source.code

    def test_the_code_of_the_user(self):
        source = source_of_model(KANModel(KANConfig(widths=(2, 1))), LoTRAConfig(), "ann/kan", "\nbase = mine()\n")
        assert source.code == "base = mine()" and not source.auto and source.model == "ann/kan"

    def test_the_shortest_package(self):
        source = source_of_model(KAN([2, 1]), LoTRAConfig())
        assert (source.module, source.name) == ("peft_lotra.kan", "KAN")


class TestSourceOfConfig:
    @pytest.fixture
    def config(self) -> LoTRAConfig:
        mapping = {"base_model_class": "KANModel", "parent_library": "peft_lotra.kan.modeling_kan"}
        return LoTRAConfig(auto_mapping=mapping, base_model_name_or_path="ann/kan")

    def test_a_base_on_the_hub(self, config):
        source = source_of_config(config)
        assert source.auto and (source.module, source.name) == ("peft_lotra.kan", "KANModel")
        code = 'from peft_lotra.kan import KANModel\n\nbase = KANModel.from_pretrained("{}")'
        assert source.code == code.format("ann/kan")
        assert source_of_config(config, "ann/other").code == code.format("ann/other")

    def test_which_code_counts(self, config):
        both = {"base_code": "base = 1", "written_code": "base = 2"}
        assert source_of_config(config, **both).code == "base = 1"
        assert source_of_config(config, written_code="base = 2").code == "base = 2"
        # the written code built the old base
        assert "ann/other" in source_of_config(config, "ann/other", written_code="base = 2").code
        assert not source_of_config(config, **both).auto

    def test_nothing_is_known(self):
        source = source_of_config(LoTRAConfig())
        assert source.code == "base = ...  # the base model, with the weights that the adapter was trained on"
        assert (source.model, source.module, source.name, source.auto) == (None, None, None, False)

    @pytest.mark.parametrize("key", ["base_model_class", "parent_library"])
    @pytest.mark.parametrize("value", ["X; print(1)", "X\nimport os", "import", "a..b", "", 3, ["KANModel"]])
    def test_what_is_no_name_of_a_class(self, config, key, value):
        config.auto_mapping[key] = value
        source = source_of_config(config)
        assert source.code.startswith("base = ...  # the base model,") and source.name is source.module is None

    def test_a_class_that_is_not_imported(self, config):
        config.base_model_name_or_path = None
        config.auto_mapping = {"base_model_class": "Net", "parent_library": "my_nets"}
        assert "a my_nets.Net, with the weights" in source_of_config(config).code


@pytest.mark.parametrize("code", ["base = (", 3, "base = 1\n```\n# a title", "base = 1\n  ```", "\0", "base ? 1"])
def test_code_that_would_not_run_in_a_card(code):
    with pytest.raises(ValueError, match="`base_code` (is|has)"):
        check_base_code(code)
    check_base_code("base = 'a ``` b'")
