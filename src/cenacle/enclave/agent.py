"""The enclave's agent, on one page: evidence, keys, assets, run, outputs, receipt.

Started by a launcher as ``python -m cenacle.enclave``. Everything it is told is checked
against the contract, which it fetches by digest and whose signatures it verifies itself; it
trusts neither its launcher nor, beyond the release of keys, the broker.

What handles data needs large libraries, and is imported when the keys are here: a machine that
measures what it maps hashes each of them whole.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cenacle.attestation.attesters import attester_for
from cenacle.attestation.measure import measure_enclave
from cenacle.attestation.registry import Attester
from cenacle.broker.client import BrokerClient
from cenacle.broker.identity import BrokerIdentity
from cenacle.broker.receipts import OpenedContract, open_contract
from cenacle.broker.rules import expected_program
from cenacle.documents.base import Digest, Frozen, Name, NonEmpty
from cenacle.documents.contract import ProgramJob, RecipeJob, ServeJob
from cenacle.documents.offload_profile import PROFILE_FILE
from cenacle.documents.privacy import PrivacyEvent
from cenacle.documents.receipt import ServingRecord
from cenacle.enclave.accelerators import attach, require_agreed
from cenacle.enclave.assets import asset_path, check_files
from cenacle.enclave.channel import Channel, OutputFile
from cenacle.enclave.reattest import Reattestation, boot_clock, end_enclave
from cenacle.enclave.sandbox.base import PLATFORM_SOCKET
from cenacle.enclave.sandbox.entry import AgentConfig
from cenacle.enclave.session import Session, patiently
from cenacle.errors import EnclaveError

if TYPE_CHECKING:
    from cenacle.enclave.outputs import OutputValue
    from cenacle.training import Offloading

__all__ = ["AgentJob", "run_agent"]

# Without these a program could write plaintext into a folder of the host's, or reach the relay.
_FOR_PROGRAMS: Final = frozenset({"landlock", "seccomp"})


class AgentJob(Frozen):
    """What the launcher tells the agent. No secrets, and nothing that is believed unchecked.

    Attributes:
        contract: digest of the contract to run.
        broker: the identity that the launcher's user pinned; the contract names its digest.
        evidence: kind of evidence to make.
        resume: the open run to take over.
    """

    contract: Digest
    broker: BrokerIdentity
    evidence: Name = "simulated"
    resume: NonEmpty | None = None


def run_agent(config: AgentConfig, channel: Channel) -> None:
    """One job, start to end. Raises what went wrong; nothing of the data leaves by that."""
    job = AgentJob.from_fields(dict(config.job))
    outputs = config.paths["outputs"]
    with BrokerClient(job.broker, socket=config.paths["broker_socket"]) as client:
        view = client.contract_view(job.contract)
        opened = open_contract(job.contract, view.contract, view.parties, view.assets)
        job.broker.require_digest(opened.contract.broker)
        _check_layers(opened, config)
        require_agreed(opened.contract, config)

        channel.stage("attesting")
        check_files(opened.assets, config.paths)
        measurements = {
            **measure_enclave(),
            "program": expected_program(opened.contract, opened.assets),
            "sandbox": config.plan.digest,
        }
        attester = attester_for(job.evidence, config.paths, config.paths.get(PLATFORM_SOCKET))

        channel.stage("keys")
        begun = boot_clock()
        session = Session.open(
            client, job.contract, attester, measurements, config.layers, job.resume
        )
        watch = Reattestation(
            session,
            attester,
            config.layers,
            opened.contract.enclave.reattest_seconds,
            since=begun,
            connect=partial(BrokerClient, job.broker, socket=config.paths["broker_socket"]),
            end=partial(end_enclave, session, channel),
        )
        with watch:
            try:
                channel.stage("running")
                from cenacle.enclave.checkpoints import SealedCheckpoints  # noqa: PLC0415
                from cenacle.enclave.outputs import seal_outputs  # noqa: PLC0415
                from cenacle.enclave.receipt import (  # noqa: PLC0415
                    NOTHING_OFFLOADED,
                    finish,
                    write_draft,
                )

                with attach(opened.contract, config, session) as offloading:
                    made = _run(opened, session, attester, config, channel, offloading)
                watch.confirm()  # before anything leaves
                channel.stage("outputs")
                if offloading is not None:
                    # In the open: names of layers, which the contract shows, times and sizes.
                    offloading.profile.write_trace(outputs / PROFILE_FILE)
                records = seal_outputs(opened, job.contract, made.values, outputs)
            finally:
                session.close()

            channel.stage("receipt")
            # As it stands now: a party may have signed between our first look and the release.
            view = patiently(lambda: client.contract_view(job.contract))
            opened = open_contract(job.contract, view.contract, view.parties, view.assets)
            write_draft(
                session,
                view,
                opened,
                records,
                config.layers,
                outputs,
                leakage=offloading.leakage if offloading else NOTHING_OFFLOADED,
                offloaded=offloading.record() if offloading else None,
                events=made.events,
                serving=made.serving,
            )
        receipt = finish(client, outputs)
        SealedCheckpoints(config.paths["checkpoints"], session).discard()
        channel.finished((), OutputFile(receipt.name, _sha256(receipt)))


def _check_layers(opened: OpenedContract, config: AgentConfig) -> None:
    """Refuse to run a program that nothing keeps from writing files or opening connections."""
    missing = _FOR_PROGRAMS - set(config.layers)
    if isinstance(opened.contract.job, ProgramJob) and missing:
        raise EnclaveError(
            "a program runs only where the sandbox confines it apart from the agent",
            found="no layer " + ", ".join(sorted(missing)),
            expected="the layers " + ", ".join(sorted(_FOR_PROGRAMS)),
            remedy="demand these layers in the contract, or use a machine that has them: "
            "`cenacle enclave layers` tells",
        )


@dataclass(frozen=True)
class _Made:
    """The outputs, what they cost the records under the contract's privacy plan, and what was
    answered on the way."""

    values: Mapping[str, OutputValue]
    events: tuple[PrivacyEvent, ...] = ()
    serving: ServingRecord | None = None


def _run(
    opened: OpenedContract,
    session: Session,
    attester: Attester,
    config: AgentConfig,
    channel: Channel,
    offloading: Offloading | None,
) -> _Made:
    if isinstance(opened.contract.job, ServeJob):
        from cenacle.enclave.serving_job import run_serving  # noqa: PLC0415 - numpy, ONNX Runtime

        served = run_serving(opened, session, config, attester)
        return _Made(served.values, serving=served.record)
    if isinstance(opened.contract.job, RecipeJob):
        from cenacle.enclave.checkpoints import SealedCheckpoints  # noqa: PLC0415
        from cenacle.enclave.readers import open_asset  # noqa: PLC0415
        from cenacle.enclave.recipe_job import run_recipe  # noqa: PLC0415

        readers = {
            alias: open_asset(asset, asset_path(config.paths, index), session.asset_key(alias))
            for index, (alias, asset) in enumerate(opened.assets.items())
        }
        checkpoints = SealedCheckpoints(config.paths["checkpoints"], session)
        values, events = run_recipe(
            opened.contract,
            readers,
            checkpoints,
            channel.progress,
            offloading,
            secret=session.privacy_secret(),
        )
        return _Made(values, events)
    if config.worker is None:
        raise EnclaveError(
            "the launcher made no process for the program",
            expected="a second process, confined more tightly than the agent",
            remedy="start the job with `cenacle run`",
        )
    from cenacle.enclave.program_job import run_program  # noqa: PLC0415

    with socket.socket(fileno=config.worker) as connection:
        return _Made(run_program(opened, session, connection, channel.progress, offloading))


def _sha256(path: Path) -> str:
    return "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
