# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The command line: peft-lotra find | inspect | merge | extract."""

from __future__ import annotations

import functools
import json
import os
import pkgutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from huggingface_hub.utils import disable_progress_bars
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.utils import logging

from ._version import __version__
from .compress.extract import extract_lotra
from .hub.contents import AdapterContents, adapter_folders, fetch_folder, read_adapter
from .hub.load import load_adapters
from .kan import modeling_kan  # noqa: F401  (registers KANModel with AutoModel)
from .layers.registry import find_kan_layers
from .modules.report import printable


app = typer.Typer(
    help="Low tensor-rank adapters (LoTRA) of Kolmogorov-Arnold networks (KANs).\n\n"
    "Models and adapters are folders or repositories on the Hugging Face Hub (log in by `hf auth login` for private "
    "ones). Only safetensors are read, nothing is unpickled. Exit codes: 0 done, 1 failed, 2 wrong usage.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
main = app  # the entry point

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of ADAPTER on the Hub.")]
Subfolder = Annotated[str | None, typer.Option(help="Name of the adapter, if it is not `default`: its subfolder.")]
Energy = Annotated[float, typer.Option(help="Share of the squared norm to keep in each layer, 0 to 1.")]
Factory = Annotated[str | None, typer.Option(help="MODULE:CALLABLE that builds the network of a state dict.")]
Adapter = Annotated[str, typer.Argument(help="A folder that `save_pretrained` wrote, or USER/REPO on the Hub.")]
Model = Annotated[str, typer.Argument(help="Folder or USER/REPO of a transformers model; or .safetensors, --factory.")]
Network = Annotated[str, typer.Argument(help="MODULE:CALLABLE that builds a network; or a transformers model.")]
Out = Annotated[str, typer.Argument(help="The folder to write. It must not exist, or be empty.")]


def _show_version(is_asked: bool) -> None:
    if is_asked:
        print(__version__)
        raise typer.Exit()


Version = Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")]


@app.callback()
def _start(version: Version = False) -> None:
    # no progress bars and no log messages of the libraries
    disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _say(text: str) -> None:
    """Print a message as one line on stderr."""
    print(printable(" ".join(text.split())), file=sys.stderr)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    if issubclass(category, UserWarning):
        _say(f"warning: {message}")


def _command(function: Callable) -> Callable:
    """Register a command. Its errors and warnings are one line on stderr."""

    @app.command(name=function.__name__)
    @functools.wraps(function)
    def run(**kwargs):
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                out = Path(kwargs.get("out") or os.devnull)
                is_full = out.is_dir() and any(out.iterdir())
                if is_full or out.is_file():
                    raise ValueError(f"{out} exists already: choose another name, or remove it.")
                return function(**kwargs)
            except Exception as error:
                is_explained = isinstance(error, (ValueError, OSError, ImportError))
                kind = "" if is_explained else f"{type(error).__name__}: "
                _say(f"error: {kind}{error}")
                raise typer.Exit(1) from error

    return run


@_command
def find(model: Network, as_json: Json = False) -> None:
    """Show the KAN layers of a model, and modules that may be KAN layers, with a registration to paste."""
    is_factory = ":" in model and not Path(model).exists()
    network = _call_factory(model) if is_factory else _load_model(model)
    layers = find_kan_layers(network)
    _print(layers.as_dict(), str(layers), as_json)


@_command
def inspect(
    adapter: Adapter,
    revision: Revision = None,
    subfolder: Subfolder = None,
    as_json: Json = False,
) -> None:
    """Show the layers, ranks, sizes and norms of an adapter."""
    _, _, contents = _read_adapter(adapter, revision, subfolder)
    base = contents.base_model or f"a {contents.base_class or 'model'}"
    _print(contents.as_dict(), f"LoTRA adapter {adapter}, for {base}\n\n{contents}", as_json)


@_command
def merge(
    base: Model,
    adapter: Adapter,
    out: Out,
    revision: Revision = None,
    subfolder: Subfolder = None,
    factory: Factory = None,
    as_json: Json = False,
) -> None:
    """Merge an adapter, and the adapters of other methods that were saved with it, into its base model.

    Saves the merged model, which has the class of BASE and no trace of the adapter.
    """
    root, names, contents = _read_adapter(adapter, revision, subfolder)
    network = _load_model(base, factory)
    model: Any = load_adapters(network, root, names)
    merged = model.merge_and_unload(safe_merge=True)
    if hasattr(merged, "save_pretrained"):
        merged.save_pretrained(out)
    else:
        os.makedirs(out, exist_ok=True)
        save_model(merged, os.path.join(out, "model.safetensors"), metadata={"format": "pt"})
    kind = type(merged).__name__
    info = {"out": out, "class": kind, "layers": contents.as_dict()["layers"]}
    _print(info, f"{contents}\nmerged into a {kind}, saved in {out}", as_json)


@_command
def extract(
    base: Model,
    tuned: Model,
    out: Out,
    energy: Energy,
    factory: Factory = None,
    as_json: Json = False,
) -> None:
    """Make an adapter from a model before (BASE) and after (TUNED) full fine-tuning."""
    base_network = _load_model(base, factory)
    tuned_network = _load_model(tuned, factory)
    model = extract_lotra(base_network, tuned_network, energy=energy)
    model.save_pretrained(out)
    report = model.extraction_report
    info = {"out": out, **report.as_dict()}
    _print(info, f"{report}\nadapter saved in {out}", as_json)


def _read_adapter(
    source: str,
    revision: str | None,
    subfolder: str | None,
) -> tuple[Path, list[str], AdapterContents]:
    """Read an adapter, by default `default` or the only one.

    Returns:
        The folder of all adapters, the names of the adapter and of those that were saved with it, and its contents.
    """
    files = [f"*{CONFIG_NAME}", f"*{SAFETENSORS_WEIGHTS_NAME}"]
    root = fetch_folder(source, files, revision)
    folders = adapter_folders(root)
    name = subfolder or "default"
    if name not in folders:
        if subfolder or len(folders) > 1:
            raise ValueError(f"{source} has the adapters {', '.join(folders)}: choose one by --subfolder.")
        (name,) = folders
    config, tensors = read_adapter(folders[name])
    companions = (config.get("saved_with") or [])[1:]
    return root, [name, *companions], AdapterContents.of(source, config, tensors)


def _load_model(source: str, factory: str | None = None) -> nn.Module:
    """Load a model by its name on the command line, from safetensors only."""
    if factory is not None:
        model = _call_factory(factory)
        load_model(model, source)
        return model
    # AutoConfig would ask the Hub five times
    folder = fetch_folder(source, ["config.json"])
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{source} is no transformers model: it has no config.json. Other networks: `find MODULE:CALLABLE`, or a "
            "file of weights and the function that builds its network, `--factory MODULE:CALLABLE`."
        )
    # without the configuration, AutoModel would load an adapter as a model
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    return AutoModel.from_pretrained(
        source, config=config, dtype="auto", use_safetensors=True, trust_remote_code=False
    )


def _call_factory(factory: str) -> nn.Module:
    """Return the network that MODULE:CALLABLE builds; the module may lie in the current folder."""
    sys.path.insert(0, os.getcwd())
    return pkgutil.resolve_name(factory)()


def _print(info: dict[str, Any], text: str, as_json: bool) -> None:
    if as_json:
        text = json.dumps(info, indent=2, allow_nan=False)
    for line in text.split("\n"):
        print(printable(line))
