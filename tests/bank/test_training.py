# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Adapters of a bank trained at once, by AdamW: each as it is trained alone."""

import copy

import pytest
import torch
from helpers import KINDS, X, adapt, assert_equal, assert_near, bank_of, differ, refused
from peft import get_peft_model_state_dict
from torch import nn
from torch.testing import assert_close

from peft_lotra import AdapterBank, BankAdamW, LoTRAConfig, create_lotra_optimizer, start_from_gradient
from peft_lotra.kan import KAN


CONFIGS = {"a": {"r": 2}, "b": {"r": (3, 1, 2)}, "c": {"r": 1, "adapt_residual": False}}
# full modes have no factor, and ranks above 4 lower rates
LARGE_CONFIGS = {"a": {"r": ("full", "full", 1)}, "b": {"r": (7, 5, 4)}, "c": {"r": "full", "adapt_residual": False}}
BASES = {
    "own": lambda: KAN([3, 20, 2]),
    **{name: KINDS[name] for name in ("efficient-kan-old", "fast-kan", "pykan")},
}


def attached_bank(base=None, random=False, configs=CONFIGS):
    """A bank of a small network or another base, its model, and for each adapter a model that has it alone."""
    bank, alone = bank_of(KAN([3, 5, 1]) if base is None else base, configs, random=random)
    return bank, bank.attach().eval(), alone


def check_same_outputs(model, alone, tolerance):
    x = X.to(next(model.parameters()).dtype)
    with torch.no_grad():
        for name, single in alone.items():
            assert_near(model(x, adapter_names=[name] * 8), single(x), tolerance)


def draw_batch(*counts, dtype=torch.float64):
    """Points, values and names of a batch with so many rows of each adapter, in any order."""
    ordered = [name for name, count in zip(CONFIGS, counts, strict=True) for _ in range(count)]
    names = [ordered[row] for row in torch.randperm(len(ordered))]
    x = torch.rand(len(names), 3, dtype=dtype) * 2 - 1
    frequency = torch.tensor([2 + ord(name) % 5 for name in names], dtype=dtype)
    return x, torch.sin(frequency * x.sum(1)), names


def derivative(model, x):
    y = model(x.requires_grad_())
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return slope[:, 0] - slope[:, 1] * y[:, 0]


def rows_of(name, names):
    return torch.tensor([row_name == name for row_name in names])


def error(model, x, y, **rows):
    return model(x, **rows)[:, 0] - y


def packed_values(bank):
    """A copy of the values of all adapters: a row for the base, then one for each adapter."""
    return bank.snapshot.packed.detach().clone()


# --- AdamW ---


def train_together(bank, model, batches, **options):
    optimizer = BankAdamW(bank, lr=3e-2, **options)
    for x, y, names in batches:
        errors = error(model, x, y, adapter_names=names).square()
        optimizer.zero_grad()
        bank.mean_by_adapter(errors, bank.ids(names)).nansum().backward()
        optimizer.step()
    optimizer.finish()


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_no_gradient_has_nan_where_an_adapter_has_no_rows():
    bank, model, _ = attached_bank()

    with torch.autograd.detect_anomaly(check_nan=True):
        train_together(bank, model, [(X, 1.0, ["a"] * len(X))])

    losses = bank.mean_by_adapter(torch.ones(2), bank.ids(["a", "a"]))
    assert losses[bank.ids(["a", "b"])].isnan().tolist() == [False, True]


def train_alone(alone, batches, **options):
    for name, model in alone.items():
        optimizer = create_lotra_optimizer(model, torch.optim.AdamW, lr=3e-2, **options)
        for x, y, names in batches:
            rows = rows_of(name, names)
            if rows.any():
                optimizer.zero_grad()
                error(model, x[rows], y[rows]).square().mean().backward()
                optimizer.step()


def step_on_all(optimizer, model, names):
    optimizer.zero_grad()
    model(X, adapter_names=names).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize(("kind", "configs"), [*[(kind, CONFIGS) for kind in BASES], ("own", LARGE_CONFIGS)])
@pytest.mark.parametrize("counts", [[(16, 16, 16)] * 4, [(3, 1, 2), (0, 9, 1), (40, 3, 0), (1, 1, 1)]])
def test_adamw_trains_each_adapter_as_alone(kind, configs, counts):
    dtype, tolerance = (torch.float32, 1e-5) if kind == "pykan" else (torch.float64, 1e-11)
    bank, model, alone = attached_bank(BASES[kind]().to(dtype), configs=configs)
    starts = {name: copy.deepcopy(get_peft_model_state_dict(single)) for name, single in alone.items()}
    steps = counts[:2] if kind == "pykan" else counts
    batches = [draw_batch(*rows, dtype=dtype) for rows in steps]

    train_together(bank, model, batches, weight_decay=0.1)
    train_alone(alone, batches, weight_decay=0.1)

    check_same_outputs(model, alone, tolerance)
    for name, start in starts.items():
        assert differ(get_peft_model_state_dict(alone[name]), start)


