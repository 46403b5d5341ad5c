# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Which modules are taken for KAN layers, and which are not."""

import numpy as np
import pytest
import torch
from helpers import assert_equal, config_of, relative, train
from orders import Flat, KnotsAsParameter, Layer, Legendre
from peft import PeftModel, get_peft_model
from stand_ins import ChebyKANLayer, FastKANLayer, OldEfficientKANLayer
from torch import nn
from torch.testing import assert_close

from peft_lotra import (
    LoTRAConfig,
    find_kan_layers,
    fit_adapter,
    register_kan_layer,
    start_from_gradient,
)
from peft_lotra.kan import KAN, KANLinear


def check_life(make, folder, **config):
    """Check that an adapter is attached, trained, saved, loaded and merged; return the merged model."""
    x = torch.rand(6, 3)

    def base():
        torch.manual_seed(0)
        return make().eval()

    plain = base()(x)
    model = get_peft_model(base(), LoTRAConfig(**{"r": 2, **config}))
    assert_close(model(x), plain)
    y = train(model.train(), x, lr=1e-2).eval()(x)
    assert relative(y, plain) > 1e-4
    model.save_pretrained(folder)
    assert_close(PeftModel.from_pretrained(base(), folder).eval()(x), y)
    merged = model.merge_and_unload()
    assert_close(merged(x), y, atol=1e-5, rtol=1e-4)
    return merged


class Attention(nn.Module):
    """The structure of timm's."""

    def __init__(self, dim, heads, proj=True):
        super().__init__()
        self.heads, self.qkv = heads, nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim) if proj else nn.Identity()

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Perceptron(nn.Module):
    def __init__(self, sizes, between):
        super().__init__()
        self.first, self.between, self.second = nn.Linear(*sizes[:2]), between, nn.Linear(*sizes[1:])

    def forward(self, x):
        return self.second(self.between(self.first(x)))


SIZES = [(384, 6), (192, 3), (64, 4), (16, 4), (8, 2), (8, 8)]
BLOCKS = [Attention(*sizes, proj) for sizes in SIZES for proj in (True, False)]
BLOCKS += [
    Perceptron(sizes, between)
    for sizes in ((4, 8, 3), (4, 4, 4), (8, 32, 8), (1, 8, 3), (2, 8, 2), (3, 12, 6))
    for between in (nn.Identity(), nn.GELU(), nn.Tanh())
]


@pytest.mark.parametrize("block", BLOCKS)
def test_attention_and_linear_layers_in_a_row_are_no_layers(block):
    assert find_kan_layers(nn.Sequential(block)) == []


class Powers(Layer):
    """A layer that nobody described."""

    def __init__(self, i, o, after=None):
        super().__init__(i, o, 4, before=torch.tanh, after=after)


def test_modules_after_the_sum_leave_the_kind_of_layer():
    for after in (nn.Identity(), nn.Sigmoid(), nn.Softmax(-1), nn.ReLU()):
        (layer,) = find_kan_layers(nn.Sequential(Powers(3, 4, after)))
        assert layer.shape == (4, 3, 4)


@pytest.mark.parametrize(
    "make",
    [
        lambda i, o: Flat(np.prod((i,)), np.int64(o)),
        lambda i, o: KAN([np.prod((1, i)), np.int64(o)]),  # as `np.prod(space.shape)` in reinforcement learning
        lambda i, o: OldEfficientKANLayer(np.int64(i), np.int64(o)),
        lambda i, o: FastKANLayer(np.int64(i), np.int64(o), num_grids=np.int64(5)),
        lambda i, o: ChebyKANLayer(np.int64(i), np.int64(o), np.int64(4)),
    ],
)
def test_sizes_may_be_numpy_integers(make, tmp_path):
    check_life(lambda: nn.Sequential(make(3, 4)), tmp_path, r=(np.int64(2),) * 3)


def test_a_description_may_hold_numpy_values(tmp_path):
    register_kan_layer("flat", matches=Flat, coefficients=("table", "o (i k)"), axes=lambda m: {"i": m.in_features})
    config = LoTRAConfig(r=np.int64(2), rank_pattern={"0": np.int64(1)})
    get_peft_model(nn.Sequential(Flat(np.int64(3), 4)), config).save_pretrained(tmp_path)
    config = config_of(tmp_path)

    assert (config["r"], config["rank_pattern"], config["base_layers"]["0"]["shape"]) == (2, {"0": 1}, [4, 3, 4])
    assert config["base_layers"]["0"]["description"]["axes"] == {"i": 3}


def changed(cls, forward):
    return type("Changed", (cls,), {"forward": lambda self, x: forward(self, cls.forward, x)})


