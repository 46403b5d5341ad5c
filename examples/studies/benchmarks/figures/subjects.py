# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The subjects of the benchmarks: KAN layers of several libraries, and the ways to fine-tune a KAN."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from figures.measure import LIMIT_GIB, Parts
from peft_lotra import LoTRAConfig
from peft_lotra.kan import KANLinear


RANKS = (8, 8, 4)  # of LoTRA
LORA_RANK = 4  # of PEFT's LoRA
GRID = 5  # intervals; with cubic splines 8 basis functions
LINEAR = "nn.Linear(8n, n)"


class FastKANLike(nn.Module):
    """FastKAN, which is not on PyPI: Gaussians of the normalized input, and a linear layer of silu."""

    def __init__(self, in_features: int, out_features: int, num_basis: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_features)
        self.register_buffer("centers", torch.linspace(-2, 2, num_basis))
        self.spline = nn.Linear(in_features * num_basis, out_features, bias=False)
        self.base = nn.Linear(in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        spacing = self.centers[1] - self.centers[0]
        bumps = torch.exp(-(((self.norm(x)[..., None] - self.centers) / spacing) ** 2))
        return self.spline(bumps.flatten(-2)) + self.base(F.silu(x))


def _efficient_kan(n_in: int, n_out: int, grid: int) -> nn.Module:
    from qkan.kan import KANLinear as EfficientKANLinear

    return EfficientKANLinear(n_in, n_out, grid_size=grid)


def _pykan(n_in: int, n_out: int, grid: int) -> nn.Module:
    from kan.KANLayer import KANLayer

    return KANLayer(n_in, n_out, num=grid, k=3, device="cpu")


def _inkan(n_in: int, n_out: int, grid: int) -> nn.Module:
    from inkan import KANLayer

    return KANLayer(n_in, n_out, grid_size=grid)


def _flashkan(n_in: int, n_out: int, grid: int) -> nn.Module:
    from flashkan import KANLayer

    return KANLayer(n_in, n_out, grid_size=grid)


# (in, out, grid intervals) -> layer. A library is imported when its layer is made. inkan and flashkan compile their
# basis, which is their default.
LAYERS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "KANLinear": lambda n_in, n_out, grid: KANLinear(n_in, n_out, grid),
    "inkan": _inkan,
    "flashkan": _flashkan,
    "FastKAN-like": lambda n_in, n_out, grid: FastKANLike(n_in, n_out, grid + 3),
    "efficient-kan": _efficient_kan,
    "pykan": _pykan,
    LINEAR: lambda n_in, n_out, grid: nn.Linear((grid + 3) * n_in, n_out),
}

# the fine-tuned KANs, by the layer that they consist of
KANS = {"own KAN": "KANLinear", "efficient-kan": "efficient-kan"}

# Floats that a layer holds at its peak, measured: for each row, input and basis function, and for each row, input and
# output
FLOATS = {"efficient-kan": (15, 0), "pykan": (12, 6)}


def too_large(layer: str, batch: int, widths: Sequence[int], grid: int = GRID) -> str | None:
    """The reason why a layer cannot run at this size, or None."""
    per_basis, per_edge = FLOATS.get(layer, (5, 0))
    pairs = list(zip(widths[:-1], widths[1:], strict=True))
    floats = sum(batch * n_in * (per_basis * (grid + 3) + per_edge * n_out) for n_in, n_out in pairs)
    gib = 4 * floats / 2**30
    return f"would take about {gib:.1f} GiB, more than {LIMIT_GIB:.0f} GiB" if gib > LIMIT_GIB else None


def make_kan(kan: str, widths: Sequence[int], device: torch.device, grid: int = GRID) -> nn.Sequential:
    """A KAN of this kind, the same one at each call."""
    torch.manual_seed(0)
    pairs = zip(widths[:-1], widths[1:], strict=True)
    return nn.Sequential(*(LAYERS[KANS[kan]](n_in, n_out, grid) for n_in, n_out in pairs)).to(device)


def _peft_lora(model: nn.Module) -> nn.Module:
    names = [name for name, _ in model.named_parameters() if name.endswith("spline_weight")]
    config = {"r": LORA_RANK, "lora_alpha": LORA_RANK, "target_modules": [], "target_parameters": names}
    return get_peft_model(model, LoraConfig(**config, init_lora_weights=False))


# The ways to fine-tune a KAN. The updates are not zero, so that no product is trivial. A frozen base trains nothing:
# its forward pass and the gradient of its input are a lower bound of the cost of fine-tuning.
METHODS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "frozen base": lambda model: model.requires_grad_(False),
    "LoTRA": lambda model: get_peft_model(model, LoTRAConfig(r=RANKS, init_weights=False)),
    "full fine-tuning": lambda model: model,
    "PEFT LoRA": _peft_lora,
}


def count_trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def random_inputs(batch: int, features: int, device: torch.device) -> Tensor:
    """Points of the grid, (batch, features), that require a gradient, like the inputs of a hidden layer."""
    return (torch.rand(batch, features, device=device) * 1.8 - 0.9).requires_grad_()


def squared_error(model: nn.Module, x: Tensor) -> Tensor:
    """The mean square of the outputs, a loss of negligible cost."""
    return model(x).square().mean()


def laplacian_residual(model: nn.Module, x: Tensor) -> Tensor:
    """The mean squared residual of lap u = u^3, with second derivatives by nested automatic differentiation."""
    u = model(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    laplacian = 0
    for axis in range(x.shape[-1]):
        laplacian = laplacian + torch.autograd.grad(slope[:, axis].sum(), x, create_graph=True)[0][:, axis]
    return (laplacian - u.squeeze(-1) ** 3).square().mean()


def training_step(model: nn.Module, x: Tensor, loss: Callable[[nn.Module, Tensor], Tensor]) -> Parts:
    """
    A training step in two parts: "gradients" (zero_grad, forward, loss, backward) and "optimizer" (a step of Adam;
    none where nothing is trainable). `squared_error` is differentiated for the input as well, as in a hidden layer.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    targets = parameters + ([x] if loss is squared_error else [])

    def gradients() -> None:
        for tensor in targets:
            tensor.grad = None
        loss(model, x).backward(inputs=targets)

    if not parameters:
        return {"gradients": gradients}
    # a rate so small that a thousand steps do not change the functions
    optimizer = torch.optim.Adam(parameters, lr=1e-7)
    return {"gradients": gradients, "optimizer": optimizer.step}


def forward_backward(layer: nn.Module, x: Tensor) -> Parts:
    """The parts "forward" (with the graph for backward) and "backward" (gradients of input and parameters)."""
    state = {}
    tensors = [x, *layer.parameters()]

    def reset() -> None:
        for tensor in tensors:
            tensor.grad = None

    def forward() -> None:
        y = layer(x)
        state["y"] = y[0] if isinstance(y, tuple) else y  # pykan's layers return four tensors

    def backward() -> None:
        y = state.pop("y")
        y.backward(state.setdefault("gradient", torch.ones_like(y)))

    return {"_reset": reset, "forward": forward, "backward": backward}


def make_layer(name: str, width: int, batch: int, grid: int, device: torch.device) -> tuple[nn.Module, Tensor]:
    """A layer width -> width, and inputs for it."""
    torch.manual_seed(0)
    layer = LAYERS[name](width, width, grid).to(device)
    return layer, random_inputs(batch, width * (grid + 3) if name == LINEAR else width, device)