def test_an_adapter_of_a_bank_on_another_base_is_refused():
    bank, _ = bank_of(KAN([3, 4, 2]), CONFIGS)

    with refused("'a' was not added: the other bank has another base"):
        AdapterBank(copy.deepcopy(bank.base)).add("a", bank)
    with refused("no adapter 'z'"):
        AdapterBank(bank.base).add("z", bank)


def test_a_new_adapter_starts_as_get_peft_model_starts_it():
    base = KAN([3, 4, 2])
    bank, alone = AdapterBank(base), {}

    for seed, (name, config) in enumerate(CONFIGS.items()):
        torch.manual_seed(seed)
        bank.add(name, LoTRAConfig(init_weights=False, **config))
        torch.manual_seed(seed)
        alone[name] = adapt(copy.deepcopy(base), **config)

    check_same_outputs(bank.attach(), alone, 1e-5)


@pytest.mark.parametrize("policy", ["width", {"core": 0.0, "factor_in": 0.5}])
@pytest.mark.parametrize("source", ["file", "folder"])
def test_components_have_the_rates_of_the_policy_and_of_their_start(tmp_path, source, policy):
    """The rates of `create_lotra_optimizer`, of a start from the gradient beside others."""
    bank, alone = bank_of(KAN([3, 20, 2]).double(), CONFIGS, random=False)
    batches = [draw_batch(4, 4, 4) for _ in range(3)]
    x, y, _ = draw_batch(0, 8, 0)
    start_from_gradient(alone["b"], lambda: error(alone["b"], x, y).square().mean())
    bank.add("b", alone["b"], replace=True)
    bank.save(tmp_path)
    bank.export("b", tmp_path / "b")

    loaded = AdapterBank.load(bank.base, tmp_path)
    if source == "folder":
        loaded.add("b", tmp_path / "b", replace=True)
    model = loaded.attach()
    train_together(loaded, model, batches, policy=policy)
    train_alone(alone, batches, policy=policy)

    check_same_outputs(model, alone, 1e-11)


def test_a_residual_with_derivatives_has_the_gradients_of_each_adapter_alone():
    bank, model, alone = attached_bank(KAN([3, 6, 1]).double(), random=True)
    x, _, names = draw_batch(16, 16, 16)
    packed, entries = bank.start_training()

    loss = derivative(lambda x: model(x, adapter_names=names), x).square().sum()
    (gradient,) = torch.autograd.grad(loss, packed)

    layers = bank.snapshot.columns(gradient.to_dense() * entries)
    for name, single in alone.items():
        parameters = [p for p in single.parameters() if p.requires_grad]
        single_loss = derivative(single, x).square()[rows_of(name, names)].sum()
        expected = sum(part.square().sum() for part in torch.autograd.grad(single_loss, parameters))
        row = int(bank.ids([name])) + 1
        squared_norm = sum(part[row].square().sum() for part in layers.values())
        assert_close(squared_norm, expected, rtol=1e-9, atol=0)


def test_the_best_values_and_early_stopping():
    bank, model, _ = attached_bank()
    optimizer = BankAdamW(bank, lr=1e-2, names=["a", "b"])
    ids = bank.ids(["a", "b", "c"])
    values = []

    for losses in ([3.0, 1.0], [2.0, 2.0], [torch.nan, 0.5], [4.0, 3.0], [5.0, 4.0]):
        is_trained = optimizer.keep_best(torch.zeros(3).index_put((ids[:2],), torch.tensor(losses)), 2)
        values.append(packed_values(bank))
        step_on_all(optimizer, model, ["a", "b"] * 4)

    assert not is_trained[ids].any()
    assert_equal(packed_values(bank)[1:3], values[4][1:3])
    assert not torch.equal(values[4][1], values[3][1])
    optimizer.finish()
    _, a, b, c = packed_values(bank)
    assert_equal(a, values[1][1])
    assert_equal(b, values[2][2])
    assert_equal(c, values[0][3])
    bank.add("d", LoTRAConfig(r=1))


@pytest.mark.parametrize(
    ("options", "message"), [({"names": ["nobody"]}, "nobody"), ({"policy": {"core": -1}}, "core")]
)
def test_training_that_is_refused_leaves_the_bank_open(options, message):
    bank, _ = bank_of(KAN([3, 4, 2]), CONFIGS)

    with refused(message):
        BankAdamW(bank, lr=1e-2, **options)

    bank.add("d", LoTRAConfig(r=1))


CALLS_IN_TRAINING = {
    "another optimizer": (lambda bank, model: BankAdamW(bank), "in training"),
    "an addition": (lambda bank, model: bank.add("e", LoTRAConfig(r=1)), "in training"),
    "a removal": (lambda bank, model: bank.remove("a"), "in training"),
    "compacting": (lambda bank, model: bank.compact(), "in training"),
    "an unknown name": (lambda bank, model: model(X[:2], adapter_names=["a", "nobody"]), "nobody"),
    "an unknown id": (lambda bank, model: bank.mean_by_adapter(torch.ones(8), torch.full((8,), 7)), "7"),
    "too few ids": (lambda bank, model: bank.mean_by_adapter(torch.ones(8), torch.zeros(7).int()), "indices"),
}


