# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Hostile adapters from a grammar of fields, types, sizes, patterns, names, headers and dtypes.

A sound adapter of one of `SUBJECTS` is rewritten in one to four places, as an author would who writes fitting digests,
and now and then further files lie beside its two. Each is refused clearly, or computes what its files say. The tests
run 200. Ten thousand, with a table and a report:

    PYTHONPATH=. python tests/support/grammar.py --count 10000 --output examples/studies/results/fuzz_configs.json

With `--patterns`, sound adapters with a generated pattern in one field, each at most 50 ms through any door.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

from doors import PLANTED, Case, main
from hostile import CONFIG, WEIGHTS
from subjects import PENDING, SUBJECTS, sound_files


CALL = f'{PLANTED}("x")'
TEXTS = [
    "", " ", ".", "..", "../../etc/passwd", "/", "a/b", "\x00", "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\r\n",
    "\u202e", "\ufeff", "\ud800", "🦎", "é" * 300, "a" * 100_000, "-" * 3, "---\n", "```\n" + CALL + "\n```python",
    f'"); {CALL} #', f"'); {CALL} #", f'\\"); {CALL} #', f"\n{CALL}\n", f'"""\n{CALL}\n"""', "{{ 7 * 7 }}", "${HOME}",
    "$(id)", "%s%n", "<script>", "![x](http://x)", "| a | b |", "[red]x[/red]", "default", "existing", "user/repo",
    "__class__", "__init__", "self", "None", "true", "NaN", "1e999", "0", "LOTRA", "LORA", "dummy-target-modules",
    "all-linear", "all-kan", "gradient", "error", "ignore", "torch", "os", "peft_lotra.kan", "KAN", "builtins", "eval",
    "cpu", "SEQ_CLS", "CAUSAL_LM",
]  # fmt: skip
LAYERS = [
    "kan.layers.0",
    "kan.layers.1",
    "layers.0",
    "layers.1",
    "kan",
    "kan.layers",
    "head",
    "0",
    "1",
    "kan.layers.2",
    "xkan.layers.0",
    "norm",
    "dense",
    "slim",
    "strip",
    "ramps",
    "ramps.linear",
]
FIELDS = [
    "r", "alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern",
    "alpha_pattern", "modules_to_save", "rank_dropout", "module_dropout", "init_weights", "adapt_residual",
    "base_layers", "check_base", "base_digest", "integrity", "peft_type", "task_type", "inference_mode", "revision",
    "base_model_name_or_path", "auto_mapping", "peft_version", "bias", "lora_alpha", "use_dora", "megatron_config",
    "_record_base", "checkpoint", "targets_all_kan", "__class__", "", "runtime_config", "train", "save_norm_stats",
    "self", "cls", "kwargs", "_unresolved", "description", "lora_dropout", "alphа", "ALPHA", "alpha ",
]  # fmt: skip
NUMBERS = [
    0, 1, -1, 2, 3, 7, 1000, 10**6, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**400, 0.0, -0.0, 0.5, 1.0, 1.5, -2.5,
    1e-320, 1e30, 1e308, float("nan"), float("inf"), float("-inf"), True, False,
]  # fmt: skip


def pattern(rng: random.Random) -> str:
    """A regular expression of what makes backtracking engines slow, or of what they refuse."""
    atoms = [
        "a",
        ".",
        "[^!]",
        r"\w",
        "(?:a|a)",
        "(?:.|)",
        "(a|ab)",
        "(?=a)",
        "(?:a*)",
        "(?:a?b?)",
        "kan",
        "layers",
        r"\.",
        "[01]",
    ]
    atoms += ["(", "[a", "(?P<x>a)", r"\1", "(?<=a)", "(?i:a)", "|", "^", "$", "\\"] if rng.random() < 0.3 else []
    repeats = ["", "", "?", "*", "+", "{1,9}", "*?", "+?", "??", "{0,40}", "{2}{3}", "{99999}"]
    body = "".join(rng.choice(atoms) + rng.choice(repeats) for _ in range(rng.randrange(1, 6)))
    if rng.random() < 0.4:
        body = f"({body}){rng.choice(['*', '+', '{1,20}', '?'])}"
    return body * rng.choice([1, 1, 2, 8, 30, 2000]) + rng.choice(["", "$", "Z", "!!"])


