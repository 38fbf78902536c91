"""The broker over HTTP: thin. Bytes in, one call of the broker, bytes out.

Errors travel as the fields of :class:`cenacle.errors.CenacleError`. A request may not be
larger than a document can be, and nothing that a client sends is ever logged.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import cenacle
from cenacle.broker.messages import (
    AssetUpload,
    Registration,
    ReleaseRequest,
    SignatureUpload,
)
from cenacle.broker.release import ReleaseDesk
from cenacle.broker.service import Broker
from cenacle.documents.base import MAX_DOCUMENT_BYTES, b64, parse_json
from cenacle.documents.dsse import Envelope
from cenacle.errors import (
    CenacleError,
    ConflictError,
    DocumentError,
    InputError,
    RefusedError,
    UnavailableError,
    VerificationError,
)

__all__ = ["create_app"]

_STATUS: Final[tuple[tuple[type[CenacleError], int], ...]] = (
    (InputError, 400),
    (VerificationError, 403),
    (RefusedError, 403),
    (ConflictError, 409),
    (UnavailableError, 503),
)
_MAX_BODY: Final = 2 * MAX_DOCUMENT_BYTES
_MAX_ENTRIES: Final = 1000


def _failure(error: CenacleError) -> Response:
    status = next((code for kind, code in _STATUS if isinstance(error, kind)), 500)
    return _json(error.to_dict(), status)


def _json(fields: Any, status: int = 200) -> Response:
    return Response(json.dumps(fields), status, media_type="application/json")


class _BoundedBody:
    """Refuses a body over the limit as it arrives, whatever its headers claim."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        seen = 0

        async def bounded() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > _MAX_BODY:
                raise DocumentError(
                    "a request is too large", found=f"> {_MAX_BODY} bytes", expected="less"
                )
            return message

        await self._app(scope, bounded, send)


def create_app(broker: Broker) -> FastAPI:
    """The ASGI application of one broker."""
    app = FastAPI(title="Cenacle broker", version=cenacle.__version__, openapi_url=None)
    app.add_middleware(_BoundedBody)
    desk = ReleaseDesk(broker)

    @app.exception_handler(CenacleError)
    async def refused(_: Request, error: CenacleError) -> Response:
        return _failure(error)

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> Response:
        # The class only: a message may hold what a client sent.
        return _failure(CenacleError(f"the broker failed ({type(error).__name__})"))

    def get(path: str, call: Callable[..., Any]) -> None:
        async def endpoint(request: Request) -> Response:
            return _json(await run_in_threadpool(call, **request.path_params))

        app.add_route(path, endpoint, methods=["GET"])

    def post(path: str, call: Callable[..., Any]) -> None:
        async def endpoint(request: Request) -> Response:
            body = await request.body()

            def handle() -> Any:
                return call(parse_json(body), **request.path_params)

            return _json(await run_in_threadpool(handle))

        app.add_route(path, endpoint, methods=["POST"])

    _party_routes(broker, get, post)
    _enclave_routes(desk, get, post)
    _log_routes(broker, get)
    return app


Route = Callable[[str, Callable[..., Any]], None]


def _identity(broker: Broker) -> Callable[[], Any]:
    def identity() -> Any:
        return broker.identity.to_fields()  # looked up anew: the address may be set later

    return identity


def _party_routes(broker: Broker, get: Route, post: Route) -> None:
    get("/v1/identity", _identity(broker))
    get("/v1/parties/{name}", lambda name: broker.party(name).to_fields())
    get("/v1/contracts/{digest}", lambda digest: broker.contract(digest).to_fields())
    get("/v1/contracts/{digest}/review", lambda digest: broker.review(digest).to_fields())
    post(
        "/v1/parties",
        lambda body: {"digest": broker.register(Registration.from_fields(body)).digest},
    )
    post("/v1/invitations", lambda body: broker.invite(Envelope.from_fields(body)).to_fields())
    post(
        "/v1/assets",
        lambda body: {"digest": broker.deposit(AssetUpload.from_fields(body)).digest},
    )
    post(
        "/v1/contracts",
        lambda body: {"digest": broker.propose(Envelope.from_fields(body)).digest},
    )
    post(
        "/v1/contracts/{digest}/signatures",
        lambda body, digest: {
            "party": broker.add_signature(digest, SignatureUpload.from_fields(body))
        },
    )
    post("/v1/vetoes", lambda body: {"party": broker.veto(Envelope.from_fields(body)).party})
    post(
        "/v1/contracts/of-party",
        lambda body: [
            {"digest": digest, "name": name}
            for digest, name in broker.contracts_of(Envelope.from_fields(body))
        ],
    )


def _enclave_routes(desk: ReleaseDesk, get: Route, post: Route) -> None:
    def open_run(contract: str) -> dict[str, Any]:
        run = desk.open_run(contract)
        return {"run": None if run is None else run.id}

    def checkpoint(body: Any) -> dict[str, Any]:
        desk.checkpoint(Envelope.from_fields(body))
        return {}

    def abandon(body: Any) -> dict[str, Any]:
        desk.abandon(Envelope.from_fields(body))
        return {}

    get("/v1/contracts/{contract}/nonce", lambda contract: {"nonce": b64(desk.nonce(contract))})
    get("/v1/contracts/{contract}/open-run", open_run)
    post("/v1/releases", lambda body: desk.release(ReleaseRequest.from_fields(body)).to_fields())
    post("/v1/checkpoints", checkpoint)
    post("/v1/settlements", lambda body: desk.settle(Envelope.from_fields(body)).to_fields())
    post("/v1/abandonments", abandon)


def _number(text: str, what: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise InputError(f"{what} is not a whole number", found=repr(text[:40]))
    return int(text)


def _log_routes(broker: Broker, get: Route) -> None:
    def head() -> dict[str, Any]:
        with broker.store.read() as tx:
            return {"head": broker.log.signed_head(tx)}

    def consistency(first: str) -> dict[str, Any]:
        with broker.store.read() as tx:
            path = tx.consistency_path(_number(first, "a log size"))
            return {"head": broker.log.signed_head(tx), "path": [b64(step) for step in path]}

    def inclusion(index: str) -> dict[str, Any]:
        with broker.store.read() as tx:
            number = _number(index, "a log index")
            entry = tx.entry(number)
            if entry is None:
                raise InputError("the log has no such entry", found=number)
            path = tx.inclusion_path(number)
            return {
                "index": number,
                "entry": b64(entry.body),
                "path": [b64(step) for step in path],
                "head": broker.log.signed_head(tx),
            }

    def entries(start: str) -> dict[str, Any]:
        first = _number(start, "a log index")
        with broker.store.read() as tx:
            found = tx.entries(first, first + _MAX_ENTRIES)
        return {"entries": [b64(entry.body) for entry in found]}

    get("/v1/log/head", head)
    get("/v1/log/consistency/{first}", consistency)
    get("/v1/log/inclusion/{index}", inclusion)
    get("/v1/log/entries/{start}", entries)
