"""Private training against training without protection, and Opacus, in one run.

``python -m benchmarks.dp --model vgg9|resnet32|vit|gpt2 [--batch N] [--rounds N] [--threads N]
[--keep-heap] [--no-opacus] [--no-memory] [--json]``

A step is forward, loss, backward, noise and SGD with momentum, in float32. The contenders take
turns on copies of one model and the same batch; a ratio is the median over the turns of
(seconds without protection / seconds of the contender) within a turn, so 1 is no cost.

* ``ratio``, ``ratio_per_layer``: this engine, with flat and with per-layer clipping.
* ``ratio_bfloat16_norms``: flat, with ``norm_dtype=torch.bfloat16``; transformers only.
* ``opacus_hooks``, ``opacus_ghost``: Opacus's ``GradSampleModule`` with ``DPOptimizer``, and
  its fast gradient clipping with ghost norms. ``null`` where Opacus is not installed or cannot
  run the model; ``opacus_problem`` then says why. Its noise is torch's generator, not a
  cryptographic one.
* ``best_ratio``, ``best_ratio_per_layer``: from each contender's fastest step, which other
  programs on the machine disturb least.
* ``peak_memory_ratio``, ``peak_memory_ratio_per_layer``: most resident memory of a process that
  makes three private steps / of one that makes three plain ones; both less the memory before
  the model was built.
* ``plain_seconds``: a step without protection.

``--keep-heap`` keeps freed memory in the process, for all contenders alike, as programs that
train do with other allocators; without it glibc returns and zeroes large blocks every step.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks._dp_models import BATCHES, batch_of, build, losses_of
from benchmarks._report import report
from cenacle.offload.heap import keep_heap
from cenacle.training.privacy import Noise, make_private

Step = Callable[[], Any]
_WARM = 2
_CLIP, _SIGMA = 1.0, 1.0
_POSITIONS = {"vit", "gpt2"}  # dense layers over positions, whose norms bfloat16 makes cheaper
_KINDS = ("plain", "private", "layered")  # whose memory is measured
_OURS = ("ratio", "ratio_per_layer", "ratio_bfloat16_norms")


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    trainable = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(trainable, lr=1e-3, momentum=0.9)


def plain(name: str, model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """A step without protection."""
    optimizer, losses = _optimizer(model), losses_of(name, model)

    def step() -> None:
        optimizer.zero_grad()
        losses(x, y).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def private(name: str, model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Step:
    """A step of this engine."""
    optimizer, losses = _optimizer(model), losses_of(name, model)
    engine = make_private(
        model, clip=_CLIP, noise_multiplier=_SIGMA, expected_batch=len(x), **options
    )

    def step() -> None:
        engine.backward(losses, x, y)
        optimizer.step()

    return step


def _logits(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out.logits


def opacus_hooks(name: str, model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """A step of Opacus that forms all per-example gradients."""
    from opacus import GradSampleModule  # noqa: PLC0415
    from opacus.optimizers import DPOptimizer  # noqa: PLC0415

    wrapped = GradSampleModule(model)
    optimizer = DPOptimizer(
        _optimizer(wrapped),
        noise_multiplier=_SIGMA,
        max_grad_norm=_CLIP,
        expected_batch_size=len(x),
    )
    losses = losses_of(name, wrapped)

    def step() -> None:
        optimizer.zero_grad()
        losses(x, y).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def opacus_ghost(name: str, model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """A step of Opacus with ghost norms and two backward passes."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping  # noqa: PLC0415
    from opacus.optimizers import DPOptimizerFastGradientClipping  # noqa: PLC0415
    from opacus.utils.fast_gradient_clipping_utils import (  # noqa: PLC0415
        DPLossFastGradientClipping,
    )

    wrapped = GradSampleModuleFastGradientClipping(
        model, max_grad_norm=_CLIP, use_ghost_clipping=True
    )
    optimizer = DPOptimizerFastGradientClipping(
        _optimizer(wrapped),
        noise_multiplier=_SIGMA,
        max_grad_norm=_CLIP,
        expected_batch_size=len(x),
    )
    criterion = DPLossFastGradientClipping(wrapped, optimizer, nn.CrossEntropyLoss())

    def step() -> None:
        optimizer.zero_grad()
        logits = _logits(wrapped(x))
        if name == "gpt2":
            loss = criterion(logits.flatten(0, 1), y.flatten(), shape=y.shape)
        else:
            loss = criterion(logits, y)
        loss.backward()
        optimizer.step()

    return step


