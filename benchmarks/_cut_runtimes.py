"""What could run a tail in the enclave: each in a process of its own that answers to its parent.

``python -m benchmarks._cut_runtimes KIND FILE KEY THREADS SHAPE`` is such a process. Its lines are
JSON; it reads a number of rows a line and answers with the seconds that they took.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

__all__ = ["KINDS", "compare", "trusted"]

KINDS: Final = ("onnxruntime", "aoti", "torch")
_KEY: Final = bytes(range(32))  # of this measurement alone
_BATCHES: Final = (1, 8)


# ------------------------------------------------------------------------------- in the process


def _loaded() -> dict[str, Any]:
    """What code this process has loaded: libraries that are mapped, and Python files."""
    mapped = {
        line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()
    }
    libraries = [Path(name) for name in mapped if ".so" in name and Path(name).exists()]
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    sources = [Path(n) for n in files if n and n.endswith(".py") and Path(n).exists()]
    sizes = {path: path.stat().st_size for path in (*libraries, *sources)}
    return {
        "libraries": len(libraries),
        "libraries_mb": sum(sizes[path] for path in libraries) / 1e6,
        "python_files": len(sources),
        "python_mb": sum(sizes[path] for path in sources) / 1e6,
        "trusted_mb": sum(sizes.values()) / 1e6,
        "torch_native_mb": sum(
            sizes[path] for path in libraries if "torch" in str(path) and "python" not in path.name
        )
        / 1e6,
    }


def _memory(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024 / 1e6


def _onnxruntime(path: str, threads: int) -> Callable[[Any], Any]:
    from cenacle.crypto import SecretBytes  # noqa: PLC0415 - each process loads only its own
    from cenacle.cut.runtime import TailRuntime  # noqa: PLC0415
    from cenacle.sealing import TensorReader  # noqa: PLC0415

    with TensorReader(Path(path), SecretBytes(_KEY)) as reader:
        tail = TailRuntime(reader, threads=threads)
    name = tail.inputs[0].name
    return lambda x: tail.run({name: x})


def _torch(path: str, threads: int) -> Callable[[Any], Any]:
    import torch  # noqa: PLC0415

    torch.set_num_threads(threads)
    model = torch.export.load(path).module()

    def run(x: Any) -> Any:
        with torch.inference_mode():
            return model(torch.from_numpy(x))

    return run


def _aoti(path: str, threads: int) -> Callable[[Any], Any]:
    import torch  # noqa: PLC0415
    from torch._inductor import aoti_load_package  # noqa: PLC0415

    torch.set_num_threads(threads)
    model = aoti_load_package(path)

    def run(x: Any) -> Any:
        with torch.inference_mode():
            return model(torch.from_numpy(x))

    return run


def _serve(kind: str, path: str, threads: int, shape: tuple[int, ...]) -> None:
    import numpy as np  # noqa: PLC0415

    # Each of them needs what opens the sealed tail.
    from cenacle.sealing import TensorReader  # noqa: F401, PLC0415

    begin = time.perf_counter()
    run = {"onnxruntime": _onnxruntime, "aoti": _aoti, "torch": _torch}[kind](path, threads)
    load = time.perf_counter() - begin
    inputs = {
        rows: np.random.default_rng(rows).normal(size=(rows, *shape)).astype(np.float32)
        for rows in _BATCHES
    }
    for _ in range(3):
        for values in inputs.values():
            run(values)
    told = {"load_s": load, "rss_mb": _memory("VmRSS"), "peak_mb": _memory("VmHWM"), **_loaded()}
    print(json.dumps(told), flush=True)
    for line in sys.stdin:
        begin, worked = time.perf_counter(), time.process_time()
        run(inputs[int(line)])
        took = time.perf_counter() - begin, time.process_time() - worked
        print(json.dumps(took), flush=True)


# -------------------------------------------------------------------------------- the comparison


class _Process:
    """One of the processes."""

    def __init__(self, kind: str, path: Path, threads: int, shape: tuple[int, ...]) -> None:
        command = [sys.executable, "-m", "benchmarks._cut_runtimes", kind, str(path)]
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        self._process = subprocess.Popen(
            [*command, str(threads), json.dumps(shape)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **dict.fromkeys(names, str(threads))},
        )
        self.told: dict[str, Any] = self._line()

    def _line(self) -> Any:
        assert self._process.stdout is not None
        text = self._process.stdout.readline()
        if not text:
            raise RuntimeError("a process of the comparison ended early")
        return json.loads(text)

    def seconds(self, rows: int) -> tuple[float, float]:
        """Of the clock and of the processor."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{rows}\n")
        self._process.stdin.flush()
        clock, processor = self._line()
        return clock, processor

    def end(self) -> None:
        self._process.communicate()


