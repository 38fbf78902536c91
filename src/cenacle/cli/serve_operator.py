"""What the operator of `cenacle serve` brings, and what it takes to start an enclave with it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cenacle.broker.client import BrokerClient
from cenacle.broker.messages import ContractView
from cenacle.broker.receipts import OpenedContract, open_contract
from cenacle.cli.home import Home
from cenacle.cli.run import Choice, begin, check_run, find_sealed, is_finished
from cenacle.documents.approval import approves
from cenacle.documents.serving import ServeJob
from cenacle.errors import InputError

if TYPE_CHECKING:
    from cenacle.enclave.launcher import RunningEnclave
    from cenacle.serving.answers import Limits
    from cenacle.serving.reload import Plan

__all__ = ["Operator", "find_front"]


@dataclass
class Operator:
    """What the user of the command gave, and what it takes to start an enclave with it.

    Every method blocks.
    """

    home: Home
    client: BrokerClient
    data: list[Path]
    fronts: list[Path]
    out: Path
    tickets: Path | None
    layers: str
    choice: Choice
    threads: int | None
    front_threads: int | None
    limits: Limits
    last: str | None = None

    def view(self, digest: str) -> tuple[ContractView, OpenedContract]:
        view = self.client.contract_view(digest)
        return view, open_contract(digest, view.contract, view.parties, view.assets)

    def successor(self, digest: str) -> str | None:
        """The newest contract that replaces this one and is signed by those who must."""
        found, current = None, self.client.contract_view(digest).replaced_by
        while current is not None:
            view, opened = self.view(current)
            if approves(opened.contract.approval, opened.signed):
                found = current
            current = view.replaced_by
        return found

    def plan(self, digest: str, out: Path, *, resume: bool) -> Plan:
        """What serving a contract takes.

        Raises:
            InputError: it serves nothing, or files are missing.
            ConflictError: the folder or the broker has an earlier run.
        """
        from cenacle.serving.deployment import Served
        from cenacle.serving.reload import Plan

        view, opened = self.view(digest)
        job = opened.contract.job
        if not isinstance(job, ServeJob):
            raise InputError(
                "the contract serves no model",
                found=f"a job of type {job.type}",
                expected="serve",
                remedy="start it with `cenacle run`",
            )
        front = None if job.front is None else find_front(self.fronts, job.front)
        files = find_sealed(opened, self.data)
        if is_finished(out, digest, resume=False):
            raise AssertionError("a finished job raises without resume")
        open_run = self.client.open_run(digest)
        check_run(resume, open_run)
        demanded = opened.contract.enclave.layers
        layers = {"contract": demanded, "all": None}.get(self.layers, self.layers.split(","))
        launcher, begun = begin(
            opened.contract, self.client, self.home, replace(self.choice, layers=layers)
        )
        writable = {"outputs": out, "checkpoints": out / "checkpoints"}
        if job.tickets is not None:
            kept = self.tickets or self.home.folder / "tickets"
            writable["tickets"] = kept / digest.removeprefix("sha256:")
        for folder in writable.values():
            folder.mkdir(parents=True, exist_ok=True)
        assets = {f"asset-{i}": files[alias] for i, alias in enumerate(opened.assets)}
        request = replace(
            begun,
            config={
                **begun.config,
                "contract": digest,
                "broker": self.client.identity.to_fields(),
                "resume": open_run if resume else None,
            },
            read_only={**begun.read_only, **assets},
            writable=writable,
            threads=self.threads,
        )

        def launch(server: Path) -> RunningEnclave:
            return launcher.launch(replace(request, serving=server))

        self.last = digest
        return Plan(
            Served(digest, job, view), front, launch, self.front_threads, self.limits.answer_s
        )


def find_front(places: list[Path], digest: str) -> Path:
    """The file of this digest, among files and folders.

    Raises:
        InputError: it is not there.
    """
    from cenacle.serving.front import front_digest

    for place in places:
        found = sorted(place.rglob("*.onnx")) if place.is_dir() else [place]
        for path in found:
            if front_digest(path) == digest:
                return path
    raise InputError(
        "the model's public front is not there",
        found="none of this digest" if places else "no --front",
        expected=digest,
        remedy="get front.onnx from the model's owner and name it, or its folder, with --front",
    )
