"""The service over HTTP: what it answers, what it refuses, and that it goes on."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import socket
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

from cenacle.broker.tls import client_context, ensure_certificate
from cenacle.enclave.tensor_bytes import Tensors
from cenacle.errors import EnclaveError, RefusedError
from cenacle.serving.answers import Limits
from cenacle.serving.backend import QueryError, enclave_gone
from cenacle.serving.open_inference import LENGTH_HEADER, encode_request, parse_response
from tests.support.serving_world import CONTRACT, FakeTail, World

INFER = "/v2/models/net/infer"
SEALED = {"Content-Type": "application/vnd.cenacle.sealed-query"}
ROW = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}
QUERY = {"inputs": [ROW]}


def _head(address: str, length: int) -> bytes:
    """A request without a content type."""
    return f"POST {address} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode()


def _tail(world: World) -> FakeTail:
    assert isinstance(world.tail, FakeTail)
    return world.tail


# ---------------------------------------------------------------------------- what it answers


@pytest.mark.parametrize("address", [INFER, f"/v2/models/net/versions/{CONTRACT}/infer"])
@pytest.mark.parametrize("binary", [True, False])
def test_inference(world: World, address: str, binary: bool) -> None:
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    body, headers = encode_request({"x": x}, request_id="q", binary=binary)
    answer = httpx.post(world.url + address, content=body, headers=headers)
    assert answer.status_code == 200
    length = answer.headers.get(LENGTH_HEADER)
    got = parse_response(answer.content, None if length is None else int(length))
    assert (got.model, got.version, got.id) == ("net", CONTRACT, "q")
    assert got.outputs["y"].tolist() == (2 * x).tolist()


def test_a_request_without_a_type_is_json(world: World) -> None:
    with socket.create_connection(("127.0.0.1", world.port)) as raw:
        body = json.dumps(QUERY).encode()
        raw.sendall(_head(INFER, len(body)) + body)
        assert raw.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_a_chunked_request_is_read(world: World) -> None:
    parts = [json.dumps(QUERY).encode()[i : i + 7] for i in range(0, 200, 7)]
    answer = httpx.post(
        world.url + INFER, content=iter(parts), headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 200


def test_sealed_bytes_go_to_the_enclave_and_back_as_they_are(world: World) -> None:
    answer = httpx.post(f"{world.url}/v1/sealed/net", content=b"\x00query", headers=SEALED)
    assert answer.content == b"yreuq\x00"
    assert answer.headers["content-type"] == "application/vnd.cenacle.sealed-answer"
    assert _tail(world).queries[-1] == b"\x00query"


def test_evidence_comes_with_the_documents_that_judge_it(world: World) -> None:
    nonce = bytes(range(32))
    answer = httpx.post(
        f"{world.url}/v1/attestation", json={"nonce": base64.b64encode(nonce).decode()}
    )
    assert answer.json() == {
        "evidence": {"nonce": nonce.hex()},
        "contract": {"a": 1},
        "parties": [{"b": 2}],
        "assets": {},
    }


# ---------------------------------------------------------------------------- what it refuses

CASES: list[tuple[str, str, dict[str, Any], int]] = [
    ("GET", "/", {}, 404),
    ("GET", "/v2/", {}, 404),
    ("GET", "/v2/models/other", {}, 404),
    ("GET", "/v2/models/net/versions/1/ready", {}, 404),
    ("GET", "/v2/models/net%2fready", {}, 404),
    ("GET", INFER, {}, 405),
    ("DELETE", "/v2", {}, 405),
    ("POST", "/v2/models/other/infer", {"json": QUERY}, 404),
    ("POST", INFER, {"json": {}}, 400),
    ("POST", INFER, {"content": b"", "headers": {"Content-Type": "application/json"}}, 400),
    ("POST", INFER, {"json": QUERY, "headers": {"Content-Type": "text/plain"}}, 415),
    ("POST", INFER, {"json": QUERY, "headers": {"Content-Type": ";;"}}, 415),
    ("POST", INFER, {"json": QUERY, "headers": {"Content-Type": "application/octet-stream"}}, 415),
    ("POST", INFER, {"json": QUERY, "headers": {"Content-Encoding": "gzip"}}, 415),
    ("POST", INFER, {"json": QUERY, "headers": {LENGTH_HEADER: "-1"}}, 400),
    ("POST", INFER, {"json": QUERY, "headers": {LENGTH_HEADER: "1e3"}}, 400),
    ("POST", INFER, {"json": QUERY, "headers": {LENGTH_HEADER: "99999"}}, 400),
    ("POST", INFER, {"json": QUERY, "headers": [(LENGTH_HEADER, "1"), (LENGTH_HEADER, "2")]}, 400),
    ("POST", INFER, {"json": {"inputs": [{**ROW, "name": "z"}]}}, 400),
    ("POST", INFER, {"json": {**QUERY, "outputs": [{"name": "z"}]}}, 400),
    ("POST", INFER, {"json": {**QUERY, "parameters": {"ticket": "{}"}}}, 403),
    ("POST", "/v1/sealed/other", {"content": b"q", "headers": SEALED}, 404),
    ("POST", "/v1/sealed/net", {"content": b"q"}, 415),
    ("POST", "/v1/attestation", {"json": {}}, 400),
    ("POST", "/v1/attestation", {"json": {"nonce": "AAAA"}}, 400),
    ("POST", "/v1/attestation", {"json": {"nonce": 7}}, 400),
    ("POST", "/v1/attestation", {"json": {"nonce": "x" * 5000}}, 413),
]


@pytest.mark.parametrize(("method", "address", "sent", "status"), CASES)
def test_refusals_are_in_words(
    world: World, method: str, address: str, sent: dict[str, Any], status: int
) -> None:
    answer = httpx.request(method, world.url + address, **sent)
    assert answer.status_code == status
    fields = answer.json()
    assert isinstance(fields["error"], str)
    assert fields["details"]["what"] in fields["error"]
    assert ("allow" in answer.headers) is (status == 405)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (QueryError("busy", EnclaveError("busy")), 503),
        (QueryError("draining", EnclaveError("draining")), 503),
        (QueryError("ticket", RefusedError("no ticket")), 403),
        (QueryError("sealed-only", RefusedError("sealed only")), 403),
        (QueryError("too-large", EnclaveError("large")), 413),
        (QueryError("input", EnclaveError("input")), 400),
        (QueryError("failed", EnclaveError("failed")), 500),
        (QueryError("late", EnclaveError("late")), 504),
        (enclave_gone(), 503),
    ],
)
def test_what_the_enclave_says_becomes_a_status(
    world: World, error: QueryError, status: int
) -> None:
    tail = _tail(world)
    tail.error = error
    try:
        for address, sent in ((INFER, {"json": QUERY}), ("/v1/sealed/net", {"headers": SEALED})):
            answer = httpx.post(world.url + address, **sent)
            assert answer.status_code == status
            assert answer.json()["details"]["what"] == error.error.what
            assert (answer.headers.get("retry-after") == "1") is (status == 503)
    finally:
        tail.error = None


@pytest.mark.parametrize(
    "outputs",
    [
        {},
        {"z": np.zeros((1, 4), np.float32)},
        {"y": np.zeros((2, 4), np.float32)},
        {"y": np.zeros((1, 4))},
        {"y": np.zeros(4, np.float32)},
    ],
)
def test_an_answer_of_another_form_is_never_passed_on(world: World, outputs: Tensors) -> None:
    tail = _tail(world)
    tail.act = lambda _: outputs
    try:
        assert httpx.post(world.url + INFER, json=QUERY).status_code == 500
    finally:
        tail.act = None


def test_a_fault_of_ours_is_told_by_its_class_alone(
    world: World, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    def fault(_: Tensors) -> Tensors:
        raise KeyError("secret-271828")

    tail = _tail(world)
    tail.act = fault
    try:
        with caplog.at_level(logging.DEBUG):
            answer = httpx.post(world.url + INFER, json=QUERY)
    finally:
        tail.act = None
    assert answer.status_code == 500
    assert answer.json()["error"] == "the service failed (KeyError)"
    shown = "".join(record.getMessage() for record in caplog.records if "uvicorn" in record.name)
    assert "271828" not in shown + "".join(capfd.readouterr())


def test_contracts_that_ask_for_tickets_or_sealed_queries() -> None:
    with World.opened(tickets="lab") as made:
        assert httpx.post(made.url + INFER, json=QUERY).status_code == 403
        use = json.dumps({"serial": "1"})
        paid = {**QUERY, "parameters": {"ticket": use}}
        assert httpx.post(made.url + INFER, json=paid).status_code == 200
        assert _tail(made).sent[-1][1] == {"serial": "1"}
        for wrong in ("{", "[]", '{"a": 1, "a": 2}'):
            answer = httpx.post(made.url + INFER, json={**QUERY, "parameters": {"ticket": wrong}})
            assert answer.status_code == 400
    with World.opened(sealed_only=True) as made:
        assert httpx.post(made.url + INFER, json=QUERY).status_code == 403
        answer = httpx.post(f"{made.url}/v1/sealed/net", content=b"q", headers=SEALED)
        assert answer.status_code == 200


def test_without_an_enclave_nothing_is_served_but_life(world: World) -> None:
    current, world.app.current = world.app.current, None
    try:
        assert httpx.get(f"{world.url}/v2/health/live").json() == {"live": True}
        for address in ("/v2/health/ready", "/v2/models/net", "/openapi.json"):
            answer = httpx.get(world.url + address)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert httpx.post(world.url + INFER, json=QUERY).status_code == 503
        assert "cenacle_ready 0.0" in httpx.get(f"{world.url}/metrics").text
    finally:
        world.app.current = current


# ---------------------------------------------------------------------------- limits

SMALL = Limits(
    body_bytes=4096, bodies_bytes=8192, waiting=2, attestations=1, connections=40, patience_s=0.6
)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A service with little patience and less room."""
    with World.opened(limits=SMALL) as made:
        yield made


