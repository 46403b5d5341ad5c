# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A drawn digit, as a new scanner sees it, and what two networks read.

The networks are those of examples/quickstart.py: the base was trained on
upright digits, the adapter on 200 scans that are rotated and noisy.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from PIL import Image, ImageOps
from safetensors.torch import load_file
from scipy.ndimage import rotate

from peft_lotra.kan import KAN


FOLDER = Path(__file__).parent / "digits"


def load() -> PeftModel:
    base = KAN([64, 32, 10])
    base.load_state_dict(load_file(FOLDER / "base.safetensors"))
    return PeftModel.from_pretrained(base, FOLDER / "adapter").eval()


def scan(ink: np.ndarray) -> np.ndarray:
    """Return the scan (8, 8), 0 to 16, of a drawing (height, width), 0 to 1.

    As in scikit-learn's digits, the digit is as high as a bitmap of 32 x 32,
    and each pixel counts the black ones of 4 x 4. The scanner then rotates by
    30 degrees, and adds noise.
    """
    drawing = Image.fromarray((255 * ink).astype(np.uint8))
    bitmap = ImageOps.pad(drawing.crop(drawing.getbbox()), (32, 32))
    counts = (np.asarray(bitmap) > 127).reshape(8, 4, 8, 4).sum((1, 3))
    turned = rotate(counts.astype(float), 30, reshape=False, order=1)
    noise = np.random.default_rng(0).normal(0, 2, (8, 8))
    return (turned + noise).clip(0, 16)


@torch.no_grad()
def read(model: PeftModel, image: np.ndarray) -> list[dict[str, float]]:
    """Return the probabilities of the digits, by the base and adapted."""
    x = torch.tensor(image / 8 - 1).float().flatten().unsqueeze(0)
    with model.disable_adapter():
        base = model(x)
    outputs = torch.cat([base, model(x)]).softmax(1).tolist()
    return [{str(i): p for i, p in enumerate(row)} for row in outputs]
