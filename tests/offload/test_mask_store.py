"""Masks work once: in one process, in two, across crashes, and when old files come back."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cenacle.accelerators.operations import PRIME
from cenacle.crypto import SecretBytes
from cenacle.errors import CenacleError, ConflictError, InputError, SealError, UnavailableError
from cenacle.offload.field import piece
from cenacle.offload.mask_store import Mask, MaskPlan, MaskStore

KEY = bytes(range(32))
PLANS = (
    MaskPlan("first", x_size=6, y_size=4, rows=2, record=2, digest="aa"),
    MaskPlan("second", x_size=3, y_size=1, rows=3, record=1, digest="bb"),
)


def correct(plan: MaskPlan, mask: torch.Tensor) -> torch.Tensor:
    """A layer that adds up: easy to recompute."""
    total = mask.long().sum(1, keepdim=True)
    return (total * torch.arange(1, plan.y_size + 1) % PRIME).int()


def key() -> SecretBytes:
    return SecretBytes(KEY)


@dataclass
class Counter:
    """A counter outside the store."""

    now: int = 0
    history: list[int] = field(default_factory=list)
    broken: bool = False

    def value(self) -> int:
        return self.now

    def advance(self, value: int) -> None:
        if self.broken:
            raise UnavailableError("the broker is away")
        assert value > self.now
        self.now = value
        self.history.append(value)


def words(mask: Mask) -> tuple[int, ...]:
    return tuple(int(w) for _, part in mask.consume() for w in part)


def corrections(mask: Mask, start: int, end: int) -> list[int]:
    found: list[int] = []
    for at, part in mask.corrections(start, end):
        assert at == start * mask._plan.y_size + len(found)
        found += part.tolist()
    return found


# ---------------------------------------------------------------------- one process


def test_masks_come_with_their_corrections() -> None:
    with MaskStore() as store:
        store.fill(PLANS, 3, correct)
        for plan in PLANS:
            mask = store.take(plan.name, 4, plan.digest)
            rows = torch.tensor(words(mask)).view(4, plan.x_size)
            wanted = correct(plan, rows)
            assert corrections(mask, 0, 4) == wanted.flatten().tolist()
            assert corrections(mask, 1, 3) == wanted[1:3].flatten().tolist()
            assert corrections(mask, 3, 3) == []


def test_a_record_of_several_frames() -> None:
    plan = MaskPlan("big", x_size=2, y_size=piece() - 1, rows=3, record=3, digest="")
    with MaskStore() as store:
        store.fill([plan], 2, correct)
        mask = store.take("big", 5, "")
        wanted = correct(plan, torch.tensor(words(mask)).view(5, 2))
        for start, end in ((0, 5), (1, 2), (2, 4), (4, 5)):
            assert corrections(mask, start, end) == wanted[start:end].flatten().tolist()


def test_a_mask_works_once() -> None:
    with MaskStore() as store:
        store.fill(PLANS, 1, correct)
        mask = store.take("first", 1, "aa")
        with pytest.raises(ConflictError, match="consumed"):
            corrections(mask, 0, 1)
        list(mask.consume())
        with pytest.raises(ConflictError, match="used already"):
            mask.consume()
        for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError):
                duplicate(mask)


def test_masks_of_before_are_given_up_when_a_store_is_filled_anew() -> None:
    """They would be at places of the new masks' keystream that are handed out again."""
    with MaskStore() as store:
        store.fill(PLANS, 3, correct)
        plan = PLANS[0]
        idle, begun, done = (store.take(plan.name, 2, plan.digest) for _ in range(3))
        pieces = begun.consume()
        words(done)
        store.fill(PLANS, 2, correct)
        with pytest.raises(ConflictError, match="filled anew"):
            idle.consume()
        with pytest.raises(ConflictError, match="filled anew"):
            corrections(done, 0, 1)
        assert len(list(pieces)) == 1  # its own numbers, which nobody else has
        with pytest.raises(ConflictError, match="filled anew"):
            corrections(begun, 0, 1)


