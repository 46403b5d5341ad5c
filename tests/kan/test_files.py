# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Networks in files; `hub/test_push.py` has them on the Hub."""

import copy
import pickle

import pytest
import torch
from helpers import ALLOWED, assert_equal, config_of, refused
from peft import AutoPeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_lotra import LoTRAConfig
from peft_lotra.kan import KAN, KANLinear, SlimKAN, refine_grid


def moved(kan):
    """Move the grids, and the running statistics of norms."""
    kan.update_grid(2 + torch.randn(100, 3, dtype=kan.layers[0].grid_bounds.dtype))
    kan(torch.randn(50, 3, dtype=kan.layers[0].grid_bounds.dtype))
    return kan.eval()


def refined():
    kan = KAN([3, 4, 2])
    refine_grid(kan, 10)
    return kan.eval()


NETWORKS = {
    "float64": lambda: moved(KAN([3, 5, 2], 7, 2, (0.0, 2.0), dtype=torch.float64)),
    "bfloat16": lambda: KAN([3, 5, 2], dtype=torch.bfloat16).eval(),
    "one layer": lambda: moved(KAN((3, 2))),
    "batch": lambda: moved(KAN([3, 5, 4, 2], norm="batch")),
    "layer": lambda: moved(KAN([3, 5, 2], norm="layer")),
    "tanh": lambda: moved(KAN([3, 5, 2], norm="tanh", grid_range=(-2, 3))),
    "refined": refined,
    "slim": lambda: SlimKAN([3, 5, 2], (2, 3, 4), norm="batch").eval(),
    "slim in part": lambda: SlimKAN([3, 5, 2], [(2, "full", 4), None], 4).eval(),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_saved_and_loaded_exactly(tmp_path, name):
    kan = NETWORKS[name]()
    x = torch.randn(4, 3, dtype=kan.layers[0].grid_bounds.dtype)

    kan.save_pretrained(tmp_path)
    loaded = type(kan).from_pretrained(tmp_path)

    assert repr(loaded) == repr(kan)
    assert_equal(loaded.state_dict(), kan.state_dict())
    assert_equal(loaded(x), kan(x))


def unequal_grids():
    kan = KAN([2, 3, 1])
    kan.layers[1] = KANLinear(3, 1, grid_size=7)
    return kan


@pytest.mark.parametrize("make", [unequal_grids, lambda: get_peft_model(KAN([2, 1]), LoTRAConfig()).get_base_model()])
def test_a_network_that_no_arguments_build_is_not_saved(tmp_path, make):
    with refused("No arguments of `KAN` build these layers"):
        make().save_pretrained(tmp_path)

    assert not list(tmp_path.iterdir())


def test_a_missing_tensor_is_an_error(tmp_path):
    KAN([3, 2]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["layers.0.base_weight"]
    save_file(tensors, tmp_path / "model.safetensors")

    with pytest.raises(RuntimeError, match="layers.0.base_weight"):
        KAN.from_pretrained(tmp_path)


@pytest.mark.parametrize("make", [lambda: KAN([2, 3, 1]), lambda: SlimKAN([2, 3, 1], (1, 2, 2))])
def test_networks_name_the_public_module_and_are_copied(make):
    model, x = make(), torch.rand(5, 2)

    assert type(model).__module__ == "peft_lotra.kan"
    for copied in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert_equal(copied(x), model(x))


def test_an_adapter_loads_its_base(tmp_path):
    KAN([2, 3, 1]).save_pretrained(tmp_path / "base")
    base = KAN.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoTRAConfig(r=2, init_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")

    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter", **ALLOWED)

    config = config_of(tmp_path / "adapter")
    x = torch.rand(5, 2)
    assert config["auto_mapping"] == {"base_model_class": "KAN", "parent_library": "peft_lotra.kan"}
    assert_equal(loaded(x), model(x))
