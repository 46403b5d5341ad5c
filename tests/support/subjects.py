# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Models that files of adapters are for, and what they compute with an adapter by the files and formulas alone."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from dense import dense, read_layer
from hostile import CONFIG, WEIGHTS, Net, X, adapted
from peft import PeftModel
from torch import Tensor, nn

from peft_lotra import register_kan_layer
from peft_lotra.families import registry
from peft_lotra.kan import KANLinear, SlimKANLinear


Files = Mapping[str, "bytes | str"]  # contents by name; a text is what a link leads to, `/` a folder, `|` a pipe
PENDING = ".adapter_config.json.next"


class Ramps(nn.Module):
    """y[o] = sum_{i,k} weights[o,i,k] tanh(k x[i] / width) + sum_i linear[o,i] x[i]; of no family that is known.

    Cosines would be noise for inputs so large that their rounding errors exceed 1.
    """

    def __init__(self, in_features: int, out_features: int, size: int = 3) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(out_features, in_features * size))
        self.linear = nn.Linear(in_features, out_features)
        self.size = size
        self.register_buffer("width", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        ramps = (x[..., None] / self.width * torch.arange(1, self.size + 1)).tanh()
        return torch.einsum("bik,oik->bo", ramps, self.weights.unflatten(1, (-1, self.size))) + self.linear(x)


class Strip(nn.Module):
    """y[o,t] = sum_{i,k,h} filters[o,i,k,h] tanh(k x[i,t+h])."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.filters = nn.Parameter(torch.randn(out_channels, in_channels, 3, 2))

    def forward(self, x: Tensor) -> Tensor:
        ramps = (x.unfold(-1, 2, 1)[:, :, None] * torch.arange(1, 4)[:, None, None]).tanh()
        return torch.einsum("bikth,oikh->bot", ramps, self.filters)


class Rich(nn.Module):
    """A layer of each kind: dense, Slim, described by the file, with a kernel; and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        state = torch.get_rng_state()
        torch.manual_seed(7)
        self.dense = KANLinear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.slim = SlimKANLinear(4, 3, ranks=2)
        self.strip = Strip(1, 2)
        self.ramps = Ramps(4, 3)
        self.head = nn.Linear(3, 2)
        torch.set_rng_state(state)

    def forward(self, x: Tensor) -> Tensor:
        y = self.slim(self.norm(self.dense(x)))
        return self.head(self.ramps(self.strip(y[:, None]).flatten(1)))


class Subject(NamedTuple):
    make: Callable[[], nn.Module]
    layers: tuple[str, ...]
    config: dict[str, Any]  # of the sound adapters, and of the one that is there already


SUBJECTS = {
    "plain": Subject(
        Net, ("kan.layers.0", "kan.layers.1"), {"modules_to_save": ["head"], "rank_pattern": {"layers.0": (1, 2, 3)}}
    ),
    "rich": Subject(
        Rich, ("dense", "slim", "strip", "ramps"), {"modules_to_save": ["head"], "rank_pattern": {"ramps": (1, 2, 3)}}
    ),
}
ALPHA = 1.5


@contextmanager
def families() -> Iterator[None]:
    """Registers the families of `Rich` for a while: afterwards only files tell of them."""
    register_kan_layer(
        "ramps",
        matches=Ramps,
        coefficients=("weights", "o (i k)"),
        residual=("linear.weight", "o i"),
        axes={"k": 3},
        grid=("width",),
        bias="linear.bias",
    )
    register_kan_layer("strip", matches=Strip, coefficients=("filters", "o i k h"), kernel="h")
    try:
        yield
    finally:
        for name in ("ramps", "strip"):
            del registry._SPECS[name]


@cache
def sound_files(subject: str, seed: int) -> dict[str, bytes]:
    """The files of an adapter with a head, and with statistics of its own where the model has any."""
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder, families():
        model = adapted(SUBJECTS[subject].make(), alpha=ALPHA, **SUBJECTS[subject].config)
        model.base_model.model.head.modules_to_save["default"].weight.data += 0.5
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer += 0.25 + 0.25 * torch.rand_like(buffer)
        model.save_pretrained(folder)
        return {name: Path(folder, name).read_bytes() for name in (CONFIG, WEIGHTS)}


def with_adapter(subject: str, seed: int, adapter_name: str) -> PeftModel:
    """A model with a sound adapter, by its files."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in sound_files(subject, seed).items():
            Path(folder, name).write_bytes(content)
        return PeftModel.from_pretrained(SUBJECTS[subject].make(), folder, adapter_name=adapter_name).eval()


# -- what an accepted adapter must compute --------------------------------------------------------------------------


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_tensors(content: bytes) -> dict[str, Tensor]:
    """The floating tensors of a safetensors file, in float64."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] in _DTYPES:
            start, end = entry["data_offsets"]
            flat = (
                torch.frombuffer(bytearray(data[start:end]), dtype=_DTYPES[entry["dtype"]])
                if end > start
                else torch.empty(0)
            )
            tensors[name] = flat.double().view(entry["shape"])
    return tensors


def read_config(subject: str, files: Files) -> dict[str, Any]:
    """The config that counts: the pending one beside a config of other tensors."""
    is_pending = PENDING in files and files[CONFIG] == sound_files(subject, 1)[CONFIG]
    return json.loads(files[PENDING if is_pending else CONFIG].decode("utf-8-sig"))


def _alpha(config: dict[str, Any], name: str) -> float:
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        for part in re.split(r"(?<!\\)\|", pattern):
            plain = re.sub(r"\\(.)", r"\1", part.removeprefix("^"))
            if name == plain or (not part.startswith("^") and name.endswith(f".{plain}")):
                return float(alpha)
    return float(config.get("alpha", 1.0))  # torch multiplies by no int above 64 bits


def expected_output(subject: str, files: Files, config: dict[str, Any] | None = None) -> Tensor:
    """The output for `X` with the adapter in these files, in float64, from the files and the formulas alone."""
    config = read_config(subject, files) if config is None else config
    tensors = {name.removeprefix("base_model.model."): t for name, t in read_tensors(files[WEIGHTS]).items()}
    base = _base(subject)

    def updated(name: str, tensor: Tensor) -> Tensor:
        """The coefficients of a layer with the update of the adapter."""
        axes = ("core", "factor_out", "factor_in", "factor_basis", "factor_kernel")[: 1 + tensor.dim()]
        parts = [tensors.get(f"{name}.lotra_{axis}") for axis in axes]
        if any(part is None for part in parts):
            return tensor
        delta = dense(parts) if tensor.dim() == 3 else torch.einsum("abcd,oa,ib,kc,hd->oikh", *parts)
        tensor = tensor.clone()
        tensor[:, :, : delta.shape[2]] += _alpha(config, name) * delta
        return tensor

    def run(name: str, x: Tensor) -> Tensor:
        layer = base[name]
        return layer._replace(tensor=updated(name, layer.tensor))(x)

    x, state = X.double(), base["state"]
    if subject == "plain":
        for name in SUBJECTS[subject].layers:
            x = run(name, x)
    else:
        x = run("dense", x)
        mean, variance = (tensors.get(f"norm.lotra_{n}", state[f"norm.{n}"]) for n in ("running_mean", "running_var"))
        x = (x - mean) / (variance + 1e-5).sqrt() * state["norm.weight"] + state["norm.bias"]
        x = run("slim", x)[:, None]
        k = torch.arange(1, 4)
        ramps = (x.unfold(-1, 2, 1)[:, :, None] * k[:, None, None]).tanh()
        x = torch.einsum("bikth,oikh->bot", ramps, updated("strip", state["strip.filters"])).flatten(1)
        weights = state["ramps.weights"].unflatten(1, (-1, 3))
        weights = updated("ramps", torch.cat([weights, state["ramps.linear.weight"][..., None]], dim=-1))
        functions = torch.cat([(x[..., None] / state["ramps.width"] * k).tanh(), x[..., None]], dim=-1)
        x = torch.einsum("bik,oik->bo", functions, weights) + state["ramps.linear.bias"]
    weight, bias = (tensors.get(f"head.{name}", state[f"head.{name}"]) for name in ("weight", "bias"))
    return x @ weight.T + bias


@cache
def _base(subject: str) -> dict[str, Any]:
    """The layers of the package in a model, as dense ones, and the state of all of it."""
    model = SUBJECTS[subject].make()
    layers: dict[str, Any] = {"state": {name: tensor.double() for name, tensor in model.state_dict().items()}}
    for name in SUBJECTS[subject].layers:
        module = model.get_submodule(name)
        if isinstance(module, (KANLinear, SlimKANLinear)):
            layers[name] = read_layer("own", module)
    return layers


@cache
def base_output(subject: str) -> Tensor:
    return SUBJECTS[subject].make().eval()(X).detach()
