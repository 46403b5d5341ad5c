# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""What holds of merging and unmerging, on dense layers and on Slim ones."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Iterator
from contextlib import suppress
from functools import cache

import pytest
import torch
from hostile import interrupted, some_of, state_of, summary
from peft import PeftModel, get_peft_model
from stand_ins import FAMILIES, as_model
from torch import Tensor, nn

from peft_lotra import LoTRAConfig, slim
from peft_lotra.kan import KANLinear, SlimKANLinear


# the kind of the base layer, and how adapters are merged into a Slim one
KINDS = [
    ("own", "densify"),
    ("efficient-kan", "densify"),
    ("cheby-kan", "densify"),
    ("slim own", "densify"),
    ("slim own", "truncate"),
    ("slim efficient-kan", "densify"),
    ("slim efficient-kan", "truncate"),
    ("slim cheby-kan", "densify"),
]
FEW = [("own", "densify"), ("slim own", "densify"), ("slim own", "truncate"), ("slim efficient-kan", "densify")]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: ", ".join(kind))
few_kinds = pytest.mark.parametrize("kind", FEW, ids=lambda kind: ", ".join(kind))
exact_kinds = pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind[1] == "densify"], ids=lambda kind: ", ".join(kind)
)
X = torch.linspace(-0.9, 0.9, 96, dtype=torch.float64).view(8, 12)


@cache
def made(name):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = as_model(FAMILIES[name.removeprefix("slim ")](12, 10)).eval()
        return slim(model, (5, 6, 3)) if name.startswith("slim ") else model


def bare(kind, dtype=torch.float64):
    """A model of one layer, the same at each call; efficient-kan's, made twice, differ in their last bits."""
    return copy.deepcopy(made(kind[0])).to(dtype)


def adapted(kind, dtype=torch.float64, **config):
    """The model with the adapters "default" and "second"."""
    with torch.random.fork_rng():
        torch.manual_seed(6)
        model = get_peft_model(bare(kind, dtype), LoTRAConfig(r=(3, 2, 2), init_weights=False, **config)).eval()
        model.add_adapter("second", LoTRAConfig(r=2, init_weights=False))
    return model


def layer_of(model):
    return model.base_model.model.kan


def merge(model, kind, names=("default",), **kwargs):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already following adapters were merged")
        model.merge_adapter(list(names), slim=kind[1], **kwargs)


