"""Invariant 1: plaintext of an asset exists only in the enclave's memory.

An unusual record is planted in a hospital's table. After whole jobs, good and bad, it must
stand nowhere but in the hospital's own file: not on disk, in a stream or a log, in an error,
in another process's environment or command line, nor in a core dump.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cenacle.cli.main import app
from tests.support.house import TERMS, patient_rows, recipe_job

pytestmark = pytest.mark.processes

NUMBER = 271828.1828459
TEXT = "Zebra-Quagga-7741"

# Every form in which the record could turn up.
CANARIES: dict[str, bytes] = {
    "text": TEXT.encode(),
    "text in UTF-16": TEXT.encode("utf-16-le"),
    "number in words": b"271828.18",
    "number rounded": b"271828.2",
    "double": struct.pack("<d", NUMBER),
    "double, big endian": struct.pack(">d", NUMBER),
    "float": struct.pack("<f", NUMBER),
}

_CONFIDING = """
import sys, logging, warnings, os, ctypes, faulthandler

class {name}(Exception): pass

def run(ctx):
    table = ctx.assets["a"].read()
    record = str(table.to_pylist())
    print(record); print(record, file=sys.stderr); logging.error(record); warnings.warn(record)
    os.write(1, record.encode()); os.write(2, record.encode())
    ctypes.CDLL(None).puts(record.encode())
    os.environ["RECORD"] = record
    sys.argv[:] = [record]
    ctypes.CDLL(None).prctl(15, record.encode(), 0, 0, 0)
    for place in ("/tmp/x", "/dev/shm/x", "/cenacle/outputs/x", "x", "/var/tmp/x"):
        try:
            open(place, "w").write(record)
        except OSError:
            pass
    ctx.progress(1, 2)
    if ctx.parameters["end"] == "raise":
        raise {name}(record)
    if ctx.parameters["end"] == "crash":
        faulthandler.enable()
        ctypes.string_at(0)
    ctx.output("table", table)
"""


@dataclass
class World:
    """One folder of a demonstration: a home per actor, a broker process, real commands."""

    folder: Path
    streams: list[bytes] = field(default_factory=list)
    reference: dict[str, Any] = field(default_factory=dict)

    def environment(self, actor: str) -> dict[str, str]:
        return {
            "CENACLE_HOME": str(self.folder / actor / "home"),
            "TMPDIR": str(self.folder / "tmp"),
            # Python says more of everything that goes wrong.
            "PYTHONDEVMODE": "1",
            "PYTHONFAULTHANDLER": "1",
        }

    def cenacle(self, actor: str, *arguments: object, fed: str = "") -> str:
        """A command that must end well; its streams are kept."""
        texts = list(map(str, arguments))
        done = CliRunner().invoke(app, texts, input=fed, env=self.environment(actor))
        self.streams += [done.stdout.encode(), done.stderr.encode()]
        assert done.exit_code == 0, (arguments, done.stdout, done.stderr)
        return done.stdout

    def ask(self, actor: str, *arguments: object) -> dict[str, Any]:
        """What a command answers in JSON."""
        found = json.loads(self.cenacle(actor, *arguments, "--json").splitlines()[-1])
        assert isinstance(found, dict)
        return found

    def run(self, *arguments: object) -> int:
        """``cenacle run`` as a process of its own; its exit code."""
        done = subprocess.run(
            [sys.executable, "-m", "cenacle", "run", *map(str, arguments)],
            capture_output=True,
            check=False,
            cwd=self.folder,
            env={**os.environ, **self.environment("operator")},
        )
        self.streams += [done.stdout, done.stderr]
        return done.returncode


@pytest.fixture(scope="module")
def core_dumps() -> Iterator[None]:
    """Let the kernel write core dumps of every process that does not forbid it itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, core_dumps: None) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("canary"))
    for actor in ("broker", "hospital-a", "clinic", "operator", "tmp"):
        (made.folder / actor).mkdir()
    folder = made.folder
    log = (folder / "broker.log").open("wb")
    broker = subprocess.Popen(
        [
            *(sys.executable, "-m", "cenacle", "broker", "start", "--dir", "broker/store"),
            *("--name", "test/broker", "--port", "0", "--development", "--json"),
        ],
        stdout=subprocess.PIPE,
        stderr=log,
        cwd=folder,
        env={**os.environ, **made.environment("broker")},
    )
    try:
        assert broker.stdout is not None
        token = json.loads(broker.stdout.readline())["owner_token"]
        for actor in ("hospital-a", "clinic", "operator"):
            made.cenacle(actor, "broker", "pin", folder / "broker/store/identity.json")
            if actor != "operator":
                made.cenacle(actor, "party", "new", actor)
                made.cenacle(actor, "party", "register", actor, "--token", "-", fed=token + "\n")
                arguments = ("broker", "invite", "--as", "hospital-a")
                token = made.ask("hospital-a", *arguments)["token"]
        made.reference = made.ask("operator", "enclave", "measure")
        yield made
    finally:
        broker.send_signal(signal.SIGTERM)
        assert broker.stdout is not None
        made.streams.append(broker.stdout.read())
        broker.wait(30)
        broker.stdout.close()
        log.close()


