# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The model card of an adapter: its base, how to load it, and a table of its layers."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel, __version__
from peft.utils import CONFIG_NAME

from ..modules.checks import check_number
from .base_code import hub_id, source_of_base
from .contents import AdapterContents, adapter_folders, read_adapter


README = "README.md"
_BEGIN = "<!-- From here on written by peft_lotra.write_model_card, which replaces this part. -->"
_END = "<!-- The part that peft_lotra.write_model_card wrote ends here. -->"
_SECTION = re.compile(re.escape(_BEGIN) + ".*?" + re.escape(_END), re.DOTALL)
_BY_TOOLS = re.compile(r"|### Framework versions|- PEFT \S+|.*has been automatically generated\.")

_CARD = """{begin}

An adapter of {base}, a Kolmogorov-Arnold network (KAN), by low tensor-rank adaptation
([LoTRA, Gao, Ng and Tan 2025](https://arxiv.org/abs/2502.06153)), a method for [PEFT](https://github.com/huggingface/peft).

## Use it

```sh
pip install "peft-lotra @ git+https://github.com/peft-lotra/peft-lotra"
```

```python
import peft_lotra  # registers LOTRA with PEFT; without it PEFT says KeyError: 'LOTRA'
from peft import PeftModel
{code}

model = PeftModel.from_pretrained(base, {arguments}
```

{notes}## Layers

{layers}

### Framework versions

- PEFT {peft}

{end}"""


def write_model_card(
    model: PeftModel | None,
    folder: str | os.PathLike,
    *,
    repo_id: str | None = None,
    revision: str | None = None,
    base_model: str | None = None,
    base_code: str | None = None,
    tags: Iterable[str] = (),
    metrics: Mapping[str, float] | Iterable[EvalResult] | None = None,
    license: str | None = None,
) -> None:
    """Writes the model card of saved LoTRA adapters, README.md, into their folder.

    The card says how to build the base and load the adapter, and lists the layers of the first adapter. It replaces an
    earlier card by this function, and PEFT's template; other text in README.md stays. A later `save_pretrained` keeps
    `base_model`, `base_code`, `tags`, `metrics` and `license`, which are in the front matter.

    Args:
        model: The model, from which the code of the base is made; None if it is not in memory.
        folder: The folder of the saved adapters.
        repo_id: The repository in the card's code, by default the folder of the card.
        revision: The branch of `repo_id`, if it is not the main one.
        base_model: The base model on the Hub, by default the one that the base was loaded from.
        base_code: Python code that assigns the base to the variable `base`, if `from_pretrained` cannot load it. By
            default that of the existing card, else the code that makes a `peft_lotra.kan.KAN` of the same shape.
        tags: Tags besides "lotra", "kan" and "peft-plugin".
        metrics: Results for the model-index: values by name, or complete results. By default the existing ones stay.
        license: The identifier of the adapter's license, such as "apache-2.0". By default that of the existing card.

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
        ...     print("accuracy | 0.853" in Path(folder, "README.md").read_text())
        True
    """
    if base_model is not None:
        validate_repo_id(base_model)
    compile(base_code or "", "base_code", "exec")
    if not (found := adapter_folders(folder)):
        raise ValueError(f"{folder} is no adapter: it has no {CONFIG_NAME}. Save the adapter there first.")
    results, card = _eval_results(metrics), load_card(Path(folder, README))
    first, *others = found
    config, tensors = read_adapter(found[first])
    data, title = card.data, (repo_id or "LoTRA adapter").rpartition("/")[2]
    # PEFT writes paths of local folders there too, which the Hub refuses
    names = [base_model, *map(hub_id, [config.get("base_model_name_or_path"), *_as_list(data.base_model)])]
    source = next(filter(None, names), None)
    data.library_name, data.base_model, data.license = "peft", source, license or data.license
    kept = (tag for tag in [*_as_list(data.tags), *_as_list(tags)] if not tag.startswith("base_model:adapter:"))
    data.tags = sorted({*kept, "kan", "lotra", "peft-plugin", *(["base_model:adapter:" + source] if source else [])})
    if base_code or base_model:
        data.base_code = base_code
    if results:
        data.model_name, data.eval_results = title, results
    cls, code = source_of_base(config, model and model.get_base_model(), source)
    code = (getattr(data, "base_code", None) or code).strip("\n")
    arguments = json.dumps(repo_id or ".") + (f", revision={json.dumps(revision)}" if revision else "")
    arguments += f", subfolder={json.dumps(first)}" if first != "default" else ""
    table = AdapterContents.of(title, config, tensors)._table()
    notes = [] if source else ["The base model is not on the Hub. The adapter fits its weights alone."]
    notes += [f"Adapters in subfolders of their names: {', '.join(others)}."] * bool(others)
    notes += _results(data.eval_results or [])
    section = _CARD.format(
        begin=_BEGIN,
        base=f"[{source}](https://huggingface.co/{source})" if source else f"a `{cls}`",
        code=code if code.startswith(("from ", "import ")) else f"\n{code}",
        arguments=arguments + (")" if repo_id else ")  # run it in this folder"),
        notes="".join(f"{note}\n\n" for note in notes),
        layers=_markdown(table.columns, [[f"`{name}`", *cells] for name, *cells in table.rows]),
        peft=__version__,
        end=_END,
    )
    text = f"\n# {title}" if is_generated(card.text) else card.text.rstrip()
    text = _SECTION.sub(lambda _: section, card.text) if _BEGIN in card.text else f"{text}\n\n{section}"
    card.text = text.rstrip() + "\n"
    card.save(Path(folder, README))


