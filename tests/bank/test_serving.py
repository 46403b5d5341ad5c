# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Rows of one batch with adapters of a bank: the answers of each adapter by itself."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from behaving import CONVS, KINDS, X, adapted, apart, net, same, state
from peft import PeftModel
from torch import nn

from peft_lotra import AdapterBank, LoTRAConfig, LoTRALayer
from peft_lotra.kan import KAN, KANLinear, SlimKAN


TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
NAMES = ["a", "__base__", "b", "c", "b", "__base__", "a", "c"]
# unequal ranks, an alpha, no residual branch
SETTINGS = {"a": {"alpha": 0.7}, "b": {"r": (4, 1, 2)}, "c": {"r": 1, "adapt_residual": False}}


def several(base, **changes):
    """A bank with an adapter of each setting, and for each name the model that has that adapter alone."""
    bank, alone = AdapterBank(base, **changes), {"__base__": copy.deepcopy(base)}
    for name, config in SETTINGS.items():
        alone[name] = adapted(copy.deepcopy(base), **config)
        if next(base.parameters()).dtype == torch.float64:
            alone[name].double()
        bank.add(name, alone[name])
    return bank, alone


@torch.no_grad()
def one_by_one(alone, names, x):
    return torch.stack([alone[name](x)[row] for row, name in enumerate(names)])


