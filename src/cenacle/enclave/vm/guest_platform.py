"""The process of the guest that asks the machine's hardware for the agent's evidence.

Started by :mod:`cenacle.enclave.vm.guest` with a listening socket, as the agent's user but
outside of its sandbox: it may use the TPM, and holds nothing of the job.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any, Final

from cenacle.attestation.platform import PlatformService
from cenacle.attestation.registry import Attester
from cenacle.broker.connection import BrokerConnection
from cenacle.broker.identity import BrokerIdentity
from cenacle.documents.base import unb64
from cenacle.enclave.sandbox import linux
from cenacle.enclave.vm.guest_system import TPM_DEVICE
from cenacle.errors import DocumentError, EnclaveError

__all__ = ["attester_of", "main"]

_TCTI: Final = f"device:{TPM_DEVICE}"


class _Service(PlatformService):
    """Serves on a socket that somebody else made."""

    def serve(self, listener: socket.socket) -> None:
        """Answer until the socket breaks."""
        self._listener = listener
        self._serve()


def attester_of(fields: dict[str, Any], client: BrokerConnection | None) -> Attester:
    """The attester that the host's description names; raises EnclaveError, UnavailableError."""
    try:
        kind = str(fields["kind"])
        authorities = tuple(unb64(text) for text in fields["authorities"])
        allow_list = str(fields["allow_list"])
    except (KeyError, TypeError, DocumentError):
        raise EnclaveError("the host's description of the evidence does not parse") from None
    # Imported by kind: an emulated machine takes seconds for what it does not need.
    if kind == "tpm":
        from cenacle.attestation.tpm_attester import TpmAttester  # noqa: PLC0415

        return TpmAttester(_TCTI, issuer=client, authorities=authorities)
    if kind == "ima":
        from cenacle.attestation.ima import ImaAttester  # noqa: PLC0415

        return ImaAttester(_TCTI, allow_list=allow_list, issuer=client, authorities=authorities)
    from cenacle.attestation.platforms import Platform, platform_attester  # noqa: PLC0415

    return platform_attester(kind, Platform(tcti=_TCTI, issuer=client, allow_list=allow_list))


def main() -> None:
    """Serve until the machine ends."""
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    listener = socket.socket(fileno=int(sys.argv[1]))
    with os.fdopen(0, "rb") as file:
        file.seek(0)
        config = json.loads(file.read())
    broker = config["broker"]
    if broker is None:
        _Service(attester_of(config["platform"], None)).serve(listener)
        return
    identity = BrokerIdentity.from_fields(broker)
    with BrokerConnection(identity, socket=Path(config["socket"])) as client:
        _Service(attester_of(config["platform"], client)).serve(listener)


if __name__ == "__main__":
    main()