# of the description of a family
ASPECTS = [
    "coefficients", "residual", "edge_scale", "kernel", "groups", "linear", "grid", "grid_methods",
    "checkpoint_methods", "network_methods", "bias", "axes", "basis", "matches", "family", "splines", "derivatives",
    "normalization", "__class__", "",
]  # fmt: skip
PARAMETERS = [
    "weights", "filters", "linear.weight", "linear.bias", "width", "linear", "forward", "__class__", "weights.*", "*",
    "linear.*", "_parameters", "training", "base_layer.weights", "lotra_core", "weights.grad", "weights.data", "0",
    "linear.weight.__class__", "weіghts", "a." * 2000 + "a",
]  # fmt: skip
LAYOUTS = [
    "o i k", "i o k", "k i o", "o (i k)", "o (k i)", "(o i) k", "(i k) o", "o i", "i o", "o", "i", "k", "o i k h",
    "o i h k", "i o k h", "o i k h w", "g o i k h", "o ((i k) + i)", "o ((i k) + o)", "o (i k) + i", "... o i",
    "o i ...", "o i k ...", "1 o i k", "o 1 i k", "o o i", "o i k k", "() o i k", "(o (i k))", "(o", "o)", "+", "o+i",
    "o i *", "_ o i", " ".join(f"a{i}" for i in range(500)), "(" * 900 + "o i k" + ")" * 900,
    "o i " + "(k + i) " * 200,
]  # fmt: skip


def of_description(rng: random.Random, description: Any) -> Any:
    """A description of a family with another aspect."""
    description = dict(description) if isinstance(description, dict) else {}
    aspect = rng.choice(ASPECTS)
    pair = [rng.choice([*PARAMETERS, *TEXTS]), rng.choice([*LAYOUTS, *LAYOUTS, *TEXTS])]
    fitting = {
        "coefficients": rng.choice([pair, [pair], [pair] * 2, [["weights", "o (i k)"], pair], [["filters", pair[1]]]]),
        "kernel": rng.choice(["", "h", "h w", "k", "o", "i", "k h", *TEXTS]),
        "groups": rng.choice(["", "g", "o", "k", "i g", *TEXTS]),
        "linear": rng.random() < 0.5,
        "bias": pair[0],
        "axes": {rng.choice("koihg"): rng.choice([*NUMBERS, [3], [3, 0], [2] * 50])},
        "network_methods": {pair[0]: rng.choice([None, *PARAMETERS])},
        **dict.fromkeys(["grid", "grid_methods", "checkpoint_methods"], pair[:1] * rng.choice([0, 1, 1, 3, 500])),
    }
    how = rng.randrange(4)
    if how == 0:
        description.pop(aspect, None)
    else:
        description[aspect] = value(rng) if how == 1 else fitting.get(aspect, pair)
    return rng.choice([description] * 20 + [None, [], {}, "o i k"])


def value(rng: random.Random, depth: int = 0) -> Any:
    """A value of any type and size."""
    kind = rng.randrange(12 if depth < 3 else 8)
    if kind == 0:
        return None
    if kind < 3:
        return rng.choice(NUMBERS)
    if kind < 5:
        return rng.choice(TEXTS)
    if kind == 5:
        return rng.choice(LAYERS)
    if kind == 6:
        return pattern(rng)
    if kind == 7:
        return rng.choice(["x", 3, None]) if depth else [rng.choice(["a", 1, None, []])] * rng.choice([1, 50_000])
    if kind < 10:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    keys = [*LAYERS, *TEXTS, "family", "shape", "weights", "config", "base_model_class", "parent_library"]
    return {rng.choice(keys): value(rng, depth + 1) for _ in range(rng.randrange(4))}