def _gate(world: World) -> asyncio.Event:
    gate = asyncio.Event()
    _tail(world).gate = gate
    return gate


def _open(world: World, gate: asyncio.Event) -> None:
    _tail(world).gate = None
    world.loop.loop.call_soon_threadsafe(gate.set)


@pytest.mark.parametrize("chunked", [True, False])
def test_a_large_body_is_refused_before_it_is_read(narrow: World, chunked: bool) -> None:
    content = (bytes(1024) for _ in range(5)) if chunked else bytes(5000)
    answer = httpx.post(f"{narrow.url}/v1/sealed/net", content=content, headers=SEALED)
    assert answer.status_code == 413
    assert answer.headers["connection"] == "close"


def test_back_pressure(narrow: World) -> None:
    gate = _gate(narrow)
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(httpx.post, narrow.url + INFER, json=QUERY) for _ in range(8)]
        while sum(future.done() for future in asked) < 6:
            time.sleep(0.005)
        _open(narrow, gate)
        statuses = sorted(future.result().status_code for future in asked)
    assert statuses == [200, 200] + [503] * 6
    assert 'cenacle_refusals_total{reason="busy"} ' in httpx.get(f"{narrow.url}/metrics").text


def test_evidence_is_made_for_few_at_once(narrow: World) -> None:
    gate = _gate(narrow)
    challenge = {"nonce": base64.b64encode(bytes(32)).decode()}
    with ThreadPoolExecutor(3) as pool:
        asked = [
            pool.submit(httpx.post, f"{narrow.url}/v1/attestation", json=challenge)
            for _ in range(3)
        ]
        while sum(future.done() for future in asked) < 2:
            time.sleep(0.005)
        _open(narrow, gate)
        assert sorted(f.result().status_code for f in asked) == [200, 503, 503]