ASSIGNMENTS = {
    "itself": lambda m, w, x: setattr(m, w, getattr(m, w).to(x.device)),
    "its floats": lambda m, w, x: setattr(m, w, getattr(m, w).contiguous().float()),
    "a parameter": lambda m, w, x: setattr(m, w, nn.Parameter(getattr(m, w).to(x.device))),
    "its data": lambda m, w, x: setattr(getattr(m, w), "data", getattr(m, w).data.to(x.device)),
    "an entry": lambda m, w, x: m._parameters.__setitem__(w, nn.Parameter(getattr(m, w))),
    "a registration": lambda m, w, x: m.register_parameter(w, getattr(m, w)),
    "all of them": lambda m, w, x: [setattr(m, name, value) for name, value in m.named_parameters(recurse=False)],
    "another name": lambda m, w, x: setattr(m, "kept", getattr(m, w)),
}


def assign_in_forward(cls, form):
    name = "A" if cls is Powers else "spline_weight"

    def run(self, forward, x):
        ASSIGNMENTS[form](self, name, x)
        return forward(self, x)

    return changed(cls, run)


class Counted(Powers):
    """Has another parameter in each forward pass."""

    def forward(self, x):
        self.passes = nn.Parameter(getattr(self, "passes", torch.zeros(())) + 1, requires_grad=False)
        return super().forward(x)


def test_a_layer_may_make_parameters_in_forward():
    x = torch.rand(6, 3)
    model = get_peft_model(nn.Sequential(Counted(3, 4)), LoTRAConfig(r=2))
    layer = model.base_model.model[0].get_base_layer()
    before = getattr(layer, "passes", 0)
    for passes in (1, 2):
        model(x)
        assert layer.passes == before + passes


@pytest.mark.parametrize("cls", [Powers, OldEfficientKANLayer])
@pytest.mark.parametrize("form", ASSIGNMENTS)
def test_a_layer_may_assign_its_parameters_to_themselves_in_forward(form, cls, tmp_path):
    """Attaching, training, saving and merging work as if nothing was assigned."""
    assigning = assign_in_forward(cls, form)

    merged = check_life(lambda: nn.Sequential(assigning(3, 4)), tmp_path)

    assert type(merged[0]) is assigning


def test_a_layer_that_assigns_a_parameter_to_itself_is_exported():
    layer = assign_in_forward(Powers, "itself")(3, 4)
    model = get_peft_model(nn.Sequential(layer), LoTRAConfig(r=2, init_weights=False)).eval()
    x = torch.rand(6, 3)

    exported = torch.export.export(model, (x,), strict=False)

    assert_close(exported.module()(x), model(x))


class SharedKnots(OldEfficientKANLayer):
    """Keeps the knots of one input for all, and counts its passes by a tensor without dimensions."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features)
        self.register_buffer("grid", self.grid[0].expand(in_features, -1))
        self.register_buffer("passes", torch.zeros(()))
        self.scale = Scale()

    def forward(self, x):
        self.passes += 1
        return super().forward(x) * self.scale(self.passes)


class Scale(nn.Module):
    """Might be a KAN layer, by its parameter."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.rand(4, 3, 5))

    def forward(self, passes):
        return self.table.mean() + passes


def start(model, x):
    model = get_peft_model(model, LoTRAConfig(r=1))
    start_from_gradient(model, lambda: model(x).square().mean())


@pytest.mark.parametrize(
    "use",
    [
        find_kan_layers,
        start,
        lambda model, x: fit_adapter(model, (x, x[:, :1]), nn.functional.mse_loss, steps=1, folds=2),
    ],
)
def test_expanded_buffers_and_tensors_without_dimensions_are_no_obstacle(use):
    """Buffers keep their values, and those that did not change are not written."""
    layer = SharedKnots(3, 1)
    buffers = {name: (buffer, buffer.clone()) for name, buffer in layer.named_buffers()}
    version = layer.grid._version

    use(nn.Sequential(layer), torch.rand(20, 3))

    for buffer, value in buffers.values():
        assert_equal(buffer, value)
    assert layer.grid._version == version


def scripted():
    frozen = torch.jit.freeze(torch.jit.script(nn.Sequential(nn.Linear(3, 3)).eval()))  # without a mode
    return nn.Sequential(torch.jit.script(nn.Linear(3, 3)), frozen, KANLinear(3, 4))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_modules_of_torchscript_are_passed_over(tmp_path):
    assert [layer.name for layer in find_kan_layers(scripted())] == ["2"]
    assert find_kan_layers(nn.Sequential(torch.jit.trace(nn.Linear(3, 3), torch.rand(2, 3)))) == []
    check_life(scripted, tmp_path)


