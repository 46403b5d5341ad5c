# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The model card of an adapter: its base, how to load it, and its ranks."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from jinja2 import Template
from peft import PeftModel, __version__
from torch import nn

from ..modules.checks import check_number
from .base_code import hub_id, source_of_base
from .contents import adapter_folders, describe_tensors, read_adapter, saved_adapters


README = "README.md"
TEMPLATES = Path(__file__).parent  # card.md, bank.md of a bank, family.md of a family
# our section of a card lies between two comments, with more dots than any such comment inside
START = "<!-- From here on written by peft_lotra, which replaces this part{} -->"
END = "<!-- The part that peft_lotra wrote ends here{} -->"
SECTION = re.compile(START.format(r"(\.+)") + ".*?" + END.format(r"\1"), re.DOTALL)


def write_model_card(
    model: PeftModel | None,
    folder: str | os.PathLike,
    *,
    repo_id: str | None = None,
    revision: str | None = None,
    base_model: str | None = None,
    base_code: str | None = None,
    tags: Iterable[str] = (),
    metrics: Mapping[str, float] | None = None,
    license: str | None = None,
) -> None:
    """Write the model card of saved LoTRA adapters, README.md, into their folder.

    The card says how to build the base and load the adapter, and lists the ranks of the first adapter. It replaces an
    earlier card by this function, and PEFT's template; other text in README.md stays. A later `save_pretrained` keeps
    `base_model`, `base_code`, `tags`, `metrics` and `license`, which are in the front matter.

    Args:
        model: The model, from which the code of the base is made; None if it is not in memory.
        folder: The folder of the saved adapters.
        repo_id: The repository in the card's code, by default the folder of the card.
        revision: The branch of `repo_id`, if it is not the main one.
        base_model: The base model on the Hub, by default the one that the base was loaded from.
        base_code: Python code that assigns the base to the variable `base`, if `from_pretrained` cannot load it. By
            default the code of the existing card, else the code that builds a `peft_lotra.kan.KAN` of the same shape.
        tags: Tags besides "lotra", "kan" and "peft-plugin".
        metrics: Results for the model-index, by name. By default the existing ones stay.
        license: The identifier of the adapter's license, such as "apache-2.0". By default the existing one.

    Raises:
        ValueError: The folder contains no LoTRA adapter, the front matter of its README.md is broken, or an argument
            is invalid. README.md is then unchanged.
        SyntaxError: `base_code` is no Python.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from peft import get_peft_model
        >>> from peft_lotra import LoTRAConfig, write_model_card
        >>> from peft_lotra.kan import KAN
        >>> model = get_peft_model(KAN([2, 8, 1]), LoTRAConfig(r=2))
        >>> with TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     write_model_card(
        ...         model, folder, base_model="user/kan", metrics={"accuracy": 0.853}
        ...     )
        ...     print("value: 0.853" in Path(folder, "README.md").read_text())
        True
    """
    if base_model is not None:
        validate_repo_id(base_model)
    compile(base_code or "", "base_code", "exec")
    folders = adapter_folders(folder)
    first, *further = folders
    config, tensors = read_adapter(folders[first])
    companions = [name for name in saved_adapters(folder) if name not in folders]
    companions = companions or (config.get("saved_with") or [])[1:]  # which PEFT saves after the first
    path = Path(folder, README)
    card = load_card(path)
    title = (repo_id or "LoTRA adapter").rpartition("/")[2]

    data = card.data
    # PEFT writes paths of local folders there too, which the Hub refuses
    source = base_model or hub_id(config.get("base_model_name_or_path")) or hub_id(data.base_model)
    data.base_model = source
    data.license = license or data.license
    if isinstance(tags, str):
        tags = [tags]
    tags = [*(data.tags or []), *tags]
    data.tags = [tag for tag in tags if not tag.startswith("base_model:adapter:")]
    if source:
        data.tags.append(f"base_model:adapter:{source}")
    if base_code or base_model:
        data.base_code = base_code
    results = []
    for name, value in (metrics or {}).items():
        value = check_number(value, f"metrics[{name!r}]", "(-inf, inf)")
        results.append(EvalResult("other", "unknown", "Unknown", name, value))
    if results:
        data.model_name = title
        data.eval_results = results

    base = model and model.get_base_model()
    save_section(
        card,
        path,
        "card.md",
        title=title,
        **source_of_base(config, base, source, data.get("base_code")),
        repo_id=repo_id or ".",
        revision=revision,
        subfolder=first,
        others=further,
        companions=companions,
        sizes=describe_tensors(tensors),
        peft=__version__,
    )