def test_bodies_together_have_a_limit(narrow: World) -> None:
    head = _head("/v1/sealed/net", 4096)
    held = []
    try:
        for _ in range(3):
            raw = socket.create_connection(("127.0.0.1", narrow.port))
            raw.sendall(head + bytes(4000))
            held.append(raw)
        raw.settimeout(5)
        assert raw.recv(100).startswith(b"HTTP/1.1 503 ")
    finally:
        for raw in held:
            raw.close()
    answer = httpx.post(f"{narrow.url}/v1/sealed/net", content=bytes(4000), headers=SEALED)
    assert answer.status_code == 200  # what they held was given back


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /v2",
        b"POST /v1/sealed/net HTTP/1.1\r\nHost: x\r\n",
        _head("/v1/sealed/net", 100) + b"abc",
        b"POST /v1/sealed/net HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
    ],
    ids=["nothing", "line", "head", "body", "chunks"],
)
def test_a_request_that_does_not_come_is_not_waited_for(narrow: World, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", narrow.port)) as raw:
        raw.settimeout(10)
        raw.sendall(sent)
        with contextlib.suppress(ConnectionResetError):
            assert raw.recv(100) == b""


def test_a_request_that_drips_is_not_waited_for(narrow: World) -> None:
    with socket.create_connection(("127.0.0.1", narrow.port)) as raw:
        raw.sendall(_head("/v1/sealed/net", 4000))
        begun, ended = time.monotonic(), False
        while not ended and time.monotonic() < begun + 20:
            try:
                raw.sendall(b"x")
            except OSError:
                ended = True
            time.sleep(0.02)
    assert ended


def test_a_client_that_does_not_read_is_not_waited_for() -> None:
    width = 1 << 22

    def large(tensors: Tensors) -> Tensors:
        return {"y": np.zeros((len(tensors["x"]), width), np.float32)}

    tail = FakeTail(out=width)
    tail.act = large
    with World.opened(tail, limits=Limits(patience_s=0.5)) as made:
        sent = {**QUERY, "parameters": {"binary_data_output": True}}
        body = json.dumps(sent).encode()
        with socket.socket() as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.connect(("127.0.0.1", made.port))
            raw.sendall(_head(INFER, len(body)) + body)
            assert raw.recv(4).startswith(b"HTTP")
            while made.server.server_state.connections:  # until the server gives it up
                time.sleep(0.02)
        assert httpx.get(f"{made.url}/v2/health/live").status_code == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /%s HTTP/1.1\r\nHost: x\r\n\r\n" % (b"a" * 70_000),
        b"GET /v2 HTTP/1.1\r\nHost: x\r\nX: %s\r\n\r\n" % (b"a" * 70_000),
        b"GET /v2 HTTP/1.1\r\n" + b"".join(b"X%d: 1\r\n" % i for i in range(10_000)) + b"\r\n",
        _head("/v1/sealed/net", -1),
        b"POST /v2 HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /v1/sealed/net HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
    ],
    ids=["address", "header", "headers", "length", "lengths", "chunk", "tls"],
)
def test_malformed_http_ends_the_connection_and_nothing_else(world: World, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", world.port)) as raw:
        raw.settimeout(10)
        try:
            raw.sendall(sent)
            answer = b""
            while part := raw.recv(65536):
                answer += part
            assert answer.startswith(b"HTTP/1.1 4")
        except ConnectionError:
            pass
    assert httpx.get(f"{world.url}/v2/health/ready").status_code == 200


def test_a_client_that_leaves_harms_nobody(world: World) -> None:
    body = json.dumps(QUERY).encode()
    head = _head(INFER, len(body))
    gate = _gate(world)
    for sent in (head + body, head + body[:5]):
        with socket.create_connection(("127.0.0.1", world.port)) as raw:
            raw.sendall(sent)
    _open(world, gate)
    assert httpx.post(world.url + INFER, json=QUERY).status_code == 200


def test_many_at_once(world: World) -> None:
    """Each gets its own answer."""

    def ask(number: int) -> bool:
        with httpx.Client() as client:
            for step in range(5):
                row = [float(number), float(step), 0.0, 1.0]
                sent = {"inputs": [{**ROW, "data": row}]}
                found = client.post(world.url + INFER, json=sent).json()
                if found["outputs"][0]["data"] != [2 * value for value in row]:
                    return False
        return True

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(32)))


