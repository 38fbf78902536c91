"""``cenacle run`` and ``cenacle abandon``."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer

from cenacle.broker.client import BrokerClient
from cenacle.broker.receipts import OpenedContract
from cenacle.cli.evidence import CollateralOption, EvidenceOption, TctiOption, choose_hardware
from cenacle.cli.home import Home
from cenacle.cli.machine import EnclaveOption, ImageOption, Machine
from cenacle.cli.options import AsOption, BrokerOption, ContractArgument
from cenacle.cli.output import JsonOption, errors_in_words, finish, line, progress_bar, say
from cenacle.documents.base import short
from cenacle.documents.contract import Contract
from cenacle.documents.offload import EnclavePlan, OffloadPlan
from cenacle.documents.offload_profile import PROFILE_FILE
from cenacle.documents.serving import ServeJob
from cenacle.errors import CenacleError, ConflictError, EnclaveError, InputError, RefusedError

if TYPE_CHECKING:
    from cenacle.enclave.launcher import Launcher, LaunchRequest, RunningEnclave

__all__ = [
    "Choice",
    "abandon",
    "begin",
    "check_run",
    "choose_accelerators",
    "find_sealed",
    "is_finished",
    "run",
    "with_way_on",
]

_WORDS = {
    "starting": "starting",
    "attesting": "checking sealed files and measuring",
    "keys": "showing evidence to the broker",
    "assets": "opening assets",
    "running": "running",
    "outputs": "sealing outputs",
    "receipt": "settling and signing the receipt",
    "closing": "closing",
}


_WAY_ON = (
    "go on with `cenacle run ... --resume` (its uses are charged once), or give the run up with "
    "`cenacle abandon`"
)


def find_sealed(opened: OpenedContract, places: list[Path]) -> dict[str, Path]:
    """The sealed file of each asset, found by its header among files and folders.

    Raises:
        InputError: naming every asset whose file is not there.
    """
    from cenacle.sealing.container import HEADER_BYTES, Header

    def candidates() -> Iterator[Path]:
        for place in places:
            if place.is_dir():
                yield from sorted(p for p in place.rglob("*.sealed") if p.is_file())
            else:
                yield place

    wanted = {asset.container.header: alias for alias, asset in opened.assets.items()}
    found: dict[str, Path] = {}
    for path in candidates():
        with path.open("rb") as file:
            head = file.read(HEADER_BYTES)
        try:
            digest = f"sha256:{Header.parse(head).digest().hex()}"
        except CenacleError:
            continue  # not a sealed file
        if digest in wanted:
            found.setdefault(wanted[digest], path)
    if missing := [alias for alias in opened.assets if alias not in found]:
        raise InputError(
            "the sealed files of some assets are not there",
            found=f"nothing for {', '.join(missing)}",
            expected="their .sealed files",
            remedy="get them from their owners and name them, or their folder, with --data",
        )
    return found


def choose_accelerators(plan: OffloadPlan, wanted: str) -> tuple[str, ...]:
    """The kind of each accelerator to start.

    Args:
        wanted: a kind, or ``contract`` for the first one that the contract allows.

    Raises:
        InputError: the contract does not allow this kind, or any.
    """
    if isinstance(plan, EnclavePlan):
        if wanted != "contract":
            raise InputError(
                "the contract sends nothing to accelerators", found=wanted, expected="none"
            )
        return ()
    allowed = plan.accelerators.kinds
    kind = allowed[0] if wanted == "contract" else wanted
    if kind not in allowed:
        raise InputError(
            "the contract does not allow this kind of accelerator",
            found=kind,
            expected=" or ".join(allowed),
        )
    return (kind,) * plan.accelerators.count


def run(
    contract: ContractArgument,
    data: Annotated[
        list[Path],
        typer.Option(metavar="PATH", help="Sealed files, or folders of them; repeatable."),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="For sealed outputs and receipt.")
    ],
    resume: Annotated[
        bool, typer.Option("--resume", help="Take over the contract's interrupted run.")
    ] = False,
    layers: Annotated[
        str, typer.Option(help="Sandbox layers: those the contract demands, all, or a,b,c.")
    ] = "contract",
    threads: Annotated[
        int | None, typer.Option(help="Threads of the enclave's algebra; default: one a core.")
    ] = None,
    accelerators: Annotated[
        str,
        typer.Option(
            help="Kind of accelerators to start outside the enclave: contract (the first that it "
            "allows), process or cuda."
        ),
    ] = "contract",
    where: EnclaveOption = "process",
    image: ImageOption = None,
    evidence: EvidenceOption = "contract",
    tcti: TctiOption = None,
    collateral: CollateralOption = None,
    broker: BrokerOption = "default",
    json_: JsonOption = False,
) -> None:
    """Start an enclave here, run a contract in it, and keep its sealed outputs and receipt.

    The operator of this command needs no key and sees no plaintext that the
    enclave's protection keeps from them; a SIMULATED enclave keeps nothing from
    root.
    """
    from cenacle.enclave.receipt import finish as finish_receipt

    with errors_in_words(json_):
        started = time.monotonic()
        home = Home.default()
        with home.client(broker) as client:
            opened = client.contract(contract)
            if isinstance(opened.contract.job, ServeJob):
                raise InputError(
                    "the contract serves a model",
                    found="a job without an end",
                    expected="a job that runs to its end",
                    remedy="start it with `cenacle serve`",
                )
            files = find_sealed(opened, data)
            if is_finished(out, contract, resume):
                # The job was done; only its last step is missing.
                _report(finish_receipt(client, out), opened.contract, started, json_)
                return
            open_run = client.open_run(contract)
            check_run(resume, open_run)
            demanded = opened.contract.enclave.layers
            chosen = {"contract": demanded, "all": None}.get(layers, layers.split(","))
            workers = choose_accelerators(opened.contract.offload, accelerators)
            assets = {f"asset-{i}": files[alias] for i, alias in enumerate(opened.assets)}
            checkpoints = out / "checkpoints"
            checkpoints.mkdir(parents=True, exist_ok=True)
            launcher, begun = begin(
                opened.contract,
                client,
                home,
                Choice(where, image, chosen, workers, evidence, tcti, collateral),
            )
            request = replace(
                begun,
                config={
                    **begun.config,
                    "contract": contract,
                    "broker": client.identity.to_fields(),
                    "resume": open_run if resume else None,
                },
                read_only={**begun.read_only, **assets},
                writable={"outputs": out, "checkpoints": checkpoints},
                threads=threads,
            )
            try:
                receipt, stages = _watch(launcher.launch(request), out, json_)
            except KeyboardInterrupt:
                _tell_open_run(client, contract)
                raise
            except CenacleError as error:
                raise with_way_on(error, client, contract) from None
        _report(receipt, opened.contract, started, json_, stages)


@dataclass(frozen=True)
class Choice:
    """What the operator chose of the machine that runs the job."""

    where: str
    image: Path | None
    layers: Sequence[str] | None
    accelerators: tuple[str, ...]
    evidence: str
    tcti: str | None
    collateral: Path | None


def begin(
    contract: Contract, client: BrokerClient, home: Home, choice: Choice
) -> tuple[Launcher, LaunchRequest]:
    """The launcher, and what of a request depends on it."""
    from cenacle.enclave.launcher import LaunchRequest, ProcessLauncher
    from cenacle.enclave.sandbox import plan

    accepted = tuple(contract.enclave.reference)
    serves = isinstance(contract.job, ServeJob)
    if choice.where == "vm":
        machine = Machine(choice.image)
        kind = accepted[0] if choice.evidence == "contract" else choice.evidence
        request = LaunchRequest(
            broker=_address(client),
            plan=machine.plan(choice.layers, serving=serves),
            config={"evidence": kind},
            accelerators=choice.accelerators,
        )
        return machine.launcher, request
    hardware = choose_hardware(
        accepted, choice.evidence, client, tcti=choice.tcti, collateral=choice.collateral
    )
    simulated = hardware.attester is None
    request = LaunchRequest(
        broker=_address(client),
        plan=plan(
            choice.layers,
            accelerators=bool(choice.accelerators),
            platform=not simulated,
            serving=serves,
        ),
        config={"evidence": hardware.kind},
        # The key that signs simulated evidence, and nothing else.
        read_only={"installation": _installation(home)} if simulated else {},
        accelerators=choice.accelerators,
        platform=hardware.attester,
    )
    return ProcessLauncher(), request


def is_finished(out: Path, contract: str, resume: bool) -> bool:
    """Whether this very job ended here without its receipt, which ``--resume`` then completes.

    Raises:
        ConflictError: the folder holds what another start would overwrite.
    """
    from cenacle.enclave.receipt import RECEIPT_FILE, draft_contract

    drafted = draft_contract(out)
    if drafted is not None:
        if resume and drafted == contract:
            return True
        raise ConflictError(
            "the output folder holds a finished job that lacks only its receipt",
            found=f"contract {short(drafted)} in {out}",
            expected="a folder without a finished job",
            remedy="complete it with --resume and its contract, or choose another --out",
        )
    if (out / RECEIPT_FILE).exists():
        raise ConflictError(
            "the output folder holds the receipt and outputs of a job already",
            found=str(out / RECEIPT_FILE),
            expected="a folder without a receipt",
            remedy="choose another --out, or move those files away",
        )
    return False


def _has_open_run(client: BrokerClient, contract: str) -> bool:
    try:
        return client.open_run(contract) is not None
    except CenacleError:
        return False


def with_way_on(
    error: CenacleError, client: BrokerClient, contract: str, way_on: str = _WAY_ON
) -> CenacleError:
    """The error of a run that stopped, with what can be done about the run."""
    if isinstance(error, RefusedError) or not _has_open_run(client, contract):
        return error
    fields = error.to_dict()
    first = f"{error.remedy}; then " if error.remedy else ""
    fields["remedy"] = first + way_on
    return CenacleError.from_dict(fields)


def _tell_open_run(client: BrokerClient, contract: str) -> None:
    if _has_open_run(client, contract):
        say(f"interrupted; {_WAY_ON}")


def _installation(home: Home) -> Path:
    home.installation()  # make it if this is the first run here
    return home.installation_path


def _address(client: BrokerClient) -> tuple[str, int]:
    url = urlsplit(client.identity.url or "")
    return (url.hostname or "", url.port or 443)


def check_run(resume: bool, open_run: str | None) -> None:
    """Raises :class:`ConflictError` unless a run is open exactly if one is to be resumed."""
    if resume and open_run is None:
        raise ConflictError(
            "there is no interrupted run to resume",
            found="no open run of this contract",
            expected="a run that was started and not finished",
            remedy="start one without --resume",
        )
    if not resume and open_run is not None:
        raise ConflictError(
            "a run of this contract is open already",
            found=f"run {open_run[:12]}",
            expected="none: a new run is charged anew",
            remedy="take it over with --resume, or give it up with `cenacle abandon`",
        )


def _watch(enclave: RunningEnclave, out: Path, json_: bool) -> tuple[Path, dict[str, float]]:
    """Where the receipt is, and how many seconds each stage took; ``steps``: the part of
    ``running`` from the first progress to the last."""
    from cenacle.enclave.channel import Failed, Finished, Progress, Stage

    seconds: dict[str, float] = {}
    name, begin, steps = "starting", time.monotonic(), 0.0

    def ended() -> None:
        seconds[name] = round(time.monotonic() - begin, 2)

    with enclave, progress_bar(f"enclave: {_WORDS['starting']}", not json_) as bar:
        for message in enclave.messages():
            match message:
                case Stage(new):
                    ended()
                    name, begin = new, time.monotonic()
                    bar.step(f"enclave: {_WORDS[name]}")
                case Progress(done, total):
                    steps = steps or time.monotonic()
                    seconds["steps"] = round(time.monotonic() - steps, 2)
                    bar.report(done, total)
                case Failed():
                    raise message.to_error()
                case Finished():
                    ended()
                    enclave.wait(30)
                    return out / "receipt.json", seconds
    raise EnclaveError("the enclave ended without a result")


def _report(
    receipt: Path,
    contract: Contract,
    started: float,
    json_: bool,
    stages: dict[str, float] | None = None,
) -> None:
    seconds = round(time.monotonic() - started, 2)
    profile = receipt.with_name(PROFILE_FILE)
    offloaded = contract.offload.scheme != "enclave" and profile.is_file()

    def show() -> None:
        line(f"receipt {receipt} after {seconds} s")
        if offloaded:
            line(f"costs by layer: cenacle offload profile {profile}")

    finish(
        {
            "receipt": str(receipt),
            "seconds": seconds,
            "stages": stages or {},
            "offload_profile": str(profile) if offloaded else None,
        },
        json_,
        show,
    )


def abandon(
    contract: ContractArgument,
    as_: AsOption,
    broker: BrokerOption = "default",
    json_: JsonOption = False,
) -> None:
    """Give up a contract's interrupted run. Its uses stay charged."""
    with errors_in_words(json_):
        with Home.default().client_as(as_, broker) as (keys, client):
            run_id = client.open_run(contract)
            if run_id is None:
                raise ConflictError(
                    "there is no open run to abandon", found="none", expected="an open run"
                )
            client.abandon(run_id, keys.signing_key, as_)
        finish(
            {"contract": contract, "abandoned": run_id},
            json_,
            lambda: line(f"abandoned run {run_id[:12]}; its uses stay charged"),
        )
