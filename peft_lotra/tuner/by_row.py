# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Samples with different adapters: the values that a forward pass passes to all layers, and their outputs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils._pytree import tree_leaves, tree_map

from ..kan.basis import in_transform
from ..kan.row_updates import PackedTucker, RowGroups, RowUpdates, group_rows
from ..kan.update_product import compute_row_outputs
from ..layers.probe import cached_by_class
from ..modules.calls import evaluating_without_trace, is_tracing
from ..tucker import Tucker, full_shape


Replaced = dict[tuple[int, str], Tucker]  # the former components, by the id of a layer and adapter

# returns the number of the running backward pass, -1 outside of one
_backward_pass = torch._C._current_graph_task_id


# --- the values of a forward pass ---


class ForwardPass(NamedTuple):
    """The values that a forward pass passes to all layers.

    Attributes:
        names: The adapter of each sample; None if all samples have the active ones.
        replaced: The former components, if a hotswap is replacing them.
        row_counts: The numbers of rows of layers that see several rows per sample, in the order of the samples.
        find_row_counts: Finds these numbers, see the function `find_row_counts`.
    """

    names: tuple[str, ...] | None
    replaced: Replaced
    row_counts: set[int]
    find_row_counts: Callable[[], set[int]] = set


class PassVariable:
    """A value that a forward pass passes to all layers, separate for each thread.

    Gradient checkpointing runs layers again during the backward pass, where `keep` provides the value.
    """

    def __init__(self, name: str) -> None:
        self.now: ContextVar[Any] = ContextVar(name, default=None)
        self._again: ContextVar[tuple[int, Any]] = ContextVar(f"{name}_again", default=(-1, None))

    def get(self) -> Any:
        """Return the value; None outside of a pass."""
        value = self.now.get()
        if value is None:
            backward_pass, kept_value = self._again.get()
            if backward_pass == _backward_pass():
                return kept_value
        return value

    @contextmanager
    def set(self, value: Any) -> Iterator[None]:
        token = self.now.set(value)
        try:
            yield
        finally:
            self.now.reset(token)

    def keep(self, outputs: Any) -> None:
        """Keep the value for the backward pass from these outputs, a tensor or a structure of tensors."""
        tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
        value = self.now.get()

        def set_again(gradient: Tensor) -> None:
            self._again.set((_backward_pass(), value))

        if tensors:
            register_multi_grad_hook(tensors, set_again, mode="any")


FORWARD_PASS = PassVariable("lotra_forward_pass")  # a `ForwardPass`, set by `LoTRAModel`


def check_names(names: Any) -> tuple[str, ...]:
    """Return the names of the adapters of samples; raise a ValueError unless they are a list of strings."""
    is_list = isinstance(names, Iterable) and not isinstance(names, str)
    values: Any = tuple(names) if is_list else (None,)
    kinds = set(map(type, values))  # few, of thousands of names
    if not all(issubclass(kind, str) for kind in kinds):
        raise ValueError(
            '`adapter_names` must be a list with the name of an adapter for each row, such as `["default"] * len(x)`, '
            f'or "__base__" for none, got {names!r:.100}.'
        )
    return values


def check_batch(
    count: int,
    args: tuple,
    kwargs: dict,
    argument: str = "adapter_names",
) -> None:
    """Raise a ValueError unless the inputs of a model have `count` rows, one for each adapter in `argument`.

    Vectors count only if all inputs are vectors.
    """
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]
    matrices = [tensor for tensor in tensors if tensor.dim() > 1]
    tensors = matrices or tensors
    if tensors and all(_find_batch(count, tensor) is None for tensor in tensors):
        raise ValueError(
            f"Length of `{argument}` should be the same as the number of inputs, but got "
            f"{count} and {len(tensors[0])} respectively. Pass an adapter for each row, such as `[name] * len(x)`."
        )


