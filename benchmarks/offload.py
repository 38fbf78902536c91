"""Training and inference under an offload scheme, against the enclave alone, in one run.

``python -m benchmarks.offload --model vgg16|vgg9|resnet50|vit --scheme lowrank|permuted|masked|
measured [--unchecked] [--no-resident] [--quick] [--batch N] [--size N] [--json] [--trace FILE]``

A training step is forward, loss, backward and SGD with momentum; inference one forward pass.
The contenders take turns on the same weights and data; a ratio is the median over the turns
of the ratios within a turn. The enclave has one thread. The accelerator is a CUDA device where
there is one, else a worker process with one thread for each other core.

* ``train_speedup``, ``infer_speedup``: seconds under the scheme ``enclave`` / seconds under the
  scheme.
* ``train_enclave_bound``, ``infer_enclave_bound``: the same, but of the scheme only the time
  that the enclave itself works: processor seconds of this process (with CUDA: seconds less
  those spent waiting for results). An infinitely fast accelerator would give this speed-up.
* ``train_plain_ratio``: seconds of the plain model on the accelerator (without CUDA: in this
  process, with as many threads as the worker) / seconds under the scheme; 1 would be as fast as no
  protection at all. ``infer_...`` of this and of what follows likewise.
* ``rel_err``: the worst layer's relative error against float64, on the operands that it got.
* ``train_bytes_per_step``: to and from accelerators.
* ``train_enclave_peak_mb``: most memory of this process during a step under the scheme, including
  what it shares with the worker.
* ``train_bound_ratio``: the fewest bytes that the enclave must read and write per training step
  (:mod:`benchmarks._offload_traffic` defines them) / this machine's copy bandwidth, measured
  on one thread in this run, / the enclave's measured seconds. Under ``lowrank`` its own algebra
  at the measured speed of a large matrix product is added to the bytes.
* ``rekey_seconds``: under ``permuted``, of bringing weights home and sending them out under new
  keys, which happens every ``rekey`` uses (100); each training step is charged its share.

``masked`` trains nothing here: it is measured in inference only, with masks prepared before.
Then the table of costs by layer; ``--trace`` writes the last step's timeline for Perfetto.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
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
from benchmarks._offload_traffic import Traffic, bandwidth, peak
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


def own_copy(
    model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor
) -> tuple[nn.Module, torch.Tensor, torch.Tensor, torch.optim.Optimizer]:
    """The same model with parameters and an optimizer of its own."""
    found = copy.deepcopy(model)
    return found, inputs, labels, torch.optim.SGD(found.parameters(), lr=1e-4, momentum=0.9)


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


def rekey(ours: Contender) -> float:
    """Processor seconds of a step in which all weights get new keys, above those of another.

    Weights and momenta come home, and go out again under other keys.
    """
    scheme: Any = ours.session.scheme if ours.session else None
    before = scheme.rekey
    ours.measure("train")
    scheme.rekey_after(1)
    ours.measure("train")
    scheme.rekey_after(before)
    ours.wall["train"].pop()
    ours.wall["train"].pop()
    once, plain = ours.own["train"].pop(), ours.own["train"].pop()
    return max(0.0, once - plain)


def scheme_option(text: str) -> tuple[str, Any]:
    """``name=json``."""
    name, _, value = text.partition("=")
    return name, json.loads(value)


def median(values: list[float]) -> float:
    return statistics.median(values)


def paired(reference: list[float], measured: list[float]) -> float:
    """Median of the ratios of neighbours in time, so that a load that comes and goes cancels."""
    return median([a / b for a, b in zip(reference, measured, strict=True)])


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

    print(f"{options.model} for {options.size}x{options.size}, {options.batch} samples a step")
    rel_err = errors(model, inputs, options.scheme, train="train" in kinds)
    enclave = Contender(model, inputs, labels, optimizer)
    traffic = count(enclave, kinds)

    speed, flops = bandwidth(), peak()
    parameters = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    results: dict[str, Any] = {
        "model": options.model,
        "scheme": options.scheme,
        "options": dict(options.option),
        "size": options.size,
        "batch": options.batch,
        "turns": options.turns,
    }
    for kind in kinds:
        results |= contest(kind, enclave, traffic[kind], options, speed, flops, parameters)
    print(f"worst layer's relative error: {rel_err:.1e}")
    results |= {"rel_err": rel_err, "copy_gb_per_s": speed / 1e9, "gflops": flops / 1e9}
    return results | {"load": os.getloadavg()[0]}


def contest(
    kind: str,
    enclave: Contender,
    traffic: Traffic,
    options: argparse.Namespace,
    speed: float,
    flops: float,
    parameters: int,
) -> dict[str, Any]:
    """The figures of one kind of step, in a session of its own."""
    model, inputs, labels, turns = enclave.model, enclave.inputs, enclave.labels, options.turns
    worker, threads = make_worker()
    ours = Contender(*own_copy(model, inputs, labels), worker=worker)
    plain = Contender(*own_copy(model, inputs, labels), threads=threads)
    if torch.cuda.is_available():
        plain = on_cuda(model, inputs, labels)
    scheme = make_scheme(options.scheme, **dict(options.option))
    resident = scheme.resident and options.resident and kind == "train"
    rekeying = 0.0
    with ExitStack() as stack:
        enclave.session = stack.enter_context(offload(model, "enclave", [InlineAccelerator()]))
        ours.session = session = stack.enter_context(
            offload(
                ours.model,
                scheme,
                [worker],
                check=options.check,
                resident=ours.optimizer if resident else None,
            )
        )
        description = worker.describe()
        masks = time.perf_counter()
        prepare(scheme, ours.model, inputs, (turns + _WARM + 1) * options.batch)
        masks = time.perf_counter() - masks
        for _ in range(turns + _WARM):
            for contender in (enclave, ours, plain):
                contender.measure(kind)
                if contender is ours:
                    total = session.profile.total
                    moved = total.bytes_sent + total.bytes_received
                    costs = session.profile.layers.items()
                    sent = {name for name, cost in costs if cost.products}
        print(f"a step of {kind}\n{session.profile.table()}")
        if options.trace and kind == ("infer" if options.scheme == "masked" else "train"):
            session.profile.write_trace(options.trace)
        stays = set(getattr(scheme, "kept", tuple)()) if resident else set()
        if resident:
            rekeying = rekey(ours)
        reset_peak()  # not timed: memory that was given back has to be found again
        ours.model.train(kind == "train")
        getattr(ours, kind)()
        most = peak_mb()
    contenders = {"enclave": enclave, "scheme": ours, "plain": plain}
    for contender in contenders.values():
        for values in (contender.wall[kind], contender.own[kind]):
            del values[:_WARM]
    for values in (ours.own[kind], ours.wall[kind]):  # every step pays its share
        values[:] = [value + rekeying / getattr(scheme, "rekey", 1) for value in values]

    fewest = traffic.fewest(
        options.scheme,
        sent.__contains__,
        parameters if kind == "train" else 0,
        stays.__contains__,
    )
    inside = traffic.algebra(sent.__contains__, getattr(scheme, "chosen", {}))
    own = median(ours.own[kind])
    found = {
        f"{kind}_speedup": paired(enclave.wall[kind], ours.wall[kind]),
        f"{kind}_enclave_bound": paired(enclave.own[kind], ours.own[kind]),
        f"{kind}_plain_ratio": paired(plain.wall[kind], ours.wall[kind]),
        f"{kind}_bound_ratio": (fewest / speed + inside / flops) / own,
        f"{kind}_bytes_per_step": moved,
        f"{kind}_fewest_enclave_bytes": fewest,
        f"{kind}_enclave_peak_mb": most,
        **{
            f"{kind}_{name}_seconds": median(contender.wall[kind])
            for name, contender in contenders.items()
        },
        f"{kind}_enclave_own_seconds": median(enclave.own[kind]),
        f"{kind}_scheme_own_seconds": own,
        "accelerator": description,
        "checked": bool(session.fleet.verifier),
        "workers_lost": [loss.name for loss in session.losses],
    }
    if resident:
        found |= {"resident_layers": len(stays), "rekey_seconds": rekeying}
    if options.scheme == "masked":
        found["masks_seconds_per_sample"] = masks / ((turns + _WARM + 1) * options.batch)
    return found


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
    parser.add_argument(
        "--option",
        action="append",
        type=scheme_option,
        default=[],
        metavar="NAME=JSON",
        help="of the scheme, e.g. max_rank=8 or guard=null; may be repeated",
    )
    parser.add_argument("--size", type=int, help="the pictures' side")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--turns", type=int, help="measured turns, after two that warm up")
    parser.add_argument(
        "--unchecked", dest="check", action="store_const", const=False, help="without Freivalds"
    )
    parser.add_argument(
        "--no-resident",
        dest="resident",
        action="store_false",
        help="permuted: send weights in every step, and keep the optimizer inside",
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
