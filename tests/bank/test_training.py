# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Adapters of a bank trained at once, by AdamW and by Levenberg-Marquardt: each as it is trained alone."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from behaving import KINDS, X, apart, same
from peft import get_peft_model, get_peft_model_state_dict
from torch import nn

from peft_lotra import AdapterBank, LoTRAConfig, create_lotra_optimizer, start_from_gradient
from peft_lotra.kan import KAN, SlimKAN, jet
from peft_lotra.optim import BankAdamW, BankLevenbergMarquardt, LevenbergMarquardt


CONFIGS = {"a": {"r": 2}, "b": {"r": (3, 1, 2)}, "c": {"r": 1, "adapt_residual": False}}
BASES = {
    "own": lambda: KAN([3, 20, 2]),
    "slim": lambda: SlimKAN([3, 5, 2], ranks=(2, 2, 3)),
    **{name: KINDS[name] for name in ("efficient-kan-old", "fast-kan", "pykan")},
}


def prepared(base, **config):
    """A bank with an adapter of each configuration, its model, and for each adapter a model with it alone."""
    bank, alone = AdapterBank(base), {}
    for name, own in CONFIGS.items():
        alone[name] = get_peft_model(copy.deepcopy(base), LoTRAConfig(**own, **config), autocast_adapter_dtype=False)
        bank.add(name, alone[name].eval(), check_base="ignore")
    return bank, bank.attach().eval(), alone


def check_alike(model, alone, tolerance):
    x = X.to(next(model.parameters()).dtype)
    with torch.no_grad():
        for name, own in alone.items():
            assert apart(model(x, adapter_names=[name] * 8), own(x)) < tolerance


def drawn(counts, dtype=torch.float64):
    """Points, values and names of a batch with so many rows of each adapter, in any order."""
    names = [name for name, count in zip(CONFIGS, counts, strict=True) for _ in range(count)]
    names = [names[place] for place in torch.randperm(len(names)).tolist()]
    x = torch.rand(len(names), 3, dtype=dtype) * 2 - 1
    waves = torch.tensor([2 + ord(name) % 5 for name in names], dtype=dtype)
    return x, torch.sin(waves * x.sum(1)), names


def error(model, x, y, **rows):
    return model(x, **rows)[:, 0] - y


# --- AdamW ---


def train_together(bank, model, batches, **options):
    optimizer = BankAdamW(bank, lr=3e-2, **options)
    for x, y, names in batches:
        errors = error(model, x, y, adapter_names=names).square()
        optimizer.zero_grad()
        bank.mean_by_adapter(errors, bank.ids(names)).nansum().backward()
        optimizer.step()
    optimizer.finish()


def train_alone(alone, batches, **options):
    for name, model in alone.items():
        optimizer = create_lotra_optimizer(model, torch.optim.AdamW, lr=3e-2, **options)
        for x, y, names in batches:
            own = torch.tensor([other == name for other in names])
            if own.any():
                optimizer.zero_grad()
                error(model, x[own], y[own]).square().mean().backward()
                optimizer.step()


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("counts", [[(16, 16, 16)] * 8, [(3, 1, 2), (0, 9, 1), (40, 3, 0), (1, 1, 1)] * 2])
def test_each_as_alone(kind, counts):
    dtype, tolerance = (torch.float32, 1e-5) if kind == "pykan" else (torch.float64, 1e-11)
    bank, model, alone = prepared(BASES[kind]().to(dtype))
    batches = [drawn(count, dtype) for count in (counts[:2] if kind == "pykan" else counts)]
    before = {name: copy.deepcopy(get_peft_model_state_dict(own)) for name, own in alone.items()}
    train_together(bank, model, batches)
    train_alone(alone, batches)
    check_alike(model, alone, tolerance)
    assert not any(same(get_peft_model_state_dict(own), before[name]) for name, own in alone.items())


