from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cenacle.attestation import Evidence, InstallationKey, SimulatedAttester, SimulatedVerifier
from cenacle.attestation.attesters import attester_for, attester_kinds
from cenacle.crypto import SigningKey
from cenacle.documents.base import b64, canonical_json
from cenacle.errors import CenacleError, EvidenceError, InputError, UnavailableError

Attested = Any  # of conftest, which tests cannot import


def test_evidence_says_that_it_is_simulated(attested: Attested) -> None:
    evidence = attested.evidence()
    assert evidence.kind == "simulated"
    assert evidence.body["warning"] == "simulated: protects from nobody with root on the machine"
    assert Evidence.from_canonical(evidence.canonical_bytes()) == evidence
    assert attested.verify(Evidence.from_fields(json.loads(evidence.canonical_bytes())))


def test_evidence_of_another_kind_is_not_read(attested: Attested) -> None:
    evidence = Evidence(kind="snp", body=attested.evidence().body)
    with pytest.raises(EvidenceError, match="another kind") as caught:
        attested.verify(evidence)
    assert (caught.value.found, caught.value.expected) == ("snp", "simulated")


@pytest.mark.parametrize(
    "fields",
    [
        {"unknown": 1},
        {"measurements": {}, "extra": {}},
        {"stated": {"measurements": {"package": "sha256:00"}}},
        {"stated": {"measurements": {"package": ["sha256:" + "0" * 64]}}},
        {"stated": {"measurements": None}},
        {"stated": {"layers": "seccomp"}},
        {"stated": {"layers": ["Seccomp"]}},
        {"report_data": "not base64"},
        {"report_data": None},
        {"issued": "now"},
        {"statement": None},
        {"statement": []},
        {"stated": {"unknown": 1}},
        {"stated": {"issued": "now"}},
        {"stated": {"measurements": {"Package": "sha256:" + "0" * 64}}},
        {"issued": 1_800_000_000},
        {"installation_key": ""},
        {"installation_key": "AAAA"},
        {"installation_key": "A" * 43 + "="},  # of small order: anybody could have signed
        {"signature": 7},
        {"signature": "not base64"},
        {"warning": None},
    ],
)
def test_malformed_evidence(
    attested: Attested, altered: Callable[..., Evidence], fields: dict[str, Any]
) -> None:
    with pytest.raises(EvidenceError, match="malformed") as caught:
        attested.verify(altered(attested.evidence(), **fields))
    assert caught.value.found


def test_no_body_no_evidence() -> None:
    bodies: tuple[Any, ...] = ({}, None, [], "x")
    for body in bodies:
        with pytest.raises(CenacleError):
            Evidence.from_fields({"kind": "simulated", "body": body})


@pytest.mark.parametrize("length", [0, 32, 63, 65])
def test_an_attester_binds_64_bytes(attested: Attested, length: int) -> None:
    with pytest.raises(InputError, match="wrong length"):
        SimulatedAttester(attested.key).attest(bytes(length), {}, (), attested.now)


def test_signatures_are_for_evidence_alone(attested: Attested) -> None:
    """A signature of the same key over the same bytes for another purpose does not pass."""
    body: dict[str, Any] = dict(attested.evidence().body)
    del body["signature"]
    body["signature"] = b64(attested.key.key.sign(canonical_json(body)))
    with pytest.raises(EvidenceError, match="not signed"):
        attested.verify(Evidence(kind="simulated", body=body))


@given(data=st.data())
@settings(max_examples=150)
def test_mutated_evidence(data: st.DataObject) -> None:
    key = InstallationKey(SigningKey.generate())
    now = datetime(2027, 2, 1, 10, tzinfo=UTC)
    evidence = SimulatedAttester(key).attest(bytes(64), {"package": "sha256:" + "1" * 64}, (), now)
    body = dict(evidence.body)
    name = data.draw(st.sampled_from(sorted(body)))
    value = data.draw(
        st.none()
        | st.integers(-9, 9)
        | st.text(max_size=12)
        | st.lists(st.text(max_size=3), max_size=2)
        | st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2)
    )
    changed = body[name] != value
    body[name] = value
    try:
        claims = SimulatedVerifier().authenticate(
            Evidence(kind="simulated", body=body), bytes(64), now
        )
    except EvidenceError:
        return
    assert not changed, claims


# --- the installation key --------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "folder" / "installation.key"


def test_is_made_once_and_private(path: Path) -> None:
    made = InstallationKey.load_or_create(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o077 == 0
    assert len(path.read_bytes()) == 32
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    before = path.stat()
    again = InstallationKey.load_or_create(path)
    assert again.measurement == made.measurement == InstallationKey.load(path).measurement
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert made.measurement.startswith("sha256:")


def test_every_installation_has_its_own(tmp_path: Path) -> None:
    """Once each was made of zeros: the secret was wiped before its view was written."""
    keys = [InstallationKey.load_or_create(tmp_path / str(i)) for i in range(3)]
    assert len({key.measurement for key in keys}) == 3
    for i in range(3):
        assert any((tmp_path / str(i)).read_bytes())


def test_the_mode_does_not_depend_on_the_umask(path: Path) -> None:
    old = os.umask(0)
    try:
        InstallationKey.load_or_create(path)
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", [b"", b"x" * 31, b"x" * 33, b"x" * 64, b"x" * 10_000])
def test_a_damaged_file_is_refused_and_kept(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    for load in (InstallationKey.load, InstallationKey.load_or_create):
        with pytest.raises(InputError, match="is damaged") as caught:
            load(path)
        assert str(len(content)) in str(caught.value.found)
        assert caught.value.remedy
    assert path.read_bytes() == content


def test_a_missing_file_is_named(path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read") as caught:
        InstallationKey.load(path)
    assert str(path) in str(caught.value.found)
    path.mkdir(parents=True)
    with pytest.raises(InputError, match="cannot be read"):
        InstallationKey.load_or_create(path)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UnavailableError, match="cannot be written") as caught:
        InstallationKey.load_or_create(tmp_path / "file" / "installation.key")
    assert str(tmp_path) in str(caught.value.found)


def test_what_a_crash_left_behind_is_no_obstacle(path: Path) -> None:
    path.parent.mkdir(parents=True)
    for name in (f".{path.name}.{os.getpid()}", f".{path.name}.tmp"):
        (path.parent / name).write_bytes(b"half")
    assert InstallationKey.load_or_create(path)


def test_threads_that_start_together_share_one(path: Path) -> None:
    barrier, found = threading.Barrier(8), []

    def make() -> None:
        barrier.wait()
        found.append(InstallationKey.load_or_create(path).measurement)

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.processes
def test_processes_that_start_together_share_one(path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from cenacle.attestation import InstallationKey\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "print(InstallationKey.load_or_create(Path(sys.argv[1])).measurement)"
    )
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", script, str(path)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for _ in range(4)
        ]
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        found = {process.communicate("go\n", timeout=60)[0] for process in processes}
    assert len(found) == 1
    assert found == {InstallationKey.load(path).measurement + "\n"}


# --- choosing an attester --------------------------------------------------------------------


def test_attesters_by_kind(path: Path) -> None:
    InstallationKey.load_or_create(path)
    assert attester_kinds() == ("simulated",)
    assert isinstance(attester_for("simulated", {"installation": path}), SimulatedAttester)
    with pytest.raises(UnavailableError, match="no installation key"):
        attester_for("simulated", {})
    for kind in ("snp", "", "Simulated"):
        with pytest.raises(InputError, match="no attester") as caught:
            attester_for(kind, {})
        assert caught.value.expected == "simulated"
