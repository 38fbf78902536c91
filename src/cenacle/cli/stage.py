"""A stage for demonstrations: parties with folders of their own, real commands, real processes."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.markup import escape

from cenacle.errors import CenacleError, UnavailableError

__all__ = [
    "Actor",
    "BackgroundBroker",
    "Stage",
    "check_ended",
]

_START_SECONDS = 30
_AT_ONCE = max(2, min(4, os.cpu_count() or 1))


def check_ended(arguments: tuple[str, ...], code: int) -> None:
    """Raises unless a command ended well."""
    if code != 0:
        raise CenacleError(
            f"the demonstration stopped at `cenacle {shlex.join(arguments)}`",
            found=f"exit code {code}",
            expected="0; the message above says what is wrong",
        )


class Stage:
    """Where a demonstration plays: prints every command before it runs it.

    Args:
        folder: everything lies in it; each actor has a folder (and a home) below.
        quiet: print to the error stream, so that the output keeps one JSON object.
    """

    def __init__(self, folder: Path, *, quiet: bool) -> None:
        self.folder = folder
        self.quiet = quiet
        self.console = Console(stderr=quiet, highlight=False)

    def actor(self, name: str) -> Actor:
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        return Actor(self, name, folder)

    def heading(self, text: str) -> None:
        self.console.print(f"\n[bold]{escape(text)}[/]")

    def environment(self, actor: Actor) -> dict[str, str]:
        return {**os.environ, "CENACLE_HOME": str(actor.folder / "home")}

    def together(self, *lines: tuple[Actor, tuple[str, ...], str | None]) -> None:
        """Run commands of several actors at once and print each with its output, in order.

        Args:
            lines: actor, arguments, and what to pipe to its standard input.

        Raises what the first command that failed reported, when all have ended.
        """
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            pending = [
                pool.submit(actor.collect, arguments, fed) for actor, arguments, fed in lines
            ]
            for (actor, arguments, _), future in zip(lines, pending, strict=True):
                self.show(actor.name, arguments)
                code, output = future.result()
                self.console.file.write(output)
                self.console.file.flush()
                check_ended(arguments, code)

    def show(self, actor: str, arguments: tuple[str, ...], end: str = "") -> None:
        line = f"[cyan]{actor}[/] $ [bold]cenacle[/] {escape(shlex.join(arguments))}{end}"
        self.console.print(line, soft_wrap=True)


class Actor:
    """One party or machine: a folder, a home with keys, and the commands that it types."""

    def __init__(self, stage: Stage, name: str, folder: Path) -> None:
        self.stage = stage
        self.name = name
        self.folder = folder

    def run(self, *arguments: str) -> None:
        """Run a command as its user would, with its own output on the terminal.

        Raises what the command reported, as an error of this process.
        """
        check_ended(arguments, self.attempt(*arguments))

    def attempt(self, *arguments: str) -> int:
        """:meth:`run`, but an error is the caller's to judge; returns the exit code."""
        self.stage.show(self.name, arguments)
        done = subprocess.run(
            self._command(arguments),
            cwd=self.folder,
            env=self.stage.environment(self),
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr if self.stage.quiet else None,
            text=True,
            check=False,
        )
        return done.returncode

    def collect(self, arguments: tuple[str, ...], fed: str | None) -> tuple[int, str]:
        """Run a command and return its exit code and all that it printed."""
        console = self.stage.console
        environment = {**self.stage.environment(self), "COLUMNS": str(console.width)}
        if console.is_terminal:
            environment["FORCE_COLOR"] = "1"
        done = subprocess.run(
            self._command(arguments),
            cwd=self.folder,
            env=environment,
            input="" if fed is None else fed + "\n",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout

    def ask(self, *arguments: str, shown: bool = True) -> dict[str, Any]:
        """Run a command with ``--json`` and return its answer; its text output is not shown."""
        if shown:
            self.stage.show(self.name, arguments)
        done = subprocess.run(
            self._command((*arguments, "--json")),
            cwd=self.folder,
            env=self.stage.environment(self),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1] if done.stdout else "{}")
        if done.returncode != 0:
            raise CenacleError.from_dict(answer)
        return answer

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Show a command and leave it running; it tells what happens as JSON on its output."""
        self.stage.show(self.name, arguments, end=" &")
        return subprocess.Popen(
            [*self._command(arguments), "--json"],
            cwd=self.folder,
            env=self.stage.environment(self),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )

    @staticmethod
    def _command(arguments: tuple[str, ...]) -> list[str]:
        return [sys.executable, "-m", "cenacle", *arguments]


class BackgroundBroker:
    """``cenacle broker start`` as a process of its own, stopped at the end."""

    def __init__(self, actor: Actor, *arguments: str) -> None:
        self._process = actor.start("broker", "start", *arguments)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer = json.loads(line or "{}")
        if "url" not in answer:
            self._process.wait(_START_SECONDS)
            raise (
                CenacleError.from_dict(answer)
                if answer
                else UnavailableError(
                    "the broker did not start", found=f"exit code {self._process.returncode}"
                )
            )
        self.announced: dict[str, Any] = answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