def test_shards_that_an_executor_trains_become_one_bank(tmp_path):
    base, batches = KAN([3, 6, 2], dtype=torch.float64), [drawn((9, 9, 9)) for _ in range(4)]
    copies, alone = [copy.deepcopy(base) for _ in range(3)], prepared(base)[2]

    def fit(names, own):
        shard = AdapterBank(own)
        for name in names:
            shard.add(name, alone[name], check_base="ignore")
        chosen = []
        for x, y, of_rows in batches:
            rows = [place for place, name in enumerate(of_rows) if name in names]
            chosen.append((x[rows], y[rows], [of_rows[place] for place in rows]))
        train_together(shard, shard.attach().eval(), chosen)
        shard.save(tmp_path / names[0])
        return tmp_path / names[0]

    base, bank = copies[2], AdapterBank(copies[2])
    with ThreadPoolExecutor(2) as executor:
        for folder in executor.map(fit, (["a", "c"], ["b"]), copies):
            shard = AdapterBank.load(base, folder)
            for name in shard.names:
                bank.add(name, shard)
    bank.save(tmp_path / "all")
    bank = AdapterBank.load(base, tmp_path / "all")
    assert bank.names == ["a", "c", "b"]
    train_alone(alone, batches)
    check_alike(bank.attach().eval(), alone, 1e-10)
    bank.detach()
    with pytest.raises(ValueError, match="'a' was not added: the other bank has another base"):
        AdapterBank(copies[0]).add("a", bank)
    with pytest.raises(ValueError, match="no adapter 'z'"):
        AdapterBank(base).add("z", bank)


def test_a_new_adapter_starts_as_get_peft_model_starts_it():
    base = KAN([3, 4, 2])
    bank, alone = AdapterBank(base), {}
    for seed, (name, config) in enumerate(CONFIGS.items()):
        torch.manual_seed(seed)
        bank.add(name, LoTRAConfig(init_weights=False, **config))
        torch.manual_seed(seed)
        alone[name] = get_peft_model(copy.deepcopy(base), LoTRAConfig(init_weights=False, **config)).eval()
    check_alike(bank.attach(), alone, 1e-5)


def test_rates_of_components():
    bank, model, alone = prepared(KAN([3, 20, 2]).double())
    batches, policy = [drawn((4, 4, 4)) for _ in range(3)], {"core": 0.0, "factor_in": 0.5}
    train_together(bank, model, batches, policy=policy)
    train_alone(alone, batches, policy=policy)
    check_alike(model, alone, 1e-11)


def test_a_start_from_the_gradient_has_rates_of_its_own(tmp_path):
    """As by `create_lotra_optimizer`, beside others, also after a file and a folder."""
    bank, _, alone = prepared(KAN([3, 20, 2]).double())
    batches = [drawn((4, 4, 4)) for _ in range(3)]
    start_from_gradient(alone["b"], lambda: error(alone["b"], *drawn((0, 8, 0))[:2]).square().mean())
    bank.detach()
    bank.add("b", alone["b"], replace=True)
    bank.save(tmp_path)
    bank.export("b", tmp_path / "b")
    train_alone(alone, batches)
    for way in ("file", "folder"):
        bank = AdapterBank.load(bank.base, tmp_path)
        if way == "folder":
            bank.add("b", tmp_path / "b", replace=True)
        model = bank.attach()
        train_together(bank, model, batches)
        check_alike(model, alone, 1e-11)
        bank.detach()


def test_derivatives_of_derivatives():
    """A residual with u_x, as of a PDE, has the gradients of each adapter alone."""
    bank, model, alone = prepared(KAN([3, 6, 1]).double(), init_weights=False)
    x, _, names = drawn((16, 16, 16))

    def loss(call):
        return derivative(call, x).square()

    packed, entries = bank.start_training()
    (found,) = torch.autograd.grad(loss(lambda x: model(x, adapter_names=names)).sum(), packed)
    layers = bank.snapshot.columns(found.to_dense() * entries)
    for name, own in alone.items():
        rows, place = torch.tensor([other == name for other in names]), int(bank.ids([name])) + 1
        parts = [p for p in own.parameters() if p.requires_grad]
        expected = sum(part.square().sum() for part in torch.autograd.grad(loss(own)[rows].sum(), parts))
        assert abs(sum(part[place].square().sum() for part in layers.values()) / expected - 1) < 1e-9


def test_the_best_values_and_early_stopping():
    bank, model, _ = prepared(KAN([3, 4, 2]))
    optimizer, ids = BankAdamW(bank, lr=1e-2, names=["a", "b"]), bank.ids(["a", "b", "c"])
    values = []
    for a, b in ((3.0, 1.0), (2.0, 2.0), (torch.nan, 0.5), (4.0, 3.0), (5.0, 4.0)):
        still = optimizer.keep_best(torch.tensor([0.0, 0.0, 0.0]).index_put((ids[:2],), torch.tensor([a, b])), 2)
        values.append(bank.snapshot.packed.detach().clone())
        optimizer.zero_grad()
        model(X, adapter_names=["a", "b"] * 4).square().sum().backward()
        optimizer.step()
    assert still[ids].tolist() == [False, False, False]
    assert torch.equal(bank.snapshot.packed[1:3], values[4][1:3]) and not torch.equal(values[4][1], values[3][1])
    optimizer.finish()
    assert torch.equal(bank.snapshot.packed[1], values[1][1]) and torch.equal(bank.snapshot.packed[2], values[2][2])
    assert torch.equal(bank.snapshot.packed[3], values[0][3])
    bank.add("d", LoTRAConfig(r=1))


