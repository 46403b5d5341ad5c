# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Adapters with full modes, which have no factor there, beside others in a bank and in mixed batches."""

import copy
import itertools
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from behaving import CONVS, KINDS, X, adapted, add, net
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn

from peft_lotra import AdapterBank, LoTRAConfig, create_lotra_optimizer
from peft_lotra.kan import KAN, SlimKAN
from peft_lotra.optim import BankAdamW, BankLevenbergMarquardt, LevenbergMarquardt


FULL = {"r": ("full", "full", 1)}
FORMS = {
    "shape": FULL,
    "splines": {**FULL, "adapt_residual": False},
    "dense": {"r": "full", "alpha": 0.3},
    "dense splines": {"r": "full", "adapt_residual": False},
    "factors": {"r": (2, 1, 3)},
    "inputs": {"r": (1, "full", 2)},
    "outputs": {"r": ("full", 1, "full")},
}
# forms that leave each combination of the modes full in all adapters
MIXTURES = [
    ["shape"],
    ["splines"],
    ["dense"],
    ["dense splines", "dense"],
    ["shape", "splines"],
    ["shape", "dense"],
    ["inputs"],
    ["outputs"],
    ["outputs", "dense"],
    ["shape", "inputs"],
    ["shape", "factors"],
    list(FORMS),
]
BASES = {
    "own": lambda: KAN([3, 5, 3, 1]),
    "one input": lambda: KAN([1, 2, 2]),
    "large grid": lambda: KAN([3, 7], grid_size=30),
    "slim": lambda: SlimKAN([3, 5, 4], ranks=(2, 2, 3)),
    **{name: KINDS[name] for name in ("efficient-kan-old", "fast-kan", "cheby-kan", "pykan")},
}


def filled(base, forms):
    """A bank with an adapter of each form, and the models that have each of them alone."""
    bank = AdapterBank(base)
    alone = {}
    for name in forms:
        alone[name] = adapted(copy.deepcopy(base), **FORMS[name])
        bank.add(name, alone[name], check_base="ignore")
    return bank, alone


def shapes(model):
    return {name: tensor.shape for name, tensor in get_peft_model_state_dict(model).items()}


@torch.no_grad()
def check(bank, alone, count=8, inputs=3):
    """Check that rows have the values of the merged model of their adapter, in any order."""
    merged = {name: copy.deepcopy(model).merge_and_unload() for name, model in alone.items()}
    merged["__base__"] = copy.deepcopy(bank.base)
    names = random.Random(0).choices(list(merged), k=count)
    x = torch.rand(count, inputs) * 1.8 - 0.9
    expected = {name: model(x) for name, model in merged.items()}

    y = bank.attach()(x, adapter_names=names)
    bank.detach()

    expected = torch.stack([expected[name][row] for row, name in enumerate(names)])
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [8, 300])
@pytest.mark.parametrize("forms", MIXTURES, ids=", ".join)
@pytest.mark.parametrize("kind", BASES)
def test_rows_have_the_values_of_merged_models(kind, forms, count):
    """Also where sizes are 1, equal or prime, in groups and one by one."""
    bank, alone = filled(BASES[kind]().eval(), forms)

    check(bank, alone, count, inputs=1 if kind == "one input" else 3)


@pytest.mark.parametrize("forms", [["shape"], ["shape", "factors"]], ids=", ".join)
def test_convolutions_run_once_for_each_adapter(forms):
    base = next(iter(CONVS.values()))().eval()
    bank, alone = filled(base, forms)
    x = torch.rand(4, 2, 5, 5)
    names = (forms * 4)[:4]

    with torch.no_grad():
        y = bank.attach()(x, adapter_names=names)
        expected = torch.stack([alone[name](x)[row] for row, name in enumerate(names)])

    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["own", "slim", "efficient-kan-old", "pykan"])
def test_rows_of_a_peft_model(kind):
    model = adapted(BASES[kind](), **FULL)
    for name in ("factors", "dense", "splines"):
        add(model, name, **FORMS[name])
    names = ["default", "factors", "dense", "splines", "__base__"] * 2
    x = torch.rand(10, 3)

    with torch.no_grad():
        y = model(x, adapter_names=names)
        for row, name in enumerate(names[:4]):
            model.set_adapter(name)
            torch.testing.assert_close(y[row], model(x)[row], rtol=1e-4, atol=1e-5)


def test_full_modes_have_no_columns():
    bank, alone = filled(KAN([3, 5, 3, 1]), ["shape"])

    tensors = get_peft_model_state_dict(alone["shape"]).values()
    assert bank.snapshot.packed.shape[1] == sum(tensor.numel() for tensor in tensors)