def _records(path: Path, bad: str = "") -> None:
    lines = patient_rows(40).splitlines()
    rows = [f"{lines[0]},note", *(f"{line},ordinary" for line in lines[1:])]
    rows.append(f"{NUMBER},0.5,{bad or '1.25'},1,{TEXT}")
    path.write_text("\n".join(rows) + "\n")


def _seal(world: World, name: str, *, bad: str = "", **terms: Any) -> Path:
    own = world.folder / "hospital-a" / "own"
    own.mkdir(exist_ok=True)
    _records(own / f"{name}.csv", bad)
    stated = world.folder / "terms.yaml"
    stated.write_text(yaml.safe_dump({**TERMS, **terms}))
    sealed = world.folder / f"{name}.sealed"
    world.cenacle(
        "hospital-a",
        *("seal", own / f"{name}.csv", "--terms", stated, "--as", "hospital-a"),
        *("--out", sealed, "--allow-missing"),
    )
    return sealed


def _agree(world: World, name: str, assets: dict[str, Path], job: Any, outputs: list[Any]) -> str:
    manifests = {alias: f"{path}.asset.json" for alias, path in assets.items()}
    draft = {
        "name": name,
        "purpose": "research",
        "parties": ["hospital-a", "clinic"],
        "assets": manifests,
        "job": job,
        "enclave": world.reference,
        "outputs": outputs,
        "approval": {"all_of": ["hospital-a", "clinic"]},
        "expires": "2036-12-31",
    }
    source, contract = world.folder / "job.yaml", world.folder / f"{name}.yaml"
    source.write_text(yaml.safe_dump(draft))
    digest = str(world.ask("operator", "draft", source, "--out", contract)["contract"])
    world.cenacle("clinic", "propose", contract, "--as", "clinic")
    for actor in ("hospital-a", "clinic"):
        world.cenacle(actor, "sign", digest, "--as", actor)
    return digest


def _run(world: World, digest: str, assets: dict[str, Path], code: int) -> tuple[Path, list[str]]:
    """Run a job while a thread reads what every process shows in /proc."""
    out = world.folder / f"results-{digest[7:15]}"
    data = [part for path in assets.values() for part in ("--data", path)]
    found: set[str] = set()
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            found.update(_in_proc())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert world.run(digest, *data, "--out", out) == code, world.streams[-2:]
    finally:
        ended.set()
        watcher.join()
    return out, sorted(found)


def _in_proc() -> Iterator[str]:
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        for name in ("environ", "cmdline", "comm", "status"):
            with contextlib.suppress(OSError):
                content = (process / name).read_bytes()
                yield from (f"{name}: {form}" for form in _forms(content))


def _forms(content: bytes) -> list[str]:
    return [form for form, canary in CANARIES.items() if canary in content]


def _unpacked(content: bytes) -> Iterator[bytes]:
    """The content, and what any zlib or gzip stream at its start holds."""
    yield content
    for bits in (zlib.MAX_WBITS, zlib.MAX_WBITS | 16):
        with contextlib.suppress(zlib.error):
            yield zlib.decompressobj(bits).decompress(content)


def _found_in(world: World, *, besides: tuple[Path, ...] = ()) -> list[str]:
    """Every place, but the hospital's own folder, where a form of the record stands."""
    own = world.folder / "hospital-a" / "own"
    places = []
    for path in world.folder.rglob("*"):
        if path.is_file() and not path.is_relative_to(own) and path not in besides:
            for content in _unpacked(path.read_bytes()):
                places += [f"{path}: {form}" for form in _forms(content)]
    for number, stream in enumerate(world.streams):
        places += [f"stream {number}: {form}" for form in _forms(stream)]
    return places


def _core_dumps(world: World) -> list[Path]:
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    folders = [world.folder, Path.cwd(), Path("/")]
    if pattern.startswith("/"):
        folders.append(Path(pattern).parent)
    return [path for folder in folders for path in folder.glob("core*") if path.is_file()]


def test_the_search_finds_what_it_looks_for(tmp_path: Path) -> None:
    """A search that cannot find anything would pass."""
    world = World(tmp_path)
    own = tmp_path / "hospital-a" / "own"
    own.mkdir(parents=True)
    _records(own / "records.csv")
    assert _found_in(world) == []
    for index, canary in enumerate(CANARIES.values()):
        (tmp_path / str(index)).write_bytes(b"before" + canary + b"after")
    (tmp_path / "packed").write_bytes(zlib.compress(TEXT.encode()))
    world.streams.append(TEXT.encode())
    places = _found_in(world)
    assert len({place.split(":")[0] for place in places}) == len(CANARIES) + 2
    assert set(_forms((own / "records.csv").read_bytes())) >= {"text", "number in words"}