def _find_batch(size: int, value: Any) -> int | None:
    """Return the dimension of a batch of `size` samples; None if there is none.

    It is the first, or the second of three, as in recurrent networks. With one sample, a second dimension of that
    size may also be a channel.
    """
    if not isinstance(value, Tensor):
        return None
    sizes = value.shape[:1]
    if value.dim() == 3 and size != 1:
        sizes = value.shape[:2]
    return sizes.index(size) if size in sizes else None


def pass_names(
    module: nn.Module,
    args: tuple,
    kwargs: dict,
) -> tuple[tuple, dict]:
    """Pass the names to a wrapper of PEFT's `modules_to_save`, as a forward pre-hook.

    An adapter without a copy of the module has the module of the base.
    """
    current = None if is_tracing() else FORWARD_PASS.get()
    if current is not None and current.names is not None:
        copies: Any = module.modules_to_save
        names = [name if name in copies else "__base__" for name in current.names]
        kwargs = {**kwargs, "adapter_names": names}
    return args, kwargs


# --- the output of a layer ---


Run = Callable[[Any, tuple, dict], Any]


class MixedBatch(NamedTuple):
    """Samples with different adapters, at a layer.

    Attributes:
        size: The number of samples.
        current: The pass, a `ForwardPass` or the pass of a bank, which has the same numbers of rows.
        read_adapters: Returns the adapter of each sample, as any key.
        find_updates: Returns the updates of the samples; None if all have the same, or none.
        run: `run(adapter, args, kwargs)` evaluates the layer for samples of one adapter.
    """

    size: int
    current: Any
    read_adapters: Callable[[], Sequence[Any]]
    find_updates: Callable[[], RowUpdates | None]
    run: Run

    def has_several_adapters(self) -> bool:
        return len(set(self.read_adapters())) > 1


def run_named_rows(
    layer: Any,
    names: Sequence[str],
    current: ForwardPass | None,
    args: tuple,
    kwargs: dict,
) -> Any:
    """Evaluate a `LoTRALayer` for samples with adapters of these names."""

    def run(name: str, args: tuple, kwargs: dict) -> Any:
        return layer._run([name], current, args, kwargs)

    current = current or ForwardPass(None, {}, set())
    find_updates = partial(_updates_by_name, layer, names, current)
    batch = MixedBatch(len(names), current, lambda: names, find_updates, run)
    return run_mixed_batch(layer, batch, args, kwargs)


def run_mixed_batch(layer: Any, batch: MixedBatch, args: tuple, kwargs: dict) -> Any:
    """Evaluate a `LoTRALayer`: all samples at once, or the samples of each adapter in turn."""
    rows_per_sample = _count_rows(layer.lotra_name, batch, args, kwargs)
    base_layer = layer._modules["base_layer"]
    formula = layer._find_formula((), args, kwargs)
    if formula is not None:
        updates = batch.find_updates()
        if updates is not None:
            return compute_row_outputs(formula, args[0], updates)
    if not batch.size:
        return layer._run((), None, args, kwargs)
    if is_tracing():
        raise RuntimeError(
            f"`{layer.lotra_name}` ({layer.lotra_spec.kind}) runs once for each adapter, which a graph cannot do. "
            "Give its kind `basis` in `register_kan_layer`, or call the model that is not compiled."
        )
    if not batch.has_several_adapters():
        return batch.run(batch.read_adapters()[0], args, kwargs)
    if cached_by_class(base_layer, ("mixes samples",), partial(_mixes_samples, layer, args, kwargs)):
        raise ValueError(
            f"`{layer.lotra_name}` normalizes by the whole batch, so that a row would depend on the adapters of "
            "others. Call the model for the rows of each adapter."
        )
    return run_by_adapter(batch, rows_per_sample, args, kwargs)