@pytest.mark.parametrize("forms", list(itertools.permutations(["shape", "factors", "splines"])), ids=", ".join)
@pytest.mark.parametrize("mapped", [False, True])
def test_files_and_growing_keep_the_forms(tmp_path, forms, mapped):
    """Whichever form comes first, and with an adapter of another layer alone."""
    base = net()
    bank, alone = filled(base, forms[:1])
    alone["one layer"] = adapted(copy.deepcopy(base), target_modules=["layers.1"], **FULL)
    bank.add("one layer", alone["one layer"])
    bank.save(tmp_path / "first")
    bank = AdapterBank.load(base, tmp_path / "first", mapped=mapped)
    for name in forms[1:]:
        alone[name] = adapted(copy.deepcopy(base), **FORMS[name])
        bank.add(name, alone[name])
    bank.save(tmp_path / "second")
    loaded = AdapterBank.load(base, tmp_path / "second", mapped=mapped)
    other = AdapterBank(base)
    for name in reversed(bank.names):
        other.add(name, loaded)

    check(bank, alone)
    check(other, alone)
    stored = [one.snapshot.gather(one.snapshot.rows_of(list(one.snapshot.entries))) for one in (loaded, bank)]
    assert torch.equal(*stored)
    for name, model in alone.items():
        former, _ = bank.snapshot.updates_of(name)
        for copied in (loaded, other):
            updates, _ = copied.snapshot.updates_of(name)
            assert {key: update.tensor.form for key, update in updates.items()} == {
                key: update.tensor.form for key, update in former.items()
            }
        other.export(name, tmp_path / name)
        exported = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name)
        assert shapes(exported) == shapes(model)
        torch.testing.assert_close(exported.eval()(X), model(X), rtol=1e-4, atol=1e-5)


def test_replaced_removed_and_compacted():
    base = net()
    bank, alone = filled(base, ["shape", "factors", "dense"])

    bank.add("shape", alone["dense"], replace=True)
    bank.remove("dense")
    bank.compact()

    check(bank, {"shape": alone["dense"], "factors": alone["factors"]})


@pytest.mark.parametrize("name", FORMS)
def test_a_state_dict_says_the_form(name):
    """Its ranks and sizes: with the residual branch or without."""
    bank, alone = filled(net(), [name])
    before, _ = bank.snapshot.updates_of(name)

    bank.add(name, get_peft_model_state_dict(alone[name]), alpha=FORMS[name].get("alpha", 1.0), replace=True)

    check(bank, alone)
    after, _ = bank.snapshot.updates_of(name)
    for layer, update in before.items():
        assert after[layer].tensor.form == update.tensor.form and after[layer].tensor.shape == update.tensor.shape


def test_a_state_dict_that_lacks_a_factor_is_refused():
    bank, alone = filled(net(), ["shape"])
    tensors = get_peft_model_state_dict(alone["shape"])
    del tensors["base_model.model.kan.layers.0.lotra_factor_basis"]

    with pytest.raises(ValueError, match="'x' was not added.*missing"):
        bank.add("x", tensors)


def error(model, x, y, **rows):
    return model(x, **rows)[:, 0] - y


def trained(base, forms):
    """A bank with full modes beside factors of ranks above 4, whose rates are lower, and each adapter alone."""
    bank, alone = AdapterBank(base), {}
    configs = {**FORMS, "wide": {"r": (7, 5, 4)}, "dense": {"r": "full"}}
    for name in forms:
        config = LoTRAConfig(**configs[name])
        alone[name] = get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False).eval()
        bank.add(name, alone[name], check_base="ignore")
    return bank, alone


@pytest.mark.parametrize("rows", [8, 80])
@pytest.mark.parametrize("forms", [["shape", "splines"], ["shape", "wide", "dense"]], ids=", ".join)
def test_adamw_trains_each_as_alone(forms, rows):
    """With weight decay, which leaves the identity of a full mode as it is."""
    base = KAN([3, 20, 2]).double()
    bank, alone = trained(base, forms)
    x = torch.rand(rows, 3, dtype=torch.float64) * 2 - 1
    y = torch.sin(4 * x.sum(1))
    names = [name for name in forms for _ in range(rows)]
    options = {"lr": 3e-2, "weight_decay": 0.1}

    model = bank.attach()
    optimizer = BankAdamW(bank, **options)
    for _ in range(6):
        errors = error(model, x.repeat(len(forms), 1), y.repeat(len(forms)), adapter_names=names).square()
        optimizer.zero_grad()
        bank.mean_by_adapter(errors, bank.ids(names)).nansum().backward()
        optimizer.step()
    optimizer.finish()

    for name, own in alone.items():
        optimizer = create_lotra_optimizer(own, torch.optim.AdamW, **options)
        for _ in range(6):
            optimizer.zero_grad()
            error(own, x, y).square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            torch.testing.assert_close(model(x, adapter_names=[name] * rows), own(x), rtol=1e-10, atol=1e-10)
        updates, _ = bank.snapshot.updates_of(name)
        bank.detach()
        other = AdapterBank(base)
        other.add(name, bank)  # without what the others need
        model = bank.attach()
        for layer, update in updates.items():
            torch.testing.assert_close(other.snapshot.updates_of(name)[0][layer].dense(), update.dense())
    bank.detach()


