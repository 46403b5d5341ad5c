# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

import copy

import pytest
import torch
from helpers import adapt, base, inputs, relative
from stand_ins import LAYER_KINDS


@pytest.fixture(autouse=True)
def eager():
    """Run flashkan without the compiler that its forward pass asks for."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def program(model):
    """Return the graph of a model for any number of rows."""
    rows = torch.export.Dim("rows", min=2, max=1000)
    return torch.export.export(model.eval(), (inputs(6),), dynamic_shapes=({0: rows},), strict=False)


def operations(exported):
    return [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]


def shapes(exported):
    return {name: tensor.shape for name, tensor in exported.state_dict.items()}


def outside():
    """Return another number of rows, some of them off the grid."""
    return torch.cat([inputs(7), torch.tensor([[3.0, -1.5, 1.0], [-1.0, 1e4, 0.0]])])


def onnx_session(model, path):
    """Return the session of onnxruntime that runs the model for any number of rows."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    rows = torch.export.Dim("rows", min=2, max=1000)
    arguments = {"dynamo": True, "dynamic_shapes": ({0: rows},), "input_names": ["x"], "verbose": False}
    torch.onnx.export(model.eval(), (inputs(6),), str(path), **arguments)
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def assert_close(actual, expected):
    """Compare shares of the largest output of each row: the terms of a far point cancel."""
    largest = expected.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(actual / largest, expected / largest, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_an_exported_adapted_model_computes_the_same(kind):
    adapted = adapt(base(kind))

    exported = program(adapted.get_base_model()).module()

    for x in (inputs(6), outside()):
        assert_close(exported(x), adapted(x))


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_an_exported_merged_model_computes_the_same_with_the_operations_of_the_base(kind):
    model = base(kind).eval()
    merged = adapt(copy.deepcopy(model)).merge_and_unload()

    plain, exported = program(model), program(merged)

    assert operations(exported) == operations(plain)
    assert shapes(exported) == shapes(plain)
    for x in (inputs(6), outside()):
        y = merged(x)
        assert_close(exported.module()(x), y)
        assert not torch.allclose(y, model(x), rtol=1e-3)


@pytest.mark.parametrize(
    ("kind", "merge"), [("own", True), ("own", False), ("efficient-kan", True), ("fast-kan", True)]
)
def test_onnx_computes_the_same(kind, merge, tmp_path):
    model = adapt(base(kind))
    model = model.merge_and_unload() if merge else model.get_base_model()

    session = onnx_session(model, tmp_path / "kan.onnx")

    for x in (inputs(6), outside()):
        (y,) = session.run(None, {"x": x.numpy()})
        assert relative(torch.from_numpy(y), model(x).detach()) < 1e-5
