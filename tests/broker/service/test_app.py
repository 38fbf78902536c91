"""The broker over real TLS on loopback, with clients that are wrong, hostile, or many."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from cenacle.broker.client import BrokerClient
from cenacle.broker.identity import BrokerIdentity
from cenacle.broker.messages import CheckpointRecord, StateRecord
from cenacle.broker.server import bind, serving
from cenacle.broker.tls import client_context, ensure_certificate
from cenacle.crypto import HpkePrivateKey, SecretBytes, SigningKey
from cenacle.documents.base import MAX_DOCUMENT_BYTES, b64, format_time, parse_time
from cenacle.documents.dsse import Envelope
from cenacle.documents.party import Party
from cenacle.errors import (
    CenacleError,
    ConflictError,
    DocumentError,
    EvidenceError,
    InputError,
    ProofError,
    RefusedError,
    SealError,
    SignatureError,
    UnavailableError,
)

CANARY = "canary-7f3a9c"


@pytest.fixture
def served(live_world: Any) -> Iterator[Any]:
    """The world, with its broker behind TLS."""
    files = ensure_certificate(live_world.folder / "broker")
    with serving(live_world.broker, files):
        yield live_world


@pytest.fixture(scope="module")
def shared(
    make_live_world: Callable[[Path], Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """The same, for tests that leave it as it is."""
    world = make_live_world(tmp_path_factory.mktemp("shared"))
    with serving(world.broker, ensure_certificate(world.folder / "broker")):
        yield world
    world.close()


@pytest.fixture
def client(served: Any) -> Iterator[BrokerClient]:
    with BrokerClient(served.broker.identity, timeout=20) as opened:
        yield opened


@contextlib.contextmanager
def _raw(world: Any) -> Iterator[httpx.Client]:
    """A client without manners."""
    identity = world.broker.identity
    with httpx.Client(
        base_url=identity.url, verify=client_context(identity.tls_certificate), timeout=20
    ) as opened:
        yield opened


@pytest.fixture(scope="module")
def raw(shared: Any) -> Iterator[httpx.Client]:
    with _raw(shared) as opened:
        yield opened


def _party(name: str, key: SigningKey, created: str) -> Envelope:
    party = Party(
        name=name,
        signing_key=b64(key.verify_key.raw),
        hpke_key=b64(HpkePrivateKey.generate().public_key.raw),
        created=created,
    )
    return Envelope.sign(party, key)


# ------------------------------------------------------------------ the whole conversation


def test_a_job_through_the_client(served: Any, client: BrokerClient) -> None:
    """Every method, in the order of a job."""
    world = served
    client.check_identity()
    owner = world.actors["hospital-a"]
    token = client.invite(owner.signing, "hospital-a").token
    key = SigningKey.generate()
    envelope = _party("lab", key, format_time(world.clock()))
    assert client.register(envelope, token) == envelope.digest
    assert client.party("lab").name == "lab"
    asset = world.manifest("hospital-b", "more")
    signing = world.actors["hospital-b"].signing
    with SecretBytes.random(32) as secret:
        assert client.deposit(Envelope.sign(asset, signing), secret, signing) == asset.digest
    contract = world.contract()
    digest = client.propose(contract, world.actors["clinic"].signing)
    assert {c.verdict for c in client.review(digest).clauses} == {"met", "pending", "failed"}
    for name in ("hospital-a", "hospital-b"):
        assert client.sign(digest, world.actors[name].signing) == name
    assert client.contract(digest).signed == {"hospital-a", "hospital-b"}
    assert (digest, "study") in client.contracts_of(owner.signing, "hospital-a")
    assert client.open_run(digest) is None

    enclave = world.enclave(digest)
    enclave.nonce = client.nonce(digest)
    answer = client.release(enclave.request(nonce=b64(enclave.nonce)))
    assert set(enclave.open(answer)) == {"hospital-a", "hospital-b", "job"}
    assert client.open_run(digest) == answer.run
    client.checkpoint(
        CheckpointRecord(run=answer.run, number=1, content="sha256:" + "1" * 64), enclave.signing
    )
    state = StateRecord(contract=digest, run=answer.run, number=1, content="sha256:" + "2" * 64)
    assert answer.state_number == 0
    for _ in range(2):
        assert client.advance_state(state, enclave.signing).number == 1
    settled = client.settle(Envelope.sign(enclave.settlement(answer.run), enclave.signing))
    assert client.inclusion(settled.index).entry == settled.entry

    _, head = client.head()
    second = client.propose(world.contract(name="second"), world.actors["clinic"].signing)
    client.veto(second, "clinic", "no", world.actors["clinic"].signing)
    _, newer = client.head(head)
    assert newer.size == head.size + 2
    entries = client.entries(newer.size)
    assert len(entries) == newer.size
    assert [json.loads(entry)["kind"] for entry in entries[-2:]] == ["contract", "veto"]
    world.sign(second, "hospital-a", "hospital-b")
    third = world.agree(name="third")
    run = world.enclave(third).release().run
    client.abandon(run, owner.signing, "hospital-a")
    assert client.open_run(third) is None


def test_a_served_broker_watches_its_runs(
    served: Any, client: BrokerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = served
    enclave = world.enclave(
        world.agree(enclave={"reference": world.reference(), "layers": [], "reattest_seconds": 60})
    )
    run = enclave.release().run
    nonce, entries = client.run_nonce(run)
    assert entries == 0
    evidence = enclave.attest(nonce)
    answer = client.reattest(nonce, evidence, run, enclave.signing)
    assert answer.accepted
    assert timedelta(0) < parse_time(answer.due) - world.clock() <= timedelta(minutes=2)
    with pytest.raises(EvidenceError, match="shown before"):
        client.reattest(nonce, evidence, run, enclave.signing)
    monkeypatch.setattr(world.broker, "clock", lambda: world.clock() + timedelta(seconds=121))
    record = CheckpointRecord(run=run, number=1, content="sha256:" + "1" * 64)
    with pytest.raises(RefusedError, match="revoked"):
        client.checkpoint(record, enclave.signing)
    until = time.monotonic() + 60
    while "revocation" not in world.kinds():  # it looks every two seconds
        assert time.monotonic() < until
        time.sleep(0.05)


def test_errors_arrive_as_they_were_raised(served: Any, client: BrokerClient) -> None:
    world = served
    clinic = world.actors["clinic"].signing
    digest = client.propose(world.contract(), clinic)
    enclave = world.enclave(digest)
    enclave.measurements["package"] = "sha256:" + "0" * 64
    request = enclave.request()
    with pytest.raises(RefusedError) as here:
        world.desk.release(request)
    with pytest.raises(RefusedError) as there:
        client.release(request)
    for name in ("what", "found", "expected", "remedy", "clauses"):
        assert getattr(there.value, name) == getattr(here.value, name)
    assert {c["name"] for c in there.value.clauses} == {"approval", "measurement package"}

    with pytest.raises(InputError, match="not known") as unknown:
        client.review("sha256:" + "0" * 64)
    assert unknown.value.found == "sha256:" + "0" * 64
    assert unknown.value.remedy == "propose it with `cenacle propose`"
    with pytest.raises(ConflictError, match="proposed already"):
        client.propose(world.contract(), clinic)
    with pytest.raises(RefusedError, match="only the broker's owner"):
        client.invite(clinic, "clinic")
    with pytest.raises(SignatureError, match="a stranger"):
        client.sign(digest, SigningKey.generate())
    with pytest.raises(SignatureError):
        client.invite(clinic, "hospital-a")
    asset = world.manifest("clinic")
    upload = world.upload(asset, wrapped_key=b64(b"garbage"))
    with pytest.raises(SealError):
        client._post(upload.to_fields(), "assets")


def test_a_replayed_release_over_the_network(served: Any, client: BrokerClient) -> None:
    world = served
    enclave = world.enclave(world.agree())
    request = enclave.request()
    with ThreadPoolExecutor(4) as pool:

        def ask(_: int) -> bool:
            with BrokerClient(world.broker.identity, timeout=20) as own:
                try:
                    own.release(request)
                except CenacleError as error:
                    return "shown before" not in str(error)
                return True

        assert sum(pool.map(ask, range(4))) == 1
    assert all(world.uses(asset) == 1 for asset in world.assets.values())


def test_many_clients_at_once(served: Any) -> None:
    world = served
    digests = [world.agree(name=f"study-{i}") for i in range(8)]

    def job(digest: str) -> str:
        enclave = world.enclave(digest)
        with BrokerClient(world.broker.identity, timeout=30) as own:
            enclave.nonce = own.nonce(digest)
            answer = own.release(enclave.request(nonce=b64(enclave.nonce)))
            own.settle(Envelope.sign(enclave.settlement(answer.run), enclave.signing))
            secret: str = enclave.open(answer)["job"].hex()
            return secret

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(job, digests))) == 8
    assert world.kinds().count("settlement") == 8


# ------------------------------------------------------------------ TLS


def test_only_the_pinned_certificate_is_accepted(shared: Any, tmp_path: Path) -> None:
    other = ensure_certificate(tmp_path / "other")
    genuine = shared.broker.identity
    fields = {**genuine.to_fields(), "tls_certificate": other.certificate_pem}
    with (
        BrokerClient(BrokerIdentity.from_fields(fields)) as client,
        pytest.raises(UnavailableError, match="cannot be reached") as caught,
    ):
        client.check_identity()
    assert "pinned certificate" in str(caught.value)


def test_a_client_without_tls_gets_nothing(shared: Any) -> None:
    host, port = shared.broker.identity.url.removeprefix("https://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"GET /v1/identity HTTP/1.1\r\nHost: x\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            assert b"HTTP" not in connection.recv(1000)


def test_an_old_version_of_tls_is_refused(shared: Any) -> None:
    identity = shared.broker.identity
    host, port = identity.url.removeprefix("https://").split(":")
    context = ssl.create_default_context(cadata=identity.tls_certificate)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        socket.create_connection((host, int(port)), timeout=10) as connection,
        pytest.raises(ssl.SSLError),
    ):
        context.wrap_socket(connection, server_hostname=host)


def test_a_broker_with_other_keys_behind_the_same_certificate(shared: Any) -> None:
    fields = shared.broker.identity.to_fields()
    fields["signing_key"] = b64(SigningKey.generate().verify_key.raw)
    with (
        BrokerClient(BrokerIdentity.from_fields(fields)) as client,
        pytest.raises(ProofError, match="other keys than pinned"),
    ):
        client.check_identity()


def test_an_identity_without_an_address(world: Any) -> None:
    with pytest.raises(InputError, match="no address"):
        BrokerClient(world.broker.identity)


def test_nobody_listens(shared: Any) -> None:
    fields = {**shared.broker.identity.to_fields(), "url": "https://127.0.0.1:1"}
    with (
        BrokerClient(BrokerIdentity.from_fields(fields)) as client,
        pytest.raises(UnavailableError, match="ConnectError"),
    ):
        client.head()


def test_a_taken_port_is_said_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UnavailableError, match=f"port {port}"):
            bind("127.0.0.1", port)
    with pytest.raises(UnavailableError, match="cannot listen"):
        bind("192.0.2.1", 0)


# ------------------------------------------------------------------ hostile requests

POSTS = [
    "/v1/parties",
    "/v1/invitations",
    "/v1/assets",
    "/v1/contracts",
    "/v1/contracts/x/signatures",
    "/v1/vetoes",
    "/v1/contracts/of-party",
    "/v1/releases",
    "/v1/runs/x/evidence",
    "/v1/checkpoints",
    "/v1/states",
    "/v1/settlements",
    "/v1/abandonments",
    "/v1/budgets",
    "/v1/attestation",
    "/v1/attestation/keys",
    "/v1/attestation/keys/activate",
]
ENVELOPE = {"payload": "e30=", "payloadType": "x", "signatures": []}
BODIES: list[bytes] = [
    b"",
    b"{",
    b"\xff\xfe",
    b"null",
    b"[]",
    b"0",
    b'""',
    b"{}",
    b'{"a": 1, "a": 2}',
    b"NaN",
    b'{"a": Infinity}',
    b"1" * 5000,
    b"[" * 100_000,
    b'{"a":' * 40 + b"1" + b"}" * 40,
    json.dumps(ENVELOPE).encode(),
    json.dumps({**ENVELOPE, "payload": 5}).encode(),
    json.dumps({**ENVELOPE, "signatures": [5]}).encode(),
    json.dumps({**ENVELOPE, "signatures": [{"keyid": [], "sig": {}}]}).encode(),
    json.dumps({**ENVELOPE, "payloadType": "\ud800"}).encode(),
    json.dumps({"party": ENVELOPE, "token": "\ud800"}).encode(),
    json.dumps({"manifest": ENVELOPE, "deposit": ENVELOPE}).encode(),
    json.dumps({"keyid": "\ud800\x00", "signature": "AAAA"}).encode(),
    json.dumps({"contract": "\x00", "nonce": "", "evidence": {}}).encode(),
]


@pytest.mark.parametrize("path", POSTS)
def test_whatever_is_sent_gets_one_clear_error(shared: Any, raw: httpx.Client, path: str) -> None:
    before = shared.state()
    for body in BODIES:
        response = raw.post(path, content=body, headers={"content-type": "application/json"})
        fields = response.json()
        assert response.status_code in {400, 403}, (body[:50], fields)
        error = CenacleError.from_dict(fields)
        assert isinstance(error, InputError | SignatureError), body[:50]
        assert error.what
        assert "the broker failed" not in error.what
    assert shared.state() == before


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1",
        "/v2/identity",
        "/v1/identity/",
        "/docs",
        "/openapi.json",
        "/redoc",
        "/v1/parties",
        "/v1/parties/a/b",
        "/v1/log/head/x",
        "/v1/../v1/identity/x",
    ],
)
def test_an_unknown_address(raw: httpx.Client, path: str) -> None:
    response = raw.get(path)
    assert response.status_code in {404, 405}
    with pytest.raises(InputError, match="no such address"):
        raise CenacleError.from_dict(response.json())


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS"])
def test_an_unknown_method(raw: httpx.Client, method: str) -> None:
    response = raw.request(method, "/v1/releases")
    assert response.status_code == 405
    assert "no such address" in response.json()["what"]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/log/inclusion/-1", 400),
        ("/v1/log/inclusion/x", 400),
        ("/v1/log/inclusion/99999999", 400),
        ("/v1/log/inclusion/" + "9" * 40, 400),
        ("/v1/log/inclusion/%D9%A3", 400),
        ("/v1/log/consistency/99999999", 400),
        ("/v1/log/entries/1e3", 400),
        ("/v1/log/entries/999999999", 200),
        ("/v1/contracts/%00/nonce", 400),
        ("/v1/contracts/%FF%FE/review", 400),
        ("/v1/parties/%00", 400),
        ("/v1/parties/" + "a" * 5000, 400),
        ("/v1/contracts/'%20OR%201=1--/open-run", 200),
    ],
)
def test_odd_values_in_an_address(raw: httpx.Client, path: str, status: int) -> None:
    response = raw.get(path)
    assert response.status_code == status, response.text
    assert "the broker failed" not in response.text


def test_a_body_over_the_limit(raw: httpx.Client) -> None:
    size = 2 * MAX_DOCUMENT_BYTES + 1
    response = raw.post("/v1/contracts", content=b" " * size)
    assert response.status_code == 400
    with pytest.raises(DocumentError, match="too large"):
        raise CenacleError.from_dict(response.json())


@contextlib.contextmanager
def _connected(identity: BrokerIdentity) -> Iterator[ssl.SSLSocket]:
    """A connection over which a test says whatever it likes."""
    host, port = (identity.url or "").removeprefix("https://").split(":")
    context = client_context(identity.tls_certificate or "")
    with (
        socket.create_connection((host, int(port)), timeout=30) as connection,
        context.wrap_socket(connection, server_hostname=host) as tls,
    ):
        yield tls


def test_an_endless_body_is_cut_off(shared: Any) -> None:
    """Chunked, without a length: it is refused while it arrives."""
    with _connected(shared.broker.identity) as tls:
        tls.sendall(b"POST /v1/contracts HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
        sent = 0
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while sent < 64:
                tls.sendall(chunk)
                sent += 1
        answer = b""
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while b"too large" not in answer and (part := tls.recv(65536)):
                answer += part
    assert sent < 64 or b"too large" in answer


def _said(shared: Any, *parts: bytes) -> bytes:
    """Everything that the broker answers until it closes the connection."""
    answer = b""
    with (
        _connected(shared.broker.identity) as tls,
        contextlib.suppress(ConnectionError, ssl.SSLError),
    ):
        try:
            for part in parts:
                tls.sendall(part)
        finally:
            while part := tls.recv(65536):
                answer += part
    return answer


HEAD = b"GET /v1/log/head HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /v1/releases HTTP/1.1\r\nHost: x\r\n"
SMUGGLED = b"GET /v1/identity HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"

HOSTILE = {
    "two lengths": POST + b"Content-Length: 2\r\nContent-Length: 90\r\n\r\n{}",
    "a length and chunks": POST
    + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks and a length": POST
    + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "chunks that are not last": POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "an odd spelling of chunks": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "a negative length": POST + b"Content-Length: -1\r\n\r\n",
    "a signed length": POST + b"Content-Length: +2\r\n\r\n{}",
    "a hexadecimal length": POST + b"Content-Length: 0x2\r\n\r\n{}",
    "an endless length": POST + b"Content-Length: " + b"9" * 40 + b"\r\n\r\n{}",
    "no chunk's size": POST + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n{}\r\n0\r\n\r\n",
    "a chunk's endless size": POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 40 + b"\r\n",
    "a chunk that goes on": POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{}\r\n0\r\n\r\n",
    "space before the colon": POST + b"Content-Length : 2\r\n\r\n{}",
    "a folded header": HEAD + b"X: a\r\n b\r\n\r\n",
    "a header without a name": HEAD + b": a\r\n\r\n",
    "a NUL in a header": HEAD + b"X: a\x00b\r\n\r\n",
    "a lonely carriage return": HEAD + b"X: a\rY: b\r\n\r\n",
    "another protocol": b"SSH-2.0-x\r\n\r\n",
    "another version": b"GET / HTTP/9.9\r\nHost: x\r\n\r\n",
    "no method": b" / HTTP/1.1\r\nHost: x\r\n\r\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_malformed_request_ends_its_connection(shared: Any, name: str) -> None:
    """Nothing after it is read, so no second request can hide in it."""
    answer = _said(shared, HOSTILE[name] + SMUGGLED)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1") == 1
    assert b"origin" not in answer


@pytest.mark.parametrize(
    ("start", "part"),
    [
        (b"GET /", b"a" * 8192),
        (HEAD + b"X: ", b"a" * 8192),
        (HEAD, b"X: " + b"a" * 1000 + b"\r\n"),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n", b"X: a\r\n" * 200),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n2;x=", b"a" * 8192),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n" * 200),
    ],
    ids=["an address", "a header", "headers", "trailers", "a chunk's extension", "tiny chunks"],
)
def test_what_is_no_body_has_a_limit(shared: Any, start: bytes, part: bytes) -> None:
    answer = _said(shared, start, *[part] * (64 * 1024 * 1024 // len(part)))
    # The answer may be lost where the connection was reset while this side still wrote.
    assert answer.count(b"HTTP/1.1") <= 1
    assert b"200 OK" not in answer


def test_a_head_below_the_limit_is_read(shared: Any) -> None:
    filler = b"X: " + b"a" * 60_000 + b"\r\n"
    with _connected(shared.broker.identity) as tls:
        for _ in range(3):  # each request has its own
            tls.sendall(HEAD + filler + b"\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                answer += tls.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200 ")


def test_two_requests_in_one_breath(shared: Any) -> None:
    closing = HEAD + b"Connection: close\r\n\r\n"
    answer = _said(shared, HEAD + b"\r\n" + closing)
    assert answer.count(b"HTTP/1.1 200 ") == 2


@pytest.mark.parametrize("upgrade", [b"websocket", b"h2c", b"tls/1.0"])
def test_no_other_protocol_is_taken_up(shared: Any, upgrade: bytes) -> None:
    answer = _said(
        shared, HEAD + b"Connection: Upgrade, close\r\nUpgrade: " + upgrade + b"\r\n\r\n"
    )
    assert answer.startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 400 "))
    assert answer.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/contracts/sha256:" + "a" * 64 + "/nonce", 200),
        ("GET", "/v1/contracts/sha256%3A" + "a" * 64 + "/nonce", 200),
        ("GET", "/v1/contracts/sha256:" + "a" * 64 + "/nonce?x=y", 200),
        ("GET", "/v1/contracts//nonce", 404),
        ("GET", "/v1/contracts/a/b/nonce", 404),
        ("GET", "/v1/contracts/nonce", 400),
        ("GET", "/v1/contracts/%2e%2e/nonce", 400),
        ("POST", "/v1/contracts/sha256:" + "a" * 64 + "/nonce", 405),
        ("GET", "/v1/releases", 405),
        ("POST", "/v1/releases/", 404),
        ("POST", "/v1/releases?x=y", 400),
        ("PUT", "/v1/releases", 405),
    ],
)
def test_the_front_answers_as_the_router_would(
    shared: Any, raw: httpx.Client, method: str, path: str, status: int
) -> None:
    response = raw.request(method, path)
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert status == 200 or response.json()["what"]


def test_a_document_over_the_limit_within_the_bodys(raw: httpx.Client) -> None:
    body = b'"' + b"a" * (MAX_DOCUMENT_BYTES + 1) + b'"'
    response = raw.post("/v1/releases", content=body)
    assert response.status_code == 400
    assert "too large" in response.json()["what"]


def test_a_request_that_is_cut_off_does_nothing(served: Any) -> None:
    """Half a body is no body, whatever it says so far."""
    world = served
    digest = world.agree()
    body = json.dumps(world.enclave(digest).request().to_fields()).encode()
    with _connected(world.broker.identity) as tls:
        length = len(body) + 10
        head = f"POST /v1/releases HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n"
        tls.sendall(head.encode() + body)
    with BrokerClient(world.broker.identity, timeout=20) as client:
        client.head()  # what came before was dealt with
    assert world.desk.open_run(digest) is None


# ------------------------------------------------------------------ what is never written down


def _logged_by_the_broker(caplog: pytest.LogCaptureFixture) -> str:
    """Without what this process logs as a client."""
    return "\n".join(
        f"{record.getMessage()} {record.exc_text}"
        for record in caplog.records
        if not record.name.startswith("http")
    )


def test_an_unforeseen_failure_tells_its_class_alone(
    served: Any,
    client: BrokerClient,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def broken(name: str) -> None:
        raise ValueError(f"{CANARY} {name}")

    monkeypatch.setattr(served.broker, "party", broken)
    with (
        caplog.at_level(logging.DEBUG),
        pytest.raises(CenacleError, match=r"the broker failed \(ValueError\)"),
    ):
        client.party(CANARY)
    assert CANARY not in _logged_by_the_broker(caplog)
    assert CANARY not in "".join(capfd.readouterr())


def test_nothing_that_a_client_sends_is_logged(
    served: Any,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Paths, headers, bodies, tokens, good and bad; with every logger as loud as it goes."""
    world = served
    digest = world.agree(name=CANARY)
    caplog.clear()
    loggers = [logging.getLogger(name) for name in ("uvicorn", "uvicorn.error", "fastapi")]
    with caplog.at_level(1), _raw(world) as raw, contextlib.ExitStack() as levels:
        for logger in loggers:
            levels.enter_context(caplog.at_level(1, logger=logger.name))
        raw.get(f"/v1/parties/{CANARY}", headers={"x-note": CANARY})
        raw.get(f"/{CANARY}")
        for path in POSTS:
            raw.post(path, content=CANARY.encode())
            raw.post(path, json={CANARY: CANARY})
        raw.post("/v1/parties", json={"party": ENVELOPE, "token": CANARY})
        raw.get(f"/v1/contracts/{digest}")
        raw.post("/v1/releases", json=world.enclave(digest).request().to_fields())
        host, port = world.broker.identity.url.removeprefix("https://").split(":")
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(CANARY.encode() * 10)
    assert CANARY not in _logged_by_the_broker(caplog)
    assert CANARY not in "".join(capfd.readouterr())