def test_what_training_refuses():
    bank, model, _ = prepared(KAN([3, 4, 2]))
    for word, options in {"nobody": {"names": ["nobody"]}, "core": {"policy": {"core": -1}}}.items():
        with pytest.raises(ValueError, match=word):
            BankAdamW(bank, **{"lr": 1e-2, **options})
    bank.add("d", LoTRAConfig(r=1))  # nothing is in training
    optimizer = BankAdamW(bank, lr=1e-2, names=["a", "b"])
    with torch.no_grad():
        model(X[:2], adapter_names=["c", "__base__"])
    for call, word in (
        (lambda: model(X[:2], adapter_names=["a", "nobody"]), "nobody"),
        (lambda: bank.add("e", LoTRAConfig(r=1)), "in training"),
        (lambda: bank.remove("a"), "in training"),
        (bank.compact, "in training"),
        (lambda: BankAdamW(bank), "in training"),
        (lambda: bank.mean_by_adapter(torch.ones(8), torch.full((8,), 7)), "7"),
        (lambda: BankAdamW(AdapterBank(KAN([3, 4, 2]), torch.bfloat16)), "float32"),
    ):
        with pytest.raises(ValueError, match=word):
            call()
    optimizer.finish()
    wrong = {"rank_dropout": 0.5}, {"train": "core"}, {"target_modules": ["x"]}
    for config, word in zip(wrong, ("dropout", "all components", "KAN layer"), strict=True):
        with pytest.raises(ValueError, match=word):
            bank.add("e", LoTRAConfig(**config))


@pytest.mark.parametrize("make", [lambda bank, model: BankAdamW(bank, lr=0.1, names=["a"]), None], ids=["AdamW", "LM"])
def test_rows_of_adapters_that_are_not_trained_change_nothing(make):
    bank, model, _ = prepared(KAN([3, 4, 1]), init_weights=False)
    names = ["a", "b", "__base__", "c"] * 2
    optimizer = BankLevenbergMarquardt(model, names=["a"]) if make is None else make(bank, model)
    before = bank.snapshot.packed.detach().clone()

    if make is None:
        optimizer.step([(lambda model, x: model(x) - 1, X, bank.ids(names))])
    else:
        (model(X, adapter_names=names) - 1).square().sum().backward()
        optimizer.step()
    optimizer.finish()

    is_changed = (bank.snapshot.packed != before).any(1)
    assert is_changed.tolist() == [False, True, False, False]


