"""``cenacle serve``: a model's confidential part in an enclave, queried over HTTPS."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cenacle.cli.evidence import CollateralOption, EvidenceOption, TctiOption
from cenacle.cli.home import Home
from cenacle.cli.machine import EnclaveOption, ImageOption
from cenacle.cli.options import BrokerOption, ContractArgument
from cenacle.cli.output import clean, errors_in_words, line, say
from cenacle.cli.run import Choice, with_way_on
from cenacle.cli.serve_operator import Operator
from cenacle.documents.base import short
from cenacle.errors import CenacleError, InputError

if TYPE_CHECKING:
    import socket

    from cenacle.broker.tls import TlsFiles
    from cenacle.serving.answers import Limits

__all__ = ["serve"]

_WAY_ON: Final = (
    "go on with `cenacle serve ... --resume` (its uses are charged once), or give the run up with "
    "`cenacle abandon`"
)
_TOGETHER: Final = "--tls-cert and --tls-key go together"


def serve(
    contract: ContractArgument,
    data: Annotated[
        list[Path],
        typer.Option(metavar="PATH", help="Sealed files, or folders of them; repeatable."),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", metavar="FOLDER", help="For the sealed usage report and the receipt."
        ),
    ],
    front: Annotated[
        list[Path] | None,
        typer.Option(help="The model's public front (ONNX), or folders of fronts; repeatable."),
    ] = None,
    listen: Annotated[str, typer.Option(help="HOST:PORT; port 0 takes a free one.")] = (
        "127.0.0.1:8443"
    ),
    public_name: Annotated[
        list[str] | None, typer.Option(help="Host name or address that clients use; repeatable.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM; default: self-made.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM key of --tls-cert.")] = None,
    plain_http: Annotated[
        bool, typer.Option("--plain-http", help="No TLS; on a loopback address alone.")
    ] = False,
    follow: Annotated[
        float | None,
        typer.Option(
            help="Seconds between looks at the broker for an approved contract that replaces "
            "this one. Without it, SIGHUP has it look."
        ),
    ] = None,
    tickets: Annotated[
        Path | None,
        typer.Option(help="Where burned tickets are kept from run to run; default: in your home."),
    ] = None,
    waiting: Annotated[int, typer.Option(help="Queries that may wait; more are told 503.")] = 256,
    max_body_mb: Annotated[int, typer.Option(help="MiB that one request may have.")] = 64,
    resume: Annotated[
        bool, typer.Option("--resume", help="Take over the contract's interrupted run.")
    ] = False,
    layers: Annotated[
        str, typer.Option(help="Sandbox layers: those the contract demands, all, or a,b,c.")
    ] = "contract",
    threads: Annotated[
        int | None, typer.Option(help="Threads of the enclave's algebra; default: one a core.")
    ] = None,
    front_threads: Annotated[
        int | None, typer.Option(help="Threads of the front; default: one a core.")
    ] = None,
    where: EnclaveOption = "process",
    image: ImageOption = None,
    evidence: EvidenceOption = "contract",
    tcti: TctiOption = None,
    collateral: CollateralOption = None,
    broker: BrokerOption = "default",
    json_: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a line for what happens.")
    ] = False,
) -> None:
    """Serve a model until interrupted; then the usage report and the receipt are written.

    Clients speak the Open Inference Protocol (KServe v2), or seal their queries
    to the enclave. The operator of this command sees no parameters of the
    confidential part, and of sealed queries sizes and times only; a SIMULATED
    enclave keeps nothing from root.
    """
    from cenacle.broker.http import bind
    from cenacle.serving.answers import Limits
    from cenacle.serving.server import event_loop

    with errors_in_words(json_):
        if waiting < 1 or max_body_mb < 1 or (follow is not None and follow <= 0):
            raise InputError("a limit must be greater than zero")
        host, port = _address(listen)
        limits = Limits(
            waiting=waiting,
            body_bytes=max_body_mb << 20,
            bodies_bytes=max(8 * max_body_mb << 20, 512 << 20),
        )
        home = Home.default()
        files = _tls(home, host, public_name or [], tls_cert, tls_key, plain=plain_http)
        choice = Choice(where, image, None, (), evidence, tcti, collateral)
        with home.client(broker) as client, bind(host, port, "the service") as listener:
            operator = Operator(
                home,
                client,
                data,
                front or [],
                out,
                tickets,
                layers,
                choice,
                threads,
                front_threads,
                limits,
            )
            shown = (public_name or [host])[0]
            url = _url(shown, listener, tls=files is not None)
            service = _Service(operator, limits, _speaker(json_), follow)
            try:
                with asyncio.Runner(loop_factory=event_loop()) as runner:
                    runner.run(service.run(contract, listener, files, url, resume=resume))
            except CenacleError as error:
                raise with_way_on(error, client, operator.last or contract, _WAY_ON) from None


# ---------------------------------------------------------------------------- where to listen


def _address(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise InputError(
            "an address to listen on has another form", found=listen, expected="HOST:PORT"
        )
    return host, int(port)


def _url(host: str, listener: socket.socket, *, tls: bool) -> str:
    shown = f"[{host}]" if ":" in host else host
    return f"{'https' if tls else 'http'}://{shown}:{listener.getsockname()[1]}"


def _tls(
    home: Home,
    host: str,
    names: list[str],
    certificate: Path | None,
    key: Path | None,
    *,
    plain: bool,
) -> TlsFiles | None:
    from cenacle.broker.tls import ensure_certificate, given_certificate

    if (certificate is None) != (key is None):
        raise typer.BadParameter(_TOGETHER)
    if plain:
        if certificate is not None or not _is_loopback(host):
            raise InputError(
                "plain HTTP is for a loopback address alone",
                found=host,
                expected="127.0.0.1 or [::1], and no certificate",
                remedy="leave --plain-http out: a certificate is made if you give none",
            )
        return None
    if certificate is not None and key is not None:
        return given_certificate(certificate, key)
    home.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    unnamed = {"0.0.0.0", "::"}  # noqa: S104
    return ensure_certificate(
        home.folder / "serving", (*names, *(() if host in unnamed else (host,)))
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# ---------------------------------------------------------------------------- the service


def _speaker(as_json: bool) -> Callable[[dict[str, Any]], None]:
    """What tells the operator of an event: a line, or a JSON object on a line."""

    def speak(event: dict[str, Any]) -> None:
        if as_json:
            sys.stdout.write(json.dumps(event, allow_nan=False) + "\n")
            sys.stdout.flush()
            return
        match event:
            case {"event": "ready", "url": url, "model": model, "certificate": certificate}:
                line(f"serving  {model} at {url}")
                if certificate is not None:
                    line(f"certificate {certificate}  (clients pin this file)")
            case {"event": "stage", "stage": stage}:
                say(f"enclave: {stage}")
            case {"event": "receipt", "receipt": receipt}:
                line(f"receipt {receipt}")
            case {"event": "problem", "problem": problem}:
                say(f"error: {problem}")
            case {"event": name}:
                say(" ".join([name, *(str(v) for k, v in event.items() if k != "event")]))

    return speak


@dataclass
class _Service:
    """One run of the command."""

    operator: Operator
    limits: Limits
    speak: Callable[[dict[str, Any]], None]
    follow: float | None

    async def run(
        self,
        contract: str,
        listener: socket.socket,
        files: TlsFiles | None,
        url: str,
        *,
        resume: bool,
    ) -> None:
        from cenacle.serving.app import ServingApp
        from cenacle.serving.reload import Switch
        from cenacle.serving.server import Listening

        self._stop, self._look = asyncio.Event(), asyncio.Event()
        self._folders: dict[str, Path] = {contract: self.operator.out}
        self._tried: set[str] = set()
        app = ServingApp(limits=self.limits)
        self._switch = Switch(app, lambda stage: self.speak({"event": "stage", "stage": stage}))
        server = Listening(app, listener, files, self.limits)
        self._signals()
        await self._unless_stopped(self._begin(contract, self.operator.out, resume=resume))
        listening = asyncio.create_task(server.run_until_told())
        try:
            await self._announce(url, files)
            await self._until_told()
        finally:
            server.should_exit = True
            await listening
        await self._end()

    def _signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._told)
        loop.add_signal_handler(signal.SIGHUP, self._look.set)

    def _told(self) -> None:
        if self._stop.is_set():
            # Told twice: no receipt, but the job can be resumed.
            asyncio.get_running_loop().create_task(self._switch.kill())
        self._stop.set()

    async def _unless_stopped(self, work: Any) -> None:
        task, stop = asyncio.create_task(work), asyncio.create_task(self._stop.wait())
        await asyncio.wait([task, stop], return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            raise KeyboardInterrupt
        await task

    async def _begin(self, contract: str, out: Path, *, resume: bool) -> None:
        plan = await asyncio.to_thread(self.operator.plan, contract, out, resume=resume)
        self._folders[contract] = out
        await self._switch.serve(plan)

    async def _announce(self, url: str, files: TlsFiles | None) -> None:
        served = self._switch.served
        if served is not None:
            self.speak(
                {
                    "event": "ready",
                    "url": url,
                    "model": served.job.model,
                    "contract": served.contract,
                    "certificate": None if files is None else str(files.certificate),
                }
            )

    async def _until_told(self) -> None:
        """Until a signal or the enclave's end; looks for a new contract in between."""
        stop = asyncio.create_task(self._stop.wait())
        try:
            while not stop.done():
                look = asyncio.create_task(self._look.wait())
                waiting: list[asyncio.Future[Any]] = [stop, look, self._switch.failed]
                await asyncio.wait(
                    waiting, timeout=self.follow, return_when=asyncio.FIRST_COMPLETED
                )
                asked = look.done()
                look.cancel()
                if self._switch.failed.done():
                    self._switch.failed.result()
                if not stop.done():
                    self._look.clear()
                    await self._reload(asked=asked)
        finally:
            stop.cancel()

    async def _reload(self, *, asked: bool) -> None:
        """Serve what replaced the contract, if anything; what goes wrong is only told.

        A contract that could not be served is tried again when the operator asks, not by itself.
        """
        served = self._switch.served
        if served is None:
            return
        newer: str | None = None
        try:
            newer = await asyncio.to_thread(self.operator.successor, served.contract)
            if newer is None:
                if asked:
                    self.speak({"event": "current", "contract": served.contract})
                return
            if newer in self._tried and not asked:
                return
            out = self.operator.out / newer.removeprefix("sha256:")[:12]
            await self._begin(newer, out, resume=False)
            self.speak({"event": "reloaded", "contract": newer, "out": str(out)})
            await self._switch.drained()
            self._receipt(served.contract)
        except CenacleError as error:
            if newer is not None:
                self._tried.add(newer)
            self.speak({"event": "problem", "problem": clean(error.diagnostics())})

    async def _end(self) -> None:
        last = self._switch.served
        self.speak({"event": "draining"})
        await self._switch.stop()
        if last is not None:
            self._receipt(last.contract)

    def _receipt(self, contract: str) -> None:
        path = self._folders[contract] / "receipt.json"
        self.speak({"event": "receipt", "receipt": str(path), "contract": short(contract)})
