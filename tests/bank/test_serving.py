# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Rows of one batch with adapters of a bank: the answers of each adapter by itself."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import (
    KINDS,
    X,
    adapt,
    assert_equal,
    assert_near,
    bank_of,
    load,
    net,
    refused,
    relative,
    row_by_row,
    state,
)
from peft import get_peft_model_state_dict
from torch import nn
from torch.testing import assert_close

from peft_lotra import AdapterBank, LoTRAConfig, LoTRALayer
from peft_lotra.kan import KAN


NAMES = ["a", "__base__", "b", "c", "b", "__base__", "a", "c"]
# an alpha, unequal ranks, full modes without a base branch
SETTINGS = {"a": {"alpha": 0.7}, "b": {"r": (4, 1, 2)}, "c": {"r": ("full", "full", 1), "adapt_residual": False}}


def several(base=None, configs=SETTINGS):
    """A bank with an adapter of each setting, and for each name, also the base's, the model that it stands for.

    By default it is a bank of `net()`.
    """
    base = net() if base is None else base
    plain = copy.deepcopy(base)
    bank, alone = bank_of(base, configs)
    return bank, {"__base__": plain, **alone}


NAMES_OF_FOUR = ["a", "b", "__base__", "c"]


@pytest.fixture
def sequences():
    """A bank, its model, inputs (4, 6, 3) with a name for each of the four, and what is expected.

    The model calls its layers twice.
    """
    bank, alone = several(nn.Sequential(*[KAN([3, 5, 3])] * 2))
    x = torch.rand(4, 6, 3)
    return bank, bank.attach(), x, row_by_row(alone, NAMES_OF_FOUR, x)


@torch.no_grad()
def test_a_name_stands_for_all_rows_behind_its_dimension(sequences):
    bank, model, x, expected = sequences

    y = model(x, adapter_names=NAMES_OF_FOUR)
    with bank.rows(NAMES_OF_FOUR):
        flattened = nn.Sequential(nn.Flatten(0, 1), model)(x)
    compiled = torch.compile(model.eval(), backend="eager", fullgraph=True)(x, ids=bank.ids(NAMES_OF_FOUR))

    assert_near(y, expected)
    assert_near(compiled, expected)
    assert_near(flattened.view(4, 6, 3), expected)


@torch.no_grad()
def test_rows_in_another_order_are_named_by_bank_rows(sequences):
    bank, model, x, expected = sequences
    turned = x.transpose(0, 1).reshape(-1, 3)

    for rows in (NAMES_OF_FOUR * 6, bank.ids(NAMES_OF_FOUR).tolist() * 6):
        with bank.rows(rows):
            assert_near(model(turned).view(6, 4, 3).transpose(0, 1), expected)

    with bank.rows(NAMES_OF_FOUR), refused("layers.0"):
        model(turned)


def test_two_banks_of_one_network_have_their_own_rows():
    """Each part of a network may have a bank of its own, whose adapters may have the same names."""
    parts = [KAN([3, 5, 4]), KAN([4, 5, 2])]
    banks, models = [], []
    for part in parts:
        bank, alone = bank_of(part, {"a": {"r": 1}, "b": {"r": 2}})
        bank.attach()
        banks.append(bank)
        models.append(alone)
    names = ["a", "b", "b", "a", "b", "a", "a", "b"]
    first, second = banks

    with torch.no_grad():
        hidden = row_by_row(models[0], names, X)
        expected = row_by_row(models[1], names, hidden)
        with first.rows(names), second.rows(names):
            y = parts[1](parts[0](X))
        with first.rows(names), second.rows(None):
            hidden_again = parts[0](X)

    assert_near(y, expected)
    assert_near(hidden_again, hidden)


# --- Graphs: compiled, exported, in ONNX ---


@torch.no_grad()
def test_adapters_that_come_and_go_do_not_compile_again():
    """Before the first call, also if the base was in training mode when the bank was attached."""
    torch._dynamo.reset()  # the forward passes of other tests count against the limit of graphs
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    bank, alone = several(KAN([3, 5, 2]).train())
    model = bank.attach().eval()
    compiled = torch.compile(model, backend=backend, fullgraph=True)

    for count in range(12):
        bank.add(f"more{count}", alone["b"])
        ids = torch.randint(-1, len(bank), (8,))
        assert_near(compiled(X, ids=ids), model(X, ids=ids))
    bank.remove("a")
    bank.add("d", alone["c"])

    assert_near(compiled(X, ids=bank.ids(["d"] * 8)), alone["c"](X))
    assert len(graphs) <= 3  # capacities 4, 8, 16