def save_section(
    card: Any,
    path: Path,
    template: str,
    title: str,
    **fields: Any,
) -> None:
    """Write a card with our section, made from a template; it replaces our earlier section, and PEFT's template.

    Args:
        card: The card that exists, see `load_card`, with the front matter to write.
        path: The file to write.
        template: The name of the template.
        title: The title of a card without a text by a person.
        fields: The fields of the template.
    """
    data = card.data
    data.library_name = "peft"
    data.tags = sorted({*(data.tags or []), "kan", "lotra", "peft-plugin"})
    fence = "```"
    while fence in str(fields):
        fence += "`"
    fields = {**data.to_dict(), **fields, "card_data": data.to_yaml(), "fence": fence}
    rendered = _read_template(template).render(fields)
    body = ModelCard(rendered).text.strip()  # an error if the front matter cannot be read again
    if is_generated(card.text):
        card.text = ""
        body = f"# {title}\n\n{body}"
    dots = "."
    while END.format(dots) in body:
        dots += "."
    section = f"{START.format(dots)}\n\n{body}\n\n{END.format(dots)}"
    if SECTION.search(card.text):
        text = SECTION.sub(lambda _: section, card.text)
    else:
        text = f"{card.text.strip()}\n\n{section}"
    card.text = f"\n{text.strip()}\n"
    card.save(path)


@cache  # compiling takes a third of the time of a small save
def _read_template(name: str) -> Template:
    return Template((TEMPLATES / name).read_text(encoding="utf-8"))


def write_card(folder: str | os.PathLike) -> None:
    """Write the card of a saved adapter over PEFT's template or an earlier card; a README.md by a person stays.

    PEFT puts adapters that are not named "default" into subfolders, and one template above them. A card that cannot be
    written is a warning.
    """
    if not Path(folder, README).is_file():
        folder = Path(folder).absolute().parent
    path = Path(folder, README)
    try:
        text = load_card(path).text
        if SECTION.search(text) or (text.strip() and is_generated(text)):
            write_model_card(None, folder)
    except Exception as error:  # no reason for a save to fail
        warnings.warn(f"The adapter is saved, its model card is not written: {error}", stacklevel=2)


def remove_new_card(folder: str | os.PathLike) -> None:
    """Remove the template that PEFT wrote before a save was refused, if the folder has nothing else."""
    path = Path(folder, README)
    if list(Path(folder).glob("*")) == [path]:
        text = load_card(path).text
        if "# Model Card for" in text and is_generated(text):
            path.unlink()


def load_card(path: Path) -> Any:
    """Read the card in a file, empty if there is none."""
    content = "---\n{}\n---\n"
    if path.is_file():
        content = path.read_text(encoding="utf-8")
    return ModelCard(content)


def is_generated(text: str) -> bool:
    """Return whether a card has no text by a person: all of it is PEFT's template, or our section."""
    lines = [line.strip() for line in SECTION.sub("", text).splitlines()]
    return all(line in _template_lines() or line.startswith("- PEFT ") for line in lines)


@cache
def _template_lines() -> set[str]:
    """Return the lines of PEFT's template, which is the template of huggingface_hub."""
    template = ModelCard.from_template(ModelCardData())
    lines = map(str.strip, template.text.splitlines())
    return {"", "### Framework versions", *lines}


def write_bank_card(
    folder: str,
    repo_id: str,
    names: list[str],
    base: nn.Module,
    base_model: str | None,
    base_code: str | None,
) -> None:
    """Write the model card of a bank, README.md, with a table of its first adapters; text by a person stays."""
    path = Path(folder, README)
    card = load_card(path)
    card.data.base_model = base_model
    save_section(
        card,
        path,
        "bank.md",
        title=repo_id.rpartition("/")[2],
        **source_of_base({}, base, base_model, base_code),
        repo_id=repo_id,
        names=names,
    )
