"""``cenacle serve`` in the background, for demonstrations."""

from __future__ import annotations

import json
import signal
import subprocess
from typing import Any, Final, Self

from cenacle.cli.stage import Actor
from cenacle.errors import CenacleError, UnavailableError

__all__ = ["BackgroundService"]

_WAIT_SECONDS: Final = 60


class BackgroundService:
    """``cenacle serve`` as a process of its own, stopped at the end.

    Attributes:
        announced: the event ``ready``: address, model, certificate.
    """

    def __init__(self, actor: Actor, *arguments: str) -> None:
        self._process = actor.start("serve", *arguments)
        assert self._process.stdout is not None
        found: dict[str, Any] = {}
        for text in self._process.stdout:
            found = json.loads(text)
            if found.get("event") == "ready":
                break
        else:
            self._process.wait(_WAIT_SECONDS)
            raise (
                CenacleError.from_dict(found)
                if "error" in found
                else UnavailableError(
                    "the service did not start", found=f"exit code {self._process.returncode}"
                )
            )
        self.announced = found

    def drain(self) -> None:
        """Have it answer what waits and write its report and receipt, as Ctrl-C does.

        Raises:
            UnavailableError: it ended badly, or not at all.
        """
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.communicate(timeout=_WAIT_SECONDS)
        except subprocess.TimeoutExpired:
            raise UnavailableError("the service does not end") from None
        if self._process.returncode != 0:
            raise UnavailableError(
                "the service ended badly", found=f"exit code {self._process.returncode}"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