def test_no_two_masks_have_anything_in_common() -> None:
    """Over passes, layers, refills, and stores with the same key."""
    seen: set[int] = set()
    total = 0
    for _ in range(2):
        with MaskStore() as store:
            for _ in range(2):
                store.fill(PLANS, 20, correct)
                for plan in PLANS:
                    for _ in range(10):
                        found = words(store.take(plan.name, plan.rows, plan.digest))
                        seen.update(found)
                        total += len(found)
    assert total == 4 * 10 * (12 + 9)
    assert len(seen) == total  # a collision by chance: 2^-13


def test_partial_records_are_not_split() -> None:
    with MaskStore() as store:
        store.fill(PLANS, 2, correct)
        one = words(store.take("first", 1, "aa"))
        two = words(store.take("first", 1, "aa"))
        assert not set(one) & set(two)
        assert store.lacks("first", 1)
        assert not store.lacks("second", 6)
        assert store.lacks("second", 7)
        assert store.lacks("third", 1)
        assert store.remaining == 0


def test_an_empty_store_says_so() -> None:
    with MaskStore() as store:
        with pytest.raises(InputError, match=r"no masks were prepared.*prepare\(\)"):
            store.take("first", 1, "aa")
        store.fill(PLANS, 2, correct)
        assert store.remaining == 2
        store.take("first", 4, "aa")
        with pytest.raises(UnavailableError, match=r"used up.*0 masks left.*prepare\(\)"):
            store.take("first", 1, "aa")
        store.fill(PLANS, 1, correct)
        assert store.remaining == 1


@pytest.mark.parametrize(("name", "digest"), [("third", "aa"), ("first", "bb")])
def test_masks_for_something_else_are_refused(name: str, digest: str) -> None:
    with MaskStore() as store:
        store.fill(PLANS, 1, correct)
        with pytest.raises(InputError, match="no masks were prepared for layer"):
            store.take(name, 1, digest)


@pytest.mark.parametrize(("plans", "count"), [([], 1), (PLANS, 0), ([PLANS[0], PLANS[0]], 1)])
def test_plans_that_make_no_sense(plans: list[MaskPlan], count: int) -> None:
    with MaskStore() as store, pytest.raises(InputError):
        store.fill(plans, count, correct)


def test_a_store_without_a_folder_leaves_nothing() -> None:
    store = MaskStore()
    store.fill(PLANS, 1, correct)
    assert {p.name[:6] for p in store.folder.iterdir()} == {"ledger", "lock", "masks-"}
    store.close()
    store.close()
    assert not store.folder.exists()
    with pytest.raises(ConflictError, match="closed"):
        store.take("first", 1, "aa")


