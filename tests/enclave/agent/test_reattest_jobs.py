"""Real enclaves that have to prove themselves again, with a real TPM protocol beneath.

The kernel's part, a list of files, is played by the test.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from cenacle.attestation.ima import ImaAttester, ImaVerifier
from cenacle.attestation.ima_list import ImaEntry, pack_entry
from cenacle.attestation.registry import VerifierSet
from cenacle.attestation.simulated import SimulatedVerifier
from cenacle.attestation.tpm import TpmVerifier
from cenacle.attestation.tpm_device import TpmDevice
from cenacle.attestation.tpm_endorsement import certificate_digest
from cenacle.enclave.channel import Failed, Message
from cenacle.enclave.launcher import ProcessLauncher
from cenacle.enclave.sandbox import plan
from cenacle.errors import CenacleError, EnclaveError, RefusedError
from tests.support.house import House
from tests.support.ima_machine import Machine, entry
from tests.support.swtpm import Manufacturer, Tpm, require_swtpm, run_swtpm

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("program_layers")]

PROGRAM = """
import time

def run(ctx):
    for step in range({steps}):
        time.sleep(0.05)
        ctx.progress(step + 1, {steps})
    ctx.output("counts", {{"rows": 1}})
"""


@dataclass
class Host:
    """A machine with a TPM, whose kernel measures what the test says."""

    tpm: Tpm
    measured: Path
    machine: Machine

    def measure(self, found: ImaEntry) -> None:
        with self.measured.open("ab") as file:
            file.write(pack_entry(found))
        with TpmDevice(self.tpm.tcti) as device:
            device.extend(10, 0x000B, hashlib.sha256(found.data).digest())

    def attester(self, issuer: Any, before_second: Callable[[], object]) -> ImaAttester:
        """Something happens on the machine before its second evidence."""

        class Later(ImaAttester):
            made = 0

            def collect(self, bound: bytes, now: datetime) -> dict[str, Any]:
                type(self).made += 1
                if self.made == 2:
                    before_second()
                return super().collect(bound, now)

        return Later(
            self.tpm.tcti,
            allow_list=self.machine.allow_list.digest,
            measurements=self.measured,
            log=None,
            issuer=issuer,
            authorities=self.tpm.authorities,
        )


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    require_swtpm()
    maker = Manufacturer(tmp_path)
    with run_swtpm(maker, maker.make("tpm")) as tpm:
        made = Host(tpm, tmp_path / "measurements", Machine(events=()))
        for found in made.machine.entries:
            made.measure(found)
        yield made


@dataclass
class Job:
    """A program on such a machine, from the contract to the enclave's last message."""

    house: House
    host: Host
    out: Path

    def run(
        self, interval: int, steps: int, before_second: Callable[[], object]
    ) -> tuple[str, list[Message], CenacleError | None]:
        """The contract, what the enclave said, and how it ended."""
        house, host = self.house, self.host
        root, now = host.tpm.manufacturer.root, datetime.now(UTC)
        issuers = [house.broker.identity.verify_key]
        verifier = ImaVerifier(issuers, [], [root], allow_lists=[host.machine.allow_list])
        # Also of the kind tpm: the broker certifies keys under the roots of that verifier.
        house.broker.verifiers = VerifierSet.of_development(  # type: ignore[misc]
            SimulatedVerifier(), verifier, TpmVerifier(issuers, [], [root])
        )
        attester = host.attester(house.client, before_second)
        shown = verifier.inspect(
            host.attester(house.client, lambda: None).attest(bytes(64), {}, (), now), now
        ).claims.measurements
        chosen = plan(platform=True)
        own = {
            n: v
            for n, v in house.enclave()["reference"]["simulated"].items()
            if n != "installation"
        }
        (house.folder / "t.csv").write_text("age,dose\n1,2\n")
        program = house.program(PROGRAM.format(steps=steps))
        table = house.seal("hospital-a", house.folder / "t.csv", programs=[program.asset.package])
        assets = {"table": table, "program": program}
        contract = house.contract(
            assets,
            {"type": "program", "program": "program", "entry": "main:run"},
            {"counts": "metrics"},
            enclave={
                "reference": {
                    "ima": {
                        **{name: [value] for name, value in shown.items()},
                        **own,
                        "sandbox": [chosen.digest],
                    }
                },
                "policy": {"ima": {"roots": [certificate_digest(root)]}},
                "layers": list(chosen.layers),
                "reattest_seconds": interval,
            },
        )
        digest = house.agree(contract)
        files = {alias: sealed.path for alias, sealed in assets.items()}
        asked = house.request(digest, files, self.out, chosen=chosen)
        request = replace(asked, platform=attester, config={**asked.config, "evidence": "ima"})
        messages: list[Message] = []
        error: CenacleError | None = None
        with ProcessLauncher().launch(request) as enclave:
            try:
                for message in enclave.messages():
                    messages.append(message)
                    if isinstance(message, Failed):
                        error = message.to_error()
                if error is None:
                    enclave.wait(30)
            except CenacleError as died:
                error = died
        return digest, messages, error

    def revocation(self, digest: str) -> dict[str, Any]:
        (found,) = [
            entry
            for entry in self.house.log()
            if entry["kind"] == "revocation" and entry["contract"] == digest
        ]
        return found


@pytest.fixture
def job(house: House, host: Host, tmp_path: Path) -> Job:
    return Job(house, host, tmp_path / "out")


def test_an_unlisted_executable_is_found_before_an_output_leaves(job: Job) -> None:
    """Whatever the interval is, the enclave proves itself once more before it seals outputs."""
    digest, _, error = job.run(3600, 2, lambda: job.host.measure(entry("/tmp/miner", b"miner")))
    assert isinstance(error, RefusedError), error
    assert "/tmp/miner, unknown" in str(error.found)
    found = job.revocation(digest)
    assert found["reason"] == "drift"
    assert "/tmp/miner, unknown" in found["found"]
    assert not list(job.out.glob("*.sealed"))
    assert not list(job.out.glob("receipt*"))
    assert job.house.open_run(digest) is None


@pytest.mark.slow
def test_listed_files_may_run_and_the_job_ends(job: Job) -> None:
    digest, _, error = job.run(3600, 2, lambda: job.host.measure(entry("/sbin/init", b"init")))
    assert error is None
    kinds = [e["kind"] for e in job.house.log() if e.get("contract") == digest]
    assert kinds[-1] == "settlement"


@pytest.mark.slow
def test_an_unlisted_executable_ends_a_job_in_its_midst(job: Job) -> None:
    digest, messages, error = job.run(
        3, 4000, lambda: job.host.measure(entry("/tmp/miner", b"miner"))
    )
    assert isinstance(error, RefusedError), error
    assert "/tmp/miner, unknown" in str(error.found)
    assert job.revocation(digest)["reason"] == "drift"
    assert len(messages) < 4000


@pytest.mark.slow
def test_a_host_that_gives_no_evidence_in_time(job: Job) -> None:
    held = threading.Event()  # never set: the host's hardware is slow
    digest, _, error = job.run(3, 4000, lambda: held.wait(12))
    assert isinstance(error, EnclaveError), error
    assert "could not prove itself again" in error.what
    while job.house.open_run(digest) is not None:
        time.sleep(0.05)  # the broker's own clock decides when; it looks every two seconds
    assert job.revocation(digest)["reason"] == "deadline"
