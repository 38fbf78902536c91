"""A whole job in a measured machine: golden values, evidence, keys, program, outputs, receipt."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from cenacle.attestation.ima_allow import AllowList
from cenacle.attestation.registry import VerifierSet
from cenacle.broker.receipts import read_bundle, verify_receipt
from cenacle.documents.base import unb64
from cenacle.documents.receipt import OutputRecord
from cenacle.enclave.channel import Stage
from cenacle.enclave.vm.image import ImagePlan, build_image
from cenacle.errors import RefusedError, UnavailableError
from cenacle.sealing import SealedReader
from tests.support.vm_world import PROGRAM, VmWorld, vm_world

pytestmark = [
    pytest.mark.slow,
    pytest.mark.processes,
    pytest.mark.usefixtures("machine_programs"),
]


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


@pytest.fixture(scope="module")
def world(
    full_image: Path, tpm_identity: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VmWorld]:
    with vm_world(tmp_path_factory.mktemp("world"), full_image, tpm_identity) as made:
        yield made


def test_a_program_runs_in_a_machine_whose_every_register_was_computed(world: VmWorld) -> None:
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
def test_a_machine_that_is_not_the_one_agreed_on_gets_no_key(world: VmWorld, register: str) -> None:
    other = "sha256:" + "0" * 64
    outcome = world.run(world.requirements(**{register: [other]}))
    assert isinstance(outcome.error, RefusedError)
    assert register in str(outcome.error.clauses)
    assert [m.name for m in outcome.messages if isinstance(m, Stage)][-1] == "keys"
    assert not (outcome.out / "receipt.json").exists()


def test_an_unlisted_file_that_runs_during_the_job_revokes_it(
    world: VmWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker's list lacks one library of the image, which only this program executes."""
    ((digest, whole),) = world.verifier.allow_lists.items()
    lacking = {name: found for name, found in whole.files.items() if "audioop" not in name}
    assert len(lacking) == len(whole.files) - 1
    shorter = AllowList(lacking, whole.buffers, required=whole.required)
    shorter.digest = digest  # the contract, and the machine, go by the list of the image
    monkeypatch.setitem(world.verifier.allow_lists, digest, shorter)
    outcome = world.run(
        world.requirements(), PROGRAM.replace("import numpy", "import audioop, numpy")
    )
    assert isinstance(outcome.error, RefusedError), outcome.error
    assert "audioop" in str(outcome.error.found)
    assert outcome.stages == ["attesting", "keys", "running"]
    assert not list(outcome.out.glob("*.sealed"))
    (entry,) = [one for one in world.house.log() if one["kind"] == "revocation"]
    assert entry["reason"] == "drift"
    assert "audioop" in entry["found"]