# ------------------------------------------------------------------ a broker that lies


def _answering(world: Any, answer: Callable[[httpx.Request], httpx.Response]) -> BrokerClient:
    """A client whose broker answers as the test says."""
    client = BrokerClient(world.broker.identity)
    client.close()
    client._http = httpx.Client(
        base_url="https://broker.test", transport=httpx.MockTransport(answer)
    )
    return client


ODD_ANSWERS = [
    b"",
    b"null",
    b"0",
    b"[]",
    b"[1]",
    b"{}",
    b'{"digest": 5, "nonce": 5, "head": 5, "run": 5, "party": null, "entries": 5}',
    b'{"nonce": "!", "head": "x", "path": ["!"], "entries": ["!"]}',
    b"[" * 100_000,
    b"<html>bad gateway</html>",
    b"\xff\xff",
]


@pytest.fixture(scope="module")
def agreed(shared: Any) -> str:
    digest: str = shared.agree()
    return digest


@pytest.mark.parametrize("body", ODD_ANSWERS)
@pytest.mark.parametrize("status", [200, 400, 502])
def test_odd_answers_are_told_in_one_sentence(
    shared: Any, agreed: str, body: bytes, status: int
) -> None:
    world = shared
    key = world.actors["clinic"].signing
    enclave = world.enclave(agreed)
    request = enclave.request()
    settlement = Envelope.sign(enclave.settlement("x"), enclave.signing)
    digest = enclave.contract
    with _answering(world, lambda _: httpx.Response(status, content=body)) as client:
        calls: list[Callable[[], object]] = [
            client.check_identity,
            lambda: client.register(world.actors["clinic"].envelope, "x"),
            lambda: client.party("clinic"),
            lambda: client.invite(key, "clinic"),
            lambda: client.propose(world.contract(name="x"), key),
            lambda: client.contract(digest),
            lambda: client.review(digest),
            lambda: client.sign(digest, key),
            lambda: client.nonce(digest),
            lambda: client.release(request),
            lambda: client.settle(settlement),
            client.head,
            lambda: client.entries(3),
            lambda: client.inclusion(0),
        ]
        if (status, body) != (200, b"[]"):  # no contracts: a good answer to this one
            calls.append(lambda: client.contracts_of(key, "clinic"))
        if not body.startswith(b"{") or b"run" in body:
            calls.append(lambda: client.open_run(digest))
        for call in calls:
            with pytest.raises(CenacleError) as caught:
                call()
            assert caught.value.what