def _files(name: str, folder: Path, kinds: tuple[str, ...]) -> dict[str, Path]:
    """The same tail in the form that each of them takes."""
    import torch  # noqa: PLC0415

    from benchmarks._cut_models import SHAPES, tail_module  # noqa: PLC0415
    from cenacle.crypto import SecretBytes  # noqa: PLC0415
    from cenacle.cut.sources import load_model  # noqa: PLC0415
    from cenacle.cut.tail_file import write_tail  # noqa: PLC0415
    from cenacle.sealing import seal_path  # noqa: PLC0415

    ends = {"onnxruntime": "sealed", "torch": "pt2", "aoti": "aoti.pt2"}
    found = {kind: folder / f"{name}-tail.{ends[kind]}" for kind in kinds}
    if all(path.exists() for path in found.values()):
        return found
    module, example = tail_module(name), torch.zeros(2, *SHAPES[name])
    if "onnxruntime" in kinds:
        plain = folder / f"{name}-only.safetensors"
        write_tail(load_model(module, inputs=[example]), plain)
        with SecretBytes(_KEY) as key:
            seal_path(plain, found["onnxruntime"], key)
    batch = torch.export.Dim("batch", max=4096)
    program = torch.export.export(module, (example,), dynamic_shapes=({0: batch},))
    if "torch" in kinds:
        torch.export.save(program, found["torch"])
    if "aoti" in kinds:
        from torch._inductor import aoti_compile_and_package  # noqa: PLC0415

        aoti_compile_and_package(program, package_path=str(found["aoti"]))
    return found


def compare(models: list[str], turns: int, threads: int, kept: Path) -> dict[str, Any]:
    """Code, memory and time of each, for the tails of some models."""
    from benchmarks._cut_models import SHAPES  # noqa: PLC0415

    results: dict[str, Any] = {}
    for name in models:
        shape = SHAPES[name]
        files = _files(name, kept, KINDS)
        running = {kind: _Process(kind, files[kind], threads, shape) for kind in KINDS}
        times: dict[tuple[str, int], list[tuple[float, float]]] = {}
        for _ in range(turns):
            for rows in _BATCHES:
                for kind, process in running.items():
                    times.setdefault((kind, rows), []).append(process.seconds(rows))
        for kind, process in running.items():
            process.end()
            results.update({f"{name}_{kind}_{key}": v for key, v in process.told.items()})
            for rows in _BATCHES:
                clock, processor = zip(*times[kind, rows], strict=True)
                results[f"{name}_{kind}_batch{rows}_ms"] = statistics.median(clock) * 1e3
                results[f"{name}_{kind}_batch{rows}_cpu_ms"] = statistics.median(processor) * 1e3
    return results


def trusted(kept: Path) -> dict[str, float]:
    """Bytes of code in a process that has computed a tail, with this runtime and with PyTorch."""
    from benchmarks._cut_models import SHAPES  # noqa: PLC0415

    files = _files("lite0", kept, ("onnxruntime", "torch"))
    found = {}
    for kind, key in (("onnxruntime", ""), ("torch", "torch_")):
        process = _Process(kind, files[kind], 1, SHAPES["lite0"])
        process.end()
        found[f"{key}trusted_mb"] = process.told["trusted_mb"]
        found[f"{key}files"] = process.told["libraries"] + process.told["python_files"]
        found[f"{key}rss_mb"] = process.told["rss_mb"]
    return found


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], int(sys.argv[3]), tuple(json.loads(sys.argv[4])))
