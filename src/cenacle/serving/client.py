"""Clients: in plain over the Open Inference Protocol, or sealed to an enclave that they verify.

A sealed client trusts neither the server nor the network nor the broker: it knows the digest of
a contract, checks its signatures, and has the enclave prove that it is the one that the contract
demands before anything is sent to it.
"""

from __future__ import annotations

import json
import secrets
import ssl
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import quote

import httpx
from numpy.typing import NDArray

from cenacle.attestation.claims import Evidence
from cenacle.attestation.registry import VerifierSet
from cenacle.attestation.simulated import SimulatedVerifier
from cenacle.attestation.verifiers import Trust, hardware_verifiers
from cenacle.broker.receipts import OpenedContract, open_contract
from cenacle.broker.tls import client_context
from cenacle.crypto import SigningKey
from cenacle.documents.approval import approves, describe_rule
from cenacle.documents.base import b64, parse_json, parse_time
from cenacle.documents.dsse import Envelope
from cenacle.documents.serving import ServeJob
from cenacle.documents.ticket import new_request, sign_use
from cenacle.enclave.client_evidence import AttestedEnclave, ClientEvidence, verify_for_client
from cenacle.enclave.sealed_query import open_answer, seal_query
from cenacle.enclave.serving_messages import NONCE_BYTES
from cenacle.enclave.tensor_bytes import input_digest
from cenacle.errors import (
    CenacleError,
    EvidenceError,
    InputError,
    ProofError,
    RefusedError,
    SealError,
    UnavailableError,
)
from cenacle.serving.front import Front
from cenacle.serving.open_inference import LENGTH_HEADER, encode_request, parse_response
from cenacle.serving.types import QUERY_TYPE

__all__ = ["Client", "SealedClient"]

Arrays = Mapping[str, NDArray[Any]]

_ATTEMPTS: Final = 5
_PAUSE_S: Final = 0.2
_MAX_PAUSE_S: Final = 5.0
_FRESH_S: Final = 3600.0
_AGAIN: Final = frozenset({502, 503, 504})


