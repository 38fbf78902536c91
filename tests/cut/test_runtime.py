"""The tail's runtime: the same numbers whole and paged, and nothing but what its file may say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from cenacle.cut.onnx_model import OnnxModel
from cenacle.cut.onnx_runtime import Session, onnxruntime
from cenacle.cut.runtime import TailRuntime, check_inputs
from cenacle.cut.specs import TensorSpec
from cenacle.cut.tail_file import write_tail
from cenacle.errors import DataError, EnclaveError, InputError

Feeds = dict[str, Any]


def _plain(model: OnnxModel, feeds: Feeds) -> list[Any]:
    """What ONNX Runtime says of the same model, without optimizations or anything of ours."""
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        model.proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return list(session.run([spec.name for spec in model.outputs], feeds))


def _close(found: dict[str, Any], expected: list[Any]) -> None:
    for array, wanted in zip(found.values(), expected, strict=True):
        scale = max(1e-6, float(np.abs(wanted).max()))
        assert array.dtype == wanted.dtype
        assert float(np.abs(array - wanted).max()) <= 1e-5 * scale


def _least(reader: Any) -> int:
    """The smallest limit that is enough, from the words of the refusal of a smaller one."""
    with pytest.raises(InputError, match="too small for the tail's largest") as caught:
        TailRuntime(reader, memory_limit=1)
    least = int(str(caught.value.expected).split()[-1])
    with pytest.raises(InputError):
        TailRuntime(reader, memory_limit=least - 1)
    return least


def test_whole_and_paged_compute_what_the_model_does(
    tail: tuple[OnnxModel, Feeds], sealed: Any
) -> None:
    model, feeds = tail
    expected = _plain(model, feeds)
    sealed.write(model)
    with sealed.open() as reader:
        with TailRuntime(reader, threads=1) as whole:
            assert not whole.paged
            assert (whole.inputs, whole.outputs) == (model.inputs, model.outputs)
            assert list(whole.run(feeds)) == [spec.name for spec in model.outputs]
            _close(whole.run(feeds), expected)
        least = _least(reader)
        for limit in (least, 2 * least, 3 * least):
            with TailRuntime(reader, memory_limit=limit, threads=1) as paged:
                for _ in range(3):
                    _close(paged.run(feeds), expected)


def test_a_batch_of_any_size_and_rows_that_do_not_depend_on_each_other(
    dense: tuple[OnnxModel, Feeds], sealed: Any
) -> None:
    model, feeds = dense
    sealed.write(model)
    with sealed.open() as reader, TailRuntime(reader, memory_limit=9000, threads=1) as paged:
        assert paged.paged
        together = paged.run(feeds)["y"]
        for row in range(3):
            alone = paged.run({"x": feeds["x"][row : row + 1]})
            _close(alone, [together[row : row + 1]])


def test_several_threads_at_once(dense: tuple[OnnxModel, Feeds], sealed: Any) -> None:
    model, feeds = dense
    sealed.write(model)
    for limit in (None, 9000):
        with sealed.open() as reader, TailRuntime(reader, memory_limit=limit, threads=1) as tail:
            expected = tail.run(feeds)["y"]
            with ThreadPoolExecutor(4) as threads:
                found = list(threads.map(lambda _: tail.run(feeds)["y"], range(20)))
            for array in found:
                np.testing.assert_array_equal(array, expected)


SPECS = (
    TensorSpec("x", "F32", (None, 4)),
    TensorSpec("mask", "BOOL", (None, 2)),
    TensorSpec("scale", "F32", ()),
)
GOOD = {
    "x": np.zeros((2, 4), np.float32),
    "mask": np.zeros((2, 2), np.bool_),
    "scale": np.zeros((), np.float32),
}
BAD: list[tuple[str, Feeds, str]] = [
    ("missing", {"x": None}, "missing"),
    ("too-many", {"y": np.zeros(1, np.float32)}, "too many"),
    ("type", {"x": np.zeros((2, 4), np.float64)}, "another type"),
    ("byte-order", {"x": np.zeros((2, 4), ">f4")}, "another type"),
    ("size", {"x": np.zeros((2, 5), np.float32)}, "another type or shape"),
    ("axes", {"x": np.zeros((2, 4, 1), np.float32)}, "another type or shape"),
    ("scalar", {"scale": np.zeros(1, np.float32)}, "another type or shape"),
    ("rows", {"x": np.zeros((3, 4), np.float32)}, "one batch"),
    (
        "no-rows",
        {"x": np.zeros((0, 4), np.float32), "mask": np.zeros((0, 2), np.bool_)},
        "one batch",
    ),
    ("truth", {"mask": np.full((2, 2), 2, np.uint8).view(np.bool_)}, "neither 0 nor 1"),
    ("objects", {"x": np.full((2, 4), None)}, "another type"),
]


@pytest.mark.parametrize(("change", "words"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_inputs_that_do_not_fit_are_refused(change: Feeds, words: str) -> None:
    inputs = {name: array for name, array in {**GOOD, **change}.items() if array is not None}
    assert check_inputs(SPECS, GOOD) == 2
    with pytest.raises(DataError, match=words):
        check_inputs(SPECS, inputs)


def test_an_operator_that_fails_says_nothing_of_the_input(sealed: Any, builder: Any) -> None:
    """ONNX Runtime's own words quote the index that is out of range."""
    x = builder.input("ids", np.array([[1]], np.int64))
    builder.node("Gather", [builder.weight("table", 8, 4), x], "h")
    builder.node("Squeeze", ["h", builder.constant("axis", [1])], "y")
    sealed.write(builder.model(("y", ["batch", 4])), segment_bytes=1 << 20)
    with sealed.open() as reader, TailRuntime(reader, threads=1) as tail:
        with pytest.raises(EnclaveError) as caught:
            tail.run({"ids": np.array([[424242]], np.int64)})
        assert "424242" not in json.dumps(caught.value.to_dict())
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__
        assert tail.run({"ids": np.array([[1]], np.int64)})["y"].shape == (1, 4)


