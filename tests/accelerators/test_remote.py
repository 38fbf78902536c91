"""Workers at the end of a stream: hostile, gone or silent."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cenacle.accelerators import RemoteAccelerator
from cenacle.errors import AcceleratorError

pytestmark = pytest.mark.processes

Liar = Callable[[str], RemoteAccelerator]

# A stream's requests are single frames, with the bytes of tensors between them: what these
# workers answer does not depend on what they are asked.
_ANSWERS = [
    pytest.param("send(b'\\xff')", "no JSON", id="garbage"),
    pytest.param("send([1])", "no object", id="array"),
    pytest.param("connection.sendall(b'\\xff' * 4)", "4294967295 bytes", id="giant-length"),
    pytest.param(
        "connection.sendall(b'\\0\\0\\0\\x20{'); connection.shutdown(1)",
        "within it",
        id="truncated",
    ),
    pytest.param(
        "connection.sendall(b'\\0\\0'); connection.shutdown(1)", "within it", id="half-a-length"
    ),
    pytest.param("send({'ticket': 2, 'seconds': 0})", "out of order", id="later-ticket"),
    pytest.param("send({'ticket': 1, 'seconds': -1})", "unknown fields", id="negative"),
    pytest.param("send({'ticket': 1, 'seconds': 0, 'shape': [9]})", "unknown fields", id="shape"),
    pytest.param(
        "send({'ticket': 1, 'seconds': 0}); connection.sendall(b'12'); connection.shutdown(1)",
        "within it",
        id="too-few-bytes",
    ),
    pytest.param("os._exit(3)", "closed its connection|Connection reset", id="exit"),
    pytest.param(r"send({'ticket': 1, 'error': '\x1b[2J'})", r"\?\[2J", id="error"),
]


@pytest.mark.parametrize(("lines", "reason"), _ANSWERS)
def test_a_wrong_answer_is_an_error(remote_liar: Liar, lines: str, reason: str) -> None:
    accelerator = remote_liar("connection.recv(1)\n" + lines)
    accelerator.put(1, torch.ones(3))
    pending = accelerator.get(1)
    with pytest.raises(AcceleratorError, match=reason):
        pending.wait(60)
    with pytest.raises(AcceleratorError, match=reason):
        pending.wait(60)


def test_more_than_was_asked_for_ends_it(remote_liar: Liar) -> None:
    """Surplus bytes of a result are taken for the next answer, which they are not."""
    accelerator = remote_liar("""
        connection.recv(1)
        send({"ticket": 1, "seconds": 0})
        connection.sendall(bytes(64))
    """)
    accelerator.put(1, torch.ones(3))
    assert torch.equal(accelerator.get(1).wait(60), torch.zeros(3))
    with pytest.raises(AcceleratorError, match=r"no JSON|nobody|gone"):
        accelerator.get(1).wait(60)


def test_silence(remote_liar: Liar) -> None:
    accelerator = remote_liar("")
    accelerator.put(1, torch.ones(3))
    with pytest.raises(AcceleratorError, match="does not answer"):
        accelerator.get(1).wait(0.2)


def test_a_worker_that_takes_nothing_blocks_nobody(remote_liar: Liar) -> None:
    accelerator = remote_liar("")
    for handle in range(20):
        accelerator.put(handle, torch.ones(1 << 18))
    with pytest.raises(AcceleratorError, match="does not answer"):
        accelerator.get(3).wait(0.2)
    accelerator.close()


def test_closing_leaves_nothing(remote_liar: Liar) -> None:
    gc.collect()
    before = len(list(Path("/proc/self/fd").iterdir())), threading.active_count()
    accelerator = remote_liar("")
    accelerator.put(1, torch.ones(1))
    pending = accelerator.get(1)
    accelerator.close()
    accelerator.close()
    with pytest.raises(AcceleratorError, match="closed"):
        pending.wait(1)
    with pytest.raises(AcceleratorError, match="closed"):
        accelerator.put(1, torch.ones(1))
    accelerator.drop([1])
    assert (len(list(Path("/proc/self/fd").iterdir())), threading.active_count()) == before