def _count_rows(layer: str, batch: MixedBatch, args: tuple, kwargs: dict) -> int:
    """Return the number of rows that a layer sees per sample. The first dimension of its input must be the batch.

    Several rows are in the order of the samples in a view of a contiguous tensor (batch, ..., in). Later layers may
    see as many. Otherwise the network is run again to find out.

    Raises:
        ValueError: The number of rows differs, and their order is unclear; or the input is transposed, and its first
            two sizes are equal.
    """
    x = first_argument(args, kwargs)
    if is_tracing() or not isinstance(x, Tensor) or x.dim() == 0:
        return 1
    count = len(x)
    if count == batch.size:
        is_square = x.dim() > 2 and x.shape[0] == x.shape[1]
        if is_square and 0 < x.stride(0) < x.stride(1) and batch.has_several_adapters():
            raise ValueError(
                f"The inputs of `{layer}` are a transposed tensor {tuple(x.shape)}: its rows may be in either order. "
                "Pass `x.contiguous()` if the first dimension is the batch, else transpose it back."
            )
        return 1

    row_counts = batch.current.row_counts
    is_multiple = batch.size > 0 and count % batch.size == 0
    if is_multiple and count not in row_counts:
        if _is_view_of_samples(x, batch.size) or not batch.has_several_adapters():
            row_counts.add(count)
        else:
            with suppress(Exception):  # a model may refuse noise
                row_counts.update(batch.current.find_row_counts())
    if count not in row_counts:
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{batch.size} and {count} respectively, in `{layer}`. Let it have inputs (batch, ..., in), or call "
            "the model for the rows of each adapter."
        )
    return count // batch.size


def _is_view_of_samples(x: Tensor, size: int) -> bool:
    """Return whether x is a view of the first `size` samples of a contiguous tensor (batch, ..., in)."""
    whole = x._base
    if whole is None or whole.dim() <= 2:
        return False
    are_contiguous = x.is_contiguous() and whole.is_contiguous()
    return are_contiguous and x.numel() == size * whole[0].numel()


def first_argument(args: tuple, kwargs: dict) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


def find_row_counts(
    model: nn.Module,
    layers: Iterable[nn.Module],
    size: int,
    args: tuple,
    kwargs: dict,
) -> set[int]:
    """Return the numbers of rows of layers that see several rows per sample, in the order of the samples.

    A model may fold channels into the batch and flatten them, which no layer sees. It is therefore run twice: if a
    roll of the batch rolls the rows of a layer by those of one sample, they are in order. Noise is added, so that no
    samples are equal.
    """

    def add_noise(value: Any) -> Any:
        if _find_batch(size, value) is None or not value.is_floating_point():
            return value
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(value.shape, generator=generator, device="cpu").to(value)
        value = value.detach().nan_to_num(0, 0, 0)
        scale = 2 * value.abs().max() or 1
        return value + scale * noise

    def roll(value: Any) -> Any:
        dim = _find_batch(size, value)
        return value if dim is None else value.roll(1, dim)

    inputs = []

    def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
        inputs.append(first_argument(args, kwargs))

    noisy = tree_map(add_noise, (args, kwargs))
    rolled = tree_map(roll, noisy)
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.register_forward_pre_hook(record, with_kwargs=True))
        stack.enter_context(FORWARD_PASS.set(None))
        # in training, dropout would hide the order
        stack.enter_context(evaluating_without_trace(model))
        for args, kwargs in (noisy, rolled):
            model(*args, **kwargs)

    calls = len(inputs) // 2  # of layers, in each run
    in_order = set()
    unclear = set()
    for x, x_rolled in zip(inputs[:calls], inputs[calls:], strict=False):
        rows_per_sample, remainder = divmod(len(x), size)
        if remainder or x.shape != x_rolled.shape:
            continue
        expected = x.roll(rows_per_sample, 0)
        rounding = 1e-4 * x.abs().max()
        # rows that are equal do not show their order
        shows = (expected - x).abs().max() > 10 * rounding
        follows = (x_rolled - expected).abs().max() <= rounding
        counts = in_order if shows and follows else unclear
        counts.add(len(x))
    return in_order - unclear


