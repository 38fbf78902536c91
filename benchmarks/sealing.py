"""Sealing against what it is made of: raw AES-GCM in memory, and ``cp`` on disk.

``python -m benchmarks.sealing [--json] [--quick]``

``seal_ratio`` and ``open_ratio``: tensors in memory, through the whole container, against
``AESGCM.encrypt_into`` / ``decrypt_into`` on 1 MiB buffers with as many threads over the
same amount of memory. ``file_ratio``: a file sealed (content digest, ``fsync`` and all)
against ``cp`` followed by ``sync`` of the copy, because sealing promises a durable file;
``file_ratio_unsynced`` is against ``cp`` alone, which leaves the copy in memory, while sealing
still syncs. ``peak_mb``: resident memory of the process that seals the file. Each pair is
measured in turn, several times; a ratio is the median over the turns, ``_best`` that of the
fastest of each. ``load`` is the machine's load average at the start: on a machine that does
other work, ``cp`` (one thread) suffers less than sealing (all cores).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from benchmarks._report import report
from cenacle.crypto import SecretBytes
from cenacle.sealing import (
    compute_digest,
    open_tensors,
    seal_path,
    seal_tensors_into,
    sealed_tensors_size,
    unseal_path,
)

MIB = 1 << 20


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def paired(reference: list[float], measured: list[float]) -> float:
    """Median of the ratios of neighbours in time, so that a load that comes and goes cancels."""
    return statistics.median(a / b for a, b in zip(reference, measured, strict=True))


def on_threads(threads: int, work: Callable[[int], None]) -> None:
    helpers = [threading.Thread(target=work, args=(i,)) for i in range(1, threads)]
    for helper in helpers:
        helper.start()
    work(0)
    for helper in helpers:
        helper.join()


def transformer(total: int) -> dict[str, Any]:
    """Tensors of a transformer's sizes, float32, ``total`` bytes or a little more."""
    rng = np.random.default_rng(0)
    width = 1024
    shapes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    tensors: dict[str, Any] = {}
    size, layer = 0, 0
    while size < total:
        for number, shape in enumerate([*shapes, (4 * width,), (width,)]):
            tensor = rng.random(shape, np.float32)
            tensors[f"layers.{layer}.{number}"] = tensor
            size += tensor.nbytes
        layer += 1
    return tensors