def test_a_broker_that_rewrites_its_log(served: Any, make_world: Any, tmp_path: Path) -> None:
    world = served
    with BrokerClient(world.broker.identity, timeout=20) as client:
        _, head = client.head()
        entries = client.entries(head.size)
        # Shorter: the same broker with an older store.
        with world.store.read() as tx:
            older = world.broker.log.signed_head(tx)
        world.agree()
        _, newest = client.head(head)
        path = client._get("log", "consistency", str(head.size))["path"]
    for answer in (
        {"head": older, "path": path},
        {"head": older, "path": []},
    ):
        with (
            _answering(world, lambda _, a=answer: httpx.Response(200, json=a)) as lying,  # type: ignore[misc]
            pytest.raises(ProofError),
        ):
            lying.head(newest)
    with (
        _answering(
            world,
            lambda _: httpx.Response(200, json={"entries": [b64(e) for e in entries[:0]]}),
        ) as lying,
        pytest.raises(ProofError, match="withholds"),
    ):
        lying.entries(head.size)


def test_a_broker_that_shows_another_contract(served: Any) -> None:
    world = served
    ours, theirs = world.agree(), world.agree(name="theirs", approval="hospital-a")
    view = world.broker.contract(theirs).to_fields()
    sent: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(request)
        return httpx.Response(200, json=view)

    with _answering(world, answer) as client:
        with pytest.raises(ProofError, match="another contract"):
            client.contract(ours)
        with pytest.raises(ProofError, match="another contract"):
            client.sign(ours, world.actors["hospital-a"].signing)
    assert {request.method for request in sent} == {"GET"}  # nothing was signed


def test_a_release_that_is_not_in_the_log(served: Any) -> None:
    world = served
    first, second = world.enclave(world.agree()), world.enclave(world.agree(name="second"))
    answer, other = first.release(), second.release()
    request = first.request()
    for log in (
        other.log.model_copy(update={"index": answer.log.index}),
        answer.log.model_copy(update={"entry": other.log.entry}),
        answer.log.model_copy(update={"path": ()}),
    ):
        fields = answer.model_copy(update={"log": log}).to_fields()
        with (
            _answering(world, lambda _, f=fields: httpx.Response(200, json=f)) as client,  # type: ignore[misc]
            pytest.raises(ProofError),
        ):
            client.release(request)


@pytest.mark.parametrize("odd", ["../identity", "a/b", "a?b=c", "a#b", "%2e%2e", "\x00", "ä"])
def test_names_are_escaped_in_addresses(shared: Any, odd: str) -> None:
    with BrokerClient(shared.broker.identity, timeout=20) as client:
        with pytest.raises(InputError):
            client.party(odd)
        with pytest.raises(InputError):
            client.review(odd)
