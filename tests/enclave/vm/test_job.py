"""A whole job in a measured machine: golden values, evidence, keys, program, outputs, receipt."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from cryptography import x509

from cenacle.attestation.ima import ImaVerifier
from cenacle.attestation.ima_allow import AllowList
from cenacle.attestation.registry import Verifier, VerifierSet
from cenacle.attestation.tpm_endorsement import certificate_digest
from cenacle.broker.identity import BrokerKeys
from cenacle.broker.receipts import read_bundle, verify_receipt
from cenacle.broker.service import Broker
from cenacle.broker.store import Store
from cenacle.cli.image_measure import measure_image
from cenacle.documents.base import unb64
from cenacle.documents.receipt import OutputRecord
from cenacle.enclave.channel import Failed, Stage
from cenacle.enclave.vm.guest_plan import guest_plan
from cenacle.enclave.vm.image import ImagePlan, build_image
from cenacle.enclave.vm.launcher import VmLauncher
from cenacle.enclave.vm.manifest import ImageManifest
from cenacle.enclave.vm.tpm import TpmIdentity
from cenacle.errors import CenacleError, RefusedError, UnavailableError
from cenacle.sealing import SealedReader
from tests.support.house import House, Outcome, Sealed, house_at

pytestmark = [
    pytest.mark.slow,
    pytest.mark.processes,
    pytest.mark.usefixtures("machine_programs"),
]

PROGRAM = """
import numpy as np

def run(ctx):
    images = np.asarray(ctx.assets["tensors"].read("images"))
    ctx.output("total", {"sum": images.sum(axis=0)})
"""


@pytest.fixture(scope="module")
def full_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with everything that an enclave needs, but no PyTorch."""
    pytest.importorskip("tpm2_pytss", reason="needs the PyPI package tpm2-pytss")
    folder = tmp_path_factory.mktemp("full") / "image"
    known = importlib.metadata.metadata("cenacle").get_all("Provides-Extra") or []
    extras = tuple(extra for extra in ("sandbox", "tpm") if extra in known)
    try:
        build_image(folder, ImagePlan(extras=extras, more=("tpm2-pytss",)))
    except UnavailableError as error:
        pytest.skip(f"needs Debian 12's package lists: {error.diagnostics()}")
    return folder


@dataclass(frozen=True)
class World:
    """A broker that knows one image and one maker of software TPMs."""

    house: House
    image: Path
    identity: TpmIdentity
    verifier: ImaVerifier
    assets: dict[str, Sealed]

    def requirements(self, **changed: list[str]) -> dict[str, Any]:
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
        return {"reference": {"ima": reference}, "policy": policy, "layers": list(plan.layers)}

    def run(self, requirements: dict[str, Any]) -> Outcome:
        job = {"type": "program", "program": "program", "entry": "main:run", "parameters": {}}
        contract = self.house.contract(self.assets, job, {"total": "model"}, enclave=requirements)
        digest = self.house.agree(contract)
        outcome = Outcome(self.house.path("results"))
        plan = guest_plan(ImageManifest.load(self.image, check=False), platform=True)
        files = {alias: sealed.path for alias, sealed in self.assets.items()}
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
            except CenacleError as error:
                outcome.error = error
        return outcome


@pytest.fixture(scope="module")
def world(
    full_image: Path, tpm_identity: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    identity = TpmIdentity(tpm_identity)
    identity.prepare()
    root = x509.load_pem_x509_certificate(identity.authority.read_bytes())
    listed = AllowList.parse((full_image / "allow-list.jsonl").read_bytes())
    made = Broker.development
    verifiers: list[ImaVerifier] = []

    def development(store: Store, keys: BrokerKeys, *others: Verifier) -> Broker:
        issuers = (keys.signing_key.verify_key,)
        verifiers.append(ImaVerifier(issuers, None, (root,), allow_lists=[listed]))
        return made(store, keys, *verifiers, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Broker, "development", development)
        with house_at(folder) as house:
            np.savez(folder / "x.npz", images=np.arange(24.0).reshape(4, 6), labels=np.arange(4))
            program = house.program(PROGRAM)
            tensors = house.seal("hospital-b", folder / "x.npz", programs=[program.asset.package])
            assets = {"tensors": tensors, "program": program}
            yield World(house, full_image, identity, verifiers[0], assets)


def test_a_program_runs_in_a_machine_whose_every_register_was_computed(world: World) -> None:
    outcome = world.run(world.requirements())
    assert outcome.error is None, outcome.error
    assert outcome.stages == ["attesting", "keys", "running", "outputs", "receipt"]
    verified = verify_receipt(
        read_bundle(outcome.receipt.read_bytes()),
        broker_digest=world.house.identity.digest,
        verifiers=VerifierSet.of_development(world.verifier),
    )
    receipt = verified.receipt
    assert receipt.protection == "simulated"  # as its TPM is one in software
    assert set(receipt.layers) == {"process", "landlock", "seccomp"}
    (record,) = receipt.outputs
    context = OutputRecord.wrapping_context(receipt.contract, record.name, record.header)
    clinic = world.house.parties["clinic"]
    key = clinic.hpke_key.open(unb64(record.wrapped_key), *context)
    sealed = outcome.out / "total.sealed"
    with SealedReader(
        sealed, key, expected_header=record.header, expected_digest=record.content
    ) as reader:
        model = safetensors.numpy.load(reader.read_range(0, reader.size))
    assert model["sum"].tolist() == np.arange(24.0).reshape(4, 6).sum(axis=0).tolist()


@pytest.mark.parametrize("register", ["pcr9", "allow-list"])
def test_a_machine_that_is_not_the_one_agreed_on_gets_no_key(world: World, register: str) -> None:
    other = "sha256:" + "0" * 64
    outcome = world.run(world.requirements(**{register: [other]}))
    assert isinstance(outcome.error, RefusedError)
    assert register in str(outcome.error.clauses)
    assert [m.name for m in outcome.messages if isinstance(m, Stage)][-1] == "keys"
    assert not (outcome.out / "receipt.json").exists()
