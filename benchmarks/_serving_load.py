"""Clients of :mod:`benchmarks.serving`, in a process of their own: one command a line."""

from __future__ import annotations

import asyncio
import json
import ssl
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._serving_world import INPUTS
from cenacle.broker.tls import client_context
from cenacle.enclave.sealed_query import open_answer, seal_query
from cenacle.serving.client import SealedClient
from cenacle.serving.front import Front
from cenacle.serving.open_inference import LENGTH_HEADER, encode_request, parse_response
from cenacle.serving.types import QUERY_TYPE


class _Connection:
    """HTTP/1.1 over one TLS connection, without more than that takes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, port: int, context: ssl.SSLContext) -> _Connection:
        return cls(*await asyncio.open_connection("127.0.0.1", port, ssl=context))

    async def post(
        self, path: str, body: bytes, headers: dict[str, str]
    ) -> tuple[dict[str, str], bytes]:
        lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self._writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        if " 200 " not in head[0]:
            raise RuntimeError(head[0])
        found = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in head[1:] if line)
        }
        return found, await self._reader.readexactly(int(found["content-length"]))

    async def close(self) -> None:
        self._writer.transport.abort()


class _Load:
    def __init__(self, config: dict[str, Any]) -> None:
        pem = Path(config["certificate"]).read_text()
        self._context = client_context(pem)
        self._ports: dict[str, int] = config["ports"]
        self._contract = config["contract"]
        self._front = Front(Path(config["front"]).read_bytes(), threads=1)
        self._x = np.random.default_rng(1).normal(size=(1, INPUTS)).astype(np.float32)
        self._body, self._headers = encode_request({"x": self._x})
        url = f"https://127.0.0.1:{self._ports['enclave']}"
        with SealedClient(
            url, self._contract, front=config["front"], certificate=pem, development=True
        ) as client:
            self._enclave = client.attest()
            self._wanted = client.infer({"x": self._x})["y"]

    async def _plain(self, connection: _Connection) -> Any:
        headers, body = await connection.post("/v2/models/net/infer", self._body, self._headers)
        return parse_response(body, int(headers[LENGTH_HEADER.lower()])).outputs["y"]

    async def _sealed(self, connection: _Connection) -> Any:
        crossing = self._front.run({"x": self._x})
        query, key = seal_query(self._enclave.hpke_key, self._contract, crossing)
        _, body = await connection.post("/v1/sealed/net", query, {"Content-Type": QUERY_TYPE})
        return open_answer(key, body)["y"]

    async def run(self, mode: str, clients: int, seconds: float) -> dict[str, Any]:
        """Milliseconds of each request, from clients that each send the next after the last.

        And how many seconds it took until the last answer was there.
        """
        port = self._ports["plain" if mode == "plain" else "enclave"]
        ask = self._sealed if mode == "sealed" else self._plain
        connections = [await _Connection.open(port, self._context) for _ in range(clients)]
        for connection in connections:
            np.testing.assert_allclose(await ask(connection), self._wanted, rtol=1e-3, atol=1e-5)
        start = time.perf_counter()
        end = start + seconds
        times: list[float] = []

        async def one(connection: _Connection) -> None:
            begun = start
            while begun < end:
                await ask(connection)
                ended = time.perf_counter()
                times.append(1000 * (ended - begun))
                begun = ended

        await asyncio.gather(*map(one, connections))
        elapsed = time.perf_counter() - start
        for connection in connections:
            await connection.close()
        return {"times": times, "seconds": elapsed}


def main() -> None:
    """Read the configuration, then a command a line; answer each with a line."""
    load = _Load(json.loads(sys.stdin.readline()))
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(asyncio.run(load.run(**command))), flush=True)


if __name__ == "__main__":
    main()
