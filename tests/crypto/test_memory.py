"""Secret memory, looked at from outside: /proc, forked children, systems that refuse it."""

from __future__ import annotations

import copy
import ctypes
import errno
import gc
import hmac
import logging
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cenacle.crypto import HpkePrivateKey, SecretBytes, SigningKey, memory

CANARY = b"canary-in-a-coal-mine-0123456789"

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

PRELUDE = """
    import ctypes, os, resource, sys
    from cenacle.crypto import SecretBytes

    def address(secret):
        import numpy
        return numpy.frombuffer(secret.view(), "u1").__array_interface__["data"][0]

    def unprivileged():
        if os.getuid() == 0:  # root may lock any amount of memory
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
"""


@pytest.fixture
def script() -> Callable[[str], str]:
    """Run Python in a process of its own; its standard output, or the test fails."""

    def run(body: str) -> str:
        source = textwrap.dedent(PRELUDE) + textwrap.dedent(body)
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", source],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


# --- holding ---------------------------------------------------------------------------------


@given(st.binary(min_size=1, max_size=10_000))
@settings(max_examples=60)
def test_holds_what_it_was_given(data: bytes) -> None:
    with SecretBytes(data) as secret:
        assert len(secret) == len(data)
        assert bytes(secret.view()) == data
        assert hmac.compare_digest(secret.view(), data)


@pytest.mark.parametrize("length", [1, 31, 4095, 4096, 4097, 100_000])
def test_random_secrets_have_their_length_and_differ(length: int) -> None:
    one, other = SecretBytes.random(length), SecretBytes.random(length)
    assert len(one.view()) == len(one) == length
    assert length == 1 or bytes(one.view()) != bytes(other.view())


class Dripping:
    """A C library whose generator gives three bytes at a time, after an interruption."""

    def __init__(self) -> None:
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        found: Any = getattr(ctypes.CDLL(None, use_errno=True), name)
        return found

    def getrandom(self, address: Any, length: Any, flags: int) -> int:
        self.calls += 1
        ctypes.set_errno(errno.EINTR)
        if self.calls == 1:
            return -1
        some: int = min(3, length.value)
        ctypes.memmove(address, CANARY, some)
        return some


def test_random_bytes_are_asked_for_until_there_are_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "_libc", Dripping())
    assert bytes(SecretBytes.random(8).view()) == CANARY[:3] * 2 + CANARY[:2]


