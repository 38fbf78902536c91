"""The broker over HTTP: thin. Bytes in, one call of the broker, bytes out.

Errors travel as the fields of :class:`cenacle.errors.CenacleError`. A request may not be
larger than a document can be, and nothing that a client sends is ever logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

import cenacle
from cenacle.attestation.tpm_credential import AttestationKeyAnswer, AttestationKeyRequest
from cenacle.broker.attestation import AttestationRequest
from cenacle.broker.attestation_keys import AttestationKeys
from cenacle.broker.losses import UnaccountedError
from cenacle.broker.messages import (
    AssetUpload,
    EvidenceUpload,
    Registration,
    ReleaseRequest,
    SignatureUpload,
)
from cenacle.broker.release import ReleaseDesk
from cenacle.broker.service import Broker
from cenacle.broker.states import States
from cenacle.broker.together import Together
from cenacle.documents.base import MAX_DOCUMENT_BYTES, b64, parse_json, unb64
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
_THREADS: Final = 16
_SMALL: Final = 64 * 1024
_SWEEP_S: Final = 2.0
_RELEASES: Final = "/v1/releases"
_NONCE_PATH: Final = re.compile(r"/v1/contracts/([^/]+)/nonce")

_Call = Callable[..., Any]
_Async = Callable[..., Awaitable[Any]]
_Add = Callable[[str, _Call], None]


def _failure(error: Exception) -> tuple[int, Any]:
    """What goes wrong unforeseen is told by its class alone, and never raised on:

    a message may hold what a client sent, and nothing that a client sends is ever logged.
    """
    if isinstance(error, UnicodeError | RecursionError):
        error = DocumentError("a request is not Unicode text of bounded depth")
    if not isinstance(error, CenacleError):
        error = CenacleError(f"the broker failed ({type(error).__name__})")
    return next((code for kind, code in _STATUS if isinstance(error, kind)), 500), error.to_dict()


async def _respond(send: Send, status: int, fields: Any) -> None:
    body = json.dumps(fields).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _body(receive: Receive) -> bytes:
    """The request's body, refused as soon as it is over the limit, whatever its headers claim."""
    parts, seen, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise DocumentError("a request was cut off", found=f"{seen} bytes")
        part = message.get("body", b"")
        more = message.get("more_body", False)
        seen += len(part)
        parts.append(part)
        if seen > _MAX_BODY:
            raise DocumentError(
                "a request is too large", found=f"> {_MAX_BODY} bytes", expected="less"
            )
    return parts[0] if len(parts) == 1 else b"".join(parts)


class _Endpoint:
    """One route as a bare ASGI application around a coroutine."""

    def __init__(self, call: _Async, *, reads: bool) -> None:
        self._call = call
        self._reads = reads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.answer(receive, send, **scope["path_params"])

    async def answer(self, receive: Receive, send: Send, **parameters: str) -> None:
        status = 200
        try:
            sent = (await _body(receive),) if self._reads else ()
            fields = await self._call(*sent, **parameters)
        except Exception as error:
            status, fields = _failure(error)
        await _respond(send, status, fields)


class _Front:
    """What enclaves ask for most, before the router and its middleware; the rest goes on to it."""

    def __init__(self, app: ASGIApp, nonce: _Endpoint, release: _Endpoint) -> None:
        self._app = app
        self._nonce = nonce
        self._release = release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            method, path = scope["method"], scope["path"]
            if method == "POST" and path == _RELEASES:
                await self._release.answer(receive, send)
                return
            if method == "GET" and (found := _NONCE_PATH.fullmatch(path)):
                await self._nonce.answer(receive, send, contract=found[1])
                return
        await self._app(scope, receive, send)


async def _no_such_address(_: Request, error: Exception) -> Response:
    status, fields = _failure(
        InputError(
            "the broker has no such address",
            expected="a path and method of this version's protocol",
            remedy="use the same version of cenacle as the broker",
        )
    )
    status = getattr(error, "status_code", status)
    return Response(json.dumps(fields), status, media_type="application/json")


