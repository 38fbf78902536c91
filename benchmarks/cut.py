"""Cut inference with the tail in the default enclave, against the uncut model on the same cores.

``python -m benchmarks.cut [--models vgg16,resnet50,lite0] [--turns N] [--threads N]
[--no-paging] [--keep FOLDER] [--json]``

The front runs in this process, the tail in an enclave with all layers of the sandbox, behind the
wire that ``cenacle serve`` uses; the uncut model runs in this process, by the same runtime with
the same options and number of threads. The contenders take turns; a ratio is the median over the
turns of the ratios within a turn. Without HTTP: ``benchmarks.serving`` measures that.

* ``latency_ratio``: seconds of a query of one row, cut / uncut. The largest of the models; each
  model's is ``<model>_latency_ratio``.
* ``throughput_ratio``: rows per second in queries of ``--batch`` rows, cut / uncut, two queries
  in flight. The smallest of the models. On the same cores only with as many threads as cores,
  which is the default: with fewer, front and tail compute beside each other.
* ``..._best_...``: the same of the fastest turns, which other programs disturbed least.
* ``cpu_ratio``: processor seconds of a query of one row, this process's and the enclave's
  together, cut / uncut; it depends less on what else the machine does. Likewise
  ``sealed_cpu_overhead_ms``.
* ``wire_ms``: seconds of a cut query less those of front and tail alone, both in this process.
* ``sealed_request_overhead_ms``: a query that a client seals to the enclave, and whose answer it
  opens, less the same query in plain. The largest of the models.
* ``enclave_rss_mb``: resident memory of the enclave that serves the largest tail, after queries.
* ``paging_ratio``: seconds of a query of ``--batch`` rows of VGG-16's tail with memory for a
  quarter of its weights / with memory for all. ``paging_bound`` is what could be had at best: the
  larger of computing, and of reading, decrypting and verifying the weights that do not fit.
* ``trusted_mb``, ``torch_trusted_mb``: bytes of libraries and of Python files that a process has
  loaded once it has computed a tail, with this runtime and with PyTorch.

``--runtimes`` measures instead what could run a tail in the enclave (ADR 0021): ONNX Runtime,
code generated and compiled by PyTorch's AOTInductor, and PyTorch itself. Each has a process of
its own, and they take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np

from benchmarks._cut_enclave import Arrays, Served, agree, seal, serve
from benchmarks._cut_models import CUTS, CutModel, cut_model
from benchmarks._cut_runtimes import compare, trusted
from benchmarks._report import report
from cenacle.crypto import SecretBytes
from cenacle.cut.runtime import TailRuntime
from cenacle.sealing import TensorReader, seal_path
from cenacle.serving.front import Front
from tests.support.house import House, house_at

_WARM = 3


def _input(rows: int) -> Arrays:
    random = np.random.default_rng(rows)
    return {"x": random.normal(size=(rows, 3, 224, 224)).astype(np.float32)}


def _named(front: Front, rows: int) -> Arrays:
    (values,) = _input(rows).values()
    return {front.inputs[0].name: values}


async def _timed(work: Callable[[], Awaitable[Any]]) -> float:
    begin = time.perf_counter()
    await work()
    return time.perf_counter() - begin


async def _turns(
    contenders: dict[str, Callable[[], Awaitable[Any]]], turns: int
) -> dict[str, list[float]]:
    """Seconds of each, turn by turn; the order changes, so that none always follows the same."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(-_WARM, turns):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds = await _timed(contenders[name])
            if turn >= 0:
                found[name].append(seconds)
    return found


def _ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def _ms(values: list[float]) -> float:
    return statistics.median(values) * 1e3


async def _in_flight(front: Front, served: Served, inputs: Arrays, count: int) -> None:
    """So many queries, two at a time: one's tail is computed while the next one's front is."""
    places = asyncio.Semaphore(2)

    async def one() -> None:
        async with places:
            crossing = await asyncio.to_thread(front.run, inputs)
            await served.infer(crossing)

    await asyncio.gather(*(one() for _ in range(count)))


async def _repeat(front: Front, inputs: Arrays, count: int) -> None:
    for _ in range(count):
        front.run(inputs)


