# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Adapters of a bank trained at once: each as it is trained alone."""

import copy

import pytest
import torch
from behaving import KINDS, X, apart
from peft import get_peft_model, get_peft_model_state_dict

from peft_lotra import AdapterBank, LoTRAConfig, create_lotra_optimizer, start_from_gradient
from peft_lotra.kan import KAN, SlimKAN
from peft_lotra.optim import BankAdamW


CONFIGS = {"a": {"r": 2}, "b": {"r": (3, 1, 2)}, "c": {"r": 1, "adapt_residual": False}}
BASES = {
    "own": lambda: KAN([3, 20, 2]),
    "slim": lambda: SlimKAN([3, 5, 2], ranks=(2, 2, 3)),
    **{name: KINDS[name] for name in ("efficient-kan-old", "fast-kan")},
}


def prepared(base, configs=CONFIGS, **options):
    """A bank of new adapters, its model, and for each adapter a model with it alone and its optimizer."""
    bank, alone = AdapterBank(base), {}
    for seed, (name, config) in enumerate(configs.items()):
        torch.manual_seed(seed)
        bank.add(name, LoTRAConfig(**config))
        torch.manual_seed(seed)
        alone[name] = get_peft_model(copy.deepcopy(base), LoTRAConfig(**config), autocast_adapter_dtype=False)
    optimizers = {
        name: create_lotra_optimizer(model, torch.optim.AdamW, lr=3e-2, **options) for name, model in alone.items()
    }
    return bank, bank.attach(), alone, optimizers


def target(name, x):
    return torch.sin((2 + ord(name) % 5) * x.sum(1))


def errors_of(model, x, names, **rows):
    goal = torch.cat([target(name, row) for name, row in zip(names, x.split(1), strict=True)])
    return (model(x, **rows)[:, 0] - goal).square()


def train_together(bank, model, batches, **options):
    optimizer = BankAdamW(bank, lr=3e-2, **options)
    for x, names in batches:
        losses = bank.mean_by_adapter(errors_of(model, x, names, adapter_names=names), bank.ids(names))
        optimizer.zero_grad()
        losses.nansum().backward()
        optimizer.step()
    optimizer.finish()


def train_alone(name, model, optimizer, batches):
    for x, names in batches:
        own = torch.tensor([other == name for other in names])
        if own.any():
            optimizer.zero_grad()
            errors_of(model, x[own], [name] * int(own.sum())).mean().backward()
            optimizer.step()


def drawn(counts, in_features=3, dtype=torch.float64):
    """Batches with so many rows of each adapter, in any order."""
    found = []
    for count in counts:
        names = [name for name, rows in zip(CONFIGS, count, strict=True) for _ in range(rows)]
        order = torch.randperm(len(names)).tolist()
        found.append((torch.rand(len(names), in_features, dtype=dtype) * 2 - 1, [names[place] for place in order]))
    return found


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("counts", [[(16, 16, 16)] * 8, [(3, 1, 2), (0, 9, 1), (40, 3, 0), (1, 1, 1)] * 2])
def test_each_as_alone(kind, counts):
    bank, model, alone, optimizers = prepared(BASES[kind]().double())
    batches = drawn(counts)
    before = {name: get_peft_model_state_dict(own) for name, own in alone.items()}
    before = {name: {key: part.clone() for key, part in own.items()} for name, own in before.items()}
    train_together(bank, model, batches)
    for name, own in alone.items():
        train_alone(name, own, optimizers[name], batches)
        with torch.no_grad():
            assert apart(model(X.double(), adapter_names=[name] * 8), own.eval()(X.double())) < 1e-11
        assert any(not torch.equal(part, before[name][key]) for key, part in get_peft_model_state_dict(own).items())


def test_kinds_that_run_once_for_each_adapter():
    configs = {"a": {"r": 2}, "b": {"r": 1}}
    bank, model, alone, optimizers = prepared(KINDS["pykan"](), configs)
    x, names = torch.rand(24, 3), ["a", "b", "b"] * 8
    train_together(bank, model, [(x, names)] * 2)
    for name, own in alone.items():
        train_alone(name, own, optimizers[name], [(x, names)] * 2)
        with torch.no_grad():
            assert apart(model(X, adapter_names=[name] * 8), own.eval()(X)) < 1e-5