def test_arguments(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs a key"):
        MaskStore(tmp_path)
    with pytest.raises(InputError, match="at least one"):
        MaskStore(tmp_path, key(), stride=0)


# ---------------------------------------------------------------------- files


def test_masks_survive_the_process_but_reserved_ones_do_not(tmp_path: Path) -> None:
    with MaskStore(tmp_path, key(), stride=2) as store:
        store.fill(PLANS, 6, correct)
        used = {words(store.take("first", 2, "aa"))}
    with MaskStore(tmp_path, key(), stride=2) as store:
        assert store.remaining == 4
        assert store.plans == PLANS
        mask = store.take("first", 8, "aa")
        rows = torch.tensor(words(mask)).view(8, 6)
        assert corrections(mask, 0, 8) == correct(PLANS[0], rows).flatten().tolist()
        assert not used & {tuple(row.tolist()) for row in rows.view(4, 12)}


def test_what_is_sealed_is_not_readable(tmp_path: Path) -> None:
    with MaskStore(tmp_path, key()) as store:
        store.fill(PLANS, 50, correct)
        mask = store.take("first", 2, "aa")
        found = np.array(words(mask), np.uint32)
        secret = [found[i : i + 2].tobytes() for i in range(11)]
        made = np.array(corrections(mask, 0, 2), np.int32)
        secret += [made[i : i + 2].tobytes() for i in range(7)]
        for path in tmp_path.iterdir():
            content = path.read_bytes()
            assert not any(one in content for one in secret)
            assert b"first" not in content
            assert path.stat().st_mode & 0o077 == 0


def test_every_byte_of_the_files_is_authenticated(tmp_path: Path) -> None:
    with MaskStore(tmp_path, key()) as store:
        store.fill(PLANS, 1, correct)
    ledger = (tmp_path / "ledger").read_bytes()
    for path in (next(tmp_path.glob("masks-*")), tmp_path / "ledger"):
        content = path.read_bytes()
        for at in range(len(content)):
            path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            with pytest.raises(SealError):
                use_all(tmp_path)
            path.write_bytes(content)
            (tmp_path / "ledger").write_bytes(ledger)
    use_all(tmp_path)


def use_all(folder: Path) -> None:
    with MaskStore(folder, key()) as store:
        for plan in PLANS:
            mask = store.take(plan.name, plan.rows, plan.digest)
            words(mask)
            corrections(mask, 0, plan.rows)


@pytest.mark.parametrize("size", [0, 5, 12, 27, 40])
def test_a_ledger_cut_short_is_refused(tmp_path: Path, size: int) -> None:
    with MaskStore(tmp_path, key()) as store:
        store.fill(PLANS, 1, correct)
    os.truncate(tmp_path / "ledger", size)
    with pytest.raises(SealError, match="ledger is damaged"):
        MaskStore(tmp_path, key())


def test_another_key_is_refused(tmp_path: Path) -> None:
    with MaskStore(tmp_path, key()) as store:
        store.fill(PLANS, 1, correct)
    with pytest.raises(SealError, match="another key"):
        MaskStore(tmp_path, SecretBytes(bytes(32)))


def test_frames_cannot_change_places(tmp_path: Path) -> None:
    plan = replace(PLANS[0], record=1)
    with MaskStore(tmp_path, key()) as store:
        store.fill([plan], 1, correct)
        masks = next(tmp_path.glob("masks-*"))
        content, size = masks.read_bytes(), plan.record_bytes
        assert len(content) == 2 * size
        masks.write_bytes(content[size:] + content[:size])
        mask = store.take("first", 2, "aa")
        words(mask)
        with pytest.raises(SealError, match="damaged or forged"):
            corrections(mask, 0, 1)


def test_a_full_disk_keeps_the_masks_that_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MaskStore(tmp_path, key()) as store:
        store.fill(PLANS, 2, correct)
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", _full)
            with pytest.raises(UnavailableError, match="no room"):
                store.fill(PLANS, 5, correct)
        assert store.remaining == 2
        assert len(list(tmp_path.glob("masks-*"))) == 1
        words(store.take("first", 2, "aa"))


def test_a_reservation_that_cannot_be_written_hands_nothing_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MaskStore(tmp_path, key()) as store:
        store.fill(PLANS, 2, correct)
        monkeypatch.setattr(os, "pwrite", _full)
        with pytest.raises(UnavailableError, match="no room"):
            store.take("first", 1, "aa")
        monkeypatch.undo()
        with pytest.raises(ConflictError):
            store.take("first", 1, "aa")


def _full(*_: object) -> int:
    raise OSError(errno.ENOSPC, "no space")


# ---------------------------------------------------------------------- old copies


def test_an_old_copy_is_refused(tmp_path: Path) -> None:
    counter, old = Counter(), tmp_path / "old"
    store_at = tmp_path / "store"
    with MaskStore(store_at, key(), counter=counter, stride=1) as store:
        store.fill(PLANS, 5, correct)
        shutil.copytree(store_at, old)
        store.take("first", 2, "aa")
    with pytest.raises(SealError, match="old copy"):
        MaskStore(old, key(), counter=counter)
    with MaskStore(store_at, key(), counter=counter) as store:
        assert store.remaining == 4
    for name in ("ledger",):
        (store_at / name).unlink()
    with pytest.raises(SealError, match="old copy"):
        MaskStore(store_at, key(), counter=counter)
    assert counter.history == sorted(set(counter.history))


def test_a_counter_that_went_back_is_noticed(tmp_path: Path) -> None:
    counter = Counter()
    with MaskStore(tmp_path, key(), counter=counter, stride=1) as store:
        store.fill(PLANS, 5, correct)
        for _ in range(4):
            store.take("first", 2, "aa")
    counter.now = 0
    with pytest.raises(SealError, match="old copy"):
        MaskStore(tmp_path, key(), counter=counter)


def test_no_version_that_a_failed_run_left_behind_comes_back(tmp_path: Path) -> None:
    """Whoever owns the disk keeps every version of the ledger, and the counter fails at will."""
    counter, store_at = Counter(), tmp_path / "store"
    versions: list[bytes] = []
    used: list[tuple[int, ...]] = []

    def keep() -> None:
        found = (store_at / "ledger").read_bytes()
        if found not in versions:
            versions.append(found)

    with MaskStore(store_at, key(), counter=counter, stride=1) as store:
        store.fill(PLANS, 40, correct)
        keep()
    rng = np.random.default_rng(11)
    opened = 0
    for _ in range(150):
        (store_at / "ledger").write_bytes(
            versions[rng.integers(max(0, len(versions) - 6), len(versions))]
        )
        counter.broken = bool(rng.random() < 0.3)
        try:
            with MaskStore(store_at, key(), counter=counter, stride=1) as store:
                opened += 1
                keep()
                for _ in range(rng.integers(0, 3)):
                    counter.broken = bool(rng.random() < 0.3)
                    used.append(words(store.take("first", 2, "aa")))
                    keep()
        except CenacleError:
            keep()
    assert opened > 10
    assert len(used) > 5
    assert len(set(used)) == len(used)


# ---------------------------------------------------------------------- two at once


def test_two_processes_cannot_share_a_store(tmp_path: Path) -> None:
    with MaskStore(tmp_path, key()) as store:
        with pytest.raises(ConflictError, match="in use"):
            MaskStore(tmp_path, key())
        store.fill(PLANS, 1, correct)
    MaskStore(tmp_path, key()).close()


def test_a_forked_process_gets_no_masks() -> None:
    with MaskStore() as store:
        store.fill(PLANS, 4, correct)
        mask = store.take("first", 2, "aa")
        child = os.fork()
        if child == 0:
            code = 1
            try:
                try:
                    mask.consume()
                except ConflictError:
                    code = 2
                try:
                    store.take("first", 2, "aa")
                except ConflictError:
                    code += 40
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
        assert words(mask)


CHILD = textwrap.dedent(
    """
    import json, os, signal, sys
    from pathlib import Path
    import torch
    from cenacle.crypto import SecretBytes
    from cenacle.accelerators.operations import PRIME
    from cenacle.offload.mask_store import MaskPlan, MaskStore

    folder, fatal, fill = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "fill"
    plan = MaskPlan("first", 4, 2, 1, 1, "aa")
    steps = 0

    def deadly(function):
        def call(*args, **kwargs):
            global steps
            steps += 1
            if steps == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            found = function(*args, **kwargs)
            steps += 1
            if steps == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return found
        return call

    for name in "pwrite fsync link open replace unlink pread preadv close".split():
        setattr(os, name, deadly(getattr(os, name)))

    with MaskStore(folder, SecretBytes(bytes(range(32))), stride=2) as store:
        if fill and store.remaining == 0:
            store.fill([plan], 6, lambda plan, mask: mask[:, :2].contiguous())
        for _ in range(3):
            if store.lacks("first", 1):
                break
            mask = store.take("first", 1, "aa")
            for _, words in mask.consume():
                # "sent": it is out the moment that the pipe has it
                sys.stdout.write(json.dumps(words.tolist()) + "\\n")
                sys.stdout.flush()
            for _ in mask.corrections(0, 1):
                pass
    print("done", steps)
    """
)


@pytest.mark.slow
@pytest.mark.processes
def test_no_mask_is_sent_twice_whenever_the_process_is_killed(tmp_path: Path) -> None:
    """SIGKILL before and after each system call of filling, reserving and reading."""
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    store = tmp_path / "store"
    sent: list[tuple[int, ...]] = []

    def run(fatal: int) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, str(script), str(store), str(fatal), "fill"],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        lines = done.stdout.splitlines()
        sent.extend(tuple(json.loads(line)) for line in lines if line.startswith("["))
        assert done.returncode in {0, -signal.SIGKILL}, done.stderr
        return done.returncode, lines[-1] if lines else ""

    code, last = run(0)
    assert code == 0
    total = int(last.split()[1])
    killed = 0
    for fatal in range(1, total + 1, max(1, total // 12)):
        killed += run(fatal)[0] != 0
    assert killed >= 8
    assert run(0)[0] == 0
    assert len(sent) > 10
    assert len(set(sent)) == len(sent)
    assert len(list(store.glob("masks-*"))) == 1
    assert not list(store.glob(".cenacle-*"))
