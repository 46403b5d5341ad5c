# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The known kinds of layers: recognized, and laid out as they compute."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import adapt, assert_equal, base, images, inputs, nested, saved_and_merged
from orders import Formula, assert_one_edge
from peft import LoraConfig, get_peft_model
from stand_ins import CONVOLUTIONS, LAYER_KINDS, Gaussians, as_model
from torch import nn
from torch.testing import assert_close

from peft_lotra import find_kan_layers
from peft_lotra.kan import KANLinear
from peft_lotra.layers.recognize import get_kan_spec, is_linear


# family, size of the basis, has a base branch; for layers of 3 inputs and 4 outputs
EXPECTED = {
    "own": ("peft-lotra", 8, True),
    "efficient-kan": ("efficient-kan", 8, True),
    "efficient-kan-no-scaler": ("efficient-kan", 8, True),
    "efficient-kan-old": ("efficient-kan", 8, True),
    "pykan": ("pykan", 8, True),
    "fast-kan": ("fast-kan", 8, True),
    "faster-kan": ("fast-kan", 8, False),
    "cheby-kan": ("cheby-kan", 5, False),
    "fourier-kan": ("fourier-kan", 8, False),
    "physicsnemo": ("physicsnemo", 10, False),
    "flashkan": ("flashkan", 8, True),
    "inkan": ("inkan", 8, True),
    "kanx": ("kanx", 8, True),
    "pina": ("pina", 7, True),
}


def located(layer):
    return get_kan_spec(layer).locate(layer)


@pytest.mark.parametrize("inputs, outputs, change", [(3, 4, torch.bfloat16), (3, 4, "meta"), (1, 1, "cpu")])
@pytest.mark.parametrize("family", LAYER_KINDS)
def test_a_copy_of_a_known_layer_is_recognized(family, inputs, outputs, change):
    """In another precision, without values, and of one input and one output."""
    kind, functions, residual = EXPECTED[family]
    layer = copy.deepcopy(LAYER_KINDS[family](inputs, outputs)).to(change)

    (row,) = find_kan_layers(as_model(layer))

    assert row[:4] == ("kan", kind, (outputs, inputs, functions), residual)
    assert not row.left_out


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("family", LAYER_KINDS)
def test_a_known_layer_is_linear_and_stays_as_it_was(family):
    layer = LAYER_KINDS[family](3, 4)
    before = copy.deepcopy(layer.state_dict())

    find_kan_layers(layer)

    assert is_linear(layer, get_kan_spec(layer), located(layer))
    assert_equal(layer.state_dict(), before)


def test_a_surface_of_two_inputs_is_no_kan_layer():
    from inkan import KANLayer

    assert get_kan_spec(KANLayer(2, 3, dim=2, compile_basis=False)) is None


def test_an_adapted_layer_of_inkan_is_one_graph():
    model, x = adapt(base("inkan")), inputs()

    compiled = torch.compile(model, fullgraph=True, backend="eager")

    assert_close(compiled(x), model(x))


def qkan_fourier(i, o, scaler):
    from qkan.fourier_kan import FourierKANLinear

    return FourierKANLinear(i, o, enable_standalone_scale_fourier=scaler)


def names(model):
    return [layer.name for layer in find_kan_layers(model)]


def test_each_layer_is_listed_once_and_nothing_inside_of_it():
    layer, outer = KANLinear(3, 3), LAYER_KINDS["own"](3, 4)
    outer.inner = KANLinear(3, 4)

    assert names(layer) == [""]
    assert names(nn.Sequential(layer, nn.ReLU(), layer)) == ["0"]
    assert names(as_model(outer)) == ["kan"]


def test_the_layers_of_an_adapted_model_are_those_of_its_base():
    model = nested()
    rows = find_kan_layers(model)
    assert [row.name for row in rows] == ["body.0", "body.1", "tail.layers.0", "tail.layers.1"]
    get_peft_model(model, LoraConfig(target_modules=["head"]))

    adapted = adapt(model, target_modules=["body.1", "tail.layers.0"])

    adapters = [{}, {"default": (2, 3, 4)}, {"default": (2, 3, 4)}, {}]
    assert find_kan_layers(model) == [row._replace(adapters=ranks) for row, ranks in zip(rows, adapters, strict=True)]
    assert "default (2, 3, 4)" in str(find_kan_layers(adapted))
    assert find_kan_layers(adapted.merge_and_unload()) == rows


@pytest.mark.parametrize(
    "saved, expected", [("body.0", ["body.1", "tail.layers.0", "tail.layers.1"]), ("tail", ["body.0", "body.1"])]
)
def test_copies_that_are_trained_whole_are_not_listed(saved, expected):
    model = nested()

    adapt(model, target_modules=["body.1"], modules_to_save=[saved])

    assert names(model) == expected