def test_random_bytes_that_the_system_refuses_are_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A key of zeros would be worse than none."""

    class Refusing(Dripping):
        def getrandom(self, address: Any, length: Any, flags: int) -> int:
            ctypes.set_errno(errno.ENOSYS)
            return -1

    monkeypatch.setattr(memory, "_libc", Refusing())
    with pytest.raises(OSError, match="no random bytes"):
        SecretBytes.random(32)


def test_without_the_systems_call_python_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        def syscall(self, *_: object) -> int:
            return -1

        def mlock(self, *_: object) -> int:
            return 0

    monkeypatch.setattr(memory, "_libc", Old())
    one, other = SecretBytes.random(32), SecretBytes.random(32)
    assert bytes(one.view()) != bytes(other.view())
    assert bytes(8) not in bytes(one.view())


def test_wipes_the_bytearray_that_it_was_given() -> None:
    data = bytearray(CANARY)
    secret = SecretBytes(data)
    assert data == bytes(len(CANARY))
    assert bytes(secret.view()) == CANARY


def test_takes_views_of_any_shape() -> None:
    assert bytes(SecretBytes(memoryview(CANARY)[3:9]).view()) == CANARY[3:9]
    words = memoryview(bytearray(CANARY)).cast("I")
    assert bytes(SecretBytes(words).view()) == CANARY


def test_is_never_empty() -> None:
    for empty in (b"", bytearray(), memoryview(b"")):
        with pytest.raises(ValueError, match="at least one byte"):
            SecretBytes(empty)


def test_views_are_read_only() -> None:
    view = SecretBytes(CANARY).view()
    assert view.readonly
    with pytest.raises(TypeError):
        view[0] = 0


# --- wiping ----------------------------------------------------------------------------------


def test_wiping_clears_every_view_and_refuses_new_ones() -> None:
    secret = SecretBytes(CANARY)
    view = secret.view()
    secret.wipe()
    assert bytes(view) == bytes(len(CANARY))
    for _ in range(2):
        with pytest.raises(ValueError, match="wiped"):
            secret.view()
        secret.wipe()
    view.release()
    with pytest.raises(ValueError, match="wiped"):
        secret.view()


def test_erasing_a_part_clears_that_part_alone() -> None:
    secret = SecretBytes(CANARY)
    view = secret.view()
    secret.erase(3, 3)
    assert bytes(view) == CANARY
    secret.erase(3, 7)
    assert bytes(view) == CANARY[:3] + bytes(4) + CANARY[7:]
    secret.erase(0, len(CANARY))
    assert bytes(view) == bytes(len(CANARY))
    secret.wipe()
    secret.erase(0, 1)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 33), (5, 4), (32, 33), (4000, 4096)])
def test_erases_nothing_beyond_a_secret(start: int, stop: int) -> None:
    secret = SecretBytes(CANARY)
    with pytest.raises(ValueError, match="reach"):
        secret.erase(start, stop)
    assert bytes(secret.view()) == CANARY


def test_leaving_the_block_wipes() -> None:
    with SecretBytes(CANARY) as secret:
        view = secret.view()
    assert bytes(view) == bytes(len(CANARY))


def test_a_view_keeps_the_secret_alive() -> None:
    """A secret that was collected while somebody read it would be read as a key of zeros."""
    view = SecretBytes(CANARY).view()
    gc.collect()
    assert bytes(view) == CANARY
    assert bytes(SecretBytes(CANARY).view()) == CANARY
    assert any(SecretBytes.random(32).view())


@linux
def test_collection_wipes(script: Callable[[str], str]) -> None:
    """The page is kept mapped through a second mapping of the same memory, and looked at."""
    out = script(
        """
        import glob, mmap
        before = set(os.listdir("/proc/self/fd"))
        secret = SecretBytes(b"canary" * 8)
        new = [int(fd) for fd in set(os.listdir("/proc/self/fd")) - before]
        kept = [mmap.mmap(fd, 4096) for fd in new
                if "secretmem" in os.readlink(f"/proc/self/fd/{fd}")] if (
                secret.protection == "memfd_secret") else []
        assert all(page[:6] == b"canary" for page in kept)
        del secret
        assert all(page[:] == bytes(4096) for page in kept)
        print(len(kept) <= 1)
        """
    )
    assert out == "True"


# --- not leaving -----------------------------------------------------------------------------


def test_cannot_be_pickled_or_copied() -> None:
    holders = (
        SecretBytes(CANARY),
        SigningKey.from_seed(SecretBytes(CANARY)),
        HpkePrivateKey(SecretBytes(CANARY * 3)),
    )
    for holder in holders:
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            with pytest.raises(TypeError):
                pickle.dumps(holder, protocol)
        with pytest.raises(TypeError):
            copy.deepcopy(holder)
    with pytest.raises(TypeError, match="cannot be pickled or copied"):
        copy.copy(holders[0])


def test_cannot_be_printed(caplog: pytest.LogCaptureFixture) -> None:
    secret = SecretBytes(CANARY)
    texts = [repr(secret), str(secret), f"{secret}", f"{secret!a}", "%s" % secret, repr([secret])]  # noqa: UP031
    texts += [repr(SigningKey.from_seed(SecretBytes(CANARY)))]
    texts += [repr(HpkePrivateKey(SecretBytes(CANARY * 3)))]
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("test").debug("%s %r", secret, secret)
    for text in [*texts, caplog.text]:
        assert CANARY.decode() not in text
        assert CANARY.hex() not in text
    assert repr(secret).startswith("<SecretBytes 32 bytes in ")


@pytest.mark.parametrize("convert", [bytes, list, iter, hash, memoryview, bytearray, int, float])
def test_converts_to_nothing(convert: Callable[[object], object]) -> None:
    with pytest.raises(TypeError):
        convert(SecretBytes(CANARY))


def test_cannot_be_compared_in_variable_time() -> None:
    secret = SecretBytes(CANARY)
    for other in (CANARY, secret, SecretBytes(CANARY), None):
        with pytest.raises(TypeError, match="compare_digest"):
            assert secret == other
        with pytest.raises(TypeError, match="compare_digest"):
            assert secret != other


# --- where it is -----------------------------------------------------------------------------


@linux
def test_stays_out_of_dumps_and_of_the_process_s_own_map(script: Callable[[str], str]) -> None:
    out = script(
        """
        secret = SecretBytes(b"canary" * 5)
        where = address(secret)
        section = []
        for line in open("/proc/self/smaps"):
            first = line.split()[0]
            if "-" in first and not first.endswith(":"):
                start, _, end = first.partition("-")
                inside = int(start, 16) <= where < int(end, 16)
                name = line.split(maxsplit=5)[5:]
            if inside:
                section.append(line)
                mapped = name
        flags = next(line for line in section if line.startswith("VmFlags")).split()[1:]
        with open("/proc/self/mem", "rb", buffering=0) as memory:
            memory.seek(where)
            try:
                read = memory.read(6).decode()
            except OSError:
                read = "refused"
        name = mapped[0].split()[0] if mapped else "anonymous"
        print(secret.protection, name, "dd" in flags, "lo" in flags, read)
        """
    ).split()
    if out[0] == "memfd_secret":
        # Neither a debugger nor root reads it through /proc.
        assert out[1:] == ["/secretmem", "True", "True", "refused"]
    else:
        assert out[2] == "True"
        assert (out[0] == "mlock") == (out[3] == "True")


@linux
@pytest.mark.parametrize("errno_name", ["ENOSYS", "EPERM"])
def test_works_where_the_kernel_has_no_secret_memory(
    script: Callable[[str], str], errno_name: str
) -> None:
    pytest.importorskip("pyseccomp", reason="pyseccomp is not installed (pip: cenacle[sandbox])")
    out = script(
        f"""
        import errno, pyseccomp
        rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
        rules.add_rule(pyseccomp.ERRNO(errno.{errno_name}), 447)
        rules.load()
        secret = SecretBytes(b"canary")
        print(secret.protection, bytes(secret.view()).decode(), repr(secret))
        """
    )
    assert out in {f"{kind} canary <SecretBytes 6 bytes in {kind}>" for kind in ("mlock", "heap")}


@linux
def test_works_when_no_memory_may_be_locked(script: Callable[[str], str]) -> None:
    out = script(
        """
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
        unprivileged()
        secret = SecretBytes(b"canary")
        print(secret.protection, bytes(secret.view()).decode())
        """
    )
    assert out == "heap canary"


@linux
def test_uses_up_the_memory_that_may_be_locked(script: Callable[[str], str]) -> None:
    out = script(
        """
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (16 * 4096, 16 * 4096))
        unprivileged()
        secrets = [SecretBytes(i.to_bytes(2, "big")) for i in range(64)]
        assert [int.from_bytes(s.view(), "big") for s in secrets] == list(range(64))
        kinds = [s.protection for s in secrets]
        assert kinds[-1] == "heap" and kinds[0] != "heap", kinds
        secrets.clear()
        print(SecretBytes(b"again").protection == kinds[0])
        """
    )
    assert out == "True"


@linux
def test_works_when_no_descriptor_is_left(script: Callable[[str], str]) -> None:
    out = script(
        """
        resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
        secrets = [SecretBytes(i.to_bytes(2, "big")) for i in range(64)]
        print([int.from_bytes(s.view(), "big") for s in secrets] == list(range(64)))
        """
    )
    assert out == "True"


@linux
def test_leaks_neither_descriptors_nor_mappings() -> None:
    def counts() -> tuple[int, int]:
        descriptors = list(Path("/proc/self/fd").iterdir())
        return len(descriptors), len(Path("/proc/self/maps").read_text().splitlines())

    SecretBytes(CANARY).wipe()
    before = counts()
    for _ in range(200):
        SecretBytes(CANARY).wipe()
        SecretBytes(CANARY)
    gc.collect()
    after = counts()
    assert after[0] == before[0]
    assert after[1] <= before[1] + 10


# --- forking ---------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
@pytest.mark.parametrize("act", ["secret.wipe()", "del secret", "held.release()", "sys.exit(0)"])
def test_a_child_can_neither_read_nor_wipe(script: Callable[[str], str], act: str) -> None:
    """Secret pages are shared with a child: what it overwrites is overwritten here too."""
    out = script(
        f"""
        secret = SecretBytes(b"canary")
        held = secret.view()
        child = os.fork()
        if child == 0:
            try:
                secret.view()
            except ValueError as error:
                assert "forked" in str(error)
            else:
                os._exit(2)
            {act}
            import gc
            gc.collect()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        print(bytes(secret.view()).decode())
        """
    )
    assert out == "canary"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
def test_a_child_has_secrets_of_its_own(script: Callable[[str], str]) -> None:
    out = script(
        """
        child = os.fork()
        if child == 0:
            secret = SecretBytes(b"canary")
            ok = bytes(secret.view()) == b"canary"
            view = secret.view()
            secret.wipe()
            os._exit(0 if ok and not any(view) else 1)
        print(os.waitpid(child, 0)[1])
        """
    )
    assert out == "0"
