# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Modes of modules, calls of layers with other parameters, and the network inside of wrappers."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


PREFIX = "base_model.model."  # that PEFT puts in front of the names of modules


def is_tracing() -> bool:
    """Return whether `torch.compile` or `torch.export` traces this call.

    `torch.compiler.is_compiling()` is true in all threads while one is traced. Modes are of one thread.
    """
    if torch.compiler.is_dynamo_compiling():
        return True
    return torch.compiler.is_compiling() and bool(_get_current_dispatch_mode_stack())


def check_module(model: Any, argument: str = "model") -> None:
    """Raise a TypeError unless a value is a module whose layers are visible."""
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"`{argument}` must be a network, a `torch.nn.Module` not compiled by `torch.jit`, but is {model!r:.100}."
        )


def places(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Return the parent, the name and the module for each place where a module is inside a model."""
    entries = []
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                entries.append((parent, name, child))
    return entries


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Restore the mode of each module, training or evaluation, at the end."""
    modes = {module: module.training for module in model.modules() if hasattr(module, "training")}  # not frozen ones
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def read_at_rest(model: nn.Module) -> Iterator[None]:
    """Put parametrizations into evaluation mode: in training, reading `spectral_norm` changes its buffers."""
    with modes_kept(model):
        for module in model.modules():
            if isinstance(module, ParametrizationList):
                module.eval()
        yield


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """Restore modules, their attributes and `requires_grad` of parameters if an error is raised.

    Values of tensors are not restored.
    """
    saved = []
    for module in model.modules():
        # dicts such as `_modules`, `_parameters`, hooks, and settings of adapters are changed in place
        for attributes in (vars(module), *vars(module).values()):
            if isinstance(attributes, dict):
                saved.append((attributes, dict(attributes)))
    requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for attributes, former in saved:
            # no name is ever missing, since other threads may run the model
            for name in attributes.keys() - former.keys():
                del attributes[name]
            attributes.update(former)
        for parameter, value in requires_grad:
            parameter.requires_grad_(value)
        raise


def without_autocast(like: Tensor) -> Any:
    """Disable autocast, which would round an update to bfloat16 before it is added to a float32 weight."""
    return nullcontext() if like.is_meta else torch.autocast(like.device.type, enabled=False)


def freeze_norms(model: nn.Module) -> None:
    """Put norms with running statistics into evaluation mode, except copies that `modules_to_save` trains."""
    saved: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        copies = module._modules.get("modules_to_save")
        if isinstance(copies, nn.ModuleDict):  # they come after the wrapper
            saved.update(copies.modules())
        if module.training and module not in saved and module._buffers.get("running_mean") is not None:
            module.training = False


def set_mode(module: nn.Module, training: bool) -> None:
    """Set the mode of a module and of the modules inside it, as `module.train(training)` does.

    A method `train` without an argument `mode` is a training loop (pykan of 2024) and is not called.
    """
    train = type(module).train
    if train is not nn.Module.train and "mode" in inspect.signature(train).parameters:
        module.train(training)
        return
    module.training = training
    for child in module.children():
        set_mode(child, training)


# the attributes of torch, and the state in which an adapted layer watches its grid and inputs
_MODULE_ATTRIBUTES = vars(nn.Module()).keys() | {"_grid_state", "_has_seen_inputs"}


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module except torch's, such as settings and results of a forward pass."""
    return {name: value for name, value in vars(module).items() if name not in _MODULE_ATTRIBUTES}


@contextmanager
def attributes_kept(model: Callable) -> Iterator[Callable[[], bool]]:
    """Restore the attributes that modules set in a forward pass, such as tensors in pykan, or counters.

    Tensors of a `torch.func` transform cannot be used after it.

    Yields:
        A function that tells whether an attribute was set.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    saved = {module: own_attributes(module) for module in modules}

    def has_set() -> bool:
        for module, attributes in saved.items():
            for name, value in own_attributes(module).items():
                if name not in attributes or value is not attributes[name]:
                    return True
        return False

    try:
        yield has_set
    finally:
        for module, attributes in saved.items():
            for name in own_attributes(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Restore the values of buffers that change, such as running statistics and counters."""
    saved = []
    for buffer in model.buffers():
        stored = _without_repeats(buffer)
        saved.append((stored, stored.clone()))
    try:
        yield
    finally:
        with torch.no_grad():
            for stored, value in saved:
                is_comparable = stored.layout is torch.strided and not stored.is_meta
                if not (is_comparable and torch.equal(stored, value)):
                    stored.copy_(value)


def _without_repeats(tensor: Tensor) -> Tensor:
    """Return a view without the repetitions of an expanded tensor, which could not be written."""
    if tensor.layout is torch.strided and tensor.numel():
        for dim, stride in enumerate(tensor.stride()):
            if stride == 0:
                tensor = tensor.narrow(dim, 0, 1)
    return tensor


def generators_kept(model: nn.Module) -> Any:
    """Restore the random generators of the CPU and the devices of a model."""
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    return torch.random.fork_rng(list(devices))


@contextmanager
def evaluating_without_trace(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode without gradients, and restore modes, buffers, attributes and generators."""
    generators = generators_kept(model)
    with modes_kept(model), buffers_kept(model), attributes_kept(model), generators, torch.no_grad():
        set_mode(model, False)
        yield


class LayerLock:
    """A re-entrant lock around temporary swaps of parameters. A copied or unpickled layer gets a new lock."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *args: Any) -> None:
        self._lock.release()

    def __reduce__(self):
        return LayerLock, ()


class _Call(nn.Module):
    """A function as a module, so that `functional_call` can replace the parameters of `layer` around it."""

    def __init__(self, layer: nn.Module, function: Callable):
        super().__init__()
        self.layer = layer
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


class _FixedParameters(dict):
    """The parameters of a module while tensors replace some of them. A replaced one cannot be assigned to itself.

    `self.w = nn.Parameter(self.w.to(x.device))` in a `forward` would detach the tensor from its graph.
    """

    def __init__(self, parameters: dict[str, Any], replaced: dict[str, Tensor]) -> None:
        super().__init__(parameters)
        self.replaced = replaced

    def __setitem__(self, name: str, value: Any) -> None:
        replaced = self.replaced.get(name)
        is_tensor = isinstance(value, Tensor)
        if is_tensor and replaced is not None and self.get(name) is replaced and _is_same(value, replaced):
            return
        super().__setitem__(name, value)


def _is_same(first: Tensor, second: Tensor) -> bool:
    try:
        return first is second or first.is_set_to(second)
    except RuntimeError:  # on the meta device, or in `vmap`
        return False


@contextmanager
def _replaceable(replaced_of: dict[nn.Module, dict[str, Tensor]]) -> Iterator[None]:
    """Make the parameters of modules replaceable: ignore self-assignment, and remove FSDP1's views.

    FSDP1 puts views of its flat parameter into `__dict__`, where they hide the parameters.
    """
    saved = []
    for owner, replaced in replaced_of.items():
        attributes = vars(owner)
        names = {"_parameters", "register_parameter", *replaced} & attributes.keys()
        hidden = {name: attributes.pop(name) for name in names}
        saved.append((attributes, replaced, hidden))
        fixed = _FixedParameters(hidden["_parameters"], replaced)
        # torch takes `self.w = self.w` if the tensor has the mark of a parameter, and would refuse its graph here
        attributes.update(_parameters=fixed, register_parameter=fixed.__setitem__)
        for name, value in replaced.items():
            if name in fixed and value is not None:
                value._is_param = True
    try:
        yield
    finally:
        for attributes, replaced, hidden in saved:
            del attributes["register_parameter"]
            kept = {id(value) for value in replaced.values()}
            # a forward pass may have assigned parameters, or kept a tensor under another name
            for name, value in attributes["_parameters"].items():
                if id(value) not in kept:
                    hidden["_parameters"][name] = value
                elif name not in replaced:
                    attributes[name] = value
            attributes.update(hidden)


def check_loaded(model: nn.Module, argument: str) -> None:
    """Raise a `ValueError` if a tensor of a model is on the meta device, unless accelerate keeps its values."""
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise ValueError(
                f"`{argument}` has no values: `{name}` is on the meta device. Load the weights of the model first."
            )


def call_with_inputs(model: nn.Module, inputs: Any) -> Any:
    """Call a model with a tensor, a tuple or list of arguments, or a mapping of named ones."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def call_with_parameters(
    layer: nn.Module,
    parameters: dict[str, Tensor],
    function: Callable,
    args: tuple,
    kwargs: dict,
) -> Any:
    """Call a function while tensors replace parameters of a layer."""
    if not parameters:
        return function(*args, **kwargs)
    replaced_of: dict[nn.Module, dict[str, Tensor]] = {}
    for name, value in parameters.items():
        path, _, leaf = name.rpartition(".")
        replaced_of.setdefault(layer.get_submodule(path), {})[leaf] = value
    module = layer
    if function is not layer:
        module = _Call(layer, function)
        parameters = {f"layer.{name}": value for name, value in parameters.items()}
    has_views = any(vars(owner).keys() & replaced.keys() for owner, replaced in replaced_of.items())
    needs_nothing = torch.compiler.is_dynamo_compiling() and not has_views
    with nullcontext() if needs_nothing else _replaceable(replaced_of):
        return torch.func.functional_call(module, parameters, args, kwargs)


def read_attribute(
    call: Callable,
    layer: nn.Module,
    name: str,
    computed: Collection[str],
) -> Any:
    """Return an attribute of a layer. `call` evaluates `computed` names and properties, and runs methods."""
    if name in computed or isinstance(inspect.getattr_static(type(layer), name, None), property):
        return call(getattr, layer, name)
    value = getattr(layer, name)
    if inspect.ismethod(value) and value.__self__ is layer:
        return partial(call, value)
    return value


@contextmanager
def loaded(layer: nn.Module) -> Iterator[None]:
    """Bring parameters that accelerate has offloaded to their device, and keep its hooks from doing it again."""
    hooked = [module for module in layer.modules() if "_hf_hook" in vars(module) and module is not layer]
    if not hooked:
        yield
        return
    forwards = {}
    try:
        for module in hooked:
            module._hf_hook.pre_forward(module)  # pyright: ignore
            if "forward" in vars(module):
                forwards[module] = vars(module).pop("forward")
        yield
    finally:
        outputs = torch.tensor([], device="cpu")
        for module in hooked:
            if module in forwards:
                vars(module)["forward"] = forwards[module]
            module._hf_hook.post_forward(module, outputs)  # pyright: ignore


def runs_more_than_its_class(layer: nn.Module) -> bool:
    """Return whether a layer or one of its children, which formulas do not call, has hooks or an own `forward`."""
    for module in (layer, *layer.children()):
        forward_hooks = module._forward_hooks or module._forward_pre_hooks
        backward_hooks = module._backward_hooks or module._backward_pre_hooks
        if forward_hooks or backward_hooks or "forward" in vars(module):
            return True
    return False


def share_hooks(old: nn.Module, new: nn.Module) -> None:
    """Copy the forward and backward hooks of a module to its replacement."""
    for kind, hooks in vars(old).items():
        if kind.startswith(("_forward_", "_backward_")) and isinstance(hooks, dict):
            vars(new)[kind].update(hooks)
    if old._is_full_backward_hook is not None:
        new._is_full_backward_hook = old._is_full_backward_hook


def is_compiled(module: nn.Module) -> bool:
    """Return whether calls of a module run a graph of `torch.compile`, which ignores later hooks."""
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def unwrap(model: nn.Module) -> nn.Module:
    """Return the network inside the wrappers of `torch.compile`, data parallelism and PEFT.

    Raises:
        TypeError: `model` is no module.
    """
    check_module(model)
    network: Any = model
    if hasattr(network, "_orig_mod"):  # torch.compile
        return unwrap(network._orig_mod)
    if isinstance(network, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return unwrap(network.module)
    if hasattr(network, "get_base_model"):  # PeftModel
        return unwrap(network.get_base_model())
    if hasattr(network, "tuner_layer_cls"):  # a tuner of PEFT, or its mixed model
        return unwrap(network.model)
    return network