def test_resumed_from_a_state_dict():
    bank, model, _ = prepared(KAN([3, 4, 2]))

    def steps(optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            model(X, adapter_names=["a", "b", "c", "a"] * 2).square().sum().backward()
            optimizer.step()
        return optimizer.state_dict()

    optimizer = BankAdamW(bank, lr=1e-2)
    kept = copy.deepcopy((steps(optimizer, 3), bank.snapshot.packed.detach()))
    steps(optimizer, 2)
    expected = bank.snapshot.packed.detach().clone()
    optimizer.finish()
    bank.snapshot.packed.copy_(kept[1])
    optimizer = BankAdamW(bank, lr=1e-2)
    optimizer.load_state_dict(kept[0])
    steps(optimizer, 2)
    assert torch.equal(bank.snapshot.packed, expected)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.kan, self.how = KAN([3, 6, 2]).double(), None

    def forward(self, x):
        checkpoint = torch.utils.checkpoint.checkpoint
        return {"y": self.kan(x) if self.how is None else checkpoint(self.kan, x, use_reentrant=self.how)}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("trains", [False, True])
def test_gradient_checkpointing(trains, use_reentrant):
    """Also of two passes with other rows, and of the rows of a PeftModel."""
    bank, model, alone = prepared(Checkpointed(), init_weights=False)
    names, found = ["a", "b", "c", "a"] * 2, []
    packed = bank.start_training()[0] if trains else torch.ones((), requires_grad=True)
    one = alone["a"]
    one.add_adapter("b", LoTRAConfig(r=1, init_weights=False))
    for how in (use_reentrant, None):
        model.model.how = one.get_base_model().how = how
        x = X.double().requires_grad_()
        y = [model(x, adapter_names=rows)["y"] for rows in (names, names[::-1])]
        y.append(one(x, adapter_names=["default", "b"] * 4)["y"])
        packed.grad = None
        (y[0] * y[1] * y[2]).sum().backward()
        found.append((x.grad, packed.grad.to_dense() if trains else x.grad))
    for first, second in zip(*found, strict=True):
        assert apart(first, second) < 1e-12 and second.abs().max() > 0


# --- Levenberg-Marquardt ---


def size(model, x):
    return model(x)[:, :1]


def derivative(model, x):
    (slope,) = torch.autograd.grad((u := model(x.requires_grad_())).sum(), x, create_graph=True)
    return slope[:, 0] - slope[:, 1] * u[:, 0]


def second_derivative(model, x):
    u, _, second = jet(model, x)
    return second.sum(0) + u**2


def check_steps(model, alone, terms, names, steps, tolerance, **options):
    """Steps of the bank, and of each adapter alone on its rows, end with the same loss, acceptance and damping."""
    optimizer, ids = BankLevenbergMarquardt(model, **options), model.bank.ids(names)
    found = [optimizer.step([(f, args, ids[: len(args[0])], w) for f, args, w in terms]) for _ in range(steps)][-1]
    optimizer.finish()
    for name, own in alone.items():
        one, rows = LevenbergMarquardt(own, forgetting=0), torch.tensor([other == name for other in names])
        parts = [(f, [arg[rows[: len(arg)]] for arg in args], w) for f, args, w in terms]
        expected = [one.step(parts) for _ in range(steps)][-1]
        values = [float(part[model.bank.ids([name])]) for part in found]
        assert values == pytest.approx([expected.loss, float(expected.accepted), expected.damping], rel=tolerance)


@pytest.mark.parametrize(("kind", "memory"), [("own", 1), *((kind, 2**26) for kind in BASES if kind != "fast-kan")])
def test_each_as_alone_by_least_squares(kind, memory, monkeypatch):
    """With more rows than numbers and with fewer, two terms, and adapters one by one or all at once."""
    monkeypatch.setattr("peft_lotra.optim.bank.MEMORY", memory)
    torch.manual_seed(0)
    bases = {**BASES, "own": lambda: KAN([3, 7, 1]), "slim": lambda: SlimKAN([3, 5, 1], ranks=(1, 2, 3))}
    bank, model, alone = prepared(bases[kind]().double(), init_weights=False)
    x, y, names = drawn((90, 9, 40) if kind != "pykan" else (9, 2, 4))
    terms = [(error, (x, y), 1.0), (size, (x[: len(x) - 3],), 0.01)]
    check_steps(model, alone, terms, names, 4, 1e-5)
    check_alike(model, alone, 1e-5)


@pytest.mark.filterwarnings("ignore:.*no closed form")
@pytest.mark.parametrize(
    ("residual", "dtype"),
    [(derivative, torch.float64), (second_derivative, torch.float64), (size, torch.float32)],
)
def test_residuals_with_derivatives_and_a_base_of_float32(residual, dtype):
    bank, model, alone = prepared(KAN([3, 5, 1]).to(dtype), init_weights=False)
    x, _, names = drawn((16, 16, 16), dtype)
    tolerance = 1e-6 if dtype == torch.float64 else 1e-3
    check_steps(model, alone, [(residual, (x,), 1.0)], names, 2, tolerance)


def test_adapters_without_rows_or_stopped_or_not_finite():
    bank, model, _ = prepared(KAN([3, 5, 1]), init_weights=False)
    x, y, names = drawn((9, 9, 0))
    optimizer, before = BankLevenbergMarquardt(model), bank.snapshot.packed.detach().clone()
    y[torch.tensor([name == "b" for name in names])] = torch.nan
    record = optimizer.step([(error, (x, y), bank.ids(names))])
    a, b, c = bank.ids(["a", "b", "c"]).tolist()
    assert record.accepted.tolist()[:3] == [n == a for n in range(3)] and record.losses[[b, c]].isnan().all()
    changed = (bank.snapshot.packed != before).any(1)
    assert changed[[a + 1, b + 1, c + 1]].tolist() == [True, False, False]
    assert record.damping[a] != 1e-2 and record.damping[[b, c]].tolist() == [1e-2] * 2
    losses = torch.full_like(record.losses, torch.nan)
    for losses[a] in (1.0, 2.0):
        optimizer.keep_best(losses, patience=1)
    assert not optimizer.step([(error, (x, y), bank.ids(names))]).accepted.any()
    optimizer.finish()
    bank.remove("c")


def test_a_minimum_is_kept():
    bank, model, _ = prepared(KAN([3, 5, 1]).double(), init_weights=False)
    x, _, names = drawn((9, 9, 9))
    with torch.no_grad():
        y = model(x, adapter_names=names)[:, 0]
    optimizer, before = BankLevenbergMarquardt(model), bank.snapshot.packed.detach().clone()
    losses = [optimizer.step([(error, (x, y), bank.ids(names))]).losses[:3].max() for _ in range(5)]
    assert losses[-1] < 1e-25 and (bank.snapshot.packed - before).abs().max() < 1e-12
    before = bank.snapshot.packed.detach().clone()
    record = optimizer.step([(lambda model, x: 0 * model(x) + 1, x, bank.ids(names))])
    assert not record.accepted.any() and (record.losses[:3] - 1).abs().max() < 1e-12
    assert torch.equal(bank.snapshot.packed, before)


def test_what_least_squares_refuse():
    bank, model, _ = prepared(KAN([3, 5, 1]))
    with pytest.raises(ValueError, match="`damping` is 0.0"):
        BankLevenbergMarquardt(model, damping=0.0)
    with pytest.raises(TypeError, match="attach"):
        BankLevenbergMarquardt(bank)
    optimizer = BankLevenbergMarquardt(model, names=["a", "b"])
    x, y, names = drawn((4, 4, 0))
    before, ids = bank.snapshot.packed.detach().clone(), bank.ids(names)
    for terms, word in (
        ([(error, (x, y))], "not enough values"),
        ([(error, (x, y), ids[:3])], "lengths"),
        ([(error, (x, y), ids + 7)], "id 7"),
        ([(error, (x, y), ids, -1.0)], "weight"),
        ([(lambda model, x: model(x).mean(), x, ids)], r"\(8,\)"),
        ([(lambda model, x, y: model(x) - y, (x, y), ids)], "all pairs"),
        ([], "no residual terms"),
    ):
        with pytest.raises(ValueError, match=word):
            optimizer.step(terms)
    assert torch.equal(bank.snapshot.packed, before)


def test_as_many_residuals_of_a_row_as_rows():
    bank, model, _ = prepared(KAN([3, 5, 4]))
    record = BankLevenbergMarquardt(model).step([(lambda model, x: model(x), X[:4], bank.ids(["a"] * 4))])
    assert record.accepted[bank.ids(["a"])]


def test_steps_after_the_end_do_not_change_the_bank():
    """Least squares refuse them; a gradient has nothing to change."""
    bank, model, _ = prepared(KAN([3, 5, 1]))
    optimizer = BankLevenbergMarquardt(model)
    x, y, names = drawn((4, 4, 4))
    optimizer.step([(error, (x, y), bank.ids(names))])
    optimizer.finish()
    before = bank.snapshot.packed.clone()

    with torch.no_grad():
        optimizer.packed.add_(1)
    with pytest.raises(ValueError, match="ended the training"):
        optimizer.step([(error, (x, y), bank.ids(names))])

    torch.testing.assert_close(bank.snapshot.packed, before, rtol=0, atol=0)


def test_what_is_by_id_has_one_length():
    """Also after removals, which leave ids that belong to no adapter."""
    bank, model, _ = prepared(KAN([3, 5, 1]), init_weights=False)
    bank.remove("b")
    ids = bank.ids(["a", "c"]).repeat_interleave(4)
    optimizer = BankLevenbergMarquardt(model)

    errors = model(X, ids=ids).square().mean(1)
    losses = bank.mean_by_adapter(errors, ids)
    is_trained = optimizer.keep_best(losses)
    record = optimizer.step([(lambda model, x: model(x), X, ids)])

    assert losses.shape == is_trained.shape == record.losses.shape == record.accepted.shape == record.damping.shape
    assert is_trained.nonzero().flatten().tolist() == bank.ids(["a", "c"]).tolist()
    assert bool((record.losses[bank.ids(["a", "c"])] < losses[bank.ids(["a", "c"])]).all())
