"""Releasing keys: nonce, evidence, rules, log, wrapped keys, from 32 enclaves at once.

``python -m benchmarks.release [--json] [--quick]``

A real broker process serves over HTTPS; a second process plays 32 enclaves, each with keys of
its own and one connection, that together take the keys of contracts prepared before (three
hospitals, three assets, a recipe, as in the demonstration). Every answer is opened and its log
proof verified after the clock has stopped. With SQLite, and with a PostgreSQL server of our own
where it is installed; each several times, and the figures are those of the median round.

``per_second``: releases durable and answered. ``p50_ms``, ``p99_ms``: from asking for the nonce
to the answer with the keys, at 32 at once. ``tail_ratio``: p99 / p50. ``limit_ratio``: what a
release by itself cannot do without, over what a release took (1 / per_second): the cryptography
of one release, each operation timed alone in this process (``crypto_ms``), and one durable commit
of a row in the same database (``commit_ms``). They count in full even what releases that wait
together share: the commit, the signature of the log's head, the unwrapping of the same asset's
key. So ``limit_ratio_cpu`` compares without the commit: the cryptography over the broker's
processor time for a release (``server_cpu_ms``, all its threads; PostgreSQL's own processes not
counted).
``apart_*``: rounds in which no two enclaves ask for the same asset, so that each release unwraps
three keys. In the other rounds all ask for the same three, as when many contracts use one data
set, and the broker unwraps them once for the releases that it seals together.
``fresh_*``: one round in which each exchange is an agent's whole conversation: a new TLS
connection, the contract (whose signatures the broker then checks for the first time since it
started), nonce, release. In the other rounds connections are open and contracts were reviewed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Final

from benchmarks._release_world import LAYERS, ORIGIN, postgres, prepare
from benchmarks._report import report
from cenacle.broker.store import Store
from cenacle.crypto import HpkePrivateKey, HpkePublicKey, SecretBytes, SigningKey, VerifyKey
from cenacle.documents.base import b64, parse_json

ENCLAVES: Final = 32
_MAX_APART: Final = 256  # contracts a round: more assets than the broker remembers say less
_TICKS: Final = os.sysconf("SC_CLK_TCK")


def _median_ms(work: Callable[[], object], times: int) -> float:
    work()
    found = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return statistics.median(found) * 1e3


def cryptography_ms(times: int) -> dict[str, float]:
    """Each operation that one release of three assets cannot do without, alone on one thread."""
    broker, enclave = HpkePrivateKey.generate(), HpkePrivateKey.generate()
    signer = SigningKey.generate()
    report_, head, secret = secrets.token_bytes(1200), secrets.token_bytes(200), os.urandom(32)
    context = (b"cenacle/asset-key", b"x" * 71)
    signature, wrapped = signer.sign(report_), broker.public_key.seal(secret, *context)
    key, message = signer.verify_key.raw, secrets.token_bytes(400)
    recipient, own = enclave.public_key.raw, broker.public_key
    return {
        "verify_evidence_ms": _median_ms(lambda: VerifyKey(key).verify(signature, report_), times),
        "unwrap_3_keys_ms": 3 * _median_ms(lambda: broker.open(wrapped, *context).wipe(), times),
        "wrap_job_secret_ms": _median_ms(lambda: own.seal(secret, *context), times),
        "seal_to_enclave_ms": _median_ms(
            lambda: HpkePublicKey(recipient).seal(message, *context), times
        ),
        "sign_tree_head_ms": _median_ms(lambda: signer.sign(head), times),
    }


def commit_ms(target: str, times: int) -> float:
    """One row, durable, in this very database, with nobody else waiting."""
    with Store.open(target) as store:
        return _median_ms(
            lambda: store.run(lambda tx: tx.set_meta("benchmark", secrets.token_hex(8))), times
        )


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


@contextlib.contextmanager
def _broker(folder: Path, target: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """A broker process as its operator starts it; yields its process id and identity."""
    command = ["broker", "start", "--dir", str(folder), "--name", ORIGIN, "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "cenacle", *command, "--store", target, "--development", "--json"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        answer = json.loads(process.stdout.readline())
        yield process.pid, parse_json(Path(answer["identity"]).read_bytes())
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


def _round(pid: int, order: dict[str, Any]) -> dict[str, float]:
    """One load process from start to end; latencies in ms."""
    load = subprocess.Popen(
        [sys.executable, "-m", "benchmarks._release_load"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert load.stdin is not None
    assert load.stdout is not None
    load.stdin.write(json.dumps(order) + "\n")
    load.stdin.flush()
    if load.stdout.readline().strip() != "ready":
        raise RuntimeError(f"the load process failed with exit code {load.wait()}")
    before = _cpu_seconds(pid)
    load.stdin.write("go\n")
    load.stdin.flush()
    spans = json.loads(load.stdout.readline())["spans"]
    spent = _cpu_seconds(pid) - before
    load.wait(30)
    taken = sorted((end - start) * 1e3 for start, end in spans)
    wall = max(end for _, end in spans) - min(start for start, _ in spans)
    p50, p99 = (taken[min(len(taken) - 1, int(len(taken) * q))] for q in (0.50, 0.99))
    return {
        "per_second": len(spans) / wall,
        "p50_ms": p50,
        "p99_ms": p99,
        "tail_ratio": p99 / p50,
        "server_cpu_ms": spent * 1e3 / len(spans),
    }


def _measure(target: str, *, rounds: int, exchanges: int) -> dict[str, Any]:
    """All figures of one kind of store."""
    installation = SecretBytes.random(32)
    seed = b64(bytes(installation.view()))
    with tempfile.TemporaryDirectory(prefix="cenacle-release-") as name:
        folder = Path(name) / "broker"
        if target == "sqlite":
            target = f"sqlite:///{name}/broker.db"
        count = ENCLAVES + (rounds + 1) * exchanges
        apart = min(exchanges, _MAX_APART)
        signing = SigningKey.from_seed(installation)
        prepared = prepare(folder, target, count, signing, apart=rounds * apart)
        commits = [commit_ms(target, 50)]
        crypto = [cryptography_ms(100)]
        with _broker(folder, target) as (pid, identity):
            order = {
                "broker": identity,
                "installation": seed,
                "measurements": prepared.measurements,
                "layers": list(LAYERS),
                "enclaves": ENCLAVES,
            }
            waiting, alone = iter(prepared.contracts), iter(prepared.apart)

            def play(contracts: Iterator[str], number: int, *, fresh: bool) -> dict[str, float]:
                batch = list(islice(contracts, number))
                return _round(pid, {**order, "contracts": batch, "fresh": fresh})

            play(waiting, ENCLAVES, fresh=False)  # warms it up
            together, separate = [], []
            for _ in range(rounds):
                together.append(play(waiting, exchanges, fresh=False))
                separate.append(play(alone, apart, fresh=False))
                crypto.append(cryptography_ms(100))
            fresh = play(waiting, exchanges, fresh=True)
        commits.append(commit_ms(target, 50))
    commit = statistics.median(commits)
    parts = {name: statistics.median(one[name] for one in crypto) for name in crypto[0]}
    return {
        **_figures(together, sum(parts.values()), commit),
        "commit_ms": commit,
        "crypto_ms": sum(parts.values()),
        **parts,
        **_named("apart", _figures(separate, sum(parts.values()), commit)),
        **_named("fresh", fresh),
    }


def _figures(rounds: list[dict[str, float]], crypto: float, commit: float) -> dict[str, Any]:
    middle = sorted(rounds, key=lambda one: one["per_second"])[len(rounds) // 2]
    return {
        **middle,
        "limit_ratio": (crypto + commit) * middle["per_second"] / 1e3,
        "limit_ratio_cpu": crypto / middle["server_cpu_ms"],
        "rounds_per_second": [round(one["per_second"], 1) for one in rounds],
        "rounds_tail_ratio": [round(one["tail_ratio"], 2) for one in rounds],
    }


def _named(kind: str, figures: dict[str, Any]) -> dict[str, Any]:
    return {f"{kind}_{name}": value for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="a JSON object on the last line")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    arguments = parser.parse_args()
    rounds, exchanges = (3, 256) if arguments.quick else (5, 1024)
    results: dict[str, Any] = {"enclaves": ENCLAVES, "exchanges_a_round": exchanges}
    results["load"] = round(os.getloadavg()[0], 2)
    results["sqlite"] = _measure("sqlite", rounds=rounds, exchanges=exchanges)
    with postgres() as url:
        results["postgresql"] = (
            "skipped: PostgreSQL is not installed (Debian package: postgresql)"
            if url is None
            else _measure(url, rounds=rounds, exchanges=exchanges)
        )
    for name in ("per_second", "p50_ms", "p99_ms", "tail_ratio", "limit_ratio"):
        results[name] = results["sqlite"][name]  # the default store's, under the plain names
    report("release", results, as_json=arguments.json)


if __name__ == "__main__":
    main()
