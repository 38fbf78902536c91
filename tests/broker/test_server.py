"""What the server does to the answers on their way out."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cenacle.broker.http import _Joined

HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n"


class Transport:
    def __init__(self) -> None:
        self.did: list[bytes | str] = []
        self.closing = False

    def write(self, data: bytes) -> None:
        self.did.append(data)

    def close(self) -> None:
        self.did.append("close")

    def is_closing(self) -> bool:
        return self.closing


def sent(*steps: bytes | str, closing: bool = False) -> list[bytes | str]:
    """What reaches the transport; ``turn``: the event loop gets to whatever else it has."""

    async def play() -> list[bytes | str]:
        transport = Transport()
        transport.closing = closing
        joined: Any = _Joined(transport)
        assert joined.is_closing() is closing  # whatever else there is comes from the transport
        for step in steps:
            if step == "close":
                joined.close()
            elif step == "turn":
                await asyncio.sleep(0)
            else:
                joined.write(step)
        return transport.did

    return asyncio.run(play())


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ((HEAD, b"body"), [HEAD + b"body"]),
        ((HEAD, b""), [HEAD]),
        ((HEAD, b"body", "turn"), [HEAD + b"body"]),
        ((HEAD, b"ends like a head\r\n\r\n"), [HEAD + b"ends like a head\r\n\r\n"]),
        ((HEAD, b"one", b"two"), [HEAD + b"one", b"two"]),
        ((HEAD, b"one", HEAD, b"two"), [HEAD + b"one", HEAD + b"two"]),
        ((b"body",), [b"body"]),
        ((HEAD, "turn"), [HEAD]),
        ((HEAD, "turn", b"late"), [HEAD, b"late"]),
        ((HEAD, "close", "turn"), [HEAD, "close"]),
        ((HEAD, b"body", "close"), [HEAD + b"body", "close"]),
    ],
)
def test_nothing_is_lost_doubled_or_moved(
    steps: tuple[bytes | str, ...], expected: list[bytes | str]
) -> None:
    assert sent(*steps) == expected


def test_nothing_is_written_to_whom_has_left() -> None:
    assert sent(HEAD, "turn", closing=True) == []
