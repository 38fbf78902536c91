"""Queries to a model in an enclave, beside the same model in plain by the same stack.

``python -m benchmarks.serving [--json] [--quick]``

A perceptron (784, 3 x 2048, 10 units; 10 million parameters) is cut after its first layer. One
process runs two HTTPS services of ``cenacle serve``'s own application: ``plain`` runs the whole
model in the host, ``enclave`` runs the front in the host and the tail in a real process enclave
with all layers of the sandbox. A second process plays the clients, each with one connection and
one row a request, sending the next when it has the answer. ``sealed``: the clients run the front,
seal each query with HPKE to the attested key, and open the answer, all within the time measured.
Services and clients share the machine's cores.

The three are measured in turns, several rounds at each number of clients; the figures are of the
median round. ``*_per_second``: requests answered. ``*_p50_ms``, ``*_p99_ms``: of one request.
``throughput_ratio_*`` and ``latency_ratio_*`` (p50): to ``plain`` in the same round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from benchmarks._report import report
from benchmarks._serving_world import World, opened, serve_both
from cenacle.serving.server import event_loop

MODES: Final = ("plain", "enclave", "sealed")
CLIENTS: Final = (1, 8, 64)


async def _measure(world: World, rounds: int, seconds: float) -> dict[str, Any]:
    async with serve_both(world) as ports:
        load = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "benchmarks._serving_load"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            limit=1 << 26,
        )
        assert load.stdin is not None
        assert load.stdout is not None

        async def tell(fields: Any) -> Any:
            assert load.stdin is not None
            assert load.stdout is not None
            load.stdin.write(json.dumps(fields).encode() + b"\n")
            return json.loads(await load.stdout.readline() or "null")

        config = {
            "certificate": str(world.files.certificate),
            "contract": world.contract,
            "front": str(world.front),
            "ports": ports,
        }
        if await tell(config) != "ready":
            raise RuntimeError("the clients did not start")
        found: dict[str, list[float]] = {}
        for _ in range(rounds):
            for clients in CLIENTS:
                figures = {
                    mode: _figures(
                        **await tell({"mode": mode, "clients": clients, "seconds": seconds})
                    )
                    for mode in MODES
                }
                _keep(found, clients, figures)
        load.stdin.close()
        await load.wait()
    return {name: statistics.median(values) for name, values in found.items()}


def _figures(*, times: list[float], seconds: float) -> tuple[float, float, float]:
    ordered = sorted(times)
    return (
        len(ordered) / seconds,
        ordered[len(ordered) // 2],
        ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
    )


def _keep(
    found: dict[str, list[float]], clients: int, figures: dict[str, tuple[float, float, float]]
) -> None:
    base = figures["plain"]
    for mode, (rate, p50, p99) in figures.items():
        named = {f"{mode}_{clients}_per_second": rate, f"{mode}_{clients}_p50_ms": p50}
        named[f"{mode}_{clients}_p99_ms"] = p99
        if mode != "plain":
            named[f"throughput_ratio_{mode}_{clients}"] = rate / base[0]
            named[f"latency_ratio_{mode}_{clients}"] = p50 / base[1]
        for name, value in named.items():
            found.setdefault(name, []).append(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="short rounds, for a first look")
    options = parser.parse_args()
    rounds, seconds = (2, 1.0) if options.quick else (5, 4.0)
    with tempfile.TemporaryDirectory() as folder, opened(Path(folder)) as world:
        with asyncio.Runner(loop_factory=event_loop()) as runner:
            results = runner.run(_measure(world, rounds, seconds))
        sizes = {"front_parameters": world.parameters[0], "tail_parameters": world.parameters[1]}
    report("serving", {"rounds": rounds, **sizes, **results}, as_json=options.json)


if __name__ == "__main__":
    main()
