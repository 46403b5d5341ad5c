# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Levenberg-Marquardt steps of all adapters of a bank at once: each as it is alone."""

import copy

import pytest
import torch
from behaving import KINDS, apart
from peft import get_peft_model

from peft_lotra import AdapterBank, LoTRAConfig
from peft_lotra.kan import KAN, SlimKAN, jet
from peft_lotra.optim import BankLevenbergMarquardt, LevenbergMarquardt


CONFIGS = {"a": {"r": 2}, "b": {"r": (3, 1, 2)}, "c": {"r": 1, "adapt_residual": False}}
BASES = {
    "own": lambda: KAN([2, 7, 1]),
    "slim": lambda: SlimKAN([2, 5, 1], ranks=(1, 2, 3)),
    "efficient-kan": lambda: torch.nn.Sequential(torch.nn.Linear(2, 3), KINDS["efficient-kan-old"]()),
    "pykan": lambda: torch.nn.Sequential(torch.nn.Linear(2, 3), KINDS["pykan"]()),
}


def prepared(base, **config):
    """A bank with an adapter of each configuration, its model, and for each adapter a model with it alone."""
    bank, alone = AdapterBank(base), {}
    for name, own in CONFIGS.items():
        config = LoTRAConfig(init_weights=False, **own)
        alone[name] = get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False).eval()
        bank.add(name, alone[name], check_base="ignore")
    return bank, bank.attach().eval(), alone


def rows(counts, dtype=torch.float64):
    """So many rows of each adapter, in any order: their points, values and names."""
    names = [name for name, count in zip(CONFIGS, counts, strict=True) for _ in range(count)]
    names = [names[place] for place in torch.randperm(len(names)).tolist()]
    x = torch.rand(len(names), 2, dtype=dtype) * 2 - 1
    return x, torch.stack([torch.sin((2 + ord(name) % 5) * row.sum()) for name, row in zip(names, x)]), names  # noqa: B905


def error(model, x, y):
    return model(x)[:, 0] - y


def size(model, x):
    return model(x)


def take(optimizer, lone, terms, ids, names, steps):
    """Steps of the bank and of each adapter alone on its rows; each as (loss, accepted, damping) at the end."""
    found = [optimizer.step([(f, args, ids[: len(args[0])], w) for f, args, w in terms]) for _ in range(steps)][-1]
    expected = {}
    for name, one in lone.items():
        own = torch.tensor([other == name for other in names])
        parts = [(f, [arg[own[: len(arg)]] for arg in args], w) for f, args, w in terms]
        record = [one.step(parts) for _ in range(steps)][-1]
        expected[name] = (record.loss, record.accepted, record.damping)
    numbers = optimizer.bank.ids(list(lone)).tolist()
    return dict(zip(lone, zip(*(part[numbers].tolist() for part in found), strict=True), strict=True)), expected


@pytest.mark.parametrize(("kind", "memory"), [("own", 1), *((kind, 2**26) for kind in BASES)])
def test_each_as_alone(kind, memory):
    """With more rows than numbers and with fewer, two terms, and adapters one by one or all at once."""
    torch.manual_seed(0)
    bank, model, alone = prepared(BASES[kind]().double())
    x, y, names = rows((90, 9, 40) if kind != "pykan" else (9, 2, 4))
    optimizer = BankLevenbergMarquardt(model, memory=memory)
    lone = {name: LevenbergMarquardt(own, forgetting=0) for name, own in alone.items()}
    terms = [(error, (x, y), 1.0), (size, (x[::1][: len(x) - 3],), 0.01)]
    found, expected = take(optimizer, lone, terms, bank.ids(names), names, 4)
    optimizer.finish()
    points = torch.rand(8, 2, dtype=torch.float64)
    for name, own in alone.items():
        assert found[name] == pytest.approx(expected[name], rel=1e-6)
        with torch.no_grad():
            assert apart(model(points, adapter_names=[name] * 8), own(points)) < 1e-6


def derivative(model, x):
    (slope,) = torch.autograd.grad((u := model(x.requires_grad_())).sum(), x)
    return slope[:, 0] - slope[:, 1] * u[:, 0]


def second_derivative(model, x):
    u, _, second = jet(model, x)
    return second.sum(0) + u**2


