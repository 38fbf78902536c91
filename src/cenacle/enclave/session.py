"""From fresh keys to the job's keys: nonce, evidence, release."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Self, TypeVar

from cenacle.attestation.binding import report_data
from cenacle.attestation.claims import Evidence
from cenacle.attestation.registry import Attester
from cenacle.broker.client import BrokerClient
from cenacle.broker.entries import ReleaseEntry
from cenacle.broker.messages import (
    CheckpointRecord,
    ReleaseRequest,
    ReleaseResponse,
    StateRecord,
    release_context,
)
from cenacle.crypto import HpkePrivateKey, SecretBytes, SigningKey, derive_key
from cenacle.documents.base import b64, parse_json, parse_time, unb64
from cenacle.documents.receipt import Binding
from cenacle.errors import ConflictError, EnclaveError, ProofError, UnavailableError

__all__ = ["Session", "patiently"]

T = TypeVar("T")

_PATIENCE_S: Final = 60.0
_PAUSE_S: Final = 0.5


def patiently(call: Callable[[], T], seconds: float | None = None) -> T:
    """Repeat a call that may be repeated while the broker is away, for a minute or as long as told.

    Raises:
        UnavailableError: it did not come back.
    """
    deadline = time.monotonic() + (_PATIENCE_S if seconds is None else seconds)
    while True:
        try:
            return call()
        except UnavailableError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_PAUSE_S)


@dataclass(frozen=True)
class Session:
    """An attested enclave's hold on one run.

    Attributes:
        signing_key: made in this process, vouched for by ``evidence``; signs the receipt.
        asset_keys: by alias.
        measurements: what the evidence states (the installation or platform is added by its
            verifier).
    """

    contract: str
    client: BrokerClient
    signing_key: SigningKey
    binding: Binding
    evidence: Evidence
    measurements: Mapping[str, str]
    release: ReleaseResponse
    asset_keys: Mapping[str, SecretBytes]
    job_secret: SecretBytes

    @classmethod
    def open(
        cls,
        client: BrokerClient,
        contract: str,
        attester: Attester,
        measurements: Mapping[str, str],
        layers: tuple[str, ...],
        resume: str | None,
    ) -> Self:
        """Attest to the broker and receive the keys.

        Raises:
            RefusedError: naming every clause that is not met.
        """
        hpke_key, signing_key = HpkePrivateKey.generate(), SigningKey.generate()
        nonce = client.nonce(contract)
        public = (hpke_key.public_key.raw, signing_key.verify_key.raw)
        evidence = attester.attest(
            report_data(nonce, contract, *public), measurements, layers, datetime.now(UTC)
        )
        binding = Binding(nonce=b64(nonce), hpke_key=b64(public[0]), signing_key=b64(public[1]))
        release = client.release(
            ReleaseRequest(
                contract=contract,
                nonce=binding.nonce,
                evidence=evidence.to_fields(),
                hpke_key=binding.hpke_key,
                signing_key=binding.signing_key,
                resume=resume,
            )
        )
        _check_logged(release, contract, evidence, signing_key)
        context = release_context(contract, release.run, nonce)
        with hpke_key.open(unb64(release.sealed_keys), *context) as message:
            fields = parse_json(bytes(message.view()))
        hpke_key.seed().wipe()
        return cls(
            contract=contract,
            client=client,
            signing_key=signing_key,
            binding=binding,
            evidence=evidence,
            measurements=dict(measurements),
            release=release,
            asset_keys={a: _secret(key) for a, key in fields["assets"].items()},
            job_secret=_secret(fields["job"]),
        )

    def asset_key(self, alias: str) -> SecretBytes:
        key = self.asset_keys.get(alias)
        if key is None:
            raise EnclaveError("the broker released no key for an asset", found=alias)
        return key

    def checkpoint_key(self, version: int) -> SecretBytes:
        """The key of one checkpoint of this run; every enclave of the run derives the same."""
        return derive_key(self.job_secret, "enclave/checkpoint", version.to_bytes(8, "big"))

    def privacy_secret(self) -> SecretBytes:
        """What the noise of a privacy plan is drawn from.

        Every enclave of the run derives the same, so that a run which is resumed releases the same
        noisy model again, and never a second one from the same records.
        """
        return derive_key(self.job_secret, "enclave/privacy")

    def register_checkpoint(self, version: int, digest: str) -> None:
        """Tell the broker that this checkpoint is the newest; durable when this returns."""
        record = CheckpointRecord(run=self.release.run, number=version, content=digest)
        attempts = 0

        def register() -> None:
            nonlocal attempts
            attempts += 1
            try:
                self.client.checkpoint(record, self.signing_key)
            except ConflictError:
                # The attempt before was heard and its answer lost: only this enclave can sign
                # for the run. If the run was closed instead, the next request tells.
                if attempts == 1:
                    raise

        patiently(register)

    def advance_state(
        self, number: int, content: str, previous: str | None, patience: float | None = None
    ) -> datetime:
        """Make a state the newest of this run's contract; it is durable when this returns.

        Safe to repeat with the same arguments.

        Returns:
            The broker's time, which never goes back.

        Raises:
            ConflictError: the run is closed, or the state does not follow the newest one.
            SignatureError: another enclave holds the run by now.
            UnavailableError: no answer within ``patience`` seconds, or a minute; it may have been
                recorded.
        """
        record = StateRecord(
            contract=self.contract,
            run=self.release.run,
            number=number,
            content=content,
            previous=previous,
        )
        answer = patiently(lambda: self.client.advance_state(record, self.signing_key), patience)
        return parse_time(answer.time)

    def close(self) -> None:
        """Wipe every key but the signing key, which the receipt still needs."""
        for key in (*self.asset_keys.values(), self.job_secret):
            key.wipe()


def _secret(text: str) -> SecretBytes:
    return SecretBytes(bytearray(unb64(text)))


def _check_logged(
    release: ReleaseResponse, contract: str, evidence: Evidence, key: SigningKey
) -> None:
    """The log must speak of this very release, or the receipt could never be verified."""
    entry = ReleaseEntry.from_canonical(unb64(release.log.entry))
    logged = (entry.contract, entry.run, entry.resumed, entry.evidence, entry.enclave_key)
    ours = (contract, release.run, release.resumed, evidence.digest, key.verify_key.keyid)
    if logged != ours:
        raise ProofError(
            "the broker logged another release than it made",
            found=", ".join(map(str, logged)),
            expected=", ".join(map(str, ours)),
            remedy="do not use this broker; its log cannot vouch for the job",
        )
