"""A broker that knows one image of virtual machines and one maker of their software TPMs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography import x509

from cenacle.attestation.ima import ImaVerifier
from cenacle.attestation.ima_allow import AllowList
from cenacle.attestation.registry import Verifier
from cenacle.attestation.tpm_endorsement import certificate_digest
from cenacle.broker.identity import BrokerKeys
from cenacle.broker.service import Broker
from cenacle.broker.store import Store
from cenacle.cli.image_measure import measure_image
from cenacle.enclave.channel import Failed, Message
from cenacle.enclave.launcher import RunningEnclave
from cenacle.enclave.vm.guest_plan import guest_plan
from cenacle.enclave.vm.launcher import VmLauncher
from cenacle.enclave.vm.manifest import ImageManifest
from cenacle.enclave.vm.tpm import TpmIdentity
from cenacle.errors import CenacleError
from tests.support.house import House, Outcome, Sealed, house_at

__all__ = ["VmWorld", "vm_world"]

PROGRAM = """
import numpy as np

def run(ctx):
    images = np.asarray(ctx.assets["tensors"].read("images"))
    ctx.output("total", {"sum": images.sum(axis=0)})
"""


@dataclass(frozen=True)
class VmWorld:
    """The house, its broker's verifier, and a sealed table of tensors."""

    house: House
    image: Path
    identity: TpmIdentity
    verifier: ImaVerifier
    tensors: Path

    def requirements(self, **changed: list[str]) -> dict[str, Any]:
        """Computed from the image and the firmware, but for ``changed``."""
        manifest = ImageManifest.load(self.image, check=False)
        plan = guest_plan(manifest, platform=True)
        reference = {
            **measure_image(self.image, None, None)["reference"],
            "ek": list(self.identity.endorsement_keys()),
            "sandbox": [plan.digest],
            **changed,
        }
        root = x509.load_pem_x509_certificate(self.identity.authority.read_bytes())
        policy = {"ima": {"roots": [certificate_digest(root)]}}
        return {
            "reference": {"ima": reference},
            "policy": policy,
            "layers": list(plan.layers),
            # Once before the outputs; emulated machines are too slow for a deadline in a test.
            "reattest_seconds": 3600,
        }

    def run(
        self,
        requirements: Mapping[str, Any],
        program: str = PROGRAM,
        watch: Callable[[RunningEnclave, Message], None] = lambda _enclave, _message: None,
    ) -> Outcome:
        """One job in one machine, to its end, good or bad."""
        code = self.house.program(program)
        tensors = self.house.seal("hospital-b", self.tensors, programs=[code.asset.package])
        assets: dict[str, Sealed] = {"tensors": tensors, "program": code}
        job = {"type": "program", "program": "program", "entry": "main:run", "parameters": {}}
        contract = self.house.contract(assets, job, {"total": "model"}, enclave=dict(requirements))
        digest = self.house.agree(contract)
        outcome = Outcome(self.house.path("results"))
        plan = guest_plan(ImageManifest.load(self.image, check=False), platform=True)
        files = {alias: sealed.path for alias, sealed in assets.items()}
        request = self.house.request(digest, files, outcome.out, chosen=plan)
        request = replace(
            request,
            config={**request.config, "evidence": "ima"},
            read_only={n: p for n, p in request.read_only.items() if n != "installation"},
        )
        launcher = VmLauncher(self.image, tpm=self.identity.authority.parent.parent)
        with launcher.launch(request) as enclave:
            try:
                for message in enclave.messages():
                    outcome.messages.append(message)
                    if isinstance(message, Failed):
                        outcome.error = message.to_error()
                    watch(enclave, message)
            except CenacleError as error:
                outcome.error = error
        return outcome


@contextmanager
def vm_world(folder: Path, image: Path, tpm: Path) -> Iterator[VmWorld]:
    """A world in ``folder``, with machines of this image and TPMs of this identity."""
    identity = TpmIdentity(tpm)
    identity.prepare()
    root = x509.load_pem_x509_certificate(identity.authority.read_bytes())
    listed = AllowList.parse((image / "allow-list.jsonl").read_bytes())
    made = Broker.development
    verifiers: list[ImaVerifier] = []

    def development(store: Store, keys: BrokerKeys, *others: Verifier) -> Broker:
        issuers = (keys.signing_key.verify_key,)
        verifiers.append(ImaVerifier(issuers, None, (root,), allow_lists=[listed]))
        return made(store, keys, *verifiers, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Broker, "development", development)
        with house_at(folder) as house:
            tensors = folder / "x.npz"
            np.savez(tensors, images=np.arange(24.0).reshape(4, 6), labels=np.arange(4))
            yield VmWorld(house, image, identity, verifiers[0], tensors)