def dynamic_shapes():
    """The number of rows is an input of the graph."""
    rows = torch.export.Dim("rows", min=2, max=64)
    return {"args": ({0: rows},), "ids": {0: rows}}


def test_an_exported_bank_takes_ids_for_any_number_of_rows():
    bank, alone = several()
    names = ["c", "b", "a", "__base__"]

    program = torch.export.export(bank.attach(), (X,), {"ids": bank.ids(NAMES)}, dynamic_shapes=dynamic_shapes())

    with torch.no_grad():
        y = program.module()(X[:4], ids=bank.ids(names))
    assert_near(y, row_by_row(alone, names, X))


UNKNOWN_IDS = {"removed": 1, "never given": 3, "too large": 10**6, "below the base": -2, "far below": -1000}
NAMES_WITHOUT_B = ["a", "__base__", "c", "c", "a", "a", "c", "__base__"]


def bank_without_b():
    """A bank that has lost its second adapter, its model, and ids of rows that it still answers."""
    bank, _ = several()
    model = bank.attach()
    bank.remove("b")
    return bank, model, bank.ids(NAMES_WITHOUT_B)


def check_refuses_unknown_ids(call, ids, error):
    """Check that a call with one wrong id among right ones raises, and is right again afterwards."""
    expected = call(ids)

    for number in UNKNOWN_IDS.values():
        with pytest.raises(error):
            call(torch.cat([ids[:-1], torch.tensor([number])]))

    assert_close(call(ids), expected)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_compiled_bank_refuses_ids_of_no_adapter(backend):
    """Also of an adapter that was there when the graph was made."""
    torch._dynamo.reset()
    bank, _ = several()
    model = bank.attach()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    call = torch.no_grad()(lambda ids: compiled(X, ids=ids))
    call(bank.ids(NAMES))

    bank.remove("b")

    ids = bank.ids(NAMES_WITHOUT_B)
    check_refuses_unknown_ids(call, ids, RuntimeError)
    assert_near(call(ids), model(X, ids=ids).detach())


def test_an_exported_bank_refuses_ids_of_no_adapter(tmp_path):
    _, model, ids = bank_without_b()
    program = torch.export.export(model, (X,), {"ids": ids})
    torch.export.save(program, tmp_path / "bank.pt2")

    for exported in (program.module(), torch.export.load(tmp_path / "bank.pt2").module()):
        check_refuses_unknown_ids(torch.no_grad()(lambda ids: exported(X, ids=ids)), ids, RuntimeError)  # noqa: B023