def test_derivatives_of_derivatives():
    """A residual with u_x, as of a PDE, has the gradients of each adapter alone."""
    bank, model, alone, _ = prepared(KAN([2, 6, 1]).double())
    for own in alone.values():
        for parameter in own.parameters():
            parameter.data += 0.1 * parameter.requires_grad
    for name, own in alone.items():
        bank.add(name, own, replace=True)
    x, names = torch.rand(48, 2, dtype=torch.float64, requires_grad=True), ["a", "b", "c"] * 16

    def loss(call):
        u = call(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return (slope[:, 0] - slope[:, 1] * u[:, 0]).square()

    packed, entries = bank.start_training()
    (found,) = torch.autograd.grad(loss(lambda x: model(x, adapter_names=names)).sum(), packed)
    layers = dict(bank.store._replace(packed=found.to_dense() * entries).columns())
    for name, own in alone.items():
        rows, place = torch.tensor([other == name for other in names]), int(bank.ids([name])) + 1
        parts = [p for p in own.parameters() if p.requires_grad]
        expected = sum(part.square().sum() for part in torch.autograd.grad(loss(own)[rows].sum(), parts))
        assert abs(sum(part[place].square().sum() for part in layers.values()) / expected - 1) < 1e-9


def test_a_start_from_the_gradient_has_rates_of_its_own(tmp_path):
    """As by `create_lotra_optimizer`, beside others, also after a file and a folder."""
    bank, _, alone, optimizers = prepared(KAN([3, 20, 2]).double())
    batches = drawn([(4, 4, 4)] * 3)
    start_from_gradient(alone["b"], lambda: errors_of(alone["b"], X.double(), ["b"] * 8).mean())
    optimizers["b"] = create_lotra_optimizer(alone["b"], torch.optim.AdamW, lr=3e-2)
    bank.detach()
    bank.add("b", alone["b"], replace=True)
    bank.save(tmp_path)
    bank.export("b", tmp_path / "b")
    for way in ("file", "folder"):
        bank = AdapterBank.load(bank.base, tmp_path)
        if way == "folder":
            bank.add("b", tmp_path / "b", replace=True)
        model = bank.attach()
        train_together(bank, model, batches)
        for name, own in alone.items():
            if way == "file":
                train_alone(name, own, optimizers[name], batches)
            with torch.no_grad():
                assert apart(model(X.double(), adapter_names=[name] * 8), own.eval()(X.double())) < 1e-11
        bank.detach()


def test_rates_of_components():
    bank, model, alone, optimizers = prepared(KAN([3, 20, 2]).double(), policy={"core": 0.0, "factor_in": 0.5})
    batches = drawn([(4, 4, 4)] * 3)
    train_together(bank, model, batches, policy={"core": 0.0, "factor_in": 0.5})
    for name, own in alone.items():
        train_alone(name, own, optimizers[name], batches)
        with torch.no_grad():
            assert apart(model(X.double(), adapter_names=[name] * 8), own.eval()(X.double())) < 1e-11


def test_the_best_values_and_early_stopping():
    bank, model, *_ = prepared(KAN([3, 4, 2]))
    optimizer, ids = BankAdamW(bank, lr=1e-2, names=["a", "b"]), bank.ids(["a", "b", "c"])
    values = []
    for a, b in ((3.0, 1.0), (2.0, 2.0), (torch.nan, 0.5), (4.0, 3.0), (5.0, 4.0)):
        still = optimizer.keep_best(torch.tensor([0.0, 0.0, 0.0]).index_put((ids[:2],), torch.tensor([a, b])), 2)
        values.append(bank.store.packed.detach().clone())
        optimizer.zero_grad()
        model(X, adapter_names=["a", "b"] * 4).square().sum().backward()
        optimizer.step()
    assert still[ids].tolist() == [False, False, False]
    assert torch.equal(bank.store.packed[1:3], values[4][1:3]) and not torch.equal(values[4][1], values[3][1])
    optimizer.finish()
    assert torch.equal(bank.store.packed[1], values[1][1]) and torch.equal(bank.store.packed[2], values[2][2])
    assert torch.equal(bank.store.packed[3], values[0][3])
    bank.add("d", LoTRAConfig(r=1))


def test_what_training_refuses():
    bank, model, *_ = prepared(KAN([3, 4, 2]))
    for options, word in (({"names": ["nobody"]}, "nobody"), ({"lr": 0.0}, "lr"), ({"policy": {"core": -1}}, "core")):
        with pytest.raises(ValueError, match=word):
            BankAdamW(bank, **{"lr": 1e-2, **options})
    bank.add("d", LoTRAConfig(r=1))  # nothing is in training
    optimizer = BankAdamW(bank, lr=1e-2, names=["a", "b"])
    for names, word in ((["a", "__base__"], "'__base__'"), (["a", "c"], "'c'"), (["a", "nobody"], "nobody")):
        with pytest.raises(ValueError, match=word):
            model(X[:2], adapter_names=names)
    with torch.no_grad():
        model(X[:2], adapter_names=["c", "__base__"])
    for change in (lambda: bank.add("e", LoTRAConfig(r=1)), lambda: bank.remove("a"), bank.compact):
        with pytest.raises(ValueError, match="in training"):
            change()
    with pytest.raises(ValueError, match="in training"):
        BankAdamW(bank)
    with pytest.raises(ValueError, match="`errors`"):
        bank.mean_by_adapter(torch.ones(8, 1), bank.ids(["a"] * 8))
    with pytest.raises(ValueError, match="7"):
        bank.mean_by_adapter(torch.ones(8), torch.full((8,), 7))
    optimizer.finish()
    with pytest.raises(ValueError, match="float32"):
        BankAdamW(AdapterBank(KAN([3, 4, 2]), torch.bfloat16))
    wrong = {"rank_dropout": 0.5}, {"train": "core"}, {"target_modules": ["x"]}
    for config, word in zip(wrong, ("dropout", "all components", "no KAN layer"), strict=True):
        with pytest.raises(ValueError, match=word):
            bank.add("e", LoTRAConfig(**config))


def test_resumed_from_a_state_dict():
    bank, model, *_ = prepared(KAN([3, 4, 2]))
    names = ["a", "b", "c", "a"] * 2

    def steps(optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            model(X, adapter_names=names).square().sum().backward()
            optimizer.step()
        return optimizer.state_dict()

    optimizer = BankAdamW(bank, lr=1e-2)
    kept = copy.deepcopy((steps(optimizer, 3), bank.store.packed.detach()))
    steps(optimizer, 2)
    expected = bank.store.packed.detach().clone()
    optimizer.finish()
    bank.store.packed.copy_(kept[1])
    optimizer = BankAdamW(bank, lr=1e-2)
    optimizer.load_state_dict(kept[0])
    steps(optimizer, 2)
    assert torch.equal(bank.store.packed, expected)


class Checkpointed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.kan, self.saves = KAN([3, 6, 2]).double(), True

    def forward(self, x):
        checkpoint = torch.utils.checkpoint.checkpoint
        return checkpoint(self.kan, x, use_reentrant=False) if self.saves else self.kan(x)


def test_gradient_checkpointing():
    bank, model, *_ = prepared(Checkpointed())
    names, found, packed = ["a", "b", "c", "a"] * 8, [], bank.start_training()[0]
    packed.data[1:4] += 0.1
    for model.model.saves in (True, False):
        y = model(torch.ones(32, 3, dtype=torch.float64) * 0.3, adapter_names=names)
        found += torch.autograd.grad(y.square().sum(), packed)
    assert torch.equal(found[0].to_dense(), found[1].to_dense()) and found[1].to_dense().abs().max() > 0
