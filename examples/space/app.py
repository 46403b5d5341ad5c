# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Burgers' equation at the viscosity of a slider, and a drawn digit.

python examples/space/app.py      # http://127.0.0.1:7860
"""

from __future__ import annotations

import base64
import copy
import io
import time
from collections.abc import Iterator
from pathlib import Path

import digits
import numpy as np
import torch
from burgers import (
    MEMBERS,
    grid,
    network,
    reference,
    residual,
    solution,
    terms_of,
)
from peft import get_peft_model
from PIL import Image
from safetensors.torch import load_file

from peft_lotra import LoTRAConfig, ParametricAdapter
from peft_lotra.least_squares import LevenbergMarquardt


try:
    import gradio as gr
except ModuleNotFoundError:
    raise SystemExit(
        "app.py: error: gradio is not installed: "
        "pip install -r requirements.txt"
    ) from None

FOLDER = Path(__file__).parent / "family"
POINTS = grid(65)  # of the pictures
START = 0.04  # between two members
STEPS = 15  # of the training from the base
LITTLE = 0.9  # of the error; a step that leaves more gains little

# colors by their red, green and blue at equal distances: dark blue over white
# to dark red, and white over red to black
DIVERGING = np.array(
    [(5, 48, 97), (67, 147, 195), (247, 247, 247), (214, 96, 77), (103, 0, 31)]
)
SEQUENTIAL = np.array(
    [(255, 255, 255), (253, 187, 132), (227, 74, 51), (127, 0, 0), (20, 0, 0)]
)

STYLE = """
<style>
.field {display: grid; grid-template-columns: 3em 1fr; gap: 2px 6px}
.field {font-size: 0.85em}
#numbers table {width: 100%; font-size: 0.9em}
#numbers :is(td, th) {word-break: normal; padding: 4px 5px}
.field img {width: 100%; aspect-ratio: 1; display: block}
.field img {border: 1px solid #888}
.field .bar {height: 0.8em; border: 1px solid #888}
.field .ends {display: flex; justify-content: space-between}
.field .up {display: flex; flex-direction: column}
.field .up {justify-content: space-between; text-align: right}
</style>
"""


def load() -> torch.nn.Module:
    """The base of the folder, trained at the viscosity 0.045."""
    base = network()
    base.load_state_dict(load_file(FOLDER / "base.safetensors"))
    return base


base = load()
family = ParametricAdapter.from_pretrained(load(), FOLDER, terms_of)
reader = digits.load()


def picture(
    values: torch.Tensor,
    low: float,
    high: float,
    colors: np.ndarray,
    title: str,
    ends: tuple[str, str, str],
) -> str:
    """HTML of values on a square grid, with axes and a color bar.

    The image is inside of the page, so that nothing is fetched.
    """
    size = round(len(values) ** 0.5)
    levels = ((values.reshape(size, size).numpy() - low) / (high - low)).clip(
        0, 1
    ) * 255
    image = Image.fromarray(levels.astype(np.uint8)).convert("P")
    stops = np.linspace(0, 255, len(colors))
    palette = np.stack(
        [np.interp(np.arange(256), stops, channel) for channel in colors.T],
        axis=1,
    )
    image.putpalette(palette.astype(np.uint8).tobytes())
    stream = io.BytesIO()
    image.save(stream, "png")
    data = base64.b64encode(stream.getvalue()).decode()
    gradient = ", ".join(f"rgb({r},{g},{b})" for r, g, b in colors)
    bar = "".join(f"<span>{end}</span>" for end in ends)
    return (
        f'{STYLE}<div class="field"><b></b><b>{title}</b>'
        '<div class="up"><span>t = 1</span><span>t = 0</span></div>'
        f'<img alt="{title}" src="data:image/png;base64,{data}"><span></span>'
        '<div class="ends"><span>x = -1</span><span>x = 0</span>'
        '<span>x = 1</span></div><span></span><div class="bar" '
        f'style="background: linear-gradient(90deg, {gradient})"></div>'
        f'<span></span><div class="ends">{bar}</div></div>'
    )


def values_of(apply, nu: float) -> tuple[torch.Tensor, float, float]:
    """u on the grid, its relative error, and the residual.

    `apply` calls a function of the model and rows, with a network.
    """
    with torch.no_grad():
        u = apply(solution, POINTS)
        r = apply(residual, POINTS, torch.full_like(POINTS[:, :1], nu))
    exact = reference(POINTS, nu)
    share = ((u - exact).norm() / exact.norm()).item()
    return u, share, r.square().mean().sqrt().item()


def apply_to(model: torch.nn.Module):
    return lambda function, *rows: function(model, *rows)


def row(name: str, share: float, r: float, ms: float) -> str:
    return f"| {name} | {share:.3%} | {r:.0e} | {ms:.0f} |"


def shown(nu: float, u: torch.Tensor, rows: list[str], note: str) -> list:
    """The pictures of the base, of u, of the exact solution and the table."""
    exact = reference(POINTS, nu)
    before, share, r = values_of(apply_to(base), nu)
    error = (u - exact).abs().clamp(min=1e-12).log10()
    ends = ("-1", "0", "1")
    pictures = [
        picture(values, -1, 1, DIVERGING, f"u(x, t), {name}", ends)
        for values, name in (
            (before, "base"),
            (u, "adapted"),
            (exact, "exact"),
        )
    ]
    ends = ("1e-5", "1e-3", "0.1")
    title = "|adapted - exact|"
    pictures.append(picture(error, -5, -1, SEQUENTIAL, title, ends))
    head = f"| viscosity {nu:.4f} | error | residual | ms |\n|---|--:|--:|--:|"
    lines = [head, row("base", share, r, 0), *rows]
    return [*pictures, "\n".join(lines) + f"\n\n{note}"]


def show(nu: float, rows: list[str]) -> list:
    """The rows of the table with one more, the pictures, and the table.

    The first row is predicted; each other has one more step.
    """
    steps, start = len(rows), time.perf_counter()
    prediction = family.refine(nu, steps) if steps else family.predict(nu)
    milliseconds = 1e3 * (time.perf_counter() - start)
    u, share, r = values_of(prediction.apply, nu)
    how = f"{steps} step{'s' * (steps > 1)}" if steps else "interpolated"
    rows = [*rows, row(how, share, r, milliseconds)]
    note = ""
    if steps == 1:
        _, before, _ = values_of(family.predict(nu).apply, nu)
        if share > LITTLE * before:
            note = (
                "This step gains little: an adapter of the family was fitted "
                "at this viscosity, or close to it."
            )
    return [rows, *shown(nu, u, rows, note)]


def train(nu: float) -> Iterator[list]:
    """Train a larger adapter of the base at this viscosity, step by step."""
    config = LoTRAConfig(r=8)
    model = get_peft_model(copy.deepcopy(base), config)
    optimizer = LevenbergMarquardt(model)
    start, losses = time.perf_counter(), []
    for step in range(1, STEPS + 1):
        history = optimizer.fit(terms_of(nu), 1, progress=False)
        losses.append(history[-1].loss)
        milliseconds = 1e3 * (time.perf_counter() - start)
        u, share, r = values_of(apply_to(model), nu)
        rows = [row(f"trained, step {step}", share, r, milliseconds)]
        note = curve(losses)
        yield [[], *shown(nu, u, rows, note)]


def curve(losses: list[float]) -> str:
    """HTML of the logarithms of the losses, from the first one to 1e-7."""
    logs = np.log10(losses)
    heights = 70 * (logs - logs[0]) / (-7 - logs[0])
    points = [
        f"{300 * step / (STEPS - 1):.0f},{height:.0f}"
        for step, height in enumerate(heights)
    ]
    return (
        f"Loss {losses[0]:.0e} to {losses[-1]:.0e}:\n\n"
        '<svg viewBox="-5 0 310 72" style="width: 100%; max-width: 30em">'
        '<path d="M0 0V70H300" fill="none" stroke="#888"/>'
        '<polyline fill="none" stroke="#d6604d" stroke-width="2" '
        f'points="{" ".join(points)}"/></svg>'
    )


def read_digit(drawing: dict) -> list:
    """The scan of a drawing, and the digits that two networks read."""
    ink = drawing["layers"][0][..., 3] / 255
    if not (ink > 0.5).any():
        return [None, None, None]
    image = digits.scan(ink)
    pixels = np.kron(255 - 15.9 * image, np.ones((32, 32)))
    pixels = np.pad(pixels, 48, constant_values=255)  # room for the label
    return [pixels.astype(np.uint8), *digits.read(reader, image)]


def build() -> gr.Blocks:
    rows, *parts = show(START, [])
    with gr.Blocks(title="LoTRA adapters of two networks") as page:
        with gr.Tab("A viscosity"):
            gr.Markdown(
                "Burgers' equation $u_t + u\\,u_x = \\nu\\,u_{xx}$, "
                "$u(x, 0) = -\\sin(\\pi x)$. The base, a Kolmogorov-Arnold "
                "network, solves it at $\\nu = 0.045$. Small adapters of it "
                f"were fitted at {', '.join(map(str, MEMBERS))}. Drag the "
                "slider: in between, the adapter is interpolated, without "
                "training. One step reduces its error.",
                latex_delimiters=[
                    {"left": "$", "right": "$", "display": False}
                ],
            )
            slider = gr.Slider(
                MEMBERS[0],
                MEMBERS[-1],
                value=START,
                step=0.0005,
                label="viscosity",
                elem_id="viscosity",
            )
            with gr.Row():
                button = gr.Button(
                    "One Levenberg-Marquardt step",
                    elem_id="refine",
                    variant="primary",
                )
                training = gr.Button("Train here", elem_id="train")
            table = gr.Markdown(
                parts.pop(), elem_id="numbers", sanitize_html=False
            )
            with gr.Row():
                fields = []
                for field in parts:
                    with gr.Column(min_width=280):  # one below the other
                        fields.append(gr.HTML(field))
            state = gr.State(rows)
        outputs = [state, *fields, table]
        with gr.Tab("Draw a digit"):
            gr.Markdown(
                "Choose the brush, and draw a large digit. A new scanner "
                "rotates it by 30 degrees and adds noise. The base was trained "
                "on upright digits, the adapter, 10 kB, on 200 scans."
            )
            with gr.Row():
                with gr.Column(min_width=340):
                    pad = gr.Sketchpad(
                        canvas_size=(280, 280),
                        fixed_canvas=True,
                        layers=False,
                        brush=gr.Brush(24, colors=["#000000"]),
                        label="your digit",
                        elem_id="pad",
                    )
                with gr.Column(min_width=280):
                    scanned = gr.Image(label="what the scanner sees")
                with gr.Column(min_width=280):
                    names = "the base reads", "the adapter reads"
                    answers = [
                        gr.Label(num_top_classes=3, label=n) for n in names
                    ]
            pad.change(
                read_digit,
                pad,
                [scanned, *answers],
                show_progress="hidden",
                trigger_mode="always_last",
            )
        # without a queue an answer is one request; of many moves of the slider
        # the last one counts
        moved = {
            "queue": False,
            "show_progress": "hidden",
            "trigger_mode": "always_last",
        }
        slider.input(lambda nu: show(nu, []), slider, outputs, **moved)
        button.click(show, [slider, state], outputs, show_progress="minimal")
        training.click(train, slider, outputs, show_progress="hidden")
    return page


if __name__ == "__main__":
    torch.set_num_threads(2)
    build().launch()