async def measure(
    model: CutModel, house: House, folder: Path, options: argparse.Namespace
) -> dict[str, float]:
    """The figures of one model."""
    threads = options.threads
    whole = Front(model.whole.read_bytes(), threads=threads)
    front = Front(model.front.read_bytes(), threads=threads)
    single, batch = _named(whole, 1), _named(whole, options.batch)
    tail = seal(house, model)
    digest = agree(house, model, tail)
    with SecretBytes.random() as key:
        sealed = folder / f"{model.name}.sealed"
        info = seal_path(model.tail, sealed, key)
        with TensorReader(sealed, key, expected_digest=info.digest) as reader:
            local = TailRuntime(reader, threads=threads)
    async with serve(house, digest, tail, folder / model.name, threads=threads) as served:
        crossing = front.run(single)
        expected = next(iter(whole.run(single).values()))
        for found in (await served.infer(crossing), await served.sealed(crossing)):
            error = float(np.abs(next(iter(found.values())) - expected).max())
            assert error <= 1e-4 * float(np.abs(expected).max()), error

        async def uncut() -> None:
            whole.run(single)

        async def cut() -> None:
            await served.infer(front.run(single))

        async def here() -> None:
            local.run(front.run(single))

        async def plain() -> None:
            await served.infer(crossing)

        async def secret() -> None:
            await served.sealed(crossing)

        alone = await _turns({"uncut": uncut, "cut": cut, "here": here}, options.turns)
        queries = {"uncut": uncut, "cut": cut, "plain": plain, "sealed": secret}
        work = dict.fromkeys(queries, 0.0)
        for _ in range(options.turns):
            for name, query in queries.items():
                begin = time.process_time() + served.cpu_seconds()
                await query()
                work[name] += time.process_time() + served.cpu_seconds() - begin
        wire = await _turns({"plain": plain, "sealed": secret}, options.turns)
        many = await _turns(
            {
                "uncut": lambda: _repeat(whole, batch, 4),
                "cut": lambda: _in_flight(front, served, batch, 4),
            },
            max(3, options.turns // 4),
        )
        rss = served.rss_mb()
    local.close()
    apart = [s - p for s, p in zip(wire["sealed"], wire["plain"], strict=True)]
    between = [c - h for c, h in zip(alone["cut"], alone["here"], strict=True)]
    rows = 4 * options.batch
    return {
        "uncut_ms": _ms(alone["uncut"]),
        "cut_ms": _ms(alone["cut"]),
        "latency_ratio": _ratio(alone["cut"], alone["uncut"]),
        "latency_best_ratio": min(alone["cut"]) / min(alone["uncut"]),
        "cut_here_ratio": _ratio(alone["here"], alone["uncut"]),
        "cpu_ratio": work["cut"] / work["uncut"],
        "wire_ms": statistics.median(between) * 1e3,
        "uncut_rows_per_s": rows / statistics.median(many["uncut"]),
        "throughput_ratio": _ratio(many["uncut"], many["cut"]),
        "throughput_best_ratio": min(many["uncut"]) / min(many["cut"]),
        "sealed_request_overhead_ms": statistics.median(apart) * 1e3,
        "sealed_best_overhead_ms": (min(wire["sealed"]) - min(wire["plain"])) * 1e3,
        "enclave_rss_mb": rss,
        "sealed_cpu_overhead_ms": (work["sealed"] - work["plain"]) / options.turns * 1e3,
        "tail_mb": model.parameters / 1e6,
        "crossing_kb": model.crossing / 1e3,
    }


def paging(model: CutModel, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """A tail with memory for a quarter of its weights, against one with memory for all."""
    sealed = folder / f"{model.name}.paged"
    with SecretBytes.random() as key:
        info = seal_path(model.tail, sealed, key)
        with (
            TensorReader(sealed, key, expected_digest=info.digest) as first,
            TensorReader(sealed, key, expected_digest=info.digest) as second,
            TailRuntime(first, threads=options.threads) as whole,
            TailRuntime(
                second, memory_limit=model.parameters // 4, threads=options.threads
            ) as paged,
        ):
            assert paged.paged
            spec = whole.inputs[0]
            shape = (options.batch, *(size or 1 for size in spec.shape[1:]))
            values = np.random.default_rng(1).normal(size=shape).astype(np.float32)
            inputs = {spec.name: values}
            block = np.empty(model.parameters * 3 // 4, np.uint8)
            times: dict[str, list[float]] = {"whole": [], "paged": [], "read": []}
            for turn in range(-1, max(3, options.turns // 4)):
                for name, work in (
                    ("whole", lambda: whole.run(inputs)),
                    ("paged", lambda: paged.run(inputs)),
                    ("read", lambda: second._reader.readinto(0, block)),
                ):
                    begin = time.perf_counter()
                    work()
                    if turn >= 0:
                        times[name].append(time.perf_counter() - begin)
    bound = [max(r, w) / w for r, w in zip(times["read"], times["whole"], strict=True)]
    return {
        "paging_whole_ms": _ms(times["whole"]),
        "paging_paged_ms": _ms(times["paged"]),
        "paging_read_ms": _ms(times["read"]),
        "paging_ratio": _ratio(times["paged"], times["whole"]),
        "paging_best_ratio": min(times["paged"]) / min(times["whole"]),
        "paging_bound": statistics.median(bound),
    }


async def _all(options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, dict[str, float]] = {}
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = [cut_model(which, options.keep or folder) for which in options.models]
        with house_at(folder) as house:
            for model in models:
                which = model.name
                found[which] = await measure(model, house, folder, options)
                if which == "vgg16" and not options.no_paging:
                    results.update(await asyncio.to_thread(paging, model, folder, options))
                print(which, {key: round(value, 3) for key, value in found[which].items()})
    for which, figures in found.items():
        results.update({f"{which}_{key}": value for key, value in figures.items()})
    worst = {"latency_ratio": max, "throughput_ratio": min, "sealed_request_overhead_ms": max}
    for key, choose in worst.items():
        results[key] = choose(figures[key] for figures in found.values())
    results["enclave_rss_mb"] = max(figures["enclave_rss_mb"] for figures in found.values())
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="Cut inference against the uncut model.")
    parser.add_argument("--models", default=",".join(CUTS), type=lambda text: text.split(","))
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8, help="rows of a query, for throughput")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--no-paging", action="store_true")
    parser.add_argument("--runtimes", action="store_true", help="compare runtimes (ADR 0021)")
    parser.add_argument("--keep", type=Path, help="a folder whose exported models are used again")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kept = options.keep or Path(folder)
        if options.runtimes:
            results = compare(options.models, options.turns, options.threads, kept)
        else:
            results = {**asyncio.run(_all(options)), **trusted(kept)}
    report("cut-runtimes" if options.runtimes else "cut", results, as_json=options.json)


if __name__ == "__main__":
    main()