AFTER = {"norm": lambda y: nn.functional.layer_norm(y, (4,)), "bound": torch.tanh, "gate": lambda y: y.relu() + 0.1}


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize(("cls", "kind"), [(KANLinear, "peft-lotra"), (OldEfficientKANLayer, "efficient-kan")])
def test_what_follows_the_sum_is_no_obstacle(cls, kind, after, tmp_path):
    followed = changed(cls, lambda self, forward, x: AFTER[after](forward(self, x)))

    (layer,) = find_kan_layers(nn.Sequential(followed(3, 4)))

    assert (layer.kind, layer.shape, layer.has_residual) == (kind, (4, 3, 8), True)
    check_life(lambda: nn.Sequential(followed(3, 4)), tmp_path)


def test_a_subclass_that_is_linear_stays_of_its_kind():
    class Named(KANLinear):
        pass

    (row,) = find_kan_layers(get_peft_model(nn.Sequential(Named(3, 4)), LoTRAConfig(r=2)))

    assert (row.kind, row.runs_by) == ("peft-lotra", "formula")


def test_legendre_polynomials_of_inputs_between_the_extremes_of_the_batch(tmp_path):
    check_life(lambda: nn.Sequential(Legendre()), tmp_path)


@pytest.mark.parametrize("is_frozen", [False, True])
def test_adapters_leave_knots_that_are_a_parameter(is_frozen, tmp_path):
    torch.manual_seed(0)
    plain = KnotsAsParameter()

    merged = check_life(lambda: nn.Sequential(KnotsAsParameter().requires_grad_(not is_frozen)), tmp_path)

    assert_equal(merged[0].knots, plain.knots)
    assert not torch.equal(merged[0].table, plain.table)


def test_knots_that_are_a_parameter_do_not_move_under_an_adapter():
    model, x = get_peft_model(nn.Sequential(KnotsAsParameter()), LoTRAConfig(r=2)), torch.rand(6, 3)
    layer = model.base_model.model[0]

    with pytest.raises(RuntimeError, match="`update_knots` would change what the coefficients"):
        layer.update_knots(x)

    layer.base_layer.knots.add_(0.1)
    with pytest.raises(RuntimeError, match="The grid of `0` .* was moved"):
        model(x)


class Experts(nn.Module):
    def __init__(self, name="w"):
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.randn(4, 6, 5)))

    def forward(self, x, y):
        return x


def message_of(model):
    with pytest.raises(ValueError) as error:
        get_peft_model(model, LoTRAConfig())
    return str(error.value)


def test_an_error_without_layers_tells_what_to_do():
    plain = message_of(nn.Sequential(nn.Linear(2, 2), nn.Conv2d(2, 2, 3)))

    assert plain.startswith("No KAN layer was found")
    assert "may be KAN" not in plain
    assert "KAT, GR-KAN" in plain
    assert "Call `register_kan_layer` to add a layer that is not recognized" in plain

    message = message_of(nn.ModuleDict({f"block{index}": Experts() for index in range(5)}))

    assert "`find_kan_layers(model)` shows why" in message
    assert message.count("(Experts)") == 3
    assert "and 2 more" in message


class Encoder(nn.Module):
    """Without KAN layers."""

    def __init__(self):
        super().__init__()
        self.position, self.token = nn.Parameter(torch.zeros(1, 17, 8)), nn.Parameter(torch.zeros(1, 1, 8))
        self.blocks = nn.ModuleList([nn.MultiheadAttention(8, 2), nn.Conv1d(8, 8, 3), nn.LSTM(8, 8)])
        self.own = type("Own", (nn.Conv2d,), {})(3, 8, 4)


def test_layers_that_may_be_kan_layers_and_are_left_out_are_named():
    damaged = OldEfficientKANLayer(3, 4)
    damaged.spline_weight = nn.Parameter(torch.randn(4, 24))

    with pytest.warns(UserWarning, match=r"^`2` \(Experts\), `3` .* may be KAN layers"):
        get_peft_model(nn.ModuleList([KANLinear(3, 4), Encoder(), Experts(), damaged]), LoTRAConfig(r=1))


def test_nothing_is_left_out_of_transformers():
    from transformers import GPT2Config, GPT2Model, ViTConfig, ViTModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    for model in (ViTModel(ViTConfig(**sizes)), GPT2Model(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20))):
        assert "may be KAN" not in message_of(model)


@pytest.mark.filterwarnings("error")
def test_no_layer_of_pykan_is_called_unknown():
    pykan = pytest.importorskip("kan")
    get_peft_model(pykan.KAN(width=[3, 4, 2], auto_save=False), LoTRAConfig())
