"""Cut at every layer of real architectures: front and tail together are the whole."""

from __future__ import annotations

import pytest

pytest.importorskip("onnxscript", reason="models are brought into ONNX with onnxscript")
pytest.importorskip("transformers", reason="the architectures are those of transformers")

from tests.support.architectures import ARCHITECTURES, check_every_cut, make, relative_error, run

# Side of the pictures, divisor of the widths, and how many different cuts there are.
_NARROW = {
    "vgg16": (32, 16, 36),
    "resnet50": (32, 16, 59),
    "vit": (32, 16, 24),
    "mobilenetv2": (32, 4, 34),
    "efficientnet-lite0": (32, 8, 30),
}
# The others show a chain with branches, a residual network and attention on every day.
LONG = {"vgg16", "mobilenetv2"}
_FULL = {
    "vgg16": 36,
    "resnet50": 158,
    "vit": 124,
    "mobilenetv2": 151,
    "efficientnet-lite0": 142,
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in ARCHITECTURES],
)
def test_every_cut_of_a_narrow_model_is_the_whole(name: str) -> None:
    size, scale, cuts = _NARROW[name]
    model, inputs, expected = make(name, size, scale=scale)
    assert relative_error(run(model, inputs)["output"], expected["output"]) <= 1e-5
    assert check_every_cut(model, inputs, expected, fast=True) >= cuts


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_cut_of_the_published_size_is_the_whole(name: str) -> None:
    """Half a minute of one core for the small ones, four minutes and 3 GB for VGG-16."""
    model, inputs, expected = make(name, 224)
    assert relative_error(run(model, inputs)["output"], expected["output"]) <= 1e-5
    assert check_every_cut(model, inputs, expected) >= _FULL[name]