def test_an_output_that_is_not_what_the_manifest_says(sealed: Any, builder: Any) -> None:
    x = builder.input("x", np.ones((2, 6), np.float32))
    builder.node("Mul", [x, builder.weight("w", 6)], "h")
    builder.node("ReduceMean", ["h", builder.constant("axis", [0])], "y", keepdims=1)
    sealed.write(builder.model(("y", ["batch", 6])))
    with (
        sealed.open() as reader,
        TailRuntime(reader, threads=1) as tail,
        pytest.raises(EnclaveError, match="not what its manifest says"),
    ):
        tail.run({"x": np.ones((2, 6), np.float32)})


def test_a_closed_runtime_computes_no_more(dense: tuple[OnnxModel, Feeds], sealed: Any) -> None:
    model, feeds = dense
    sealed.write(model)
    for limit in (None, 9000):
        with sealed.open() as reader:
            tail = TailRuntime(reader, memory_limit=limit, threads=1)
            tail.close()
            tail.close()
            with pytest.raises(EnclaveError, match="closed"):
                tail.run(feeds)


@pytest.mark.parametrize("limit", [0, -1, 1000])
def test_a_limit_without_room_is_refused(
    dense: tuple[OnnxModel, Feeds], sealed: Any, limit: int
) -> None:
    sealed.write(dense[0])
    with sealed.open() as reader, pytest.raises(InputError, match="memory limit"):
        TailRuntime(reader, memory_limit=limit)


def _opened(paths: list[Path], action: Callable[[], object]) -> list[str]:
    """Which of these files were opened meanwhile, by anybody (inotify)."""
    import ctypes  # noqa: PLC0415

    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(os.O_NONBLOCK)
    assert fd >= 0
    try:
        watches = {libc.inotify_add_watch(fd, os.fsencode(p), 0x20): p.name for p in paths}
        action()
        try:
            raw = os.read(fd, 1 << 16)
        except BlockingIOError:
            return []
        found = []
        while raw:
            watch, length = int.from_bytes(raw[:4], "little"), int.from_bytes(raw[12:16], "little")
            found.append(watches[watch])
            raw = raw[16 + length :]
        return found
    finally:
        os.close(fd)