def test_few_functions_have_their_factors_adapted(tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(LAYER_KINDS["efficient-kan"](3, 4, grid_size=2, spline_order=1), nn.Linear(4, 2))

    assert get_kan_spec(build()[0]).kind == "efficient-kan-few"
    merged = saved_and_merged(build, inputs(), tmp_path)
    for name in ("spline_weight", "spline_scaler", "base_weight"):
        assert not torch.equal(merged[0].get_parameter(name), build()[0].get_parameter(name))


# the kinds of torch-conv-kan, and the functions of each
KINDS = {
    "kagnconv": ("gram-conv", 4),
    "kalnconv": ("gram-conv", 4),
    "kacnconv": ("cheby-conv", 4),
    "fastkanconv": ("spline-conv", 5),
    "kanconv": ("spline-conv", 6),
}


# stand-ins: builders of modules with the parameters and the formula of the originals


def fast_kan_conv(i, o, count=4, base=True):
    """Return a layer of U-KAN, with `spline_conv.weight` of shape (O, (K I), k, k)."""

    def forward(m, x):
        y = m.spline_conv(m.rbf(x).movedim(-1, 1).flatten(1, 2))
        return y + m.base_conv(F.silu(x)) if base else y

    parts = {"base_conv": nn.Conv2d(i, o, 3, padding=1)} if base else {}
    return Formula(forward, rbf=Gaussians(-1, 1, count), spline_conv=nn.Conv2d(count * i, o, 3, padding=1), **parts)


def kanlib_conv(i, o, groups=2, count=3):
    def forward(m, x):
        y = F.conv2d(F.silu(x), m.weight_residual, m.bias_output, padding=1, groups=groups)
        for k, center in enumerate(m.basis.grid):
            weight = m.coefficients[..., k] * m.weight_spline
            y = y + F.conv2d(torch.exp(-((x - center) ** 2)), weight, padding=1, groups=groups)
        return y

    shape = o, i // groups, 3, 3
    parts = {"weight_spline": shape, "weight_residual": shape, "bias_output": (o,), "groups": groups}
    return Formula(forward, coefficients=(*shape, count), basis=Gaussians(-1, 1, count), **parts)


def gram_conv_2(i, o, degree=3):
    """Return a layer with one convolution of all degrees."""

    def forward(m, x):
        basis = torch.cat([torch.tanh(x) ** k * (1 + m.beta_weights[k] ** 2) for k in range(degree + 1)], 1)
        return F.silu(m.poly_conv(basis) + m.base_conv(F.silu(x)))

    convs = [nn.Conv2d(count * i, o, 3, padding=1, bias=False) for count in (degree + 1, 1)]
    return Formula(forward, degree=degree, beta_weights=(degree + 1,), poly_conv=convs[0], base_conv=convs[1])


def old_pykan(i, o, count=5):
    """Return a layer of pykan as of 2024, with a row of `coef` for each edge."""

    def forward(m, x):
        rows = x.repeat(1, o)  # (batch, o i)
        y = (torch.exp(-((rows[..., None] - m.grid) ** 2)) * m.coef).sum(-1) * m.scale_sp
        y = (y + F.silu(rows) * m.scale_base).view(len(x), o, i)
        return y.sum(2), y, y, y

    grid = nn.Parameter(torch.linspace(-1, 1, count).repeat(o * i, 1), requires_grad=False)
    parts = {"coef": (o * i, count), "scale_base": (o * i,), "scale_sp": (o * i,)}
    return Formula(forward, grid=grid, in_dim=i, out_dim=o, **parts)


def relu_kan(i, o, count=5, name="phase_high"):
    """Return a layer whose basis (batch, i, k) is reshaped, not transposed, for a convolution of kernel (k, i)."""

    def forward(m, x):
        x = x[..., None]
        basis = (torch.relu(x - m.phase_low) * torch.relu(getattr(m, name) - x)) ** 2
        return m.equal_size_conv(basis.reshape(len(x), 1, count, i)).flatten(1)

    low = torch.linspace(-1.5, 0.5, count).repeat(i, 1)
    phases = {"phase_low": nn.Parameter(low), name: nn.Parameter(low + 1.2)}
    return Formula(forward, equal_size_conv=nn.Conv2d(1, o, (count, i)), **phases)


def wav_conv(i, o, groups=1, ndim=2):
    """Return a layer with a scale and a translation of each edge, without axes of the kernel, in blocks by group."""

    def wavelets(m, x):
        u = (x.unsqueeze(1) - m.translation) / m.scale
        return m.wavelet_weights(((1 - u**2) * torch.exp(-(u**2) / 2)).flatten(1, 2))

    def forward(m, x):
        blocks = zip(x.chunk(groups, 1), m.base_conv, m.wavelet_conv, strict=True)
        return torch.cat([conv(F.silu(rows)) + block(rows) for rows, conv, block in blocks], 1)

    conv, i, o = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[ndim - 1], i // groups, o // groups
    shape = 1, o, i, *[1] * ndim
    blocks = [
        Formula(
            wavelets,
            scale=nn.Parameter(torch.ones(shape)),
            translation=nn.Parameter(torch.randn(shape) / 4),
            wavelet_weights=conv(o * i, o, 3, padding=1, groups=o, bias=False),
        )
        for _ in range(groups)
    ]
    base = nn.ModuleList([conv(i, o, 3, padding=1, bias=False) for _ in range(groups)])
    return Formula(forward, base_conv=base, wavelet_conv=nn.ModuleList(blocks))


def test_a_layer_of_convkan_on_rows_of_groups():
    edges = {"base_weight": (2, 4, 3), "spline_scaler": (2, 4, 3)}
    layer = Formula(None, grid=nn.Buffer(torch.rand(2, 3, 5)), spline_weight=(2, 4, 3, 5), **edges)

    tensor = located(layer)

    assert (tensor.kind, tensor.shape, tensor.has_residual) == ("convkan", (8, 3, 5), True)
    expected = torch.cat([layer.spline_weight, layer.base_weight[..., None]], -1).flatten(0, 1)
    assert_equal(tensor.read(layer), expected)


# a layer of 4 inputs, its kind, its canonical shape, and whether it has a base branch
LAYERS = [
    (partial(fast_kan_conv, 4, 6, base=True), "fast-kan-conv", (6, 4, 4, 9), True),
    (partial(fast_kan_conv, 4, 6, base=False), "fast-kan-conv", (6, 4, 4, 9), False),
    (partial(gram_conv_2, 4, 6), "gram-conv-2", (6, 4, 4, 9), True),
    (partial(qkan_fourier, 4, 6, True), "qkan-fourier", (6, 4, 10), True),
    (partial(qkan_fourier, 4, 6, False), "qkan-fourier", (6, 4, 10), True),
    (partial(old_pykan, 4, 6), "pykan-2024", (6, 4, 5), True),
    (partial(relu_kan, 4, 20), "relu-kan", (20, 4, 5), False),
]
for groups in (1, 2):
    inputs_of_group = 4 // groups
    LAYERS.append((partial(kanlib_conv, 4, 6, groups=groups), "kanlib-conv", (6, inputs_of_group, 3, 9), True))
    for ndim in (1, 2, 3):
        # factors of edges are shared along the kernel
        shape = (6, inputs_of_group, 3, 3**ndim)
        LAYERS.append((partial(wav_conv, 4, 6, groups, ndim), f"wav-conv-{ndim}d", shape, True))
        for kind, (family, functions) in KINDS.items():
            make = partial(CONVOLUTIONS[kind], 4, 6, 3, groups=groups, padding=1, ndim=ndim)
            LAYERS.append((make, family, (6, inputs_of_group, functions, 3**ndim), kind != "kacnconv"))
for family, (kind, functions, residual) in EXPECTED.items():
    LAYERS.append((partial(LAYER_KINDS[family], 4, 6), kind, (6, 4, functions), residual))


@pytest.mark.parametrize("make, family, shape, residual", LAYERS)
def test_an_edge_joins_one_input_and_one_output(make, family, shape, residual):
    layer = make()

    spec = get_kan_spec(layer)

    tensor = spec.locate(layer)
    assert (spec.kind, tensor.shape, tensor.has_residual) == (family, shape, residual)
    for name, values in tensor.split(tensor.read(layer)).items():
        assert_close(values, layer.get_parameter(name))  # a mean is rounded
    is_convolution = len(shape) == 4
    x = images(2, 4, (1, 3, 9, 27).index(shape[-1]) if is_convolution else 0)
    has_norm = family not in ("fast-kan-conv", "kanlib-conv") if is_convolution else family == "fast-kan"
    assert_one_edge(layer, tensor, x, mixes_inputs=has_norm)


@pytest.fixture(params=["phase_high", "phase_height"])
def with_phases(request):
    """The name of a phase, and a builder of a network with phases that all outputs share."""

    def build():
        torch.manual_seed(0)
        return nn.Sequential(relu_kan(3, 4, name=request.param))

    return request.param, build


def test_a_merge_changes_the_phases(with_phases, tmp_path):
    name, build = with_phases
    (layer,) = build()
    state = build().state_dict()

    merged = saved_and_merged(build, inputs(), tmp_path).state_dict()

    changed = {key for key, value in merged.items() if not torch.equal(value, state[key])}
    assert changed == {"0.phase_low", f"0.{name}", "0.equal_size_conv.weight"}
    assert located(layer).shape == (4, 3, 15)
    assert_equal(located(layer).read(layer)[2, :, 5:10], layer.phase_low)
    assert not is_linear(layer, get_kan_spec(layer), located(layer))