def create_app(broker: Broker) -> ASGIApp:
    """The ASGI application of one broker."""
    pool = ThreadPoolExecutor(_THREADS, "broker-request")
    desk = ReleaseDesk(broker)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        sweeping = asyncio.create_task(_sweep(desk, pool))
        yield
        sweeping.cancel()
        pool.shutdown()

    app = FastAPI(
        title="Cenacle broker", version=cenacle.__version__, openapi_url=None, lifespan=lifespan
    )
    app.router.redirect_slashes = False
    app.add_exception_handler(HTTPException, _no_such_address)
    changes = Together(broker.store.committer, desk.seal_all)

    def route(path: str, method: str, call: _Async) -> _Endpoint:
        endpoint = _Endpoint(call, reads=method == "POST")
        app.router.routes.append(Route(path, endpoint, methods=[method]))
        return endpoint

    async def threaded(call: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(pool, call)

    def get(path: str, call: _Call) -> None:
        async def handle(**parameters: str) -> Any:
            return await threaded(lambda: call(**parameters))

        route(path, "GET", handle)

    def post(path: str, call: _Call) -> None:
        async def handle(body: bytes, **parameters: str) -> Any:
            return await threaded(lambda: call(parse_json(body), **parameters))

        route(path, "POST", handle)

    async def release(body: bytes) -> Any:
        if len(body) > _SMALL:
            return await threaded(lambda: desk.release(_release_request(body)).to_fields())
        with desk.appraise(_release_request(body)) as asked:
            if asked.claims is None:
                await threaded(lambda: desk.refuse(asked))
            contract = asked.request.contract
            try:
                answer = await changes.commit(contract, lambda tx: (asked, desk.commit(tx, asked)))
            except UnaccountedError:
                # Composing takes seconds and must hold up neither the loop nor the writer.
                answer = await threaded(lambda: desk.seal(asked, desk.decide_patiently(asked)))
            return answer.to_fields()

    async def nonce(contract: str) -> Any:
        return {"nonce": b64(desk.nonce(contract))}

    nonces = route("/v1/contracts/{contract}/nonce", "GET", nonce)
    releases = route(_RELEASES, "POST", release)
    _party_routes(broker, get, post)
    _enclave_routes(desk, get, post)
    _attestation_routes(broker, post)
    _log_routes(broker, get)
    return _Front(app, nonces, releases)


async def _sweep(desk: ReleaseDesk, pool: ThreadPoolExecutor) -> None:
    """Write down again and again which runs missed their deadlines; they are refused without."""
    loop = asyncio.get_running_loop()
    while True:
        # A database that is away now is asked again; there is nobody to tell.
        with contextlib.suppress(Exception):
            await loop.run_in_executor(pool, desk.reattestation.sweep)
        await asyncio.sleep(_SWEEP_S)


def _release_request(body: bytes) -> ReleaseRequest:
    return ReleaseRequest.from_fields(parse_json(body))


def _identity(broker: Broker) -> Callable[[], Any]:
    def identity() -> Any:
        return broker.identity.to_fields()  # looked up anew: the address may be set later

    return identity


def _party_routes(broker: Broker, get: _Add, post: _Add) -> None:
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
    post("/v1/budgets", lambda body: broker.budget(Envelope.from_fields(body)).to_fields())
    post("/v1/vetoes", lambda body: {"party": broker.veto(Envelope.from_fields(body)).party})
    post(
        "/v1/contracts/of-party",
        lambda body: [
            {"digest": digest, "name": name}
            for digest, name in broker.contracts_of(Envelope.from_fields(body))
        ],
    )


def _enclave_routes(desk: ReleaseDesk, get: _Add, post: _Add) -> None:
    states = States(desk)

    def open_run(contract: str) -> dict[str, Any]:
        run = desk.open_run(contract)
        return {"run": None if run is None else run.id}

    def checkpoint(body: Any) -> dict[str, Any]:
        desk.checkpoint(Envelope.from_fields(body))
        return {}

    def abandon(body: Any) -> dict[str, Any]:
        desk.abandon(Envelope.from_fields(body))
        return {}

    def run_nonce(run: str) -> dict[str, Any]:
        nonce, entries = desk.reattestation.nonce(run)
        return {"nonce": b64(nonce), "entries": entries}

    def reattest(body: Any, run: str) -> dict[str, Any]:
        return desk.reattestation.accept(run, EvidenceUpload.from_fields(body)).to_fields()

    get("/v1/contracts/{contract}/open-run", open_run)
    get("/v1/runs/{run}/nonce", run_nonce)
    post("/v1/runs/{run}/evidence", reattest)
    post("/v1/checkpoints", checkpoint)
    post("/v1/states", lambda body: states.advance(Envelope.from_fields(body)).to_fields())
    post("/v1/settlements", lambda body: desk.settle(Envelope.from_fields(body)).to_fields())
    post("/v1/abandonments", abandon)


def _attestation_routes(broker: Broker, post: _Add) -> None:
    keys = AttestationKeys(broker)

    def challenge(body: Any) -> dict[str, Any]:
        request = AttestationKeyRequest.from_fields(body)
        return keys.challenge_attestation_key(request).to_fields()

    def activate(body: Any) -> dict[str, Any]:
        answer = AttestationKeyAnswer.from_fields(body)
        return keys.certify_attestation_key(answer).to_fields()

    def attest(body: Any) -> dict[str, Any]:
        request = AttestationRequest.from_fields(body)
        return broker.attest(unb64(request.nonce)).to_fields()

    post("/v1/attestation", attest)
    post("/v1/attestation/keys", challenge)
    post("/v1/attestation/keys/activate", activate)


def _number(text: str, what: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise InputError(f"{what} is not a whole number", found=repr(text[:40]))
    return int(text)


def _log_routes(broker: Broker, get: _Add) -> None:
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
