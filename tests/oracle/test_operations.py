# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Each operation on each kind of layer, compared with a base to whose parameters the dense update was added."""

import copy

import pytest
import torch
from dense import ALPHA, FORMS, dense, dense_parameters, near
from helpers import CONVS, KINDS, adapt, add_adapter, assert_equal, assert_near, images, inputs, layer_of
from jet_helpers import nested
from peft import PeftModel, get_peft_model
from stand_ins import CONVOLUTIONS, LAYER_KINDS, as_model

from peft_lotra import AdapterBank, LoTRAConfig, extract_lotra, hotswap_adapter, start_from_gradient
from peft_lotra.derivatives.torch_fallback import ExactNorms
from peft_lotra.kan import jet


pytestmark = pytest.mark.filterwarnings("ignore")

MAKERS = {
    **KINDS,
    **CONVS,
    **{
        f"{kind} in groups": lambda kind=kind: as_model(CONVOLUTIONS[kind](2, 4, 3, groups=2, padding=1))
        for kind in CONVS
    },
    "wide own": lambda: as_model(LAYER_KINDS["own"](40, 40)),
}
# the kinds that take all forms: thin products, scales of edges, no formula, a convolution
TYPICAL = ["own", "wide own", "efficient-kan-old", "pykan", "fastkanconv"]
FORM_OF_OTHERS = ["factors", "shape"]
OPERATIONS = {}
# operations that do the same for each kind
OF_ONE_KIND = ["half", "hotswap", "weighted"]


def operation(function):
    OPERATIONS[function.__name__] = function
    return function


def make(kind):
    """Return a base of one layer, and inputs."""
    torch.manual_seed(0)
    base = MAKERS[kind]().double().eval()
    if "conv" in kind:
        return base, images(12, channels=2, size=5).double()
    return base, inputs(48, in_features=40 if "wide" in kind else 3).double()


@operation
def forward(base, model, x, folder):
    expected = dense(base, model)(x)
    near(model(x), expected)
    near(model(x[:1]), dense(base, model)(x[:1]))
    near(model.train()(x), expected)
    with torch.no_grad():
        near(model(x), expected)
    with model.disable_adapter():
        near(model(x), base(x))


@operation
def gradient(base, model, x, folder):
    """Of the inputs, and of each component."""
    x = x.clone().requires_grad_()
    variables = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    parameters = dense_parameters(base, (model, "default", ALPHA))

    actual = torch.autograd.grad(model(x).sin().sum(), variables)
    expected = torch.autograd.grad(torch.func.functional_call(base, parameters, (x,)).sin().sum(), variables)

    near(actual, expected, 1e-7)


@operation
def coefficients(base, model, x, folder):
    layer = layer_of(model)
    total = dense(base, model)
    read = layer_of(adapt(total, r=1)).get_base_weight()
    near(layer.effective_coefficients(), read)


@operation
def merge(base, model, x, folder):
    expected = dense(base, model)(x)
    before = copy.deepcopy(base.state_dict())
    model.merge_adapter()
    near(model(x), expected)
    model.unmerge_adapter()
    near(model(x), expected)
    assert_equal(model.unload().state_dict(), before)
    again = adapt(base, r=model.peft_config["default"].r, alpha=ALPHA)
    expected = dense(copy.deepcopy(again).unload(), again)(x)
    near(again.merge_and_unload(safe_merge=True)(x), expected)


@operation
def reload(base, model, x, folder):
    """Bit for bit, of components that require a gradient and those of a file, which do not."""
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    assert_equal(loaded(x), model(x))
    near(loaded(x), dense(base, model)(x))
    single = copy.deepcopy(model).float()
    single.save_pretrained(folder)
    assert_equal(PeftModel.from_pretrained(copy.deepcopy(base).float(), folder).eval()(x.float()), single(x.float()))


@operation
def single(base, model, x, folder):
    """In float32, up to its rounding."""
    near(copy.deepcopy(model).float()(x.float()).double(), dense(base, model)(x), 5e-5)


@operation
def bfloat16(base, model, x, folder):
    """A base in half precision, with components in float32 and an update that is added in float32."""
    half = adapt(copy.deepcopy(base).bfloat16(), r=model.peft_config["default"].r, alpha=ALPHA)
    x = x.bfloat16()
    assert_near(half(x), dense(copy.deepcopy(half).unload(), half)(x), 5e-2)


@operation
def autocast(base, model, x, folder):
    model, reference = copy.deepcopy(model).float(), dense(base, model).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_near(model(x.float()), reference(x.float()), 5e-2)


@operation
def half(base, model, x, folder):
    """Of a file in half precision."""
    model.peft_config["default"].storage = "float16"
    model.save_pretrained(folder)
    assert_near(PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()(x), dense(base, model)(x), 5e-3)