def write_card(folder: str | os.PathLike) -> None:
    """Writes the card of a saved adapter in place of PEFT's template or of an earlier card.

    PEFT puts adapters that are not named "default" into subfolders, and one template above them. A README.md by a
    person stays. A card that cannot be written is a warning.
    """
    place = Path(folder) if Path(folder, README).is_file() else Path(folder).absolute().parent
    try:
        if (place / README).is_file() and (_BEGIN in (text := load_card(place / README).text) or is_generated(text)):
            write_model_card(None, place)
    except Exception as error:  # no reason for a save to fail
        warnings.warn(f"The adapter is saved, its model card is not written: {error}", stacklevel=2)


def load_card(path: Path) -> Any:
    """The `ModelCard` in a file, empty if there is none."""
    return ModelCard(path.read_text(encoding="utf-8") if path.is_file() else "---\n{}\n---\n")


def is_generated(text: str) -> bool:
    """Whether a card has no text by a person: it is PEFT's template, or our part below a title."""
    rest, template = _SECTION.sub("", text), ModelCard.from_template(ModelCardData()).text
    known = {line.strip() for line in template.splitlines()}
    lines = [line.strip() for line in rest.splitlines() if rest == text or not line.startswith("# ")]
    return all(line in known or _BY_TOOLS.fullmatch(line) for line in lines)


def _as_list(value: str | Iterable[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _eval_results(metrics: Any) -> list[EvalResult]:
    if not isinstance(metrics, Mapping):
        return list(metrics or [])
    values = {name: check_number(value, f"metrics[{name!r}]", "(-inf, inf)") for name, value in metrics.items()}
    return [EvalResult("other", "unknown", "Unknown", name, value) for name, value in values.items()]


def _results(results: Iterable[EvalResult]) -> list[str]:
    rows = []
    for it in results:
        value = f"{it.metric_value:.4g}" if isinstance(it.metric_value, float) else str(it.metric_value)
        rows.append([it.metric_name or it.metric_type, value, it.dataset_name])
    return ["## Results", _markdown(["metric", ">value", "data"], rows)] if rows else []


def _markdown(columns: list[str], rows: list[list[str]]) -> str:
    rules = ["--:" if column.startswith(">") else "---" for column in columns]
    lines = [[column.removeprefix(">") for column in columns], *rows]
    head, *body = (f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in line)}|" for line in lines)
    return "\n".join([head, f"|{'|'.join(rules)}|", *body])