def run_by_adapter(
    batch: MixedBatch,
    rows_per_sample: int,
    args: tuple,
    kwargs: dict,
) -> Any:
    """Evaluate the samples of each adapter in turn, and return the outputs in the order of the batch."""
    size = batch.size
    samples = defaultdict(list)
    for sample, adapter in enumerate(batch.read_adapters()):
        samples[adapter].append(sample)

    def pick(value: Any) -> Any:
        is_batch = isinstance(value, Tensor) and value.dim() and len(value) == size * rows_per_sample
        return _select_samples(value, size, index) if is_batch else value

    def join(*outputs: Tensor) -> Tensor:
        return _select_samples(torch.cat(outputs), size, order)

    outputs = []
    indices = []
    for adapter, of_adapter in samples.items():
        index = torch.tensor(of_adapter, device="cpu")
        indices.append(index)
        picked_args, picked_kwargs = tree_map(pick, (args, kwargs))
        outputs.append(batch.run(adapter, picked_args, picked_kwargs))
    order = torch.cat(indices).argsort()
    return tree_map(join, *outputs)  # pykan returns four tensors


def _mixes_samples(layer: Any, args: tuple, kwargs: dict) -> bool:
    """Return whether the output of a sample depends on other samples."""
    outputs = []
    # a layer may refuse what is far from its grid
    with layer._lock, evaluating_without_trace(layer._modules["base_layer"]), suppress(Exception):
        x = args[0].nan_to_num(0, 0, 0)
        half = len(x) // 2
        for _ in range(2):
            x[half:] += 1 + x.abs().max()  # changes the extremes of the batch
            y = layer._run((), None, (x.clone(), *args[1:]), kwargs)
            outputs.append(tree_leaves(y)[0][:half])
        return not torch.allclose(*outputs, rtol=1e-4, atol=1e-4, equal_nan=True)
    return False


def _select_samples(rows: Tensor, size: int, index: Tensor) -> Tensor:
    """Select samples from the rows of `size` samples. A sample has several rows where a layer or a model flattens."""
    samples = rows.unflatten(0, (size, -1))
    return samples[index.to(rows.device)].flatten(0, 1)


def _updates_by_name(
    layer: Any,
    names: Sequence[str],
    current: ForwardPass,
) -> RowUpdates | None:
    """Return the updates of the rows of a `LoTRALayer`; None if all have the same, or none."""
    # tensors that are made in a transform of `torch.func` cannot be used after it
    group_names = _group_names.__wrapped__ if in_transform() else _group_names
    distinct, groups = group_names(tuple(names))
    if len(distinct) == 1:
        return None
    names_of_layer = layer._available(distinct)
    update_of = dict(zip(names_of_layer, layer._updates(names_of_layer, current), strict=True))
    if names and not update_of:
        return None
    shape = full_shape(layer.lotra_tensor)
    # layers of other libraries refuse empty batches, but here only the shape of the output matters
    form = PackedTucker(shape, (0 if names else 1,) * len(shape))
    # adapters of the same shapes need the same room
    tensors = {}
    for _, tensor in update_of.values():
        shapes = tuple([None if component is None else component.shape for component in tensor])
        tensors[shapes] = tensor
    for tensor in tensors.values():
        form = form.with_room_for(tensor)
    updates = [update_of.get(name) for name in distinct]  # without one, the base
    stored = layer.lotra_tensor.get_parameter(layer.get_base_layer())
    return RowUpdates(form.pack(updates or [None], stored), groups.to(stored.device), form)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _group_names(names: tuple[str, ...]) -> tuple[list[str], RowGroups]:
    """Return the distinct names, and groups of the rows by the index of their names among them."""
    distinct = list(dict.fromkeys(names))
    index_of = {name: index for index, name in enumerate(distinct)}
    index = torch.tensor([index_of[name] for name in names], dtype=torch.long, device="cpu")
    # the index has all of 0, 1, ..., so that the groups count the same names
    _, groups = group_rows(index)
    return distinct, groups
