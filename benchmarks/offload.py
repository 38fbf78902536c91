"""Training and inference under an offload scheme, against the enclave alone, in one run.

``python -m benchmarks.offload --model vgg16|vgg9|resnet50|vit --scheme lowrank|permuted|masked|
measured [--unchecked] [--quick] [--batch N] [--size N] [--json] [--trace FILE]``

A training step is forward, loss, backward and SGD with momentum; inference one forward pass.
The contenders take turns on the same weights and data; a ratio is the median over the turns
of the ratios within a turn. The enclave has one thread. The accelerator is a CUDA device where
there is one, else a worker process with one thread for each other core.

* ``train_speedup``, ``infer_speedup``: seconds under the scheme ``enclave`` / seconds under the
  scheme.
* ``train_enclave_bound``, ``infer_enclave_bound``: the same, but of the scheme only the time
  that the enclave itself works: processor seconds of this process (with CUDA: seconds less
  those spent waiting for results). An infinitely fast accelerator would give this speed-up.
* ``plain_ratio``: seconds of the plain model on the accelerator (without CUDA: in this process,
  with as many threads as the worker) / seconds under the scheme; 1 would be as fast as no
  protection at all. ``infer_plain_ratio`` likewise.
* ``rel_err``: the worst layer's relative error against float64, on the operands that it got.
* ``bytes_per_step``: to and from accelerators in a training step (inference: ``infer_bytes``).
* ``enclave_peak_mb``: most memory of this process during a step under the scheme, including
  what it shares with the worker.
* ``bound_ratio``: the fewest bytes that the enclave must read and write per training step
  (:mod:`benchmarks._offload_traffic` defines them) / this machine's copy bandwidth, measured
  on one thread in this run, / the enclave's measured seconds; ``infer_bound_ratio`` likewise.

``masked`` trains nothing here: it is measured in inference only, with masks prepared before.
Then the table of costs by layer; ``--trace`` writes the last step's timeline for Perfetto.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks._offload_models import LayerErrors, build, logits, picture_size
from benchmarks._offload_traffic import Traffic, bandwidth
from benchmarks._report import report
from cenacle.accelerators.inline import InlineAccelerator
from cenacle.accelerators.protocol import Accelerator, Operation
from cenacle.errors import CenacleError
from cenacle.offload import Offload, make_scheme, offload
from cenacle.offload.heap import keep_heap

BATCHES = {"vgg16": 4, "vgg9": 32, "resnet50": 4, "vit": 4}
_WARM = 2  # turns: code is compiled in the first, memory found in both
TRAINS = {"lowrank", "permuted", "measured"}


class TimedInline(InlineAccelerator):
    """Knows how long its own algebra took, which is not the enclave's."""

    cpu = 0.0

    def call(self, operation: Operation, result: int, operands: Any) -> None:
        begin = time.process_time()
        super().call(operation, result, operands)
        self.cpu += time.process_time() - begin


@dataclass
class Contender:
    """A model, and how to tell the enclave's own seconds in a step from others."""

    model: nn.Module
    inputs: torch.Tensor
    labels: torch.Tensor
    optimizer: torch.optim.Optimizer
    threads: int = 1
    session: Offload | None = None
    worker: Accelerator | None = None
    wall: dict[str, list[float]] = field(default_factory=lambda: {"train": [], "infer": []})
    own: dict[str, list[float]] = field(default_factory=lambda: {"train": [], "infer": []})

    def train(self) -> None:
        self.optimizer.zero_grad()
        output = logits(self.model(self.inputs))
        functional.cross_entropy(output, self.labels).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def infer(self) -> None:
        with torch.inference_mode():
            logits(self.model(self.inputs))

    def measure(self, kind: str) -> None:
        self.model.train(kind == "train")
        self.optimizer.zero_grad()
        gc.collect()
        torch.set_num_threads(self.threads)
        if self.session is not None:
            self.session.profile.reset()
        _synchronize(self.inputs)
        inline = self.worker.cpu if isinstance(self.worker, TimedInline) else 0.0
        cpu, begin = time.process_time(), time.perf_counter()
        getattr(self, kind)()
        _synchronize(self.inputs)
        wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
        torch.set_num_threads(1)
        if isinstance(self.worker, TimedInline):
            cpu -= self.worker.cpu - inline
        elif torch.cuda.is_available():  # its driver waits by spinning
            waits = self.session.profile.total.wait_seconds if self.session else 0.0
            cpu = wall - waits
        self.wall[kind].append(wall)
        self.own[kind].append(cpu)