@pytest.mark.parametrize("forms", [["shape"], ["shape", "factors", "dense splines"]], ids=", ".join)
def test_levenberg_marquardt_trains_each_as_alone(forms):
    base = KAN([3, 4, 1]).double()
    bank, alone = filled(base, forms)
    x = torch.rand(60, 3, dtype=torch.float64) * 2 - 1
    y = torch.sin(4 * x.sum(1))
    ids = bank.ids(forms).repeat_interleave(60)

    optimizer = BankLevenbergMarquardt(bank.attach())
    for _ in range(3):
        record = optimizer.step([(error, (x.repeat(len(forms), 1), y.repeat(len(forms))), ids)])
    optimizer.finish()

    for name, own in alone.items():
        optimizer = LevenbergMarquardt(own.double(), forgetting=0)
        for _ in range(3):
            expected = optimizer.step([(error, (x, y))])
        assert float(record.losses[bank.ids([name])]) == pytest.approx(expected.loss, rel=1e-5)


def test_eight_threads_serve_and_save_while_the_layout_changes(tmp_path):
    """Full modes get factors, and ranks rise, while other threads read."""
    base = net()
    bank, alone = filled(base, ["shape", "splines"])
    later = {name: adapted(copy.deepcopy(base), **FORMS[name]) for name in ("factors", "dense", "inputs")}
    model = bank.attach()
    names = ["shape", "splines"] * 4
    with torch.no_grad():
        expected = torch.stack([alone[name](X)[row] for row, name in enumerate(names)])
        of_shape = alone["shape"](X)

    def serve(_):
        for _ in range(40):
            with torch.no_grad():
                torch.testing.assert_close(model(X, adapter_names=names), expected, rtol=1e-4, atol=1e-5)

    def save(number):
        folder = tmp_path / str(number)
        for _ in range(10):
            bank.save(folder)
            loaded = AdapterBank.load(copy.deepcopy(spare), folder)
            with torch.no_grad():
                y = loaded.attach()(X, adapter_names=["shape"] * 8)
            torch.testing.assert_close(y, of_shape, rtol=1e-4, atol=1e-5)

    def change(_):
        for name, adapter in later.items():
            bank.add(name, adapter)
            bank.add("shape", alone["shape"], replace=True)
            bank.compact()

    spare = net()
    with ThreadPoolExecutor(8) as threads:
        jobs = [threads.submit(serve, number) for number in range(5)]
        jobs += [threads.submit(save, number) for number in range(2)] + [threads.submit(change, 0)]
        for job in jobs:
            job.result()
    bank.detach()
    check(bank, {**alone, **later})


@pytest.mark.parametrize("forms", [["shape"], ["shape", "factors"], ["outputs", "dense"]], ids=", ".join)
@pytest.mark.parametrize("kind", ["own", "efficient-kan-old"])
def test_graphs(tmp_path, kind, forms):
    """Compiled, exported and in ONNX."""
    torch._dynamo.reset()
    bank, alone = filled(BASES[kind]().eval(), forms)
    model = bank.attach().eval()
    names = (forms * 8)[:8]
    ids = bank.ids(names)
    with torch.no_grad():
        expected = torch.stack([alone[name](X)[row] for row, name in enumerate(names)])
        compiled = torch.compile(model, backend="eager", fullgraph=True)(X, ids=ids)
        program = torch.export.export(model, (X,), {"ids": ids})
        exported = program.module()(X, ids=ids)
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(exported, expected, rtol=1e-4, atol=1e-5)

    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.onnx.export(model, (X,), tmp_path / "bank.onnx", kwargs={"ids": ids}, dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(tmp_path / "bank.onnx"))
    inputs = dict(zip([value.name for value in session.get_inputs()], (X.numpy(), ids.numpy()), strict=True))
    torch.testing.assert_close(torch.tensor(session.run(None, inputs)[0]), expected, rtol=1e-4, atol=1e-5)


def test_a_graph_with_several_rows_for_each_sample():
    bank, alone = filled(nn.Sequential(KAN([3, 4, 2])), ["shape", "outputs"])
    model = bank.attach().eval()
    x = torch.rand(4, 6, 3)
    names = ["shape", "outputs"] * 2

    with torch.no_grad():
        y = torch.compile(model, backend="eager", fullgraph=True)(x, ids=bank.ids(names))
        expected = torch.stack([alone[name](x)[row] for row, name in enumerate(names)])

    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
