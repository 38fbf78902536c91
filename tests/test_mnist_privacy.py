"""The example of private digits: its features, its ledger, its figure, and what it promises."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="training needs torch (pip: cenacle[train])")
pytest.importorskip("dp_accounting", reason="accounting needs dp-accounting (cenacle[privacy])")

import torch

from cenacle.accounting import epsilon
from cenacle.documents.privacy import PrivacyEvent
from examples import mnist_privacy
from examples.mnist_privacy import Ledger, OverBudgetError
from examples.mnist_privacy_features import CHANNELS, Scattering
from examples.mnist_privacy_plot import Bar, Point, write_plot

VECTORS = Path(__file__).parent / "vectors" / "scattering" / "kymatio.json"
DELTA = 1e-5
LAST = "t10k-labels-idx1-ubyte"


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(7))


# ------------------------------------------------------------------ features


@pytest.mark.parametrize("case", [0, 1], ids=["28x28", "16x24"])
def test_features_equal_those_of_kymatio(case: int) -> None:
    known = json.loads(VECTORS.read_text("utf-8"))["pictures"][case]
    i, j = torch.arange(known["height"])[:, None], torch.arange(known["width"])[None]
    (found,) = Scattering(known["height"], known["width"])(
        (((7 * i * i + 3 * j + i * j) % 17) / 16)[None]
    )
    assert found.shape == (CHANNELS, known["height"] // 4, known["width"] // 4)
    for name, part in (
        ("first", found[:, 0, 0]),
        ("last", found[:, -1, -2]),
        ("mean", found.double().mean((1, 2))),
    ):
        np.testing.assert_allclose(part.numpy(), known[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_features_of_a_picture_depend_on_it_alone() -> None:
    """What makes them free of privacy cost."""
    pictures = noise(5, 16, 16)
    transform = Scattering(16, 16)
    together = transform(pictures)
    for picture, found in zip(pictures, together, strict=True):
        torch.testing.assert_close(transform(picture[None])[0], found, rtol=1e-5, atol=1e-6)


def test_wavelets_see_no_brightness() -> None:
    (found,) = Scattering(16, 20)(torch.full((1, 16, 20), 0.7))
    torch.testing.assert_close(found[0], torch.full((4, 5), 0.7), rtol=1e-5, atol=0)
    assert found[1:].abs().max() < 1e-5


def test_contrast_scales_features() -> None:
    pictures = noise(2, 16, 16)
    transform = Scattering(16, 16)
    torch.testing.assert_close(transform(3 * pictures), 3 * transform(pictures))


def test_a_shift_by_four_moves_features_by_one() -> None:
    picture = torch.zeros(1, 64, 64)
    picture[:, 28:34, 27:35] = noise(1, 6, 8)
    transform = Scattering(64, 64)
    there, here = transform(picture.roll((4, -4), (1, 2))), transform(picture)
    torch.testing.assert_close(there, here.roll((1, -1), (2, 3)), rtol=1e-4, atol=1e-5)


def test_a_quarter_turn_moves_angles_by_half() -> None:
    picture = torch.zeros(1, 32, 32)
    picture[0, 16, 16] = 1
    picture[0, 16, 18] = 0.5
    transform = Scattering(32, 32)
    here = transform(picture)[0].sum((1, 2))
    turned = transform(picture.rot90(1, (1, 2)))[0].sum((1, 2))
    for begin in (1, 9):
        np.testing.assert_allclose(
            turned[begin : begin + 8].roll(4).numpy(), here[begin : begin + 8].numpy(), rtol=0.05
        )


@pytest.mark.parametrize(("height", "width"), [(28, 30), (4, 28), (0, 0)])
def test_sizes_that_do_not_divide_are_refused(height: int, width: int) -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        Scattering(height, width)


# ------------------------------------------------------------------ the ledger


def event(steps: int = 100) -> PrivacyEvent:
    return PrivacyEvent(noise_multiplier=8.0, sampling_probability=0.1, steps=steps)


def test_a_ledger_charges_plans_and_refuses_beyond_its_budget() -> None:
    one, two = epsilon([event()], DELTA), epsilon([event(200)], DELTA)
    ledger = Ledger((two + epsilon([event(300)], DELTA)) / 2, DELTA)
    assert ledger.reserve("a", event()).together == pytest.approx(one)
    assert ledger.reserve("b", event()).together == pytest.approx(two)
    with pytest.raises(OverBudgetError) as caught:
        ledger.reserve("c", event())
    assert f"{two:.3f} without" in str(caught.value)
    assert caught.value.together == pytest.approx(epsilon([event(300)], DELTA))
    (fitting, *_) = (caught.value.remedy or "").split()
    assert 0 < int(fitting) < 100
    assert [entry.model for entry in ledger.entries] == ["a", "b"]  # a refusal costs nothing
    assert ledger.reserve("d", event(int(fitting))).together <= ledger.budget


def test_a_budget_may_be_spent_to_the_last() -> None:
    ledger = Ledger(epsilon([event()], DELTA), DELTA)
    ledger.reserve("a", event())
    with pytest.raises(OverBudgetError, match="0 of its 1 steps would fit"):
        ledger.reserve("b", event(1))


def test_a_model_pays_its_plan_until_what_it_did_is_known() -> None:
    ledger = Ledger(10.0, DELTA)
    entry = ledger.reserve("a", event())
    assert ledger.events == [event()]
    ledger.settle(entry, (event(30),))
    assert ledger.events == [event(30)]
    assert entry.together == pytest.approx(epsilon([event(30)], DELTA))


# ------------------------------------------------------------------ the figure


def drawn(path: Path, points: list[Point], bars: list[Bar], data: str = "digits") -> ET.Element:
    write_plot(path, points, bars, budget=2.0, delta=DELTA, data=data)
    return ET.parse(path).getroot()


def classes(root: ET.Element, tag: str) -> list[str]:
    return [each.get("class", "") for each in root.iter(f"{{http://www.w3.org/2000/svg}}{tag}")]


def test_the_figure_has_every_point_and_every_entry(tmp_path: Path) -> None:
    points = [Point(1.0, 0.97, "ours"), Point(0.5, 0.95, "ours"), Point(1.0, 0.96, "<theirs>")]
    bars = [Bar("a", 1.0, refused=False), Bar("b", 1.9, refused=False), Bar("c", 2.4, refused=True)]
    root = drawn(tmp_path / "x.svg", points, bars, "digits & more")
    circles = classes(root, "circle")
    assert circles.count("own") == 2 + 1  # and the legend's
    assert circles.count("first") == 1 + 1
    assert classes(root, "rect").count("added") == 2
    assert classes(root, "rect").count("over") == 1
    said = "".join(root.itertext())
    for text in ("97.00%", "95.00%", "<theirs>", "digits & more", "2.40 refused", "budget 2"):
        assert text in said
    assert list(tmp_path.iterdir()) == [tmp_path / "x.svg"]


@pytest.mark.parametrize(
    ("points", "bars"),
    [
        ([], []),
        ([], [Bar("a", 9.0, refused=True)]),
        ([Point(1.0, 0.5, "ours")], [Bar("a", 1.0, refused=False)]),
        ([Point(1.0, 1.0, "ours"), Point(3.0, 1.0, "ours")], [Bar("a", 2.0, refused=False)]),
        ([Point(0.001, 0.1, "ours"), Point(900.0, 0.9, "ours")], []),
    ],
    ids=["nothing", "refused alone", "one", "equal", "far apart"],
)
def test_figures_stay_within_their_frame(
    tmp_path: Path, points: list[Point], bars: list[Bar]
) -> None:
    root = drawn(tmp_path / "x.svg", points, bars)
    _, _, width, height = map(float, root.get("viewBox", "").split())
    for each in root.iter():
        for name, most in (
            ("x", width),
            ("cx", width),
            ("x2", width),
            ("y", height),
            ("cy", height),
        ):
            assert 0 <= float(each.get(name, 0)) <= most
        for name in ("width", "height"):
            assert float((each.get(name) or "0").rstrip("%")) >= 0


def test_a_figure_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "x.svg").mkdir()
    with pytest.raises(OSError, match="directory"):
        drawn(tmp_path / "x.svg", [], [])
    assert list(tmp_path.iterdir()) == [tmp_path / "x.svg"]


# ------------------------------------------------------------------ the program


@pytest.mark.slow
def test_the_program_trains_charges_and_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CENACLE_DATA", raising=False)
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn (pip: cenacle[demo])")
    plot = tmp_path / "x.svg"
    arguments = ["--epsilon", "1", "--budget", "1.1", "--steps", "300"]
    assert mnist_privacy.main([*arguments, "--json", "--plot", str(plot)]) == 0
    figures = json.loads(capsys.readouterr().out)
    (model,), (entry,), (refused,) = (figures[name] for name in ("models", "ledger", "refused"))
    assert model["accuracy"] > 0.4  # of ten digits; 1,500 small pictures are few
    assert model["epsilon"] <= 1
    assert "Poisson sampling" in model["guarantee"]
    (released,) = [PrivacyEvent.model_validate(each) for each in entry["events"]]
    assert released.steps == 300
    assert epsilon([released], DELTA) == pytest.approx(entry["together"], abs=1e-3)
    assert refused["together"] > 1.1 >= entry["together"]
    assert "would fit" in refused["remedy"]
    assert classes(ET.parse(plot).getroot(), "rect").count("over") == 1
    mnist_privacy.show(figures)
    shown = capsys.readouterr().out
    assert "No MNIST files were named" in shown
    assert "refused: the budget does not allow for epsilon 1 again" in shown


def write_idx(folder: Path, name: str, array: np.ndarray[Any, Any]) -> None:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    head = bytes([0, 0, 8, array.ndim]) + sizes
    (folder / f"{name}-idx{array.ndim}-ubyte").write_bytes(head + array.tobytes())


def write_digits(folder: Path, shape: tuple[int, ...] = (6, 28, 28), labels: int = 6) -> Path:
    for part in ("train", "t10k"):
        write_idx(folder, f"{part}-images", np.full(shape, 9, dtype=np.uint8))
        write_idx(folder, f"{part}-labels", np.arange(labels, dtype=np.uint8))
    return folder


def test_mnist_is_found_by_name_or_by_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mnist").mkdir()
    write_digits(tmp_path / "mnist")
    monkeypatch.setenv("CENACLE_DATA", str(tmp_path))
    for found in (mnist_privacy.load(None), mnist_privacy.load(tmp_path / "mnist")):
        assert found.source == "MNIST"
        assert found.pictures.shape == found.test_pictures.shape == (6, 28, 28)
        assert found.labels.tolist() == list(range(6))


@pytest.mark.parametrize(
    ("prepare", "sentence"),
    [
        (lambda folder: folder.rmdir(), "there is no such folder"),
        (lambda folder: None, "train-images-idx3-ubyte.gz and train-labels-idx1-ubyte.gz and"),
        (lambda folder: (write_digits(folder) / LAST).unlink(),
         "expected t10k-labels-idx1-ubyte.gz, or unpacked"),
        (lambda folder: write_digits(folder, labels=5), "do not fit together"),
        (lambda folder: write_digits(folder, (11, 28, 28), labels=11), "from 0 to 9"),
        (lambda folder: write_digits(folder, shape=(6, 27, 28)), "pictures of 28 x 28"),
        (lambda folder: (write_digits(folder) / LAST).write_bytes(b"\0"),
         "an IDX file is malformed"),
    ],
    ids=["no folder", "empty", "one lacks", "few labels", "label 10", "size", "truncated"],
)  # fmt: skip
def test_data_that_cannot_be_used_are_refused_in_a_sentence(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    prepare: Callable[[Path], object],
    sentence: str,
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    prepare(folder)
    assert mnist_privacy.main(["--data", str(folder), "--json"]) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    "arguments",
    [("--plot", "x.png"), ("--plot", "nowhere/x.svg"), ("--steps", "0")],
    ids=["format", "folder", "steps"],
)
def test_options_are_checked_before_the_work(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    assert mnist_privacy.main(arguments) == 2
    assert "cannot be" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "much"])
def test_an_epsilon_is_a_number_above_zero(capsys: pytest.CaptureFixture[str], value: str) -> None:
    with pytest.raises(SystemExit):
        mnist_privacy.main([f"--budget={value}"])
    assert "is not a number above 0" in capsys.readouterr().err


@pytest.mark.slow
def test_mnist_reaches_the_published_accuracy(
    mnist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tramer and Boneh 2021: 98.1 % and 98.7 %; end-to-end training: 96.6 % and 98.1 %."""
    arguments = ["--data", str(mnist), "--epsilon", "1.2", "2.93", "--budget", "3.5"]
    assert mnist_privacy.main([*arguments, "--json", "--plot", str(tmp_path / "x.svg")]) == 0
    figures = json.loads(capsys.readouterr().out)
    low, high = figures["models"]
    assert math.isclose(low["epsilon"], 1.2, abs_tol=0.01)
    assert math.isclose(high["epsilon"], 2.93, abs_tol=0.01)
    assert low["epsilon"] <= 1.2
    assert high["epsilon"] <= 2.93
    assert low["accuracy"] >= 0.975
    assert high["accuracy"] >= 0.984
    assert figures["ledger"][-1]["together"] <= 3.5
    assert figures["refused"][0]["model"] == "epsilon 2.93 again"
