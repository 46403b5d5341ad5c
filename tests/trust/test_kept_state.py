# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A test for each promise in the table of docs/notes/kept_state.md."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from forking import describe, in_child
from helpers import adapt, base, inputs, lotra_layers
from stand_ins import FAMILIES
from torch import Tensor, nn

from peft_lotra import LoTRAConfig, preprocess_lotra, slim
from peft_lotra.kan import KAN, SlimKAN, jet, laplacian
from peft_lotra.optim import LevenbergMarquardt
from peft_lotra.tuner import initialization


PAGE = Path(__file__).parents[2] / "docs/notes/kept_state.md"


def read_table() -> dict[str, dict[str, str]]:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    table = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    head = table[0]
    return {name: dict(zip(head[1:], cells, strict=True)) for name, *cells in table[1:] if len(cells) == len(head) - 1}


TABLE = read_table()
COLUMNS = list(next(iter(TABLE.values())))


class Subject(NamedTuple):
    """Something that keeps state, and a use of it that gives a tensor."""

    make: Callable[[], nn.Module]
    use: Callable[[nn.Module, Tensor], Tensor] = lambda model, x: model(x)
    rows: int = 6
    width: int = 3


def foreign_slim(name: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return slim(base(name, in_features=4, out_features=4), ranks=(2, 2, 2)).eval()


def merged(model: nn.Module) -> nn.Module:
    model = adapt(model, r=2)
    model.merge_adapter()
    return model


def merged_and_back(model: nn.Module, x: Tensor) -> Tensor:
    """The output of the merged model, and of the model after it is unmerged."""
    y = model(x)
    again = copy.deepcopy(model)
    again.unmerge_adapter()
    with again.disable_adapter():
        return torch.cat([y, again(x)])


def with_two() -> nn.Module:
    model = adapt(KAN([3, 4, 2]), r=2)
    model.add_adapter("second", LoTRAConfig(r=2, init_weights=False))
    return model


def flags_after_unloading(model: nn.Module, x: Tensor) -> Tensor:
    base_model = copy.deepcopy(model).unload()
    return torch.tensor([parameter.requires_grad for parameter in base_model.parameters()]).to(x)


def half_frozen() -> nn.Module:
    model = KAN([3, 4, 2])
    model.layers[0].requires_grad_(False)
    return adapt(model, r=2)


CONFIG = LoTRAConfig(r=2, init_weights="gradient")


def prepared() -> nn.Module:
    model, x = KAN([3, 4, 2]), inputs()
    preprocess_lotra(model, copy.deepcopy(CONFIG), lambda: model(x).square().sum().backward())
    return model


def start_from_gradient(model: nn.Module, x: Tensor) -> Tensor:
    """The subspace in which the first layer's adapter starts."""
    layer = model.layers[0]
    gradient = initialization.GRADIENTS[layer]
    parts = [torch.empty(*size) for size in ((2, 2, 2), (4, 2), (3, 2), (gradient.shape[-1], 2))]
    initialization.reset_components_from_gradient(*parts, layer=layer)
    factor = parts[2].double()
    return (factor @ factor.T).to(x)


def guarded() -> nn.Module:
    from kan import MultKAN

    network = MultKAN([2, 2, 1], grid=3, k=3, auto_save=False, symbolic_enabled=False, save_act=False)
    return adapt(network, r=2)


def refuses(model: nn.Module, x: Tensor) -> Tensor:
    network = model.get_base_model()
    assert network.prune.args[0] is network  # not the one that it is a copy of
    with pytest.raises(RuntimeError, match="rebuilds the network"):
        network.prune()
    return torch.ones(1).to(x)


class Trained(nn.Module):
    """A model with its optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.model = adapt(KAN([3, 4, 1]), r=2)
        self.optimizer = LevenbergMarquardt(self.model)


def equation(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) + 0.1 * laplacian(model, x)).squeeze(-1) - x.sum(-1)


def step(trained: nn.Module, x: Tensor) -> Tensor:
    """The outputs after a step of a copy."""
    trained.optimizer.step([(equation, x)])  # to fill what is kept
    twin = copy.deepcopy(trained)
    twin.optimizer.damping = 1e-2
    with torch.no_grad():
        for (_, parameter), (_, value) in zip(twin.named_parameters(), START.named_parameters(), strict=True):
            parameter.copy_(value)
    assert twin.optimizer.step([(equation, x)]).accepted
    return twin.model(x).detach()


torch.manual_seed(0)
START = Trained()
_ADAPTED = ("own", "efficient-kan", "pykan", "inkan", "fast-kan")

SUBJECTS: dict[str, dict[str, Subject]] = {
    "working memory": {
        "dense": Subject(lambda: KAN([3, 8, 4]), rows=200),
        "wide": Subject(lambda: KAN([20, 8, 4]), rows=200, width=20),
        "sparse": Subject(lambda: KAN([3, 8, 4], grid_size=64), rows=200),
    },
    "constants": {
        "laplacian": Subject(lambda: KAN([3, 6, 1]), laplacian, rows=100),
        "jet": Subject(lambda: KAN([3, 6, 4]), lambda model, x: torch.cat(jet(model, x, None)[:1])),
    },
    "grid buffer": {"dense": Subject(lambda: KAN([3, 4, 2], grid_range=(-2, 3)))},
    "Slim layer": {
        "own": Subject(lambda: SlimKAN([3, 8, 4], ranks=(2, 2, 2))),
        "foreign": Subject(lambda: foreign_slim("efficient-kan"), width=4),
    },
    "adapted layer": {name: Subject(lambda name=name: adapt(base(name))) for name in _ADAPTED},
    "adapted Slim layer": {
        "own": Subject(lambda: adapt(SlimKAN([3, 8, 4], ranks=(2, 2, 2)), r=2)),
        "foreign": Subject(lambda: adapt(foreign_slim("efficient-kan"), r=2), width=4),
    },
    "merged layer": {
        "own": Subject(lambda: merged(KAN([3, 4, 2])), merged_and_back),
        "foreign": Subject(lambda: merged(base("efficient-kan")), merged_and_back),
        "slim": Subject(lambda: merged(SlimKAN([3, 8, 4], ranks=(2, 2, 2))), merged_and_back),
    },
    "mixed batch": {
        "own": Subject(with_two, lambda model, x: model(x, adapter_names=["default", "second", "__base__"] * 2)),
    },
    "unloading": {"half frozen": Subject(half_frozen, flags_after_unloading)},
    "gathered gradients": {"own": Subject(prepared, start_from_gradient)},
    "network guards": {"pykan": Subject(guarded, refuses, width=2)},
    "optimizer": {"Levenberg-Marquardt": Subject(Trained, step, rows=40)},
}


def cells(column: str) -> pytest.MarkDecorator:
    found = [
        pytest.param(subject, id=f"{row}: {name}")
        for row in TABLE
        if TABLE[row][column] == "yes"
        for name, subject in SUBJECTS[row].items()
    ]
    return pytest.mark.parametrize("subject", found)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def prepare(subject: Subject) -> tuple[nn.Module, Tensor, Tensor]:
    """The object, after a use; inputs, and what the use gives."""
    model, x = subject.make(), inputs(subject.rows, in_features=subject.width)
    return model, x, subject.use(model, x).detach().clone()


def train(subject: Subject, model: nn.Module, x: Tensor) -> list[Tensor]:
    y = subject.use(model, x)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not y.requires_grad:
        return [y]
    return [g for g in torch.autograd.grad(y.square().sum(), parameters, allow_unused=True) if g is not None]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, check_dtype=False)


def test_the_table_names_all_subjects_and_columns() -> None:
    assert TABLE.keys() == SUBJECTS.keys()
    tests = {name.removeprefix("test_survives_") for name in globals() if name.startswith("test_survives_")}
    assert tests == set(COLUMNS)
    assert sum(cell == "yes" for row in TABLE.values() for cell in row.values()) > 90


@cells("inference_mode")
def test_survives_inference_mode(subject: Subject) -> None:
    model, x, expected = prepare(subject)
    if subject.use is step:  # it differentiates, which that mode does not let it do: evaluations before and between
        with torch.inference_mode():
            model.model(x)
            laplacian(model.model, x)
        assert_close(subject.use(model, x), expected)
        return
    gradients = train(subject, copy.deepcopy(model) if subject.use is not start_from_gradient else model, x)
    with torch.inference_mode():
        first = subject.use(model, x).clone()
    again = train(subject, model, x)
    with torch.inference_mode():
        second = subject.use(model, x).clone()
    assert_close(first.clone(), expected)
    assert torch.equal(first, second)
    for gradient, other in zip(again, gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-6)


@cells("inference_mode")
def test_a_first_call_under_inference_mode(subject: Subject) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, x = subject.make(), inputs(subject.rows, in_features=subject.width)
    if subject.use is not step:
        with torch.inference_mode():
            subject.use(model, x)
    train(subject, model, x)


@cells("fork")
def test_survives_fork(subject: Subject) -> None:
    model, x, expected = prepare(subject)

    def check() -> None:
        assert_close(subject.use(model, x).detach(), expected)
        train(subject, model, x)

    in_child(check)
    assert_close(subject.use(model, x).detach(), expected)


@cells("threads")
def test_survives_threads(subject: Subject) -> None:
    model, x, expected = prepare(subject)
    before = describe(model)

    def work(number: int) -> None:
        for _ in range(3):
            if number % 2 and subject.use is not refuses:
                with torch.inference_mode():
                    assert_close(subject.use(model, x).clone(), expected)
            else:
                assert_close(subject.use(model, x).detach(), expected)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert describe(model) == before


def check_copy(subject: Subject, copier: Callable[[nn.Module], nn.Module]) -> None:
    model, x, expected = prepare(subject)
    twin = copier(model)
    assert_close(subject.use(twin, x).detach(), expected)
    twin = copier(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    assert_close(subject.use(model, x).detach(), expected)
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in twin.parameters()}


@cells("deepcopy")
def test_survives_deepcopy(subject: Subject) -> None:
    check_copy(subject, copy.deepcopy)


@cells("pickle")
def test_survives_pickle(subject: Subject) -> None:
    check_copy(subject, lambda model: pickle.loads(pickle.dumps(model)))


@cells("dtype")
def test_survives_dtype(subject: Subject) -> None:
    model, x, expected = prepare(subject)
    model.double()
    assert_close(subject.use(model, x.double()).detach(), expected)
    model.float()
    assert_close(subject.use(model, x).detach(), expected)


@cells("device")
def test_survives_device(subject: Subject) -> None:
    model, x, expected = prepare(subject)
    twin = copy.deepcopy(model).to("meta")
    assert all(tensor.is_meta for tensor in twin.state_dict().values())
    if subject.use not in (refuses, flags_after_unloading):
        with torch.no_grad():
            y = (subject.use if subject.use is not merged_and_back else type(twin).__call__)(twin, x.to("meta"))
        assert y.is_meta and y.shape[-1] == expected.shape[-1]
    assert_close(subject.use(model, x).detach(), expected)


@cells("functional_call")
def test_survives_functional_call(subject: Subject) -> None:
    model, x, expected = prepare(subject)
    before = describe(model)

    class Use(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return (subject.use if subject.use is not merged_and_back else type(model).__call__)(self.model, x)

    own = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    y = torch.func.functional_call(Use(), own, (x,)).detach()
    assert_close(y, expected[: len(y)])
    of_adapters = [name for name in own if "lotra_" in name]  # in some families the grid is a parameter
    changed = own.keys() - of_adapters if subject.use is merged_and_back else of_adapters or own
    other = {**own, **{name: own[name] * 2 for name in changed}}
    assert not torch.allclose(torch.func.functional_call(Use(), other, (x,)), y)
    assert describe(model) == before
    assert_close(subject.use(model, x).detach(), expected)


@cells("vmap")
def test_survives_vmap(subject: Subject) -> None:
    model, x, expected = prepare(subject)
    use = subject.use if subject.use is not merged_and_back else type(model).__call__
    rows = torch.func.vmap(lambda row: use(model, row[None])[0])(x)
    assert_close(rows.detach(), expected[: len(rows)])
    assert_close(subject.use(model, x).detach(), expected)


@pytest.mark.slow
@cells("compile")
def test_survives_compile(subject: Subject) -> None:
    model, x, expected = prepare(subject)
    use = subject.use if subject.use is not merged_and_back else type(model).__call__
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: use(model, x), backend="aot_eager")
    gradients = train(subject, model, x)
    y = compiled(x)
    assert_close(y.detach(), expected[: len(y)])
    with torch.inference_mode():
        assert_close(compiled(x).clone(), expected[: len(y)])
    assert_close(subject.use(model, x).detach(), expected)
    if y.requires_grad and subject.use is not merged_and_back:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        found = torch.autograd.grad(compiled(x).square().sum(), parameters, allow_unused=True)
        for gradient, other in zip([g for g in found if g is not None], gradients, strict=True):
            torch.testing.assert_close(gradient, other, rtol=0, atol=1e-4 * other.abs().max().item())


def test_gathered_gradients_of_a_copy_are_asked_for() -> None:
    twin = copy.deepcopy(prepared())
    with pytest.raises(ValueError, match="preprocess_lotra"):
        adapt(twin, random=False, r=2, **{"init_weights": "gradient"})


def test_what_is_kept_goes_with_its_object() -> None:
    kept = []
    for row in SUBJECTS.values():
        for subject in row.values():
            model, x, _ = prepare(subject)
            kept.append(weakref.ref(next(model.parameters())))
            kept += [weakref.ref(layer.lotra_lock) for layer in lotra_layers(model).values()]
            del model
    gc.collect()
    assert [ref for ref in kept if ref() is not None] == []
    assert len(initialization.GRADIENTS) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_train_evaluate_train_each_family(family: str) -> None:
    model, x = adapt(base(family)), inputs()

    def gradients() -> list[Tensor]:
        y = model(x)
        parameters = [p for p in model.parameters() if p.requires_grad]
        return list(torch.autograd.grad(y.square().sum(), parameters))

    before = gradients()
    with torch.inference_mode():
        model(x)
        model.eval()
        model(x)
    for gradient, other in zip(gradients(), before, strict=True):
        assert torch.equal(gradient, other)
