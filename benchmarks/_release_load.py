"""The load: a process of its own, whose enclaves ask for keys at the same time.

Each enclave has one TLS connection and speaks just enough HTTP/1.1, so that the load
generator takes little of the machine that it shares with the broker. Keys are made before the
clock runs; evidence is made, as it must be, between the nonce and the release.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from cenacle.attestation.binding import report_data
from cenacle.attestation.simulated import InstallationKey, SimulatedAttester
from cenacle.broker.identity import BrokerIdentity
from cenacle.broker.messages import ReleaseResponse, release_context
from cenacle.broker.receipts import verify_inclusion
from cenacle.broker.tls import client_context
from cenacle.crypto import HpkePrivateKey, SecretBytes, SigningKey
from cenacle.documents.base import b64, unb64

__all__ = ["main"]


@dataclass(frozen=True)
class _Task:
    contract: str
    hpke: HpkePrivateKey
    signing: SigningKey


class _Connection:
    """One HTTPS connection; requests one after the other."""

    def __init__(self, identity: BrokerIdentity) -> None:
        assert identity.url is not None
        assert identity.tls_certificate is not None
        self._host, _, port = identity.url.removeprefix("https://").rpartition(":")
        self._port = int(port)
        self._context = client_context(identity.tls_certificate)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def request(self, method: str, path: str, body: bytes = b"") -> Any:
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, self._port, ssl=self._context)
        reader, writer = self._streams
        head = f"{method} {path} HTTP/1.1\r\nHost: {self._host}\r\n"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        writer.write(head.encode() + b"\r\n" + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        status, *lines = answer.decode().split("\r\n")
        length = next(
            int(line.split(":")[1]) for line in lines if line.lower().startswith("content-length")
        )
        fields = json.loads(await reader.readexactly(length))
        if " 200 " not in status:
            raise RuntimeError(f"{status}: {fields}")
        return fields

    async def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            await self._streams[1].wait_closed()
            self._streams = None


class _Load:
    def __init__(self, order: dict[str, Any]) -> None:
        self.identity = BrokerIdentity.from_fields(order["broker"])
        seed = SecretBytes(bytearray(unb64(order["installation"])))
        self.attester = SimulatedAttester(InstallationKey(SigningKey.from_seed(seed)))
        self.measurements = order["measurements"]
        self.layers = tuple(order["layers"])
        self.fresh = bool(order["fresh"])
        self.enclaves = int(order["enclaves"])
        self.tasks = [
            _Task(digest, HpkePrivateKey.generate(), SigningKey.generate())
            for digest in order["contracts"]
        ]
        self.spans: list[tuple[float, float]] = []
        self.answers: list[tuple[_Task, bytes, Any]] = []

    async def exchange(self, connection: _Connection, task: _Task) -> None:
        """Nonce, evidence, release; on a fresh connection the contract first, as an agent does."""
        start = time.perf_counter()
        if self.fresh:
            await connection.request("GET", f"/v1/contracts/{task.contract}")
        answer = await connection.request("GET", f"/v1/contracts/{task.contract}/nonce")
        nonce = unb64(answer["nonce"])
        public = (task.hpke.public_key.raw, task.signing.verify_key.raw)
        evidence = self.attester.attest(
            report_data(nonce, task.contract, *public),
            self.measurements,
            self.layers,
            datetime.now(UTC),
        )
        body = {
            "contract": task.contract,
            "nonce": b64(nonce),
            "evidence": evidence.to_fields(),
            "hpke_key": b64(public[0]),
            "signing_key": b64(public[1]),
        }
        released = await connection.request("POST", "/v1/releases", json.dumps(body).encode())
        self.spans.append((start, time.perf_counter()))
        self.answers.append((task, nonce, released))

    async def run(self) -> None:
        waiting = list(reversed(self.tasks))

        async def enclave() -> None:
            connection = _Connection(self.identity)
            # Parties review a contract, and every agent reads it; here before the clock runs.
            while not self.fresh and unread:
                contract = f"/v1/contracts/{unread.pop().contract}"
                await connection.request("GET", contract)
                await connection.request("GET", f"{contract}/review")
            started.release()
            await ready.wait()
            while waiting:
                await self.exchange(connection, waiting.pop())
                if self.fresh:
                    await connection.close()
            await connection.close()

        ready, started, unread = asyncio.Event(), asyncio.Semaphore(0), list(self.tasks)
        running = [asyncio.create_task(enclave()) for _ in range(self.enclaves)]
        for _ in running:
            await started.acquire()
        print("ready", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        ready.set()
        await asyncio.gather(*running)

    def check(self) -> None:
        """Every answer opens, with its enclave's key alone, to the keys of three assets."""
        for task, nonce, fields in self.answers:
            answer = ReleaseResponse.from_fields(fields)
            verify_inclusion(answer.log, self.identity)
            context = release_context(task.contract, answer.run, nonce)
            with task.hpke.open(unb64(answer.sealed_keys), *context) as message:
                assert len(json.loads(bytes(message.view()))["assets"]) == 3


def main() -> None:
    """Read an order from the first line, say ``ready``, go at the second line, answer."""
    load = _Load(json.loads(sys.stdin.readline()))
    asyncio.run(load.run())
    load.check()
    print(json.dumps({"spans": load.spans}), flush=True)


if __name__ == "__main__":
    main()