def fitting(rng: random.Random, field: str, config: dict[str, Any]) -> Any:
    """A value of about the type that a field has."""
    names = [
        rng.choice(LAYERS + ["^kan\\.layers\\.0", "kan.layers.0|head", r"layers\.1"]) for _ in range(rng.randrange(4))
    ]
    number = rng.choice(NUMBERS)
    ranks = rng.choice([number, [1, 2, 3], [2, 2], [1, 2, 3, 4], [10**9] * 3, [0, 1, 1], [1.0, 2, 3], ["1", 2, 3]])
    if field in ("rank_pattern", "alpha_pattern"):
        return {
            name: ranks if field == "rank_pattern" else number
            for name in names + ([pattern(rng)] if rng.random() < 0.3 else [])
        }
    if field == "base_layers":
        layers = json.loads(json.dumps(config.get("base_layers") or {}))
        layers = layers if isinstance(layers, dict) else {}  # an earlier change may have made it anything
        for layer in (layer for layer in layers.values() if isinstance(layer, dict)):
            if rng.random() < 0.5:
                layer["description"] = of_description(rng, layer.get("description"))
            else:
                layer[rng.choice(["family", "shape", "has_residual", "grid", "parameters", "new"])] = value(rng)
        if rng.random() < 0.7:
            return layers
        layers[rng.choice(LAYERS + TEXTS)] = rng.choice(
            [{}, {"family": "slim-kan", "shape": [10**9] * 3, "has_residual": True}, value(rng)]
        )
        return layers
    if field == "train":
        components = ["core", "factor_out", "factor_in", "factor_basis", "factor_kernel", *TEXTS]
        return rng.choice(
            [components[:4], [rng.choice(components)], [rng.choice(components)] * 2, rng.choice(components)]
        )
    if field in ("save_norm_stats", "adapt_residual"):
        return rng.random() < 0.5
    if field == "auto_mapping":
        return {"base_model_class": rng.choice(TEXTS), "parent_library": rng.choice(TEXTS)}
    if field == "integrity":
        return {"config": "0" * 32, "weights": value(rng)}
    if field in ("r", "alpha", "rank_dropout", "module_dropout", "layers_to_transform"):
        return rng.choice([ranks, number, [number, number]])
    return rng.choice([names, names, rng.choice(TEXTS), pattern(rng), number])


def of_config(rng: random.Random, config: dict[str, Any], tensors: dict[str, list]) -> str:
    field = rng.choice(FIELDS)
    how = rng.choice(["fitting", "fitting", "any", "missing"])
    if how == "missing":
        config.pop(field, None)
    else:
        config[field] = fitting(rng, field, config) if how == "fitting" else value(rng)
    return f"{how} {field}: {str(config.get(field))[:80]!r}"