def _synchronize(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def twin(model: nn.Module) -> nn.Module:
    """Another model with the same parameters, in the same memory."""
    found: nn.Module = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    return found


def make_worker() -> tuple[Accelerator, int]:
    """The accelerator, and its number of threads."""
    threads = max(1, len(os.sched_getaffinity(0)) - 1)
    if torch.cuda.is_available():
        return InlineAccelerator("cuda", "cuda"), threads
    with suppress(ImportError, CenacleError):
        from cenacle.accelerators.process import ProcessAccelerator  # noqa: PLC0415

        return ProcessAccelerator("worker", threads=threads), threads
    return TimedInline("inline"), 1


def reset_peak() -> None:
    """Forget the most memory that this process had, and give back what it does not use."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> float:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def count(enclave: Contender, kinds: list[str]) -> dict[str, Traffic]:
    """One step of each kind with its traffic counted; it warms up, too."""
    found = {}
    for kind in kinds:
        traffic = found[kind] = Traffic()
        enclave.model.train(kind == "train")
        hooks = traffic.watch(enclave.model, train=kind == "train")
        with offload(enclave.model, traffic, [InlineAccelerator()]):
            getattr(enclave, kind)()
        for hook in hooks:
            hook.remove()
    return found


def errors(model: nn.Module, inputs: torch.Tensor, scheme: str, *, train: bool) -> float:
    """The worst layer's, in one step of one sample or two."""
    checked = LayerErrors(make_scheme(scheme))
    few = inputs[:2]
    model.train(train)
    with offload(model, checked, [InlineAccelerator()], check=False):
        prepare(checked.inner, model, few, len(few))
        with torch.set_grad_enabled(train):
            output = logits(model(few))
        if train:
            labels = torch.zeros(len(few), dtype=torch.long)
            functional.cross_entropy(output, labels).backward()  # type: ignore[no-untyped-call]
    model.zero_grad()
    return checked.worst


def prepare(scheme: Any, model: nn.Module, inputs: torch.Tensor, samples: int) -> None:
    """What a scheme does before its inputs are there."""
    if hasattr(scheme, "prepare"):
        model.eval()
        scheme.prepare(model, inputs, samples)


def median(values: list[float]) -> float:
    return statistics.median(values)


def paired(reference: list[float], measured: list[float]) -> float:
    """Median of the ratios of neighbours in time, so that a load that comes and goes cancels."""
    return median([a / b for a, b in zip(reference, measured, strict=True)])


def table(session: Offload) -> None:
    """Costs by layer."""
    print(f"{'layer':<44}{'enclave':>9}{'worker':>9}{'wait':>9}{'sent':>9}{'received':>9}{'':>4}")
    print(f"{'':<44}{'ms':>9}{'ms':>9}{'ms':>9}{'MB':>9}{'MB':>9}{'n':>4}")
    rows = [*session.profile.layers.items(), ("all", session.profile.total)]
    for name, cost in rows:
        times = (cost.enclave_seconds, cost.accelerator_seconds, cost.wait_seconds)
        sizes = (cost.bytes_sent, cost.bytes_received)
        numbers = [*(1e3 * t for t in times), *(size / 1e6 for size in sizes)]
        print(f"{name[-43:]:<44}{''.join(f'{n:9.1f}' for n in numbers)}{cost.products:4d}")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    keep_heap()  # as the enclave does; it helps all contenders
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build(options.model, options.size, classes=options.classes)
    inputs = torch.randn(options.batch, 3, options.size, options.size)
    labels = torch.randint(0, options.classes, (options.batch,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    kinds = ["train", "infer"] if options.scheme in TRAINS else ["infer"]
    turns = options.turns

    print(f"{options.model} for {options.size}x{options.size}, {options.batch} samples a step")
    rel_err = errors(model, inputs, options.scheme, train="train" in kinds)
    enclave = Contender(model, inputs, labels, optimizer)
    traffic = count(enclave, kinds)

    worker, threads = make_worker()
    shared = (inputs, labels, optimizer)
    ours = Contender(twin(model), *shared, worker=worker)
    plain = Contender(twin(model), *shared, threads=threads)
    if torch.cuda.is_available():
        plain = on_cuda(model, inputs, labels)
    scheme = make_scheme(options.scheme)
    peaks: dict[str, float] = {}
    moved: dict[str, int] = {}
    sent: dict[str, set[str]] = {}
    with ExitStack() as stack:
        enclave.session = stack.enter_context(offload(model, "enclave", [InlineAccelerator()]))
        ours.session = stack.enter_context(
            offload(ours.model, scheme, [worker], check=options.check)
        )
        description = worker.describe()
        masks = time.perf_counter()
        prepare(scheme, ours.model, inputs, (turns + _WARM + 1) * options.batch)
        masks = time.perf_counter() - masks
        for turn in range(turns + _WARM):
            for kind in kinds:
                for contender in (enclave, ours, plain):
                    if contender is ours and kind != kinds[0]:
                        contender.model.eval()
                        contender.infer()  # weights that training changed are sent again
                    contender.measure(kind)
                    if contender is ours:
                        total = ours.session.profile.total
                        moved[kind] = total.bytes_sent + total.bytes_received
                        layers = ours.session.profile.layers
                        sent[kind] = {name for name, cost in layers.items() if cost.products}
                if turn == turns + _WARM - 1 and kind == kinds[0]:
                    table(ours.session)
                    if options.trace:
                        ours.session.profile.write_trace(options.trace)
        for kind in kinds:  # not timed: memory that was given back has to be found again
            reset_peak()
            ours.model.train(kind == "train")
            getattr(ours, kind)()
            peaks[kind] = peak_mb()
        losses = [loss.name for loss in ours.session.losses]
    contenders = {"enclave": enclave, "scheme": ours, "plain": plain}
    for contender in contenders.values():
        for series in (contender.wall, contender.own):
            for values in series.values():
                del values[:_WARM]

    speed = bandwidth()
    parameters = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    results: dict[str, Any] = {
        "model": options.model,
        "scheme": options.scheme,
        "size": options.size,
        "batch": options.batch,
        "turns": turns,
        "checked": bool(ours.session.fleet.verifier),
        "accelerator": description,
        "load": os.getloadavg()[0],
        "workers_lost": losses,
    }
    for kind in kinds:
        prefix = "" if kind == kinds[0] else f"{kind}_"
        own = median(ours.own[kind])
        fewest = traffic[kind].fewest(
            options.scheme, sent[kind].__contains__, parameters if kind == "train" else 0
        )
        results |= {
            f"{kind}_speedup": paired(enclave.wall[kind], ours.wall[kind]),
            f"{kind}_enclave_bound": paired(enclave.own[kind], ours.own[kind]),
            f"{prefix}plain_ratio": paired(plain.wall[kind], ours.wall[kind]),
            f"{prefix}bound_ratio": fewest / speed / own,
            f"{prefix}bytes_per_step": moved[kind],
            f"{prefix}fewest_enclave_bytes": fewest,
            f"{prefix}enclave_peak_mb": peaks[kind],
            **{
                f"{kind}_{name}_seconds": median(contender.wall[kind])
                for name, contender in contenders.items()
            },
            f"{kind}_enclave_own_seconds": median(enclave.own[kind]),
            f"{kind}_scheme_own_seconds": own,
        }
    print(f"worst layer's relative error: {rel_err:.1e}")
    results |= {"rel_err": rel_err, "copy_gb_per_s": speed / 1e9}
    if "train" not in kinds:
        results["masks_seconds_per_sample"] = masks / ((turns + _WARM + 1) * options.batch)
    return results


def on_cuda(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> Contender:
    """The plain model on the device, with an optimizer of its own."""
    moved = copy.deepcopy(model).to("cuda")
    optimizer = torch.optim.SGD(moved.parameters(), lr=1e-4, momentum=0.9)
    return Contender(moved, inputs.to("cuda"), labels.to("cuda"), optimizer)


def main(arguments: list[str] | None = None, emit: Callable[..., None] = report) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.offload",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=sorted(BATCHES), default="vgg16")
    schemes = sorted({*TRAINS, "masked"})
    parser.add_argument("--scheme", choices=schemes, default="permuted")
    parser.add_argument("--batch", type=int, help="samples per step")
    parser.add_argument("--size", type=int, help="the pictures' side")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--turns", type=int, help="measured turns, after two that warm up")
    parser.add_argument(
        "--unchecked", dest="check", action="store_const", const=False, help="without Freivalds"
    )
    parser.add_argument("--quick", action="store_true", help="a smaller batch, two turns")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--trace", type=Path, help="write the last step's timeline here")
    options = parser.parse_args(arguments)
    options.size = options.size or picture_size(options.model)
    small = options.size <= 64
    options.batch = options.batch or (
        (8 if small else 1) if options.quick else (32 if small else BATCHES[options.model])
    )
    options.turns = options.turns or (2 if options.quick else 5)
    emit("offload", run(options), as_json=options.json)


if __name__ == "__main__":
    main()