def test_connections_have_a_limit(narrow: World) -> None:
    held = [socket.create_connection(("127.0.0.1", narrow.port)) for _ in range(45)]
    try:
        held[-1].sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        held[-1].settimeout(5)
        assert held[-1].recv(100).startswith(b"HTTP/1.1 503 ")
    finally:
        for raw in held:
            raw.close()


def test_metrics_hold_nothing_that_a_client_sent(world: World) -> None:
    marked = {"inputs": [{**ROW, "data": [271828.25, 1, 1, 1]}], "id": "canary-id"}
    assert httpx.post(world.url + INFER, json=marked).status_code == 200
    httpx.get(f"{world.url}/canary-path")
    httpx.get(
        f"{world.url}/v2", headers={"X-Canary": "canary-header", "User-Agent": "canary-agent"}
    )
    httpx.post(f"{world.url}/v1/sealed/net", content=b"canary-query", headers=SEALED)
    page = httpx.get(f"{world.url}/metrics").text
    assert "canary" not in page
    assert "271828" not in page
    assert "543656.5" not in page
    for name in ("requests_total", "refusals_total", "request_seconds_bucket", "waiting", "ready"):
        assert f"cenacle_{name}" in page


def test_tls_is_modern_and_its_end_is_not_waited_for(tmp_path: Any) -> None:
    folder = tmp_path / "tls"
    files = ensure_certificate(folder)
    begun: float
    with World.opened(tls=files) as made:
        context = client_context(files.certificate_pem)
        with httpx.Client(verify=context) as client:
            assert client.get(f"{made.url}/v2/health/live").status_code == 200
            old = ssl.create_default_context()
            old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
            old.maximum_version = ssl.TLSVersion.TLSv1_2
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{made.url}/v2/health/live", verify=old)
            begun = time.monotonic()
            made.server.should_exit = True
            made._done.result(20)  # the idle client never answers the end of its session
        assert time.monotonic() - begun < 15


def test_requests_in_progress_are_finished_at_the_end() -> None:
    made = World()
    gate = _gate(made)
    found: list[int] = []
    asking = threading.Thread(
        target=lambda: found.append(httpx.post(made.url + INFER, json=QUERY).status_code)
    )
    asking.start()
    while not _tail(made).sent:
        time.sleep(0.005)
    made.server.should_exit = True
    _open(made, gate)
    made.close()
    asking.join()
    assert found == [200]
