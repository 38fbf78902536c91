"""A connection to one broker: pinned TLS, JSON in and out, errors as the broker raised them.

And the little that a machine asks for whose TPM makes evidence; everything else is in ``client``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

import httpx

from cenacle.broker.identity import BrokerIdentity
from cenacle.broker.tls import client_context
from cenacle.documents.base import unb64
from cenacle.documents.dsse import Envelope
from cenacle.errors import CenacleError, InputError, ProofError, UnavailableError

if TYPE_CHECKING:
    from cenacle.attestation.tpm_credential import (
        AttestationKeyAnswer,
        AttestationKeyChallenge,
        AttestationKeyRequest,
    )

__all__ = ["BrokerConnection", "listed", "octets_in", "text_in", "wrong_form"]


class BrokerConnection:
    """A connection to one broker, whose identity was pinned beforehand.

    Args:
        identity: the broker's public identity; its certificate is the only one accepted.
        socket: a unix socket whose other end is relayed to the broker, instead of TCP.
        timeout: seconds until a request fails.

    Raises (every method): the broker's own error, rebuilt; :class:`UnavailableError` when it
    cannot be reached.
    """

    def __init__(
        self, identity: BrokerIdentity, *, socket: Path | None = None, timeout: float = 60.0
    ) -> None:
        if identity.url is None or identity.tls_certificate is None:
            raise InputError(
                "a broker's identity has no address",
                found=f"keys of {identity.origin} alone",
                expected="the file that `cenacle broker start` writes",
            )
        self.identity = identity
        self._http = httpx.Client(
            base_url=identity.url,
            timeout=timeout,
            transport=httpx.HTTPTransport(
                verify=client_context(identity.tls_certificate),
                uds=None if socket is None else str(socket),
                retries=2,  # of connecting only: nothing is sent twice
            ),
        )

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------ transport

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        try:
            response = self._http.request(method, path, json=body)
            fields = response.json()
        except httpx.HTTPError as error:
            raise UnavailableError(
                "the broker cannot be reached",
                found=f"{type(error).__name__} at {self.identity.url}",
                expected="a broker that shows the pinned certificate",
                remedy="start it with `cenacle broker start`, or check the address",
            ) from None
        except (ValueError, RecursionError):
            raise UnavailableError(
                "the broker's answer is not JSON", found=f"HTTP {response.status_code}"
            ) from None
        if response.status_code != httpx.codes.OK:
            raise CenacleError.from_dict(fields if isinstance(fields, dict) else {})
        return fields

    def _get(self, *path: str) -> Any:
        return self._call("GET", "/v1/" + "/".join(quote(part, safe="") for part in path))

    def _post(self, body: Any, *path: str) -> Any:
        return self._call("POST", "/v1/" + "/".join(quote(part, safe="") for part in path), body)

    def check_identity(self) -> None:
        """Ask the broker who it is and compare its keys with the pinned ones."""
        found = BrokerIdentity.from_fields(self._get("identity"))
        if found.digest != self.identity.digest:
            raise ProofError(
                "the broker has other keys than pinned",
                found=found.digest,
                expected=self.identity.digest,
                remedy="do not use it; ask its operator what happened",
            )

    def challenge_attestation_key(self, request: AttestationKeyRequest) -> AttestationKeyChallenge:
        """A challenge for a TPM; see :mod:`cenacle.attestation.tpm_credential`."""
        from cenacle.attestation.tpm_credential import AttestationKeyChallenge  # noqa: PLC0415

        answer = self._post(request.to_fields(), "attestation", "keys")
        return AttestationKeyChallenge.from_fields(answer)

    def certify_attestation_key(self, answer: AttestationKeyAnswer) -> Envelope:
        """The certificate of an attestation key; checked to be this broker's."""
        fields = self._post(answer.to_fields(), "attestation", "keys", "activate")
        envelope = Envelope.from_fields(fields)
        envelope.verify_signature(self.identity.verify_key)
        return envelope


def wrong_form(answer: Any, expected: str) -> ProofError:
    """What to raise for an answer of another form."""
    return ProofError(
        "the broker's answer has another form than expected",
        found=type(answer).__name__,
        expected=expected,
        remedy="use the same version of cenacle as the broker",
    )


def listed(answer: Any) -> list[Any]:
    """The answer, which is a list; raises ProofError."""
    if not isinstance(answer, list):
        raise wrong_form(answer, "a list")
    return answer


def text_in(answer: Any, name: str) -> str:
    """The text of this name in an answer; raises ProofError."""
    found = answer.get(name) if isinstance(answer, dict) else None
    if not isinstance(found, str):
        raise wrong_form(answer, f"an object with a text named {name}")
    return found


def octets_in(answer: Any, name: str) -> tuple[bytes, ...]:
    """The octets of this name in an answer, from base64; raises ProofError."""
    found = answer.get(name) if isinstance(answer, dict) else None
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        raise wrong_form(answer, f"an object with a list of texts named {name}")
    return tuple(unb64(item) for item in found)