def test_no_file_is_opened_though_the_graph_names_one(
    dense: tuple[OnnxModel, Feeds],
    sealed: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The file that external weights are said to lie in exists here, with other values."""
    model, feeds = dense
    sealed.write(model)
    decoy = tmp_path / "cenacle.tail"
    decoy.write_bytes(bytes(1 << 16))
    monkeypatch.chdir(tmp_path)
    assert _opened([decoy], decoy.read_bytes) == ["cenacle.tail"]

    def compute() -> None:
        with sealed.open() as reader, TailRuntime(reader, threads=1) as tail:
            _close(tail.run(feeds), _plain(model, feeds))

    assert _opened([decoy], compute) == []


def test_onnx_runtime_refuses_what_it_cannot_compute_in_our_words() -> None:
    graph = helper.make_graph(
        [helper.make_node("NoSuchOperator", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    with pytest.raises(EnclaveError, match="does not take the model") as caught:
        Session(helper.make_model(graph).SerializeToString())
    assert "NoSuchOperator" not in caught.value.diagnostics()


_LEAN = """
import json, os, sys
from pathlib import Path
from cenacle.crypto import SecretBytes
from cenacle.cut.runtime import TailRuntime
from cenacle.sealing import TensorReader
import numpy as np
os.environ["HOME"] = sys.argv[1]
key = SecretBytes(bytes.fromhex(sys.argv[2]))
with TensorReader(Path(sys.argv[3]), key) as reader, TailRuntime(reader, threads=2) as tail:
    tail.run({"x": np.ones((1, 24), np.float32)})
heavy = sorted({"onnx", "torch", "google.protobuf", "keras"} & set(sys.modules))
print(json.dumps({"heavy": heavy, "tasks": len(os.listdir("/proc/self/task")),
                  "home": os.listdir(sys.argv[1])}))
"""


def test_the_enclave_needs_neither_onnx_nor_torch_and_sends_no_telemetry(
    dense: tuple[OnnxModel, Feeds], sealed: Any, tmp_path: Path
) -> None:
    """With telemetry, the import leaves an identifier in the user's folder and a thread."""
    sealed.write(dense[0])
    home = tmp_path / "home"
    home.mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    environment.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", XDG_CACHE_HOME=str(home))
    done = subprocess.run(
        [sys.executable, "-c", _LEAN, str(home), bytes(sealed.key.view()).hex(), str(sealed.path)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["heavy"] == []
    assert found["home"] == []
    assert done.stderr == ""


def test_nothing_else_imports_onnx_runtime() -> None:
    """Its import starts telemetry unless :func:`onnxruntime` prevents it."""
    root = Path(__file__).parents[2]
    odd = []
    for folder in ("src", "examples", "benchmarks"):
        for path in sorted((root / folder).rglob("*.py")):
            lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
            if any(line.startswith(("import onnxruntime", "from onnxruntime")) for line in lines):
                odd.append(str(path.relative_to(root)))
    assert odd == []


def test_equal_inputs_give_equal_outputs(tail: tuple[OnnxModel, Feeds], sealed: Any) -> None:
    model, feeds = tail
    sealed.write(model, segment_bytes=1 << 12)
    found = []
    for _ in range(2):
        with sealed.open() as reader, TailRuntime(reader, threads=2) as one:
            found.append(one.run(feeds))
    for first, second in zip(found[0].values(), found[1].values(), strict=True):
        np.testing.assert_array_equal(first, second)


def test_a_segment_size_that_is_too_small_is_refused(
    dense: tuple[OnnxModel, Feeds], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="too small"):
        write_tail(dense[0], tmp_path / "tail", segment_bytes=100)
    assert list(tmp_path.iterdir()) == []