def test_a_recipe_leaves_no_record_anywhere(world: World) -> None:
    assets = {"a": _seal(world, "good")}
    job = recipe_job(["a"], epochs=2, every=2, holdout={"fraction": 0.2})
    job["recipe"]["data"]["ignore"] = ["note"]
    outputs = [{"name": name, "kind": name, "recipient": "clinic"} for name in ("model", "metrics")]
    digest = _agree(world, "recipe", assets, job, outputs)
    out, in_proc = _run(world, digest, assets, 0)
    assert in_proc == []
    assert _found_in(world) == []
    # What the clinic opens is a model, not the record.
    for name, suffix in (("model", "safetensors"), ("metrics", "json")):
        opened = world.folder / f"opened.{suffix}"
        world.cenacle(
            "clinic", "open", out / "receipt.json", name, "--as", "clinic", "--out", opened
        )
    world.cenacle("hospital-a", "verify", out / "receipt.json")
    world.cenacle("clinic", "log")
    assert _found_in(world) == []


@pytest.mark.parametrize(
    ("bad", "changes", "words"),
    [
        ("", {"target": "note", "classes": ["ordinary", "other"]}, b"holds a label in row 40"),
        pytest.param("nan", {"ignore": ["note"]}, b"row 40", marks=pytest.mark.slow),
        pytest.param("", {}, b"does not hold numbers", marks=pytest.mark.slow),
    ],
    ids=["unknown label", "NaN", "text as a feature"],
)
def test_a_recipe_that_fails_on_the_record_does_not_quote_it(
    world: World, bad: str, changes: dict[str, Any], words: bytes
) -> None:
    name = f"bad-{len(world.streams)}"
    assets = {"a": _seal(world, name, bad=bad)}
    job = recipe_job(["a"])
    job["recipe"]["data"].update(changes)
    outputs = [{"name": "model", "kind": "model", "recipient": "clinic"}]
    digest = _agree(world, name, assets, job, outputs)
    _, in_proc = _run(world, digest, assets, 2)
    assert words in world.streams[-1]
    assert in_proc == []
    assert _found_in(world) == []


@pytest.mark.usefixtures("program_layers")
@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("output", 0),
        pytest.param("raise", 7, marks=pytest.mark.slow),
        pytest.param("crash", 7, marks=pytest.mark.slow),
    ],
)
def test_a_program_that_tells_all_it_can_tells_nothing(world: World, end: str, code: int) -> None:
    program = world.folder / "clinic" / f"program-{end}"
    program.mkdir()
    (program / "main.py").write_text(_CONFIDING.format(name="Unusual"))
    terms = world.folder / "terms.yaml"
    terms.write_text(yaml.safe_dump(TERMS))
    sealed = world.folder / f"program-{end}.sealed"
    arguments = ("seal", program, "--terms", terms, "--as", "clinic", "--out", sealed)
    package = world.ask("clinic", *arguments)["package"]
    assets = {"a": _seal(world, f"told-{end}", programs=[package]), "program": sealed}
    job = {"type": "program", "program": "program", "parameters": {"end": end}}
    outputs = [{"name": "table", "kind": "table", "recipient": "clinic"}]
    digest = _agree(world, f"program-{end}", assets, job, outputs)
    out, in_proc = _run(world, digest, assets, code)
    assert in_proc == []
    assert _found_in(world) == []
    assert _core_dumps(world) == []
    if end == "output":
        # It was the real record all along: the recipient, and only the recipient, has it now.
        opened = world.folder / "opened.csv"
        world.cenacle(
            "clinic", "open", out / "receipt.json", "table", "--as", "clinic", "--out", opened
        )
        assert TEXT in opened.read_text()
        assert _found_in(world, besides=(opened,)) == []
        opened.unlink()


@pytest.mark.slow
def test_an_enclave_that_is_made_to_crash_leaves_no_core_dump(world: World) -> None:
    assets = {"a": _seal(world, "crash")}
    job = recipe_job(["a"], epochs=2000)
    job["recipe"]["data"]["ignore"] = ["note"]
    outputs = [{"name": "model", "kind": "model", "recipient": "clinic"}]
    digest = _agree(world, "crash", assets, job, outputs)
    before = set(_processes())
    done = threading.Event()

    def abort_them() -> None:
        """Ask every process of the enclave to dump core, until there is none."""
        while not done.wait(0.1):
            for pid in set(_processes()) - before:
                with contextlib.suppress(OSError):
                    process = Path(f"/proc/{pid}")
                    inside = b"-m\0cenacle.enclave\0" in (process / "cmdline").read_bytes()
                    if inside and (process / "comm").read_text().strip() != "bwrap":
                        os.kill(pid, signal.SIGABRT)

    aborter = threading.Thread(target=abort_them)
    aborter.start()
    try:
        _run(world, digest, assets, 7)
    finally:
        done.set()
        aborter.join()
    assert _core_dumps(world) == []
    assert _found_in(world) == []


def _processes() -> Iterator[int]:
    return (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