@pytest.mark.filterwarnings("ignore:.*no closed form")
@pytest.mark.parametrize("residual", [derivative, second_derivative])
def test_residuals_with_derivatives(residual):
    bank, model, alone = prepared(KAN([2, 5, 1]).double())
    x, _, names = rows((16, 16, 16))
    lone = {name: LevenbergMarquardt(own, forgetting=0) for name, own in alone.items()}
    optimizer = BankLevenbergMarquardt(model)
    found, expected = take(optimizer, lone, [(residual, (x,), 1.0)], bank.ids(names), names, 2)
    for name in alone:
        assert found[name] == pytest.approx(expected[name], rel=1e-6)


def test_a_base_of_float32():
    bank, model, alone = prepared(KAN([2, 5, 1]))
    x, y, names = rows((20, 20, 20), torch.float32)
    lone = {name: LevenbergMarquardt(own, forgetting=0) for name, own in alone.items()}
    found, expected = take(BankLevenbergMarquardt(model), lone, [(error, (x, y), 1.0)], bank.ids(names), names, 2)
    for name in alone:
        assert found[name] == pytest.approx(expected[name], rel=1e-3)


def test_adapters_without_rows_or_stopped_or_not_finite():
    bank, model, _ = prepared(KAN([2, 5, 1]))
    x, y, names = rows((9, 9, 0))
    optimizer, before = BankLevenbergMarquardt(model), bank.store.packed.detach().clone()
    y[torch.tensor([name == "b" for name in names])] = torch.nan
    record = optimizer.step([(error, (x, y), bank.ids(names))])
    a, b, c = bank.ids(["a", "b", "c"]).tolist()
    assert record.accepted.tolist()[:3] == [n == a for n in range(3)] and record.losses[[b, c]].isnan().all()
    changed = (bank.store.packed != before).any(1)
    assert changed[[a + 1, b + 1, c + 1]].tolist() == [True, False, False]
    assert record.damping[a] != 1e-2 and record.damping[[b, c]].tolist() == [1e-2] * 2
    losses = torch.full_like(record.losses, torch.nan)
    for losses[a] in (1.0, 2.0):
        optimizer.keep_best(losses, patience=1)
    assert not optimizer.step([(error, (x, y), bank.ids(names))]).accepted.any()
    optimizer.finish()
    bank.remove("c")


def test_a_minimum_is_kept():
    bank, model, _ = prepared(KAN([2, 5, 1]).double())
    x, _, names = rows((9, 9, 9))
    with torch.no_grad():
        y = model(x, adapter_names=names)[:, 0]
    optimizer, accepted = BankLevenbergMarquardt(model), True
    for _ in range(30):
        before = bank.store.packed.detach().clone()
        record = optimizer.step([(error, (x, y), bank.ids(names))])
        if not (accepted := bool(record.accepted.any())):
            break
    assert not accepted and torch.equal(bank.store.packed, before) and (record.losses[:3] < 1e-25).all()
    record = optimizer.step([(lambda model, x: 0 * model(x) + 1, x, bank.ids(names))])
    assert not record.accepted.any() and (record.losses[:3] - 1).abs().max() < 1e-12


def test_what_it_refuses():
    bank, model, _ = prepared(KAN([2, 5, 1]))
    for given in ({"damping": 0.0}, {"floor": 2.0}, {"memory": 0}):
        with pytest.raises(ValueError, match="floor"):
            BankLevenbergMarquardt(model, **given)
    with pytest.raises(TypeError, match="attach"):
        BankLevenbergMarquardt(bank)
    optimizer = BankLevenbergMarquardt(model, names=["a", "b"])
    x, y, names = rows((4, 4, 0))
    before, ids = bank.store.packed.detach().clone(), bank.ids(names)
    for terms, word in (
        ([(error, (x, y))], "ids"),
        ([(error, (x, y), ids[:3])], "lengths"),
        ([(error, (x, y), ids + 7)], "number"),
        ([(error, (x, y), torch.zeros_like(ids) + bank.ids(["c"]))], "'c'"),
        ([(error, (x, y), ids, -1.0)], "weight"),
        ([(lambda model, x: model(x).mean(), x, ids)], r"\(8,\)"),
        ([(lambda model, x: x, x, ids)], "depend"),
        ([], "no residual terms"),
    ):
        with pytest.raises(ValueError, match=word):
            optimizer.step(terms)
    assert torch.equal(bank.store.packed, before)