def measure(name: str, batch: int, rounds: int, *, opacus: bool) -> dict[str, Any]:
    """Ratios of all contenders."""
    model = build(name)
    x, y = batch_of(name, batch)
    makers: dict[str, Callable[..., Step]] = {
        "plain": plain,
        "ratio": private,
        "ratio_per_layer": lambda *a: private(*a, per_layer=True),
    }
    if name in _POSITIONS:
        makers["ratio_bfloat16_norms"] = lambda *a: private(*a, norm_dtype=torch.bfloat16)
    if opacus:
        makers |= {"opacus_hooks": opacus_hooks, "opacus_ghost": opacus_ghost}
    steps: dict[str, Step] = {}
    problems: dict[str, str] = {}
    for key, make in makers.items():
        try:
            steps[key] = make(name, copy.deepcopy(model), x, y)
            steps[key]()
        except Exception as problem:
            if not key.startswith("opacus"):
                raise
            steps.pop(key, None)
            problems[key] = f"{type(problem).__name__}: {problem}".splitlines()[0][:160]
    times: dict[str, list[float]] = {key: [] for key in steps}
    for _ in range(_WARM + rounds):
        for key, step in steps.items():
            gc.collect()
            begin = time.perf_counter()
            step()
            times[key].append(time.perf_counter() - begin)
    kept = {key: values[_WARM:] for key, values in times.items()}
    out: dict[str, Any] = {"plain_seconds": statistics.median(kept["plain"])}
    for key in (*_OURS, "opacus_hooks", "opacus_ghost"):
        found = kept.get(key)
        out[key] = (
            statistics.median(p / t for p, t in zip(kept["plain"], found, strict=True))
            if found
            else None
        )
    for key in kept.keys() & set(_OURS):
        out[f"best_{key}"] = min(kept["plain"]) / min(kept[key])
    if problems:
        out["opacus_problem"] = problems
    return out


def _peak() -> int:
    # Of this program alone: getrusage would count what its parent had before exec.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def peak_of(name: str, kind: str, batch: int) -> int:
    """Kilobytes that a process of its own needs for three steps."""
    x, y = batch_of(name, batch)
    functional.conv2d(torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3, 3))
    Noise().number()  # libraries, and the compiler that makes the noise's kernel
    before = _peak()
    if kind == "plain":
        step = plain(name, build(name), x, y)
    else:
        step = private(name, build(name), x, y, per_layer=kind == "layered")
    for _ in range(3):
        step()
    return _peak() - before


def memory_ratios(name: str, batch: int, threads: int) -> dict[str, float]:
    """Peaks of private steps / peak of plain ones."""
    peaks = {}
    for kind in _KINDS:
        command = [sys.executable, "-m", "benchmarks.dp", "--model", name, "--batch", str(batch)]
        done = subprocess.run(
            [*command, "--threads", str(threads), "--peak", kind],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        peaks[kind] = json.loads(done.stdout.splitlines()[-1])
    return {
        "peak_memory_ratio": peaks["private"] / peaks["plain"],
        "peak_memory_ratio_per_layer": peaks["layered"] / peaks["plain"],
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(BATCHES), default="vgg9")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--keep-heap", action="store_true")
    parser.add_argument("--no-opacus", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peak", choices=_KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    batch = options.batch or BATCHES[options.model]
    torch.set_num_threads(options.threads or torch.get_num_threads())
    warnings.simplefilter("ignore")
    if options.peak:
        print(peak_of(options.model, options.peak, batch))
        return
    heap = options.keep_heap and keep_heap()
    results: dict[str, Any] = {
        "model": options.model,
        "batch": batch,
        "threads": torch.get_num_threads(),
        "keep_heap": heap,
        **measure(options.model, batch, options.rounds, opacus=not options.no_opacus),
    }
    if not options.no_memory:
        results |= memory_ratios(options.model, batch, torch.get_num_threads())
    report("dp", results, as_json=options.json)


if __name__ == "__main__":
    main()
