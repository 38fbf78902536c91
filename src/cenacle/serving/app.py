"""The service over HTTP: the Open Inference Protocol, sealed queries, evidence, metrics.

Thin, and on the operator's side: nothing in here is trusted with anything that sealed queries
hide. Nothing that a client sends is ever logged, counted by name, or kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, TypeVar
from urllib.parse import unquote

from starlette.types import Receive, Scope, Send

import cenacle
from cenacle.documents.base import parse_json, unb64
from cenacle.enclave.serving_messages import NONCE_BYTES
from cenacle.errors import InputError, UnavailableError
from cenacle.serving.answers import (
    Answer,
    BodyBudget,
    HttpError,
    Limits,
    Request,
    failure,
    read_body,
)
from cenacle.serving.backend import enclave_gone
from cenacle.serving.deployment import PLATFORM, Deployment
from cenacle.serving.metrics import METRICS_TYPE, Metrics
from cenacle.serving.open_inference import (
    BINARY_TYPE,
    JSON_TYPE,
    LENGTH_HEADER,
    encode_response,
    metadata,
    parse_request,
)
from cenacle.serving.openapi import describe
from cenacle.serving.types import ANSWER_TYPE, QUERY_TYPE

__all__ = ["ServingApp"]

T = TypeVar("T")

_SMALL: Final = 64 * 1024
"""Bodies up to here are parsed on the event loop, larger ones beside it."""
_MAX_CHALLENGE: Final = 4096
_EXTENSIONS: Final = ("binary_tensor_data", "cenacle_sealed_query", "cenacle_attestation")


@dataclass(frozen=True)
class _Route:
    """One address: its name in the metrics, its method, and what answers it."""

    name: str
    method: str
    path: re.Pattern[str]
    call: Callable[..., Awaitable[Answer]]
    reads: bool


class ServingApp:
    """The ASGI application.

    Args:
        metrics: shared with the deployments.
        limits: what strangers may cost.

    Attributes:
        current: the deployment that new requests go to; ``None`` while no enclave serves.
    """

    def __init__(self, metrics: Metrics | None = None, limits: Limits | None = None) -> None:
        self.metrics = metrics or Metrics()
        self.limits = limits = limits or Limits()
        self.current: Deployment | None = None
        self._budget = BodyBudget(limits.bodies_bytes)
        self._waiting = 0
        self._attesting = 0
        self._pool = ThreadPoolExecutor(2, "serving-parse")
        model = "/v2/models/(?P<name>[^/]+)(?:/versions/(?P<version>[^/]+))?"
        self._routes = tuple(
            _Route(name, method, re.compile(path), call, method == "POST")
            for name, method, path, call in (
                ("server", "GET", "/v2", self._server),
                ("live", "GET", "/v2/health/live", self._live),
                ("ready", "GET", "/v2/health/ready", self._ready),
                ("model", "GET", model, self._model),
                ("model-ready", "GET", f"{model}/ready", self._model_ready),
                ("infer", "POST", f"{model}/infer", self._infer),
                ("sealed", "POST", "/v1/sealed/(?P<name>[^/]+)", self._sealed),
                ("attestation", "POST", "/v1/attestation", self._attestation),
                ("metrics", "GET", "/metrics", self._metrics_page),
                ("openapi", "GET", "/openapi.json", self._openapi),
            )
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        begun = time.monotonic()
        name = "unknown"
        try:
            request = Request(scope)
            route, parameters = self._find(request)
            name = route.name
            if not route.reads:
                answer = await route.call(request, **parameters)
            else:
                limit = self.limits.body_bytes if name != "attestation" else _MAX_CHALLENGE
                with self._budget.share() as share:
                    body = await read_body(request, receive, limit, share)
                    answer = await route.call(request, body, **parameters)
        except Exception as error:
            answer, reason = failure(error)
            self.metrics.refused(reason)
        self.metrics.answered(name, answer.status, time.monotonic() - begun)
        await answer.send(send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                self._pool.shutdown(wait=False)
                return

    def _find(self, request: Request) -> tuple[_Route, dict[str, Any]]:
        methods = []
        for route in self._routes:
            if (found := route.path.fullmatch(request.path)) is not None:
                if route.method == request.method:
                    named = found.groupdict()
                    return route, {n: v and unquote(v, "utf-8") for n, v in named.items()}
                methods.append(route.method)
        if methods:
            error = InputError("this address has another method", expected=" or ".join(methods))
            raise HttpError(405, "method", error, {"Allow": ", ".join(methods)})
        raise HttpError(
            404,
            "address",
            InputError("the service has no such address", remedy="see /openapi.json"),
        )

    # ------------------------------------------------------------------ what is served

    @contextlib.contextmanager
    def _deployment(
        self, name: str | None = None, version: str | None = None
    ) -> Iterator[Deployment]:
        current = self.current
        if current is None:
            raise enclave_gone()
        if name is not None and (name != current.name or version not in (None, current.version)):
            raise HttpError(
                404,
                "model",
                InputError(
                    "there is no such model here",
                    expected=f"{current.name}, version {current.version}",
                ),
            )
        with current.entered():
            yield current

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        """A place among the queries that wait, or a refusal at once."""
        if self._waiting >= self.limits.waiting:
            raise HttpError(
                503,
                "busy",
                UnavailableError(
                    "as many queries wait as may wait", remedy="send the request again in a while"
                ),
            )
        self._waiting += 1
        self.metrics.waiting.set(self._waiting)
        try:
            yield
        finally:
            self._waiting -= 1
            self.metrics.waiting.set(self._waiting)

    async def _off_loop(self, size: int, call: Callable[[], T]) -> T:
        if size <= _SMALL:
            return call()
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)

    # ------------------------------------------------------------------ Open Inference Protocol

    async def _server(self, _: Request) -> Answer:
        return Answer.of(
            {
                "name": "cenacle",
                "version": cenacle.__version__,
                "extensions": list(_EXTENSIONS),
            }
        )

    async def _live(self, _: Request) -> Answer:
        return Answer.of({"live": True})

    async def _ready(self, _: Request) -> Answer:
        with self._deployment():
            return Answer.of({"ready": True})

    async def _model(self, _: Request, name: str, version: str | None) -> Answer:
        with self._deployment(name, version) as served:
            return Answer.of(
                {
                    "name": served.name,
                    "versions": [served.version],
                    "platform": PLATFORM,
                    "inputs": [metadata(spec) for spec in served.inputs],
                    "outputs": [metadata(spec) for spec in served.outputs],
                }
            )

    async def _model_ready(self, _: Request, name: str, version: str | None) -> Answer:
        with self._deployment(name, version) as served:
            return Answer.of({"name": served.name, "ready": True})

    async def _infer(self, request: Request, body: bytes, name: str, version: str | None) -> Answer:
        with self._deployment(name, version) as served, self._place():
            length = request.number(LENGTH_HEADER)
            if length is None:
                request.require_type(JSON_TYPE, optional=True)
            else:
                request.require_type(BINARY_TYPE, JSON_TYPE, optional=True)
            asked = await self._off_loop(len(body), lambda: parse_request(body, length))
            outputs = await served.infer(asked)
            size = sum(array.nbytes for array in outputs.values())
            data, headers = await self._off_loop(
                size, lambda: encode_response(asked, served.name, served.version, outputs)
            )
            return Answer(data, headers)

    # ------------------------------------------------------------------ sealed queries

    async def _sealed(self, request: Request, body: bytes, name: str) -> Answer:
        with self._deployment(name) as served, self._place():
            request.require_type(QUERY_TYPE)
            answer = await served.tail.sealed(body)
            return Answer(bytes(answer), {"Content-Type": ANSWER_TYPE})

    async def _attestation(self, request: Request, body: bytes) -> Answer:
        with self._deployment() as served:
            request.require_type(JSON_TYPE)
            nonce = _challenge(body)
            if self._attesting >= self.limits.attestations:
                raise HttpError(503, "busy", UnavailableError("other evidence is being made"))
            self._attesting += 1
            try:
                document = await served.tail.attest(nonce)
            finally:
                self._attesting -= 1
            view = served.served.view.to_fields()
            return Answer.of(
                {
                    "evidence": json.loads(bytes(document)),
                    **{part: view[part] for part in ("contract", "parties", "assets")},
                }
            )

    # ------------------------------------------------------------------ for operators

    async def _metrics_page(self, _: Request) -> Answer:
        self.metrics.ready.set(0 if self.current is None else 1)
        return Answer(self.metrics.page(), {"Content-Type": METRICS_TYPE})

    async def _openapi(self, _: Request) -> Answer:
        with self._deployment() as served:
            return Answer.of(describe(served, self.limits))


def _challenge(body: bytes) -> bytes:
    fields = parse_json(body)
    nonce = fields.get("nonce") if isinstance(fields, dict) and set(fields) == {"nonce"} else None
    if not isinstance(nonce, str) or len(raw := unb64(nonce)) != NONCE_BYTES:
        raise InputError(
            "a challenge has another form",
            expected=f'{{"nonce": base64 of {NONCE_BYTES} random bytes}}',
        )
    return raw