@pytest.fixture(scope="module", params=["module", "program"])
def onnx_bank(request, tmp_path_factory):
    """A function that runs a bank in ONNX, from `torch.onnx.export` of its model or of its exported program."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    bank, alone = several()
    model = bank.attach()
    bank.remove("b")
    ids = bank.ids(NAMES_WITHOUT_B)
    file = tmp_path_factory.mktemp("onnx") / "bank.onnx"
    shapes = {"dynamic_shapes": dynamic_shapes()}
    if request.param == "program":
        program = torch.export.export(model, (X,), {"ids": ids}, **shapes)
        torch.onnx.export(program, f=file, dynamo=True, verbose=False)
    else:
        torch.onnx.export(model, (X,), file, kwargs={"ids": ids}, dynamo=True, verbose=False, **shapes)
    session = runtime.InferenceSession(str(file))
    names = [value.name for value in session.get_inputs()]

    def call(x, ids):
        (y,) = session.run(None, dict(zip(names, (x.numpy(), ids.numpy()), strict=True)))
        return torch.tensor(y)

    return bank, alone, call


def test_a_bank_in_onnx_takes_ids_for_any_number_of_rows(onnx_bank):
    bank, alone, call = onnx_bank

    for names in (NAMES_WITHOUT_B, ["c", "a", "__base__"]):
        x = X[: len(names)]
        assert_near(call(x, bank.ids(names)), row_by_row(alone, names, x))


def test_a_bank_in_onnx_refuses_ids_of_no_adapter(onnx_bank):
    bank, _, call = onnx_bank

    check_refuses_unknown_ids(lambda ids: call(X, ids), bank.ids(NAMES_WITHOUT_B), Exception)


@pytest.mark.parametrize(("rows", "count"), [(8, 1), (8, 3), (1, 8)])
def test_a_bank_in_onnx_refuses_another_number_of_ids_than_rows(onnx_bank, rows, count):
    """ONNX would broadcast one id."""
    bank, _, call = onnx_bank

    with pytest.raises(Exception, match="dimensions must match"):
        call(X[:rows], bank.ids(NAMES_WITHOUT_B[:count]))


def test_a_compiled_bank_refuses_one_id_for_several_rows():
    bank, _ = several()
    compiled = torch.compile(bank.attach(), backend="eager", fullgraph=True)

    with pytest.raises(Exception, match="Length of `ids`"):
        compiled(X, ids=bank.ids(["a"]))


def test_a_kind_without_functions_serves_but_makes_no_graph():
    bank, alone = several(KINDS["kanx"]())
    model, rows = bank.attach(), {"ids": bank.ids(NAMES)}

    with pytest.raises(RuntimeError, match="basis"):
        torch.export.export(model, (X,), rows)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="basis"):
        torch.compile(model, backend="eager", fullgraph=True)(X, **rows)
    with pytest.raises(RuntimeError, match="basis|one graph"):
        torch.compile(model, backend="eager")(X, **rows)

    assert_near(model(X, **rows).detach(), row_by_row(alone, NAMES, X))


@torch.no_grad()
def test_a_part_of_the_model_may_be_compiled():
    base = net()
    bank, alone = several(base)
    model = bank.attach()
    base.kan.compile(backend="eager")

    assert_near(model(X, adapter_names=NAMES), row_by_row(alone, NAMES, X))
    assert_near(model(X), alone["__base__"](X))


def test_an_eager_pass_is_right_while_another_thread_compiles():
    """While a graph is made, torch says in all threads that it compiles."""
    torch._dynamo.reset()
    bank, alone = several()
    model = bank.attach()
    answers = []

    def backend(graph, _):
        with ThreadPoolExecutor(1) as threads:
            for rows in ({"adapter_names": NAMES}, {"ids": bank.ids(NAMES)}):
                answers.append(threads.submit(torch.no_grad()(model), X, **rows).result())
        return graph

    torch.compile(model, backend=backend, fullgraph=True)(X, ids=bank.ids(["c"] * 8))

    assert len(answers) == 2
    for y in answers:
        assert_near(y, row_by_row(alone, NAMES, X))


# --- What is refused ---


def test_an_id_is_never_given_to_another_adapter():
    """Not after a removal, a replacement or `compact`: what was looked up before is right or refused."""
    bank, alone = several()
    model = bank.attach()
    *replaced, kept = bank.ids(["a", "b", "c"])

    bank.remove("b")
    bank.add("a", alone["c"], replace=True)
    for count in range(20):
        bank.add(f"more{count}", alone["b"])
    bank.compact()

    with torch.no_grad():
        assert_near(model(X, ids=kept.expand(8)), alone["c"](X))
    for number in replaced:
        with refused(f"No adapter has the id {number}"):
            model(X, ids=number.expand(8))


@pytest.mark.parametrize("rows", [{"adapter_names": ["a"]}, {"ids": torch.tensor([0])}, {"adapter_names": ["a"] * 4}])
@pytest.mark.parametrize("shape", [(8, 3), (8, 1, 3)])
def test_one_adapter_for_several_rows_is_refused(rows, shape):
    """`adapter_names=[name]` is a forgotten `* len(x)`."""
    bank, _ = several()

    with refused(f"Length of `{next(iter(rows))}`"):
        bank.attach()(torch.rand(shape), **rows)


@pytest.mark.parametrize("shape", [(0, 5, 3), (4, 0, 3), (0, 0, 3)])
def test_empty_sequences_give_empty_outputs(shape):
    bank, alone = several(net())
    names = ["a", "b", "__base__", "a"][: shape[0]]
    x = torch.empty(shape, requires_grad=True)

    y = bank.attach()(x, adapter_names=names)
    y.sum().backward()

    assert y.shape == alone["a"](x).shape
    assert_equal(x.grad, torch.zeros(shape))


@pytest.mark.parametrize("change", ["removed", "compacted", "exchanged", "replaced"])
@pytest.mark.parametrize("make", [net, KINDS["pykan"]], ids=["own", "pykan"])
def test_a_pass_goes_on_with_an_adapter_that_is(change, make):
    """As if another thread changed the bank between two layers."""

    def change_bank(*_):
        if change == "replaced":
            bank.add("a", alone["b"], replace=True)
            return
        bank.remove("a")
        if change != "removed":
            bank.compact()
        if change == "exchanged":
            bank.add("new", alone["b"])

    bank, alone = several(make())
    model = bank.attach()
    *_, last = [module for module in model.modules() if isinstance(module, LoTRALayer)]
    last.register_forward_pre_hook(change_bank)

    with torch.no_grad():
        y = model(X, adapter_names=NAMES)

    assert_near(y, row_by_row(alone, NAMES, X))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"adapter_names": ["nobody"] * 8}, "nobody"),
        ({"adapter_names": []}, "Length of `adapter_names`"),
        ({"ids": torch.tensor([3] * 8)}, "3"),
        ({"ids": torch.tensor([-2] * 8)}, "-2"),
        ({"ids": torch.tensor([1] * 8)}, "1"),
        ({"ids": torch.tensor([0] * 8), "adapter_names": ["a"] * 8}, "not both"),
    ],
)
def test_a_refused_call_leaves_nothing_behind(rows, message):
    bank, alone = several()
    model = bank.attach()
    bank.remove("b")

    with refused(message):
        model(X, **rows)

    with torch.no_grad():
        assert_near(model(X, adapter_names=["a"] * 8), alone["a"](X))


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8])
def test_ids_that_are_no_signed_integers_are_refused(dtype, compiles):
    bank, _ = several()
    model = bank.attach()
    call = torch.compile(model, backend="eager", fullgraph=True) if compiles else model

    with pytest.raises(Exception, match="`ids` must be integers"):
        call(X, ids=torch.zeros(8, dtype=dtype))


class Weighted(nn.Module):
    """A network with a second input, of one weight for all rows."""

    def __init__(self):
        super().__init__()
        self.kan = KAN([3, 4, 2])

    def forward(self, x, weight):
        return weight * self.kan(x)


def test_a_vector_beside_the_rows_is_not_taken_for_them():
    bank, _ = several(Weighted())
    model, weight = bank.attach(), torch.ones(1)

    with refused("Length of `adapter_names`"):
        model(X, weight, adapter_names=["a"])
    assert model(X, weight, adapter_names=NAMES).shape == (8, 2)


@torch.no_grad()
def test_as_many_steps_as_rows_in_the_order_of_time_are_refused():
    """Recurrent networks have (time, batch, in). Rows of equal steps have one answer in either order."""
    bank, alone = several(KAN([3, 2]))
    model, names = bank.attach(), ["a", "b", "c", "a"]

    for steps in (3, 4):
        with refused("layers.0"):
            model(torch.rand(4, steps, 3).transpose(0, 1), adapter_names=names)
    x = torch.rand(1, 4, 3).expand(4, 4, 3)
    assert_near(model(x, adapter_names=names), row_by_row(alone, names, x))


def test_inputs_far_outside_of_the_grid_warn():
    bank, _ = several()

    with pytest.warns(UserWarning, match="far outside of its grid"):
        bank.attach()(100 * X, adapter_names=NAMES)


def test_a_grid_that_moves_while_attached_is_refused():
    base = net()
    bank, _ = several(base)
    model = bank.attach()
    base.kan.layers[0].update_grid(X)

    with pytest.raises(RuntimeError, match="grid of `kan.layers.0`"):
        model(X, adapter_names=NAMES)


# --- Attaching and detaching ---


def merged_model():
    model = adapt(net())
    model.merge_adapter()
    return model


def moved_grid():
    model = net()
    model.kan.layers[0].grid_bounds += 1
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [(merged_model, "merged"), (lambda: net(seed=8), "another base"), (moved_grid, "another base")],
)
def test_a_model_that_does_not_fit_the_bank_is_refused(make, message):
    bank, _ = several()
    model = make()

    with refused(message, model):
        bank.attach(model)

    assert bank.attach() is not None


def test_a_base_whose_weights_were_loaded_after_the_bank_was_created_is_refused():
    base, trained = net(seed=8), net()
    bank = AdapterBank(base)
    bank.add("a", get_peft_model_state_dict(adapt(net())))
    base.load_state_dict(trained.state_dict())

    with refused("changed since the bank was created", base):
        bank.attach()


def test_a_detached_model_is_as_before():
    base = net()
    before, modules = state(base), list(base.modules())
    bank, _ = several(base)

    bank.attach()
    with refused("detach"):
        bank.attach()
    bank.detach()

    assert_equal(state(base), before)
    assert list(base.modules()) == modules
    assert bank.attach(copy.deepcopy(base)) is not None


@pytest.mark.parametrize("serves_another", [False, True])
def test_a_detached_model_refuses_adapters(serves_another):
    bank, _ = several()
    model = bank.attach()
    bank.detach()
    if serves_another:
        bank.attach(net())

    with refused("detached"):
        model(X, adapter_names=["a"] * 8)
    with refused("detached"):
        model(X, ids=bank.ids(["a"] * 8))

    assert_near(model(X), net()(X))


def test_rows_of_a_bank_that_is_not_attached_are_refused():
    bank, _ = several()

    with refused("attached to no model"), bank.rows(["a"] * 8):
        net()(X)


def test_an_attached_bank_grows_and_is_pickled_with_its_model():
    bank, alone = several()
    model = bank.attach()

    bank.add("d", alone["a"])
    copied = pickle.loads(pickle.dumps(model))

    with torch.no_grad():
        assert_equal(copied(X, adapter_names=["d"] * 8), model(X, adapter_names=["a"] * 8))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda network: network], ids=["a copy", "the base"])
def test_a_base_that_serves_a_bank_gets_no_adapter(copied):
    base = net()
    spare = copy.deepcopy(base)
    bank, _ = several(base)
    model = bank.attach()

    with refused("serves an AdapterBank", model):
        adapt(copied(base))

    assert all(parameter.requires_grad for parameter in base.parameters())
    bank.add("d", adapt(spare))


def test_a_bank_serves_a_peft_model_that_goes_on(tmp_path):
    model = adapt(net())
    expected, bank = model(X).detach(), AdapterBank(model)
    bank.add("b", adapt(net(), r=1))
    bank.add("own", model)
    layer = model.get_submodule("base_model.model.kan.layers.0")

    served = bank.attach(model)

    with torch.no_grad():
        assert_equal(model.eval()(X), expected)
        assert_near(served(X), net()(X))
        assert_near(served(X, adapter_names=["own"] * 8), expected)
        assert relative(served(X, adapter_names=["b"] * 8), served(X)) > 1e-5
    model.save_pretrained(tmp_path)
    model.add_adapter("more", LoTRAConfig(r=1))
    with refused("another bank"):
        AdapterBank(net()).attach(model)

    model.train()
    bank.detach()

    assert type(layer) is LoTRALayer
    assert not any(module.training for module in model.model.modules())
    assert_near(load(tmp_path)(X), expected)
    assert_equal(model.eval()(X), expected)


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload", "unload"])
def test_adapters_are_not_merged_while_a_bank_is_attached(method):
    model = adapt(net())
    bank = AdapterBank(model)
    bank.add("own", model)
    expected = model(X)
    served = bank.attach(model)

    with refused("detach"):
        getattr(model, method)()

    assert_near(served(X, adapter_names=["own"] * 8), expected)
    bank.detach()
    getattr(model, method)()


def test_a_pass_is_refused_while_adapters_are_merged_into_a_single_layer():
    model = adapt(net())
    bank = AdapterBank(model)
    bank.add("own", model)
    served = bank.attach(model)
    expected = served(X, adapter_names=["own"] * 8)
    layer = model.get_submodule("base_model.model.kan.layers.1")

    layer.merge()

    for names in (["own"] * 8, None):
        with refused("merged into `kan.layers.1`"):
            served(X, adapter_names=names)
    layer.unmerge()
    assert_equal(served(X, adapter_names=["own"] * 8), expected)


def test_a_forward_that_was_replaced_stays():
    """As accelerate replaces it."""
    model = adapt(net())
    layer = model.get_submodule("base_model.model.kan.layers.0")
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)
    expected, bank = model(X), AdapterBank(net())

    bank.attach(model)
    assert_equal(model(X), expected)
    bank.detach()
    assert_equal(model(X), expected)


def test_detaching_restores_the_modes_of_modules():
    base = nn.Sequential(KINDS["fast-kan"](), nn.BatchNorm1d(4), KAN([4, 2])).train()
    base[1].eval()
    before = [module.training for module in base.modules()]
    bank = AdapterBank(base)

    bank.attach().eval()
    bank.detach()

    assert [module.training for module in base.modules()] == before