@operation
def hotswap(base, model, x, folder):
    model.save_pretrained(folder)
    other = adapt(copy.deepcopy(base), r=3, alpha=0.4, adapt_residual=model.peft_config["default"].adapt_residual)
    hotswap_adapter(other, folder, target_rank=99)
    near(other(x), dense(base, model)(x))


@operation
def weighted(base, model, x, folder):
    add_adapter(model, "other", r=1, alpha=0.4)
    expected = dense(base, (model, "default", 0.5 * ALPHA), (model, "other", -2 * 0.4))(x)
    for kind, ranks in {"cat": {}, "svd": {"ranks": 99}}.items():
        model.add_weighted_adapter(["default", "other"], [0.5, -2.0], kind, kind, **ranks)
        model.set_adapter(kind)
        near(model(x), expected, 1e-6)


@operation
def mixed(base, model, x, folder):
    """Rows of different adapters: in groups and one by one."""
    if x.dim() == 2:
        x = x.repeat(9, 1)
    add_adapter(model, "other", r=2, alpha=0.4)
    add_adapter(model, "splines", **FORMS["splines"])
    scales = {"default": ALPHA, "other": 0.4, "splines": 1.0}
    outputs = {name: dense(base, (model, name, scale))(x) for name, scale in scales.items()}
    outputs["__base__"] = dense(base)(x)
    near_by_row(model, outputs, x)
    near_by_row(model, outputs, x[:5])


def near_by_row(model, outputs, x):
    """Check that each row of a mixed batch has the outputs of its adapter."""
    names = [list(outputs)[index] for index in torch.randint(len(outputs), (len(x),))]
    y = model(x, adapter_names=names)
    near(y, torch.stack([outputs[name][row] for row, name in enumerate(names)]))
    if x.dim() == 2:
        near(model(x[:0], adapter_names=[]), y[:0])


@operation
def bank(base, model, x, folder):
    bank = AdapterBank(copy.deepcopy(base))
    bank.add("a", model)
    outputs = {"a": dense(base, model)(x), "__base__": dense(base)(x)}
    near_by_row(bank.attach().eval(), outputs, x)
    bank.detach()
    for name, form in FORMS.items():
        other = adapt(copy.deepcopy(base), alpha=0.4, **form)
        bank.add(name, other)
        outputs[name] = dense(base, (other, "default", 0.4))(x)
    bank.add("shape", bank, replace=True)
    bank.remove("dense")
    del outputs["dense"]
    bank.save(folder)
    loaded = AdapterBank.load(copy.deepcopy(base), folder)
    near_by_row(loaded.attach().eval(), outputs, x)
    loaded.export("a", folder / "a")
    near(PeftModel.from_pretrained(copy.deepcopy(base), folder / "a").eval()(x), outputs["a"])


@operation
def derivatives(base, model, x, folder):
    """Along directions and up to order 4, of few points and of many."""
    if x.dim() > 2:
        return
    reference = dense(base, model)
    directions = torch.randn(2, x.shape[1], dtype=x.dtype)
    for points, order in ((x[:2], 4), (x[:20], 3), (x, 2)):
        actual = [derivative[..., :4] for derivative in jet(model, points, directions, order=order)]
        with ExactNorms():
            expected = nested(lambda z: reference(z)[..., :4], points, directions, order)
        near(actual, list(expected), 1e-7)


@operation
def extraction(base, model, x, folder):
    tuned = dense(base, model)
    extracted = extract_lotra(copy.deepcopy(base), tuned, r=model.peft_config["default"].r)
    near(extracted.eval()(x), tuned(x), 1e-5)


@operation
def start(base, model, x, folder):
    near(get_peft_model(copy.deepcopy(base), LoTRAConfig()).eval()(x), base(x))
    fresh = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2))
    start_from_gradient(fresh, lambda: (fresh(x) - 1).square().mean())
    near(fresh.eval()(x), base(x))


CASES = []
for name in OPERATIONS:
    for kind in MAKERS:
        if name in OF_ONE_KIND and kind not in TYPICAL:
            continue
        forms = FORMS if kind in TYPICAL else FORM_OF_OTHERS
        CASES += [(name, kind, form) for form in ([*forms][:1] if name == "start" else forms)]
IMPOSSIBLE = {
    ("flashkan", "derivatives"): "its compiled backward pass cannot be differentiated again",
    **{("flashkan", name): "its compilation takes seconds" for name in ("reload", "single", "bfloat16", "autocast")},
    **{
        (f"kalnconv{groups}", name): "it normalizes by the whole batch: refused"
        for groups in ("", " in groups")
        for name in ("mixed", "bank")
    },
}


@pytest.mark.parametrize(("name", "kind", "form"), CASES)
def test_an_operation_gives_what_it_gives_on_the_dense_base(name, kind, form, tmp_path):
    if (kind, name) in IMPOSSIBLE:
        pytest.skip(IMPOSSIBLE[kind, name])
    base, x = make(kind)
    OPERATIONS[name](base, adapt(copy.deepcopy(base), alpha=ALPHA, **FORMS[form]), x, tmp_path)