MODELS = {
    "own": lambda: KAN([3, 5, 4]),
    "large grid": lambda: KAN([3, 17, 2], grid_size=30),
    "no splines": lambda: KINDS["fast-kan"](),
    "slim": lambda: SlimKAN([3, 5, 4], ranks=(2, 2, 3)),
    "used twice": lambda: nn.Sequential(*[KANLinear(3, 3)] * 2),
    **{name: KINDS[name] for name in ("efficient-kan-old", "cheby-kan", "fourier-kan")},
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", MODELS)
def test_each_row_as_by_itself(kind, dtype):
    base = MODELS[kind]().to(dtype).eval()
    bank, alone = several(base)
    model, x = bank.attach(), X.to(dtype)
    expected = one_by_one(alone, NAMES, x)
    with torch.no_grad():
        y = model(x, adapter_names=NAMES)
        assert apart(y, expected) < TOLERANCE[dtype]
        assert apart(alone["a"](x), alone["b"](x)) > 1e-3
        assert torch.equal(model(x, ids=bank.ids(NAMES)), y)
        assert apart(model(x), alone["__base__"](x)) < TOLERANCE[dtype]


@pytest.mark.parametrize("kind", ["pykan", next(iter(CONVS))])
def test_kinds_that_run_once_for_each_adapter(kind):
    bank, alone = several(KINDS[kind]() if kind in KINDS else CONVS[kind]())
    model, x = bank.attach(), X if kind in KINDS else torch.rand(8, 2, 5, 5)
    with torch.no_grad():
        assert apart(model(x, adapter_names=NAMES), one_by_one(alone, NAMES, x)) < 1e-5


def test_many_rows_and_a_gradient():
    base = KAN([3, 33, 2])
    bank, alone = several(base)
    model, x = bank.attach(), torch.rand(2500, 3, requires_grad=True)
    names = [("a", "b", "c", "__base__")[n] for n in torch.randint(4, (2500,)).tolist()]
    y = model(x, adapter_names=names)
    expected = {name: own(x) for name, own in alone.items()}
    assert apart(y, torch.stack([expected[name][row] for row, name in enumerate(names)])) < 1e-5
    (found,) = torch.autograd.grad(y.sum(), x)
    sums = sum((own * torch.tensor([[name == other] for other in names])).sum() for name, own in expected.items())
    assert apart(found, torch.autograd.grad(sums, x)[0]) < 1e-5
    with torch.no_grad():
        assert apart(model(x, adapter_names=names), y) < 1e-5


def test_adapters_of_some_layers():
    base = net()
    bank, alone = AdapterBank(base), {"__base__": copy.deepcopy(base)}
    for name, layer in (("a", "kan.layers.0"), ("b", "kan.layers.1")):
        alone[name] = adapted(copy.deepcopy(base), target_modules=[layer])
        bank.add(name, alone[name])
    model, names = bank.attach(), ["a", "b", "__base__", "b"] * 2
    with torch.no_grad():
        assert apart(model(X, adapter_names=names), one_by_one(alone, names, X)) < 1e-5


def test_rows_behind_leading_dimensions_and_in_another_order():
    base = nn.Sequential(KAN([3, 5, 2]))
    flattens = nn.Sequential(nn.Flatten(0, 1), base)
    bank, alone = several(base)
    model, x = bank.attach(), torch.rand(4, 6, 3)
    names = ["a", "b", "__base__", "c"]
    with torch.no_grad():
        expected = one_by_one(alone, names, x)
        assert apart(model(x, adapter_names=names), expected) < 1e-5
        with bank.rows(names):
            assert apart(flattens(x).view(4, 6, 2), expected) < 1e-5
        with bank.rows(names * 6):
            turned = model(x.transpose(0, 1).reshape(-1, 3)).view(6, 4, 2)
        assert apart(turned.transpose(0, 1), expected) < 1e-5
        with bank.rows((bank.ids(names) + 0).tolist() * 6):
            assert torch.equal(model(x.transpose(0, 1).reshape(-1, 3)).view(6, 4, 2), turned)
        with bank.rows(names), pytest.raises(ValueError, match="layers.0"):
            model(x.transpose(0, 1).reshape(-1, 3))


def test_threads_have_their_own_rows():
    bank, alone = several(net())
    model = bank.attach()
    rows = [[name] * 8 for name in ("a", "b", "c")] + [NAMES]
    expected = [one_by_one(alone, names, X) for names in rows]

    @torch.no_grad()
    def serve(place):
        return sum(apart(model(X, adapter_names=rows[place]), expected[place]) > 1e-5 for _ in range(60))

    def change():
        for count in range(40):  # grows, and replaces
            bank.add(f"more{count}", alone["b"])
            bank.add("other", alone["c"], replace=True)
            bank.remove(f"more{count}")
        return 0

    with ThreadPoolExecutor(5) as threads:
        jobs = [threads.submit(serve, place) for place in range(len(rows))] + [threads.submit(change)]
        assert [job.result() for job in jobs] == [0] * 5


def test_compiled_once_for_all_adapters():
    """Before the first call, also if the base was in training mode when the bank was attached."""
    torch._dynamo.reset()  # the forward passes of other tests count against the limit of graphs
    base, graphs = KAN([3, 5, 2]).train(), []
    bank, alone = several(base)
    model = bank.attach().eval()
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
    with torch.no_grad():
        for count in range(12):
            bank.add(f"more{count}", alone["b"])
            ids = torch.randint(-1, len(bank), (8,))
            assert apart(compiled(X, ids=ids), model(X, ids=ids)) < 1e-5
        bank.remove("a")
        bank.add("d", alone["c"])
        ids = bank.ids(["d"] * 8)
        assert apart(compiled(X, ids=ids), alone["c"](X)) < 1e-5
    assert len(graphs) <= 3  # capacities 4, 8, 16


def test_exported_with_ids_as_an_input(tmp_path):
    bank, alone = several(KAN([3, 4, 2]))
    model, names, ids = bank.attach(), ["c", "b", "a", "__base__"], bank.ids(NAMES)
    rows = torch.export.Dim("rows", min=2, max=64)
    shapes = {"args": ({0: rows},), "ids": {0: rows}}
    program = torch.export.export(model, (X,), {"ids": ids}, dynamic_shapes=shapes)
    with torch.no_grad():
        assert apart(program.module()(X[:4], ids=bank.ids(names)), one_by_one(alone, names, X)) < 1e-5
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.onnx.export(model, (X,), tmp_path / "bank.onnx", kwargs={"ids": ids}, dynamo=True, verbose=False)
    session, names = runtime.InferenceSession(str(tmp_path / "bank.onnx")), NAMES[::-1]
    values = dict(zip([it.name for it in session.get_inputs()], (X.numpy(), bank.ids(names).numpy()), strict=True))
    assert apart(torch.tensor(session.run(None, values)[0]), one_by_one(alone, names, X)) < 1e-5


UNKNOWN_IDS = {"removed": 1, "never given": 3, "too large": 10**6, "below the base": -2, "far below": -1000}


def without_b():
    """A bank that has lost its second adapter, its model, and ids of rows that it still answers."""
    bank, _ = several(KAN([3, 4, 2]))
    model = bank.attach()
    bank.remove("b")
    return bank, model, bank.ids(["a", "__base__", "c", "c", "a", "a", "c", "__base__"])


def check_refuses_unknown_ids(call, ids, error):
    """Check that a call with one wrong id among right ones raises, and is right again afterwards."""
    before = call(ids)

    for number in UNKNOWN_IDS.values():
        with pytest.raises(error):
            call(torch.cat([ids[:-1], torch.tensor([number])]))

    torch.testing.assert_close(call(ids), before)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_compiled_bank_refuses_ids_of_no_adapter(backend):
    """Also of an adapter that was there when the graph was made."""
    torch._dynamo.reset()
    bank, _ = several(KAN([3, 4, 2]))
    model = bank.attach()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    call = torch.no_grad()(lambda ids: compiled(X, ids=ids))
    call(bank.ids(NAMES))

    bank.remove("b")

    ids = bank.ids(["a", "__base__", "c", "c", "a", "a", "c", "__base__"])
    check_refuses_unknown_ids(call, ids, RuntimeError)
    torch.testing.assert_close(call(ids), model(X, ids=ids).detach(), rtol=1e-4, atol=1e-5)


def test_an_exported_bank_refuses_ids_of_no_adapter(tmp_path):
    _, model, ids = without_b()
    program = torch.export.export(model, (X,), {"ids": ids})
    torch.export.save(program, tmp_path / "bank.pt2")
    loaded = torch.export.load(tmp_path / "bank.pt2").module()

    check_refuses_unknown_ids(torch.no_grad()(lambda ids: program.module()(X, ids=ids)), ids, RuntimeError)
    check_refuses_unknown_ids(torch.no_grad()(lambda ids: loaded(X, ids=ids)), ids, RuntimeError)


def test_a_bank_in_onnx_refuses_ids_of_no_adapter(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    _, model, ids = without_b()
    torch.onnx.export(model, (X,), tmp_path / "bank.onnx", kwargs={"ids": ids}, dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(tmp_path / "bank.onnx"))
    names = [value.name for value in session.get_inputs()]

    def call(ids):
        (y,) = session.run(None, dict(zip(names, (X.numpy(), ids.numpy()), strict=True)))
        return torch.tensor(y)

    check_refuses_unknown_ids(call, ids, Exception)


@pytest.mark.parametrize("way", ["module", "program"])
def test_a_bank_in_onnx_refuses_one_id_for_several_rows(tmp_path, way):
    """Also if the number of rows is an input: ONNX would broadcast the id."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    bank, alone = several(KAN([3, 4, 2]))
    model = bank.attach()
    ids = bank.ids(NAMES)
    rows = torch.export.Dim("rows", min=2, max=64)
    shapes = {"args": ({0: rows},), "ids": {0: rows}}
    if way == "program":
        program = torch.export.export(model, (X,), {"ids": ids}, dynamic_shapes=shapes)
        torch.onnx.export(program, f=tmp_path / "bank.onnx", dynamo=True, verbose=False)
    else:
        file = tmp_path / "bank.onnx"
        torch.onnx.export(model, (X,), file, kwargs={"ids": ids}, dynamo=True, verbose=False, dynamic_shapes=shapes)
    session = runtime.InferenceSession(str(tmp_path / "bank.onnx"))
    names = [value.name for value in session.get_inputs()]

    def call(x, ids):
        (y,) = session.run(None, dict(zip(names, (x.numpy(), ids.numpy()), strict=True)))
        return torch.tensor(y)

    torch.testing.assert_close(call(X[:5], ids[:5]), one_by_one(alone, NAMES, X)[:5], rtol=1e-4, atol=1e-5)
    for wrong in (ids[:1], ids[:3]):
        with pytest.raises(Exception, match="dimensions must match"):
            call(X, wrong)
    with pytest.raises(Exception, match="dimensions must match"):
        call(X[:1], ids)


def test_an_id_is_never_given_to_another_adapter():
    """Not after a removal, a replacement or `compact`: what was looked up before is right or refused."""
    bank, alone = several(net())
    model = bank.attach()
    ids = bank.ids(["a", "b", "c"])

    bank.remove("b")
    bank.add("a", alone["c"], replace=True)
    for count in range(20):
        bank.add(f"more{count}", alone["b"])
    bank.compact()

    with torch.no_grad():
        of_c = model(X, ids=ids[2:].expand(8))
    torch.testing.assert_close(of_c, alone["c"](X).detach(), rtol=1e-4, atol=1e-5)
    for number in ids[:2]:
        with pytest.raises(ValueError, match=f"No adapter has the id {number}"):
            model(X, ids=number.expand(8))


@pytest.mark.parametrize("rows", [{"adapter_names": ["a"]}, {"ids": torch.tensor([0])}, {"adapter_names": ["a"] * 4}])
@pytest.mark.parametrize("shape", [(8, 3), (8, 1, 3)])
def test_one_adapter_for_several_rows_is_refused(rows, shape):
    """`adapter_names=[name]` is a forgotten `* len(x)`."""
    bank, _ = several(KAN([3, 4, 2]))
    model = bank.attach()

    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(torch.rand(shape), **rows)


def test_a_compiled_bank_refuses_one_id_for_several_rows():
    bank, _ = several(KAN([3, 4, 2]))
    compiled = torch.compile(bank.attach(), backend="eager", fullgraph=True)

    with pytest.raises(Exception, match="Length of `adapter_names`"):
        compiled(X, ids=bank.ids(["a"]))


@pytest.mark.parametrize("kind", ["own", "slim", "pykan", "fast-kan"])
def test_no_rows_give_no_outputs(kind):
    bank, _ = several((MODELS | KINDS)[kind]())
    model = bank.attach()
    x = torch.empty(0, 3)

    for rows in ({"adapter_names": []}, {"ids": bank.ids([])}, {"ids": torch.empty(0, dtype=torch.int64)}):
        assert model(x, **rows).shape == (0, *model(X).shape[1:])
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(X, adapter_names=[])


def test_kinds_without_functions_in_graphs():
    bank, alone = several(KINDS["kanx"]())
    model = bank.attach()
    with pytest.raises(RuntimeError, match="basis"):
        torch.export.export(model, (X,), {"ids": bank.ids(NAMES)})
    with pytest.raises(torch._dynamo.exc.Unsupported, match="basis"):
        torch.compile(model, backend="eager", fullgraph=True)(X, ids=bank.ids(NAMES))
    with pytest.raises(RuntimeError, match="basis|one graph"):
        torch.compile(model, backend="eager")(X, ids=bank.ids(NAMES))
    with torch.no_grad():
        assert apart(model(X, ids=bank.ids(NAMES)), one_by_one(alone, NAMES, X)) < 1e-5


def test_no_graph_of_a_mapped_bank(tmp_path):
    bank, alone = several(KAN([3, 4, 2]))
    bank.save(tmp_path)
    bank = AdapterBank.load(KAN([3, 4, 2]), tmp_path, mapped=True, check_base="ignore")
    bank.add("d", alone["a"], check_base="ignore")
    with pytest.raises(ValueError, match="compact"):
        torch.export.export(bank.attach(), (X,), {"ids": bank.ids(["d"] * 8)})


def test_a_compiled_part_of_the_model():
    base = net()
    bank, alone = several(base)
    model = bank.attach()
    base.kan.compile(backend="eager")
    with torch.no_grad():
        assert apart(model(X, adapter_names=NAMES), one_by_one(alone, NAMES, X)) < 1e-5
        assert apart(model(X), alone["__base__"](X)) < 1e-5


def test_detached_as_before():
    base = net()
    before, modules = state(base), list(base.modules())
    bank, alone = several(base)
    model = bank.attach()
    assert model.kan is base.kan if hasattr(model, "kan") else model.model is base
    with pytest.raises(ValueError, match="detach"):
        bank.attach()
    bank.add("d", alone["a"])  # while attached
    copied = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        assert torch.equal(copied(X, adapter_names=["d"] * 8), model(X, adapter_names=["a"] * 8))
    bank.detach()
    assert same(state(base), before) and list(base.modules()) == modules
    assert bank.attach(copy.deepcopy(base)) is not None


def test_what_a_call_refuses():
    bank, alone = several(net())
    model = bank.attach()
    bank.remove("b")
    names = (["nobody"] * 8, "nobody"), ("a", "list"), (["a"] * 7, "[Ll]ength")
    ids = ([3] * 8, "3"), ([-2] * 8, "-2"), ([1] * 8, "1"), ([0.5] * 8, "integers")
    wrong = [({"adapter_names": rows}, word) for rows, word in names]
    for rows, word in wrong + [({"ids": torch.tensor(rows)}, word) for rows, word in ids]:
        with pytest.raises(ValueError, match=word):
            model(X, **rows)
    with torch.no_grad():  # nothing was left behind
        assert apart(model(X, adapter_names=["a"] * 8), alone["a"](X)) < 1e-5


@pytest.mark.parametrize("what", ["merged", "parameters of", "grid of"])
def test_what_attaching_refuses(what):
    bank, alone = several(net())
    model = alone["a"] if what == "merged" else net(seed=8 if what == "parameters of" else 7)
    if what == "merged":
        model.merge_adapter()
    if what == "grid of":
        model.kan.layers[0].grid_bounds += 1
    before = state(model)
    with pytest.raises(ValueError, match=what):
        bank.attach(model)
    assert same(state(model), before) and bank.attach() is not None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda network: network], ids=["a copy", "the base"])
def test_an_adapter_beside_the_bank_is_for_a_base_of_its_own(copied):
    base = net()
    spare = copy.deepcopy(base)
    bank, _ = several(base)
    model = bank.attach()
    before = state(model)
    with pytest.raises(ValueError, match="serves an AdapterBank"):
        adapted(copied(base))
    assert same(state(model), before) and all(it.requires_grad for it in base.parameters())
    bank.add("d", adapted(spare))


def test_inputs_far_outside_of_the_grid():
    bank, _ = several(net())
    with pytest.warns(UserWarning, match="far outside of its grid"):
        bank.attach()(100 * X, adapter_names=NAMES)


def test_a_grid_that_moves_while_attached():
    base = net()
    bank, _ = several(base)
    model = bank.attach()
    base.kan.layers[0].update_grid(X)
    with pytest.raises(RuntimeError, match="grid of `kan.layers.0`"):
        model(X, adapter_names=NAMES)


def test_as_many_steps_as_rows_in_the_order_of_time():
    bank, alone = several(KAN([3, 2]))
    model, names = bank.attach(), ["a", "b", "c", "a"]
    for steps in (3, 4):  # (time, batch, in), as recurrent networks have them
        with pytest.raises(ValueError, match="layers.0"):
            model(torch.rand(4, steps, 3).transpose(0, 1), adapter_names=names)
    x = torch.rand(1, 4, 3).expand(4, 4, 3)
    with torch.no_grad():
        assert apart(model(x, adapter_names=names), one_by_one(alone, names, x)) < 1e-5


def test_a_peft_model_goes_on(tmp_path):
    model = adapted(net())
    expected, bank = model(X).detach(), AdapterBank(model)
    bank.add("b", adapted(net(), r=1))
    bank.add("own", model)
    layer, served = model.get_submodule("base_model.model.kan.layers.0"), bank.attach(model)
    with torch.no_grad():
        assert torch.equal(model.eval()(X), expected)
        assert apart(served(X), net()(X)) < 1e-5 < apart(served(X, adapter_names=["b"] * 8), served(X))
        assert apart(served(X, adapter_names=["own"] * 8), expected) < 1e-5
    model.save_pretrained(tmp_path)
    model.add_adapter("more", LoTRAConfig(r=1))
    with pytest.raises(ValueError, match="another bank"):
        AdapterBank(net()).attach(model)
    model.train()
    bank.detach()
    assert type(layer) is LoTRALayer and not any(module.training for module in model.model.modules())
    assert apart(PeftModel.from_pretrained(net(), tmp_path).eval()(X), expected) < 1e-5
    assert torch.equal(model.eval()(X), expected)


def test_a_forward_that_was_replaced_stays():
    """As accelerate replaces it."""
    model = adapted(net()).eval()
    layer = model.get_submodule("base_model.model.kan.layers.0")
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)
    expected, bank = model(X), AdapterBank(net())
    bank.attach(model)
    assert torch.equal(model(X), expected)
    bank.detach()
    assert torch.equal(model(X), expected)


def test_modes_after_it():
    base = nn.Sequential(KINDS["fast-kan"](), nn.BatchNorm1d(4), KAN([4, 2])).train()
    base[1].eval()
    before = [module.training for module in base.modules()]
    bank = AdapterBank(base)
    bank.attach().eval()
    bank.detach()
    assert [module.training for module in base.modules()] == before


def test_an_eager_pass_while_another_thread_compiles():
    """While a graph is made, torch says in all threads that it compiles."""
    torch._dynamo.reset()
    bank, alone = several(KAN([3, 4, 2]))
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
        torch.testing.assert_close(y, one_by_one(alone, NAMES, X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("ids", [torch.zeros(8), torch.zeros(8, dtype=torch.bool), torch.zeros(8, dtype=torch.uint8)])
def test_ids_that_are_no_signed_integers_are_refused(ids, compiles):
    bank, _ = several(KAN([3, 4, 2]))
    model = bank.attach()
    call = torch.compile(model, backend="eager", fullgraph=True) if compiles else model

    with pytest.raises(Exception, match="`ids` must be integers"):
        call(X, ids=ids)


class Weighted(nn.Module):
    """A network with a second input, of one weight for all rows."""

    def __init__(self):
        super().__init__()
        self.kan = KAN([3, 4, 2])

    def forward(self, x, weight):
        return weight * self.kan(x)


def test_a_vector_beside_the_rows_is_not_taken_for_them():
    bank, _ = several(Weighted())
    model = bank.attach()

    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(X, torch.ones(1), adapter_names=["a"])
    assert model(X, torch.ones(1), adapter_names=NAMES).shape == (8, 2)