def memory(total: int, rounds: int, threads: int) -> dict[str, float]:
    """Sealing and opening in memory against raw AES-GCM, interleaved."""
    tensors = transformer(total)
    size = sum(tensor.nbytes for tensor in tensors.values())
    key = SecretBytes.random(32)
    aead = AESGCM(bytes(32))
    count = -(-size // MIB)
    plain = np.ones(count * MIB, np.uint8)
    sealed = np.zeros(count * (MIB + 16), np.uint8)
    container = np.zeros(sealed_tensors_size(tensors), np.uint8)
    out = np.zeros(container.nbytes, np.uint8)
    nonce, data = bytes(12), bytes(44)

    def raw(method: Callable[..., int], source: Any, step: int, sink: Any, width: int) -> None:
        def work(first: int) -> None:
            for i in range(first, count, threads):
                method(
                    nonce,
                    source[i * step : (i + 1) * step],
                    data,
                    sink[i * width : (i + 1) * width],
                )

        on_threads(threads, work)

    cases: dict[str, Callable[[], object]] = {
        "raw_seal": lambda: raw(aead.encrypt_into, plain.data, MIB, sealed.data, MIB + 16),
        "seal": lambda: seal_tensors_into(container, tensors, key, threads=threads),
        "raw_open": lambda: raw(aead.decrypt_into, sealed.data, MIB + 16, plain.data, MIB),
        "open": lambda: open_tensors(container.data, key, out=out, threads=threads),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(rounds + 1):
        for name, work in cases.items():
            taken = seconds(work)
            if turn:  # the first touches memory for the first time
                times[name].append(taken)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "seal_ratio": paired(times["raw_seal"], times["seal"]),
        "open_ratio": paired(times["raw_open"], times["open"]),
        "seal_gb_per_s": size / medians["seal"] / 1e9,
        "open_gb_per_s": size / medians["open"] / 1e9,
        "raw_seal_gb_per_s": size / medians["raw_seal"] / 1e9,
        "raw_open_gb_per_s": size / medians["raw_open"] / 1e9,
    }


def files(total: int, rounds: int, threads: int) -> dict[str, float]:
    """Sealing a file against copying it, interleaved, in a process of its own.

    A fresh process, because its peak memory is measured, and because gigabytes of arrays
    that were just freed disturb the page cache.
    """
    with tempfile.TemporaryDirectory(prefix="cenacle-bench-") as folder:
        need = 4 * total
        if shutil.disk_usage(folder).free < need:
            raise SystemExit(f"{need >> 20} MiB free are needed in {folder}; set TMPDIR")
        command = [sys.executable, "-m", "benchmarks.sealing", "--child", folder]
        command += [str(number) for number in (total, rounds, threads)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    results: dict[str, float] = json.loads(done.stdout)
    return results


def peak_mb() -> float:
    """Most memory this program ever had resident (``ru_maxrss`` would count its parent's)."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def child(folder: Path, total: int, rounds: int, threads: int) -> dict[str, float]:
    """What :func:`files` starts."""
    source, copied = folder / "plain.bin", folder / "copy.bin"
    sealed, opened = folder / "sealed", folder / "opened.bin"
    key = SecretBytes(bytes(range(32)))
    block = os.urandom(16 * MIB)
    with source.open("wb") as file:
        for _ in range(total // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    del block

    def copy() -> float:
        copied.unlink(missing_ok=True)
        os.sync()
        return seconds(
            lambda: subprocess.run(["cp", "--reflink=never", source, copied], check=True)
        )

    def seal() -> float:
        sealed.unlink(missing_ok=True)
        os.sync()
        return seconds(lambda: seal_path(source, sealed, key, threads=threads))

    copies, synced, seals = [], [], []
    for turn in range(rounds + 1):
        taken = copy()
        sync = seconds(lambda: subprocess.run(["sync", copied], check=True))
        sealing = seal()
        if turn:  # the first round fills the page cache
            copies.append(taken)
            synced.append(taken + sync)
            seals.append(sealing)
    peak = peak_mb()
    verify = seconds(lambda: compute_digest(sealed, threads=threads))
    unseals = []
    for _ in range(2):  # the first touches the file's pages for the first time
        opened.unlink(missing_ok=True)
        unseals.append(seconds(lambda: unseal_path(sealed, opened, key, threads=threads)))
    unseal = min(unseals)
    median = statistics.median
    return {
        "file_ratio": paired(synced, seals),
        "file_ratio_best": min(synced) / min(seals),
        "file_ratio_unsynced": paired(copies, seals),
        "file_ratio_unsynced_best": min(copies) / min(seals),
        "peak_mb": peak,
        "file_seal_mb_per_s": total / median(seals) / 1e6,
        "file_cp_sync_mb_per_s": total / median(synced) / 1e6,
        "file_cp_mb_per_s": total / median(copies) / 1e6,
        "file_verify_mb_per_s": total / verify / 1e6,
        "file_unseal_mb_per_s": total / unseal / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sealing", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--quick", action="store_true", help="64 MiB instead of 2 GiB, less often")
    parser.add_argument("--threads", type=int, default=min(8, len(os.sched_getaffinity(0))))
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        folder, *numbers = options.child
        print(json.dumps(child(Path(folder), *map(int, numbers))))
        return
    in_memory, on_disk = (64 * MIB, 64 * MIB) if options.quick else (1024 * MIB, 2048 * MIB)
    rounds = 3 if options.quick else 7
    results: dict[str, Any] = {
        "threads": options.threads,
        "memory_mib": in_memory // MIB,
        "file_mib": on_disk // MIB,
        "load": os.getloadavg()[0],
        **memory(in_memory, 3 * rounds, options.threads),
        **files(on_disk, rounds, options.threads),
    }
    report("sealing", results, as_json=options.json)


if __name__ == "__main__":
    main()
