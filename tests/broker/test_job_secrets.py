"""Secrets that share a page: each is its own, used once, and wiped without its neighbours."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest

from cenacle.broker.job_secrets import LENGTH, JobSecret, JobSecrets


def _bytes(secret: JobSecret) -> bytes:
    with secret.view() as view:
        return bytes(view)


def test_no_two_are_alike_and_none_changes() -> None:
    """More of them than a page holds, taken by several threads."""
    stock = JobSecrets()
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda _: stock.take(), range(300)))
    seen = [_bytes(secret) for secret in taken]
    assert {len(secret) for secret in seen} == {LENGTH}
    assert len(set(seen)) == 300
    assert not any(bytes(8) in secret for secret in seen)
    assert [_bytes(secret) for secret in taken] == seen
    assert len({id(secret._page) for secret in taken}) == 3


def test_wiping_one_clears_its_views_and_no_other() -> None:
    stock = JobSecrets()
    before, secret, after = (stock.take() for _ in range(3))
    kept = [_bytes(before), _bytes(after)]
    view = secret.view()
    assert view.readonly
    with secret:
        assert any(view)
    assert bytes(view) == bytes(LENGTH)
    for _ in range(2):
        with pytest.raises(ValueError, match="wiped"):
            secret.view()
        secret.wipe()
    assert [_bytes(before), _bytes(after)] == kept


def test_a_place_is_not_used_again() -> None:
    """Nor is a secret that was forgotten while somebody reads it a key of zeros."""
    stock = JobSecrets()
    view = stock.take().view()
    with stock.take() as wiped:
        zeros = wiped.view()
    gc.collect()
    seen = bytes(view)
    assert any(seen)
    later = [_bytes(stock.take()) for _ in range(200)]
    assert bytes(view) == seen
    assert bytes(zeros) == bytes(LENGTH)
    assert seen not in later


def test_a_forked_child_takes_others_and_wipes_none_of_its_parents() -> None:
    script = """
        import os
        from cenacle.broker.job_secrets import JobSecrets
        stock = JobSecrets()
        mine, next_one = stock.take(), stock._left[-1]
        seen = bytes(mine.view()), bytes(next_one.view())
        child = os.fork()
        if child == 0:
            other = bytes(stock.take().view())  # drops the rest of the parent's page
            mine.wipe()
            os._exit(0 if any(other) and other not in seen else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert (bytes(mine.view()), bytes(next_one.view())) == seen
        assert stock.take() is next_one
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