def unmerge_in_silence(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.unmerge_adapter()


def edit_merged(model, factor=1.25):
    """Changes every parameter that adapters were merged into, by hand."""
    with torch.no_grad():
        for name, parameter in layer_of(model).base_layer.named_parameters():
            if "grid" not in name:
                parameter.mul_(factor)


@torch.no_grad()
def output(model, x: Tensor = X):
    base = next(parameter for name, parameter in model.named_parameters() if "lotra_" not in name)
    return model(x.to(base.dtype))


def assert_near(actual, expected, tolerance=1e-10):
    assert ((actual - expected).abs().max() / expected.abs().max()).item() < tolerance


def tolerance_of(model):
    """What merging may change: nothing but rounding, unless the sum is truncated."""
    error = getattr(layer_of(model), "merge_error", None)
    return 1e-10 if error is None else 3 * error


##############
# Of numbers #
##############


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_restores_everything_bit_for_bit(kind, dtype):
    model = adapted(kind, dtype)
    before, y = state_of(model), output(model)
    for names in (["default"], ["second", "default"]):
        merge(model, kind, names)
        assert layer_of(model).merged_adapters == names
        unmerge_in_silence(model)
        after = state_of(model)
        assert before["tensors"] == after["tensors"]
        assert {key: v for key, v in after.items() if key != "tensors"} == {
            key: v for key, v in before.items() if key != "tensors"
        }
        assert torch.equal(output(model), y)


@every_kind
def test_a_merged_model_computes_the_same(kind):
    model = adapted(kind)
    y = output(model)
    merge(model, kind)
    assert_near(output(model), y, tolerance_of(model))
    assert torch.equal(output(model), output(model.merge_and_unload()))


@every_kind
def test_a_second_merge_adds_what_is_not_yet_merged(kind):
    """Whatever became of the adapter that is merged, or of its scale."""
    model = adapted(kind)
    at_once = copy.deepcopy(model)
    y = output(model)
    merge(at_once, kind, ["default", "second"])
    merge(model, kind)
    layer = layer_of(model)
    layer.set_scale("default", 7.0)
    with torch.no_grad():
        layer.lotra_core["default"].mul_(-3)
    merge(model, kind, ["second"])
    assert layer.merged_adapters == ["default", "second"]
    assert_near(output(model), output(at_once), 1e-10)  # truncated once, not twice
    unmerge_in_silence(model)
    layer.set_scale("default", 1.0)
    with torch.no_grad():
        layer.lotra_core["default"].div_(-3)
    assert_near(output(model), y)


@pytest.mark.parametrize("ways", [("truncate", "densify"), ("densify", "truncate")])
@pytest.mark.parametrize("family", ["slim own", "slim efficient-kan"])
def test_the_last_merge_says_what_becomes_of_a_slim_layer(family, ways):
    model, at_once = adapted((family, "")), adapted((family, ""))
    y = output(model)
    merge(at_once, (family, ways[1]), ["default", "second"])
    for way, name in zip(ways, ["default", "second"], strict=True):
        merge(model, (family, way), [name])
    assert type(layer_of(model).base_layer) is type(layer_of(at_once).base_layer)
    assert_near(output(model), output(at_once))
    unmerge_in_silence(model)
    assert torch.equal(output(model), y)


@every_kind
def test_without_a_copy_of_the_base(kind):
    model = adapted(kind)
    y, classes = output(model), [type(module) for module in model.modules()]
    for _ in range(10):
        merge(model, kind, ["default", "second"], keep_base=False)
        unmerge_in_silence(model)
    assert_near(output(model), y)
    assert [type(module) for module in model.modules()] == classes


@few_kinds
def test_merged_under_autocast(kind):
    model, expected = adapted(kind, torch.float32), adapted(kind, torch.float32)
    merge(expected, kind)
    with torch.autocast("cpu", torch.bfloat16):
        merge(model, kind)
    assert torch.equal(output(model), output(expected))


@few_kinds
def test_merged_in_inference_mode_and_trained_later(kind):
    model = adapted(kind, torch.float32)
    y = output(model)
    with torch.inference_mode():
        merge(model, kind)
        output(model)
    x = X.float().requires_grad_()
    model(x).sum().backward()  # through the merged layer
    assert x.grad is not None
    unmerge_in_silence(model)
    assert torch.equal(output(model), y)
    model.train()(X.float()).square().sum().backward()
    assert layer_of(model).lotra_core["default"].grad.any()


###########
# By hand #
###########


@every_kind
def test_parameters_changed_while_merged(kind):
    model = adapted(kind)
    merge(model, kind)
    edit_merged(model)
    y, layer = output(model), layer_of(model)
    with pytest.warns(UserWarning, match=r"changed after \['default'\] had been merged. The changes are kept"):
        model.unmerge_adapter()
    assert not layer.merged
    if kind[1] == "truncate":
        assert isinstance(layer.base_layer, type(bare(kind).kan)) and layer.base_layer.ranks == (5, 6, 3)
    else:
        assert_near(output(model), y)  # unmerged, the adapter is added to a base that has kept the changes
        merge(model, kind)
        assert_near(output(model), y)
        unmerge_in_silence(model)
        assert_near(output(model), y)


@every_kind
def test_parameters_changed_between_two_merges(kind):
    """As if they had been changed after one merge of both: said once more, and kept."""
    model = adapted(kind)
    merge(model, kind)
    edit_merged(model)
    y, layer = output(model), layer_of(model)
    merge(model, kind, ["second"])
    with pytest.warns(UserWarning, match=r"changed after \['default', 'second'\] had been merged"):
        model.unmerge_adapter()
    if kind[1] == "densify":
        assert_near(output(model), y)
    model.merge_adapter(["default"], slim=kind[1])
    unmerge_in_silence(model)
    assert not layer.merged


@exact_kinds
def test_a_changed_layer_is_used_as_any_other(kind, tmp_path):
    model = adapted(kind)
    merge(model, kind)
    edit_merged(model)
    with pytest.warns(UserWarning, match="The changes are kept"):
        model.unmerge_adapter()
    y = output(model)
    names = ["default", "second", "__base__", "second"] * 2
    with torch.no_grad():
        mixed = model(X, adapter_names=names)
    with model.disable_adapter():
        base = output(model)
    for row, name in enumerate(names):
        expected = {"default": y, "__base__": base}
        assert name == "second" or torch.allclose(mixed[row], expected[name][row], rtol=1e-9, atol=1e-9)
    model.train()(X).square().sum().backward()
    assert layer_of(model).lotra_core["default"].grad.any()
    model.eval()
    layer = layer_of(model)
    layer.set_base_weight(2 * layer.get_base_weight())
    copied = copy.deepcopy(model).float()
    assert output(copied).isfinite().all()
    assert output(model.unload()).isfinite().all()


def test_the_grid_has_moved_since_the_adapter_was_made():
    model = adapted(("own", ""))
    before = state_of(model)["tensors"]
    layer_of(model).base_layer.grid_bounds.mul_(2)
    with pytest.raises(RuntimeError, match="The grid of this peft-lotra layer was moved after the adapter 'default'"):
        model.merge_adapter()
    assert not layer_of(model).merged
    after = state_of(model)["tensors"]
    assert all(content == after[name] for name, content in before.items() if "grid" not in name)


############
# Gradient #
############


@every_kind
@pytest.mark.parametrize("trainable", [True, False])
def test_a_merge_trains_nothing_and_unloading_frees_what_was_free(kind, trainable):
    def wants(model):
        return {name for name, p in model.named_parameters() if p.requires_grad and "lotra_" not in name}

    base = bare(kind).requires_grad_(trainable)
    grids = {name for name, p in bare(kind).named_parameters() if not p.requires_grad}
    model = get_peft_model(base, LoTRAConfig(r=2, init_weights=False))
    assert not wants(model)
    merge(model, kind)
    assert not wants(model)
    other = copy.deepcopy(model)
    unmerge_in_silence(model)
    assert not wants(model)
    # merged before, merged to unload, and only unloaded
    for unloaded in (other.merge_and_unload(), copy.deepcopy(model).merge_and_unload(slim=kind[1]), model.unload()):
        assert wants(unloaded) | grids == ({name for name, _ in unloaded.named_parameters()} if trainable else grids)


@pytest.mark.parametrize("family", ["slim own", "slim efficient-kan"])
@pytest.mark.parametrize("trainable", [True, False])
def test_a_layer_that_stays_dense_is_as_free_as_the_slim_one(family, trainable):
    model = get_peft_model(bare((family, "")).requires_grad_(trainable), LoTRAConfig(r=2, init_weights=False))
    model.merge_adapter()
    edit_merged(model)
    with pytest.warns(UserWarning, match="The layer stays dense"):
        model.unmerge_adapter()
    unloaded = model.unload()
    flags = {name: p.requires_grad for name, p in unloaded.named_parameters() if "grid" not in name}
    assert set(flags.values()) == {trainable} and not isinstance(unloaded.kan, SlimKANLinear)


############################
# What is done in between  #
############################


@few_kinds
@pytest.mark.parametrize("how", ["deepcopy", "saved whole", "float", "bfloat16", "there and back"])
def test_copied_and_cast_while_merged(kind, how):
    model = adapted(kind)
    dtypes = {"float": torch.float32, "bfloat16": torch.bfloat16}
    expected = copy.deepcopy(model)
    merge(model, kind)
    if how == "deepcopy":
        model = copy.deepcopy(model)
    elif how == "saved whole":
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        model = torch.load(file, weights_only=False)
    elif how == "there and back":
        model, expected = model.float().double(), expected.float().double()
    else:
        model, expected = model.to(dtypes[how]), expected.to(dtypes[how])
    unmerge_in_silence(model)
    state = expected.state_dict()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(output(model), output(expected))


@few_kinds
def test_hooks_and_mode_while_merged(kind):
    model, calls = adapted(kind), []
    base = layer_of(model).base_layer
    base.register_forward_hook(lambda *_: calls.append("forward"))
    base.register_forward_pre_hook(lambda *_, **__: calls.append("before"), with_kwargs=True)
    base.register_full_backward_hook(lambda *_: calls.append("backward"))
    merge(model, kind)
    model(X.clone().requires_grad_()).sum().backward()
    assert calls == ["before", "forward", "backward"]
    model.train()
    unmerge_in_silence(model)
    assert all(module.training for module in model.modules())
    model.eval()
    calls.clear()
    output(model)
    assert calls == ["before", "forward"]


@every_kind
def test_disabled_while_merged(kind):
    model = adapted(kind)
    y = output(model)
    merge(model, kind)
    with model.disable_adapter():
        assert torch.equal(output(model), output(bare(kind)))
    assert torch.equal(output(model), y)


@every_kind
def test_adapters_added_and_set_while_merged(kind, tmp_path):
    model = adapted(kind)
    y = output(model)
    merge(model, kind)
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.add_adapter("third", LoTRAConfig(r=2, init_weights=False))
    assert torch.equal(output(model), y)
    assert model.peft_config["third"].base_layers == model.peft_config["default"].base_layers
    merge(model, kind)
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("third")
    z = output(model)
    model.save_pretrained(tmp_path, selected_adapters=["third"])
    assert torch.equal(output(PeftModel.from_pretrained(bare(kind), tmp_path / "third")), z)


@every_kind
def test_saved_and_loaded_while_merged(kind, tmp_path):
    model = adapted(kind)
    y = output(model)
    model.save_pretrained(tmp_path / "unmerged", selected_adapters=["default"])
    merge(model, kind)
    model.save_pretrained(tmp_path / "merged", selected_adapters=["default"])
    configs = [(tmp_path / name / "adapter_config.json").read_text() for name in ("merged", "unmerged")]
    assert configs[0] == configs[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(output(PeftModel.from_pretrained(bare(kind), tmp_path / "merged")), y)
        warnings.filterwarnings("ignore", "Adapter cannot be set when the model is merged")
        model.load_adapter(tmp_path / "merged", "loaded", check_base="error")  # into the model that is merged
    model.set_adapter("loaded")
    assert torch.equal(output(model), y)


@pytest.mark.parametrize("rows", [4, 64])
@pytest.mark.parametrize("family", ["slim own", "slim efficient-kan", "slim cheby-kan"])
def test_rows_with_adapters_of_their_own(family, rows):
    model = adapted((family, ""))
    x = torch.linspace(-0.9, 0.9, rows * 12, dtype=torch.float64).view(rows, 12)
    names = (["default", "second", "__base__", "default"] * rows)[:rows]
    by_name = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        by_name[name] = output(model, x)
    with model.disable_adapter():
        by_name["__base__"] = output(model, x)
    with torch.no_grad():
        mixed = model(x, adapter_names=names)
    assert torch.equal(mixed, torch.stack([by_name[name][row] for row, name in enumerate(names)])) or torch.allclose(
        mixed, torch.stack([by_name[name][row] for row, name in enumerate(names)]), rtol=1e-12, atol=1e-12
    )


################
# All or none  #
################


class Two(nn.Module):
    """Two layers of one kind, so that the first may be merged when something happens to the second."""

    def __init__(self, kind) -> None:
        super().__init__()
        self.kan, self.more = bare(kind, torch.float32).kan, FAMILIES["own"](10, 10)

    def forward(self, x):
        return self.more(self.kan(x))


def two(kind, merged: Iterator[str] = ()):
    with torch.random.fork_rng():
        torch.manual_seed(8)
        model = get_peft_model(Two(kind), LoTRAConfig(r=2, init_weights=False)).eval()
        model.add_adapter("second", LoTRAConfig(r=1, init_weights=False))
        for name in merged:
            merge(model, kind, [name])
    return model


OPERATIONS = {
    "merge": ((), lambda model, kind: merge(model, kind)),
    "second merge": (["default"], lambda model, kind: merge(model, kind, ["second"])),
    "unmerge": (["default"], lambda model, kind: model.unmerge_adapter()),
}


@few_kinds
@pytest.mark.parametrize("name", OPERATIONS)
def test_interrupted(kind, name):
    merged, operation = OPERATIONS[name]
    operation(two(kind, merged), kind)  # fills caches
    model = two(kind, merged)
    before = summary(model)
    lines = interrupted(lambda: operation(model, kind), at=0)
    after = summary(model)
    assert before != after and lines > 20
    wrong, start = [], two(kind, merged)
    model = copy.deepcopy(start)
    for at in some_of(lines):
        if summary(model) != before:
            model = copy.deepcopy(start)
        with suppress(KeyboardInterrupt):
            interrupted(lambda model=model: operation(model, kind), at)
        state = summary(model)
        if state not in (before, after):
            wrong.append((at, [key for key in state if state[key] != before[key]]))
    assert not wrong, f"{len(wrong)} of {lines} lines: {wrong[:3]}"
    with warnings.catch_warnings():  # and it goes on from there
        warnings.simplefilter("ignore")
        model.unmerge_adapter()
        merge(model, kind, ["default", "second"])
        unmerge_in_silence(model)
    assert torch.equal(output(model), output(two(kind)))


@few_kinds
def test_an_error_in_the_last_layer(kind):
    model = two(kind)
    with torch.no_grad():
        model.base_model.model.more.lotra_core["second"].fill_(torch.nan)
    before = summary(model)
    with pytest.raises(ValueError, match="NaNs detected"):
        merge(model, kind, ["second"], safe_merge=True)
    model.base_model.model.more.base_layer.grid_bounds.add_(1)
    with pytest.raises(RuntimeError, match="was moved after the adapter 'default'"):
        merge(model, kind)
    model.base_model.model.more.base_layer.grid_bounds.sub_(1)
    assert summary(model) == before
    merge(model, kind)
    merged = summary(model)
    model.base_model.model.more.base_layer.grid_bounds.add_(1)
    with pytest.raises(RuntimeError, match="was moved after"):
        model.unmerge_adapter()
    model.base_model.model.more.base_layer.grid_bounds.sub_(1)
    assert summary(model) == merged
    unmerge_in_silence(model)
    assert summary(model) == before


def test_safe_merge_looks_at_the_sum():
    """Components may be finite, and their product not."""
    for kind in FEW:
        model = adapted(kind, torch.float32)
        with torch.no_grad():
            for component in layer_of(model).get_components("default"):
                component.fill_(1e30)
        before = summary(model)
        with pytest.raises(ValueError, match="NaNs detected"):
            merge(model, kind, safe_merge=True)
        assert summary(model) == before


def test_a_merge_gives_the_slim_layer_its_class_back():
    model = adapted(("slim own", ""))
    merge(model, ("slim own", "densify"))
    assert type(layer_of(model).base_layer) is KANLinear
    unmerge_in_silence(model)
    assert type(layer_of(model).base_layer) is SlimKANLinear