class _Http:
    """Requests that are sent again when the connection breaks or the service is busy."""

    def __init__(self, url: str, certificate: str | None, timeout: float) -> None:
        verify: ssl.SSLContext | bool = True if certificate is None else client_context(certificate)
        self._url = url.rstrip("/")
        self._http = httpx.Client(verify=verify, timeout=timeout, trust_env=False)
        self._timeout = timeout

    def close(self) -> None:
        self._http.close()

    def metadata(self, model: str) -> dict[str, Any]:
        found = _json(self._send("GET", f"/v2/models/{quote(model, safe='')}", None, {}))
        if not isinstance(found, dict) or not isinstance(found.get("inputs"), list):
            raise UnavailableError("the service's answer is of another form")
        return found

    def post(self, path: str, body: bytes, headers: Mapping[str, str]) -> httpx.Response:
        return self._send("POST", path, body, headers)

    def _send(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> httpx.Response:
        deadline = time.monotonic() + self._timeout
        pause = _PAUSE_S
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                response = self._http.request(
                    method, self._url + path, content=body, headers=dict(headers)
                )
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                failed: CenacleError = UnavailableError(
                    "the service cannot be reached",
                    found=f"{type(error).__name__} at {self._url}",
                    expected="a service started with `cenacle serve`",
                    remedy="check the address and the certificate",
                )
                if isinstance(error, httpx.InvalidURL | httpx.UnsupportedProtocol):
                    raise failed from None
            else:
                if response.status_code == httpx.codes.OK:
                    return response
                failed = _error(response)
                if response.status_code not in _AGAIN:
                    raise failed
                pause = max(pause, _retry_after(response))
            if attempt == _ATTEMPTS or time.monotonic() + pause > deadline:
                raise failed
            time.sleep(pause * (0.5 + secrets.randbelow(1000) / 1000))
            pause = min(2 * pause, _MAX_PAUSE_S)
        raise AssertionError("the last attempt returns or raises")


def _retry_after(response: httpx.Response) -> float:
    text = response.headers.get("Retry-After", "")
    return min(float(text), _MAX_PAUSE_S) if text.isascii() and text.isdigit() else 0.0


def _json(response: httpx.Response) -> Any:
    try:
        return parse_json(response.content)
    except CenacleError:
        raise UnavailableError(
            "the service's answer is not JSON", found=f"HTTP {response.status_code}"
        ) from None


def _error(response: httpx.Response) -> CenacleError:
    """The error as the service raised it."""
    try:
        fields = parse_json(response.content)
        return CenacleError.from_dict(fields["details"])
    except (CenacleError, KeyError, TypeError, AttributeError):
        return UnavailableError(
            "the service answers with an error", found=f"HTTP {response.status_code}"
        )


def _certificate(given: str | Path | None) -> str | None:
    return given.read_text() if isinstance(given, Path) else given


def _rows(arrays: Arrays) -> int:
    first = next(iter(arrays.values()), None)
    return 1 if first is None or first.ndim == 0 else int(first.shape[0])


class _Ticketed:
    """The ticket that a client pays with, if it has one.

    Raises:
        InputError: a ticket without its key, or a key without its ticket.
    """

    def __init__(self, ticket: Envelope | None, key: SigningKey | None) -> None:
        if (ticket is None) != (key is None):
            raise InputError(
                "a ticket and its client's key go together",
                found="a ticket alone" if key is None else "a key alone",
                expected="both, or neither",
            )
        self._ticket, self._key = ticket, key

    def use(self, request: bytes, rows: int, digest: str | None = None) -> dict[str, Any] | None:
        """The signed use for one request; the same for each attempt of it."""
        if self._ticket is None or self._key is None:
            return None
        signed = sign_use(self._ticket, self._key, request=request, rows=rows, input_digest=digest)
        return signed.to_fields()


class Client:
    """Queries in plain: the operator of the server sees inputs and outputs, but no parameters.

    Args:
        url: of the service, e.g. ``https://127.0.0.1:8443``.
        model: its name: the alias of the model in the contract.
        certificate: PEM of the server's certificate, or its file, for a self-signed one; by
            default the authorities that the system trusts.
        ticket: signed ticket, for a model whose contract asks for tickets.
        key: the client's key, which the ticket names.
        timeout: seconds for a request, all its attempts together.

    Raises (every method): the service's own error, rebuilt; :class:`UnavailableError` when it
    cannot be reached. A request is sent again after a broken connection; under a ticket with the
    same name, so that it is not paid for twice.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        certificate: str | Path | None = None,
        ticket: Envelope | None = None,
        key: SigningKey | None = None,
        timeout: float = 60.0,
    ) -> None:
        self.model = model
        self._tickets = _Ticketed(ticket, key)
        self._http = _Http(url, _certificate(certificate), timeout)
        self._path = f"/v2/models/{quote(model, safe='')}"

    def metadata(self) -> dict[str, Any]:
        """What the model takes and gives, as the Open Inference Protocol describes it."""
        return self._http.metadata(self.model)

    def infer(self, inputs: Arrays, *, request: bytes | None = None) -> dict[str, NDArray[Any]]:
        """Outputs by name for inputs by name.

        Args:
            request: the name under which a ticket pays for this request, from
                :func:`cenacle.documents.ticket.new_request`: give the same one again to ask again
                for an answer that was lost. By default a new one.
        """
        use = self._tickets.use(request or new_request(), _rows(inputs))
        body, headers = encode_request(inputs, ticket=None if use is None else json.dumps(use))
        response = self._http.post(f"{self._path}/infer", body, headers)
        length = response.headers.get(LENGTH_HEADER)
        try:
            number = None if length is None else int(length)
            return dict(parse_response(response.content, number).outputs)
        except (InputError, ValueError):
            raise UnavailableError(
                "the service's answer is not one of the Open Inference Protocol"
            ) from None

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _NotYetError(Exception):
    """The enclave cannot say yet whether a ticket pays; the same request may be sent again."""

    def __init__(self, error: UnavailableError) -> None:
        super().__init__(error.what)
        self.error = error


class SealedClient:
    """Queries that only the enclave reads: the server sees sizes and times, no more.

    Args:
        contract: digest of the contract, from a source that the caller trusts.
        front: the model's public front, which runs here; the contract names its digest.
        trust: what verifiers of evidence take as given beside the vendors' roots.
        development: accept SIMULATED evidence where the contract does. It protects from nobody
            with root on the server.
        url, certificate, ticket, key, timeout: as :class:`Client` has them; here TLS adds
            nothing to secrecy.

    Raises (every method): what :class:`Client` raises, and :class:`VerificationError` or
    :class:`RefusedError` where the server is not what the contract demands. Nothing is sent then.
    """

    def __init__(
        self,
        url: str,
        contract: str,
        *,
        front: str | Path | None = None,
        trust: Trust | None = None,
        development: bool = False,
        certificate: str | Path | None = None,
        ticket: Envelope | None = None,
        key: SigningKey | None = None,
        timeout: float = 60.0,
    ) -> None:
        given = trust or Trust()
        if not development:
            # Evidence of a TPM in software is simulated too.
            given = replace(given, software_tpm_roots=())
        hardware = hardware_verifiers(given)
        self.contract = contract
        self._verifiers = (
            VerifierSet.of_development(SimulatedVerifier(), *hardware)
            if development
            else VerifierSet.of_production(*hardware)
        )
        self._tickets = _Ticketed(ticket, key)
        self._http = _Http(url, _certificate(certificate), timeout)
        self._timeout = timeout
        self._front_path = None if front is None else Path(front)
        self._front: Front | None = None
        self._enclave: AttestedEnclave | None = None
        self._job: ServeJob | None = None
        self._attested = 0.0

    def attest(self) -> AttestedEnclave:
        """Have the enclave prove what it is, for a fresh nonce; done by itself when needed.

        Raises:
            ProofError, SignatureError: the contract, its parties or manifests are not genuine.
            RefusedError: not everyone who must has signed it, or it has expired.
            EvidenceError: the enclave is not what the contract demands, or of a kind that is not
                accepted here.
        """
        nonce = secrets.token_bytes(NONCE_BYTES)
        body = json.dumps({"nonce": b64(nonce)}).encode()
        found = _json(
            self._http.post("/v1/attestation", body, {"Content-Type": "application/json"})
        )
        parts = ("evidence", "contract", "parties", "assets")
        if not isinstance(found, dict) or any(part not in found for part in parts):
            raise UnavailableError("the service's answer is of another form")
        now = datetime.now(UTC)
        opened = self._opened(found, now)
        shown = ClientEvidence.from_fields(found["evidence"])
        self._require_kind(shown)
        self._enclave = verify_for_client(
            shown, nonce, self.contract, opened.contract, opened.assets, self._verifiers, now
        )
        self._attested = time.monotonic()
        return self._enclave

    def metadata(self) -> dict[str, Any]:
        """What the server says that the model takes and gives; believed by nobody."""
        if self._job is None:
            self.attest()
        assert self._job is not None
        return self._http.metadata(self._job.model)

    def _require_kind(self, shown: ClientEvidence) -> None:
        kind = Evidence.from_fields(shown.evidence).kind
        if kind not in self._verifiers.kinds:
            raise EvidenceError(
                "the enclave's evidence is of a kind that this client does not accept",
                found=kind,
                expected=" or ".join(self._verifiers.kinds),
                remedy="for tests, development=True (--development) accepts simulated evidence, "
                "which protects from nobody with root"
                if kind == "simulated"
                else None,
            )

    def _opened(self, found: Mapping[str, Any], now: datetime) -> OpenedContract:
        parties, assets = found["parties"], found["assets"]
        if not isinstance(parties, list) or not isinstance(assets, dict):
            raise UnavailableError("the service's answer is of another form")
        envelope = Envelope.from_fields(found["contract"])
        if envelope.digest != self.contract:
            raise ProofError(
                "the service serves another contract",
                found=envelope.digest,
                expected=self.contract,
                remedy="ask its operator whether the contract was replaced, and review the new one",
            )
        opened = open_contract(self.contract, found["contract"], tuple(parties), assets)
        contract = opened.contract
        if not approves(contract.approval, opened.signed):
            raise RefusedError(
                "the contract is not signed by those who must",
                found=", ".join(sorted(opened.signed)) or "nobody",
                expected=describe_rule(contract.approval),
            )
        if now > parse_time(contract.expires):
            raise RefusedError(
                "the contract has expired", found=f"it is {now:%Y-%m-%d}", expected=contract.expires
            )
        if not isinstance(contract.job, ServeJob):
            raise InputError("the contract serves no model", found=contract.job.type)
        self._job = contract.job
        self._open_front(contract.job)
        return opened

    def _open_front(self, job: ServeJob) -> None:
        if (job.front is None) != (self._front_path is None):
            raise InputError(
                "the contract's model has no front"
                if job.front is None
                else "the contract's model has a front, which runs here",
                found="none" if self._front_path is None else str(self._front_path),
                expected=job.front or "none",
                remedy="get front.onnx from the model's owner, and name it with front=",
            )
        if self._front is None and job.front is not None and self._front_path is not None:
            self._front = Front.open(self._front_path, job.front)

    def infer(self, inputs: Arrays, *, request: bytes | None = None) -> dict[str, NDArray[Any]]:
        """Outputs by name for inputs by name; ``request`` as for :meth:`Client.infer`."""
        if self._enclave is None or time.monotonic() - self._attested > _FRESH_S:
            self.attest()
        crossing = inputs if self._front is None else self._front.run(inputs)
        named = request or new_request()
        use = self._tickets.use(named, _rows(crossing), input_digest(crossing))
        deadline, pause = time.monotonic() + self._timeout, _PAUSE_S
        renewed = False
        while True:
            try:
                return self._ask(crossing, use)
            except SealError:
                # The enclave was started anew, with another key: it has to prove itself again.
                if renewed:
                    raise
                self.attest()
                renewed = True
            except _NotYetError as unknown:
                if time.monotonic() + pause > deadline:
                    raise unknown.error from None
                time.sleep(pause)
                pause = min(2 * pause, _MAX_PAUSE_S)

    def _ask(self, crossing: Arrays, use: dict[str, Any] | None) -> dict[str, NDArray[Any]]:
        assert self._enclave is not None
        assert self._job is not None
        sealed, key = seal_query(self._enclave.hpke_key, self.contract, crossing, use)
        path = f"/v1/sealed/{quote(self._job.model, safe='')}"
        response = self._http.post(path, sealed, {"Content-Type": QUERY_TYPE})
        try:
            return open_answer(key, response.content)
        except UnavailableError as error:
            raise _NotYetError(error) from None

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
