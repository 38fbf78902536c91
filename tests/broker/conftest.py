"""Stores to test on: SQLite files, and a PostgreSQL cluster that the tests start themselves."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cenacle.broker.store import Store, Transaction

TIME = "2027-01-31T12:00:00Z"


def _postgres_programs() -> Path | None:
    """The newest installed version's folder: Debian keeps it out of PATH."""
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    versions = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: int(p.parts[-3])
    )
    return versions[-1].parent if versions else None


def _server_user() -> pwd.struct_passwd:
    """PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return pwd.getpwuid(os.geteuid())
    names = {user.pw_name: user for user in pwd.getpwall()}
    return names.get("postgres") or names["nobody"]


def _as_server_user(command: list[str]) -> list[str]:
    if os.geteuid() != 0:
        return command
    user = _server_user()
    identity = [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    return ["setpriv", *identity, *command]


def _fast_folder() -> str | None:
    """Memory, if there is enough: a database for each test is many small files."""
    memory = Path("/dev/shm")
    roomy = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2 << 30
    return str(memory) if roomy else None


@pytest.fixture(scope="session")
def postgres_cluster() -> Iterator[Path]:
    """The socket folder of a PostgreSQL server, durable as in production, without TCP."""
    programs = _postgres_programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (Debian package: postgresql)")
    pytest.importorskip("psycopg", reason="psycopg is not installed (pip: cenacle[postgres])")
    folder = Path(tempfile.mkdtemp(prefix="cenacle-pg-", dir=_fast_folder()))
    try:
        if os.geteuid() == 0:
            os.chown(folder, _server_user().pw_uid, -1)
        data = folder / "data"
        initdb = [str(programs / "initdb"), "-D", str(data), "-A", "trust", "-U", "cenacle"]
        subprocess.run(
            _as_server_user([*initdb, "-E", "UTF8", "--no-locale", "--no-sync"]),
            check=True,
            capture_output=True,
            cwd="/",
        )
        options = f"-c listen_addresses='' -c unix_socket_directories={folder}"
        control = [str(programs / "pg_ctl"), "-D", str(data), "-w", "-l", str(folder / "log")]
        subprocess.run(
            _as_server_user([*control, "-o", options, "start"]),
            check=True,
            stdout=subprocess.DEVNULL,
            cwd="/",
        )
        try:
            yield folder
        finally:
            subprocess.run(
                _as_server_user([*control, "-m", "fast", "stop"]),
                check=True,
                stdout=subprocess.DEVNULL,
                cwd="/",
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgres_url(postgres_cluster: Path) -> str:
    """The URL of a new, empty database."""
    psycopg = pytest.importorskip("psycopg")
    name = f"t{secrets.token_hex(6)}"
    with psycopg.connect(
        f"host={postgres_cluster} user=cenacle dbname=postgres", autocommit=True
    ) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return f"postgresql://cenacle@/{name}?host={postgres_cluster}"


@pytest.fixture
def sqlite_path(tmp_path: Path) -> Path:
    return tmp_path / "broker.db"


@pytest.fixture(params=["sqlite", "postgresql"])
def store_target(request: pytest.FixtureRequest) -> str:
    """What ``Store.open`` takes, once for each kind of database."""
    if request.param == "sqlite":
        return f"sqlite:///{request.getfixturevalue('sqlite_path')}"
    url: str = request.getfixturevalue("postgres_url")
    return url


@pytest.fixture
def store(store_target: str) -> Iterator[Store]:
    with Store.open(store_target) as opened:
        yield opened


@pytest.fixture
def sqlite_store(sqlite_path: Path) -> Iterator[Store]:
    with Store.open(sqlite_path) as opened:
        yield opened


@pytest.fixture
def furnish() -> Callable[..., None]:
    """Fill a store with two parties, an asset, a contract and an open run."""

    def fill(store: Store, **asset: Any) -> None:
        def change(tx: Transaction) -> None:
            tx.add_party("alice", "sha256:" + "a" * 64, "{}", TIME)
            tx.add_party("bob", "sha256:" + "b" * 64, "{}", TIME)
            tx.add_asset("sha256:" + "1" * 64, "scans", "alice", "{}", b"wrapped", **asset)
            tx.add_contract("sha256:" + "c" * 64, "study", "{}", "bob", TIME)
            tx.create_run("run-1", "sha256:" + "c" * 64, TIME, job_secret_wrapped=b"secret")

        store.run(change)

    return fill
