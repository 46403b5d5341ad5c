# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The data sets of examples/studies/slim_images.py, on small ones in the same formats."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parents[2] / "examples" / "studies" / "slim_images.py"
    spec = importlib.util.spec_from_file_location("slim_images", path)
    module = importlib.util.module_from_spec(spec)
    threads = torch.get_num_threads()
    import sys

    sys.modules["slim_images"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    torch.set_num_threads(threads)
    return module


def idx(array):
    return b"\x00\x00\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def images(count, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 4, 4), dtype=np.uint8), rng.integers(0, 3, count, dtype=np.uint8)


def test_idx_files(example, tmp_path):
    x, y = images(10)
    (tmp_path / "images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(x)))
    (tmp_path / "labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(y)))
    data = example.load_idx(tmp_path)
    assert data.x.shape == (8, 16) and data.x_test.shape == (2, 16)
    assert data.x.min() >= -1 and data.x.max() <= 1
    np.testing.assert_allclose(data.x_test, x[8:].reshape(2, 16) / 127.5 - 1, atol=1e-6)
    assert data.y_test.tolist() == y[8:].tolist()


def test_idx_files_in_two_parts(example, tmp_path):
    for part, count in (("train", 6), ("t10k", 3)):
        x, y = images(count)
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(x))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(y))
    data = example.load_idx(tmp_path)
    assert len(data.x) == len(data.y) == 6 and len(data.x_test) == len(data.y_test) == 3


def test_idx_errors(example, tmp_path):
    with pytest.raises(FileNotFoundError, match="No `\\*images-idx3-ubyte`"):
        example.load_idx(tmp_path)
    (tmp_path / "images-idx3-ubyte").write_bytes(b"PNG and more")
    with pytest.raises(ValueError, match="is no IDX file of bytes"):
        example.load_idx(tmp_path)


@pytest.mark.parametrize("column", ["image", "img"])
@pytest.mark.parametrize("colours", [0, 3])
def test_hub_format(example, tmp_path, column, colours):
    """A folder with the columns that mnist, fashion_mnist (grey, `image`) and cifar10 (colours, `img`) have."""
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    for split, count in (("train", 5), ("test", 2)):
        x, y = images(count)
        pictures = [Image.fromarray(np.stack([p] * colours, -1) if colours else p) for p in x]
        features = datasets.Features({column: datasets.Image(), "label": datasets.ClassLabel(num_classes=3)})
        data = datasets.Dataset.from_dict({column: pictures, "label": y.tolist()}, features=features)
        data.to_parquet(tmp_path / f"{split}.parquet")
    data = example.load_hub(str(tmp_path))
    assert data.x.shape == (5, 16 * max(colours, 1)) and data.x_test.shape[0] == 2
    assert data.y.tolist() == images(5)[1].tolist()


def test_peers_have_about_as_many_parameters(example):
    for make in (example.mlp, example.narrow_kan):
        assert 0.85 < example.count(make(64, 10, 5000)) / 5000 < 1.15