@pytest.mark.parametrize("call", CALLS_IN_TRAINING)
def test_a_bank_in_training_refuses(call):
    bank, model, _ = attached_bank()
    BankAdamW(bank, lr=1e-2, names=["a", "b"])
    action, message = CALLS_IN_TRAINING[call]

    with torch.no_grad():
        model(X[:2], adapter_names=["c", "__base__"])  # adapters that are not trained still answer
    with pytest.raises((ValueError, RuntimeError), match=message):
        action(bank, model)


@pytest.mark.parametrize(("dtype", "message"), [(None, "no adapter to train"), (torch.bfloat16, "float32 or float64")])
def test_a_bank_without_adapters_or_in_half_precision_is_not_trained(dtype, message):
    bank = AdapterBank(KAN([3, 4, 2]), dtype)
    if dtype is not None:
        bank.add("a", LoTRAConfig(r=1))

    with refused(message):
        BankAdamW(bank)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"train": "core"}, "all components"),
        ({"target_modules": ["x"]}, "KAN layer"),
    ],
)
def test_a_configuration_that_a_bank_cannot_train_is_refused(config, message):
    with refused(message):
        AdapterBank(KAN([3, 4, 2])).add("e", LoTRAConfig(**config))


def test_rows_of_adapters_that_are_not_trained_change_nothing():
    bank, model, _ = attached_bank(random=True)
    names = ["a", "b", "__base__", "c"] * 2
    before = packed_values(bank)

    optimizer = BankAdamW(bank, lr=0.1, names=["a"])
    (model(X, adapter_names=names) - 1).square().sum().backward()
    optimizer.step()
    optimizer.finish()

    is_changed = (packed_values(bank) != before).any(1)
    assert is_changed.tolist() == [False, True, False, False]


def test_training_resumes_from_a_state_dict():
    bank, model, _ = attached_bank()

    def train_for(optimizer, steps):
        for _ in range(steps):
            step_on_all(optimizer, model, ["a", "b", "c", "a"] * 2)

    optimizer = BankAdamW(bank, lr=1e-2)
    train_for(optimizer, 3)
    saved_optimizer, saved_values = copy.deepcopy(optimizer.state_dict()), packed_values(bank)
    train_for(optimizer, 2)
    expected = packed_values(bank)
    optimizer.finish()

    bank.snapshot.packed.copy_(saved_values)
    optimizer = BankAdamW(bank, lr=1e-2)
    optimizer.load_state_dict(saved_optimizer)
    train_for(optimizer, 2)

    assert_equal(packed_values(bank), expected)


class Checkpointed(nn.Module):
    """Runs its KAN by gradient checkpointing, unless `use_reentrant` is None."""

    def __init__(self):
        super().__init__()
        self.kan = KAN([3, 6, 2]).double()
        self.use_reentrant = None

    def forward(self, x):
        if self.use_reentrant is None:
            return {"y": self.kan(x)}
        return {"y": torch.utils.checkpoint.checkpoint(self.kan, x, use_reentrant=self.use_reentrant)}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("is_training", [False, True])
def test_gradient_checkpointing_keeps_the_rows_of_each_pass(is_training, use_reentrant):
    """Two passes of a bank and one of a PeftModel, each with other names, before one backward pass."""
    bank, model, alone = attached_bank(Checkpointed(), random=True)
    packed = bank.start_training()[0] if is_training else torch.ones((), requires_grad=True)
    names = ["a", "b", "c", "a"] * 2
    peft_model = alone["a"]
    peft_model.add_adapter("b", LoTRAConfig(r=1, init_weights=False))

    def gradients(use_reentrant):
        model.model.use_reentrant = peft_model.get_base_model().use_reentrant = use_reentrant
        x = X.double().requires_grad_()
        packed.grad = None
        product = model(x, adapter_names=names)["y"] * model(x, adapter_names=names[::-1])["y"]
        product = product * peft_model(x, adapter_names=["default", "b"] * 4)["y"]
        product.sum().backward()
        return [x.grad, packed.grad.to_dense()] if is_training else [x.grad]

    for checkpointed, plain in zip(gradients(use_reentrant), gradients(None), strict=True):
        assert_near(checkpointed, plain, 1e-12)
        assert plain.any()


def test_what_is_by_id_has_one_length():
    """Also after removals, which leave ids that belong to no adapter."""
    bank, model, _ = attached_bank(random=True)
    bank.remove("b")
    adapters = bank.ids(["a", "c"])
    ids = adapters.repeat_interleave(4)
    optimizer = BankAdamW(bank)

    errors = model(X, ids=ids).square().mean(1)
    losses = bank.mean_by_adapter(errors, ids)
    is_trained = optimizer.keep_best(losses)

    assert losses.shape == is_trained.shape
    assert is_trained.nonzero().flatten().tolist() == adapters.tolist()