def of_tensors(rng: random.Random, config: dict[str, Any], tensors: dict[str, list]) -> str:
    """Tensors are `[dtype, shape, bytes]` by name."""
    name = rng.choice(sorted(tensors))
    dtype, shape, data = tensors[name]
    axes = shape if isinstance(shape, list) else []
    where = "base_model.model."
    kind = rng.choice(["rename", "add", "drop", "dtype", "shape", "values", "both ranks", "many", "swap", "negative"])
    others = [
        f"{where}kan.layers.0.spline_weight", f"{where}kan.layers.0.base_layer.spline_weight",
        f"{where}kan.layers.0.grid_bounds", f"{where}head.weight", f"{where}head.modules_to_save.existing.weight",
        f"{where}head.original_module.weight", f"{name}.existing", f"{name}.default",
        f"{where}kan.layers.0.lotra_core.existing", f"{where}kan.layers.7.lotra_core", f"{where}lotra_core",
        "lotra_core", f"{where}kan.layers.0.lotra_scaling", f"{name} ", name.upper(), f"{where}{name}",
        name.removeprefix(where), f"{where}.lotra_core", f"{where}norm.lotra_running_mean",
        f"{where}norm.running_mean",
        f"{where}norm.lotra_running_var", f"{where}norm.lotra_running_mean.existing", f"{where}lotra_running_mean",
        f"{where}norm.lotra_num_batches_tracked", f"{where}kan.layers.0.lotra_factor_kernel", f"{where}slim.core",
        f"{where}slim.factor_basis", f"{where}ramps.weights", f"{where}ramps.width",
        f"{where}ramps.lotra_factor_kernel",
        f"{where}strip.filters", f"{where}norm.weight", name.replace("o", "о", 1), name.replace("/", "\\"), *TEXTS,
    ]  # fmt: skip
    if kind == "rename":
        tensors[rng.choice(others)] = tensors.pop(name)
    elif kind == "add":
        tensors[rng.choice(others)] = rng.choice([[dtype, shape, data], ["F32", [0], b""], ["F32", [], b"\0" * 4]])
    elif kind == "drop":
        del tensors[name]
    elif kind == "dtype":
        new = rng.choice(
            [
                "F64",
                "F16",
                "BF16",
                "I8",
                "U8",
                "I16",
                "I32",
                "I64",
                "U64",
                "BOOL",
                "F8_E4M3",
                "F8_E5M2",
                "C64",
                "F4",
                "F32 ",
                "",
                3,
                None,
            ]
        )
        width = {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F16": 2, "BF16": 2, "I16": 2, "F32": 4, "I32": 4}.get(new, 1)
        tensors[name] = [new, shape, (data * 2)[: width * len(data) // 4] if rng.random() < 0.8 else data]
    elif kind == "shape":
        sizes = [
            [],
            [0],
            [-1],
            [1, *axes],
            [*axes, 1],
            axes[::-1],
            [len(data) // 4],
            [2**31, 2**31, 2**31],
            [2**64],
            [10**30],
            None,
            ["2", 2],
            [2.0],
            {},
        ]
        tensors[name] = [dtype, rng.choice(sizes), data]
    elif kind == "values":
        fill = rng.choice(
            [b"\xff\xff\xff\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f", b"\1\0\0\0", b"\0\0\0\0", b"\0\0\0\x80"]
        )
        tensors[name] = [dtype, shape, fill * (len(data) // 4) if rng.random() < 0.5 else data[:-4] + fill]
    elif kind == "negative":  # a variance below zero, for one; numbers in F32
        tensors[name] = [
            dtype,
            shape,
            b"".join(data[i : i + 3] + bytes([data[i + 3] | 0x80]) for i in range(0, len(data) - 3, 4)),
        ]
    elif kind == "both ranks":  # that fit each other, and not the config
        for key, (dtype, shape, _) in tensors.items():
            tensors[key] = [dtype, [1] * (len(shape) if isinstance(shape, list) else 1), b"\0\0\0\0"]
    elif kind == "many":
        tensors.update(
            {f"{name}.{index}": ["F32", [1], b"\0" * 4] for index in range(rng.choice([100, 2000, 60_000]))}
        )
    else:
        other = rng.choice(sorted(tensors))
        tensors[name], tensors[other] = tensors[other], tensors[name]
    return f"tensor {kind}: {name}"


def written(tensors: dict[str, list], rng: random.Random, hostile: bool) -> bytes:
    """A safetensors file, with a hostile header or not."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(content)]}
        end += len(content)
    data = b"".join(content for _, _, content in tensors.values())
    kind = (
        rng.choice(["offsets", "metadata", "entry", "length", "padding", "text", "tail", "empty", "twice"])
        if hostile
        else ""
    )
    name = rng.choice([*tensors, "__metadata__"])
    if kind == "offsets" and name in tensors:
        header[name]["data_offsets"] = rng.choice(
            [[0, 0], [-1, 4], [4, 0], [0, 2**63], [0, 2**64], [1, 17], [0], None, "0", [0.0, 4.0], [len(data)] * 2]
        )
    elif kind == "metadata":
        header["__metadata__"] = rng.choice(
            [None, [], {"format": 3}, {"format": "tf"}, {"x": rng.choice(TEXTS)}, {"x": "y" * 10**6}, "pt"]
        )
    elif kind == "entry":
        header[name] = value(rng)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    if kind == "padding":
        text += b" " * rng.choice([7, 10**6, 9 << 20])
    elif kind == "text":
        text = rng.choice(
            [
                b"",
                b"{",
                b"[]",
                b"{}",
                b"\xff" * 50,
                b"[" * 10_000,
                b'{"a":' * 5000,
                text[:-1],
                text.replace(b"{", b"[", 1),
                text.replace(b'"F32"', b'"F32","F32"', 1),
            ]
        )
    elif kind == "twice":
        text = text[:-1] + b"," + text[1:]
    length = (
        rng.choice([0, 1, len(text) - 1, len(text) + 1, len(text) + len(data), 2**31, 2**63, 2**64 - 1, 100_000_001])
        if kind == "length"
        else len(text)
    )
    content = length.to_bytes(8, "little") + text + data
    if kind == "tail":
        content = rng.choice([content + b"\0", content[:-1], content + content, content[:8], content[:4]])
    return b"" if kind == "empty" else content


def text_of(config: Any, rng: random.Random, often: bool = False) -> bytes:
    """The JSON of a config, now and then in another form than `json.dumps` writes."""
    text = json.dumps(config)
    kind = rng.randrange(18 if often else 60)
    forms: dict[int, Callable[[], bytes]] = {
        0: lambda: b"\xef\xbb\xbf" + text.encode(),
        1: lambda: text.encode("utf-16"),
        2: lambda: (text + rng.choice(["}", "x", "\0", text])).encode(),
        3: lambda: (text[:-1] + ', "alpha": 3.0, "alpha": 1.5}').encode(),
        4: lambda: (text[:-1] + ', "x": ' + "[" * 50_000 + "]" * 50_000 + "}").encode(),
        5: lambda: (text[:-1] + ', "x": ' + '{"a":' * 900 + "1" + "}" * 901).encode(),
        6: lambda: (" " * 1_000_000 + text).encode(),
        7: lambda: (text[:-1] + ', "x": ' + "9" * 5000 + "}").encode(),
        8: lambda: rng.choice(
            [b"", b"null", b"[]", b"3", b'"LOTRA"', b"{}", b'{"peft_type": "LOTRA"}', b"\xff\xfe", b"{'r': 2}"]
        ),
        9: lambda: (text[:-1] + ', "x": "' + "x" * (9 << 20) + '"}').encode(),
        10: lambda: text.replace('"', "'").encode(),
        11: lambda: (text[:-1] + ', "x": {' + ", ".join(f'"k{i}": {i}' for i in range(50_000)) + "}}").encode(),
    }
    return forms[kind]() if kind in forms else text.encode()


@cache
def _sound(subject: str) -> tuple[str, dict[str, list]]:
    files = sound_files(subject, 0)
    length = int.from_bytes(files[WEIGHTS][:8], "little")
    header, data = json.loads(files[WEIGHTS][8 : 8 + length]), files[WEIGHTS][8 + length :]
    header.pop("__metadata__")
    tensors = {name: [it["dtype"], it["shape"], data[slice(*it["data_offsets"])]] for name, it in header.items()}
    return files[CONFIG].decode(), tensors


# the ninefold of each of nine entries, nine times
BOMB = "a: &a [x]\n" + "".join(f"{y}: &{y} [{', '.join([f'*{x}'] * 9)}]\n" for x, y in pairwise("abcdefghi"))
FRONT = [
    "[1", "a: &a [*a]", "tags: 3\nbase_model: [1]", "- x", "x: !!python/object/apply:os.system ['id']", "tags: [[a]]",
    "model-index: 3", "model-index:\n- name: x\n  results: [{}]", f"license: {'x' * 10**6}", "metrics: {a: 1}", BOMB,
    "a: 1\n---\n{}\n---", "datasets: {}", "? [a]\n: b", "a: 2001-01-01", "pipeline_tag: [x]", "library_name: 3",
]  # fmt: skip


def beside(rng: random.Random, subject: str, config: dict[str, Any], files: dict[str, Any]) -> str:
    """A further file in the folder, of one that loading or writing a card looks for."""
    name = rng.choice(
        [PENDING, PENDING, PENDING, "README.md", "README.md", "adapter_model.bin", ".saving", "existing", "other"]
    )
    content = rng.choice(["/", "|", "nowhere", name, "/dev/null"])
    if name == PENDING:
        if rng.random() < 0.9:
            content = text_of({**config, "integrity": None}, rng, often=True)
        if rng.random() < 0.9:  # whose digest is that of other tensors, as after a killed save
            files[CONFIG] = sound_files(subject, 1)[CONFIG]
    elif name == "README.md" and rng.random() < 0.8:
        text = (
            rng.choice(["", "\ufeff"])
            + f"---\n{rng.choice(FRONT)}\n---\n" * rng.choice([0, 1, 1, 1])
            + rng.choice(["", "# [x]", "```python\n" + CALL, "### Framework versions\n", *TEXTS])
        )
        content = text.encode("utf-8", "surrogatepass")
    elif name == "adapter_model.bin" and rng.random() < 0.8:
        content = b"cos\nsystem\n(S'touch pwned'\ntR."
        if rng.random() < 0.5:
            del files[WEIGHTS]
    files[name] = content
    return f"beside: {name}"


def generate(rng: random.Random) -> Case:
    subject = rng.choice(list(SUBJECTS))
    text, tensors = _sound(subject)
    config, tensors = json.loads(text), dict(tensors)
    if rng.random() < 0.95:
        config["integrity"] = None
    if rng.random() < 0.7:
        config["base_digest"] = None
    if rng.random() < 0.3:
        config["base_layers"] = None
    kinds = []
    for _ in range(rng.choice([1, 1, 1, 2, 2, 3, 4])):
        rule = rng.choice([of_config, of_config, of_tensors])
        if tensors:
            kinds.append(rule(rng, config, tensors))
    hostile = rng.random() < 0.15
    kinds += ["header"] * hostile
    files: dict[str, Any] = {CONFIG: text_of(config, rng), WEIGHTS: written(tensors, rng, hostile)}
    if rng.random() < 0.03:
        name = rng.choice([CONFIG, WEIGHTS])
        files[name] = rng.choice(["/", "|", "nowhere", name, "/dev/zero", "/dev/null"])
        kinds.append(f"{name} is {files[name]}")
    if rng.random() < 0.1:
        kinds.append(beside(rng, subject, config, files))
    return Case(kinds, files, None, subject)


PATTERNED = {
    "target_modules": lambda pattern: pattern,
    "exclude_modules": lambda pattern: [pattern],
    "layers_pattern": lambda pattern: [pattern],
    "rank_pattern": lambda pattern: {pattern: 2},
    "alpha_pattern": lambda pattern: {pattern: 1.5},
    "modules_to_save": lambda pattern: [pattern, "head"],
}


def generate_pattern(rng: random.Random) -> Case:
    """A sound adapter with a generated pattern in one field."""
    subject = rng.choice(list(SUBJECTS))
    text, tensors = _sound(subject)
    field, config = rng.choice(sorted(PATTERNED)), {**json.loads(text), "integrity": None}
    config[field] = PATTERNED[field](pattern(rng))
    if field == "layers_pattern":
        config.update(layers_to_transform=[0, 1], target_modules=None)
    files = {CONFIG: json.dumps(config).encode(), WEIGHTS: written(tensors, rng, False)}
    return Case([f"pattern in {field}"], files, None, subject)


if __name__ == "__main__":
    if "--patterns" in sys.argv:
        sys.argv.remove("--patterns")
        main("Generated patterns, none of which may take 50 ms through any door.", generate_pattern, limit=0.05)
    else:
        main(__doc__.splitlines()[0], generate)
