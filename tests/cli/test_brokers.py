"""Starting a broker, pinning it, and watching its log."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cenacle.broker.identity import BrokerIdentity, BrokerKeys
from cenacle.broker.server import serving
from cenacle.broker.service import Broker
from cenacle.broker.store import Store
from cenacle.broker.tls import ensure_certificate
from cenacle.documents.base import parse_json
from tests.support.house import House

Command = Callable[..., Any]

pytestmark = pytest.mark.processes


class Started:
    """``cenacle broker start`` as a process, with what it announced."""

    def __init__(self, folder: Path, *arguments: str, json_: bool = True) -> None:
        command = ["broker", "start", "--dir", str(folder), "--name", "test/broker"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cenacle", *command, *arguments, *(["--json"] * json_)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "CENACLE_HOME": str(folder / "home"), "COLUMNS": "60"},
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def end(self, number: int = signal.SIGTERM) -> tuple[str, str, int]:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        out, err = self.process.communicate(timeout=30)
        return out, err, self.process.returncode


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """``start(*arguments)``: a broker in ``tmp_path/broker``, stopped at the end."""
    started: list[Started] = []

    def begin(*arguments: str, json_: bool = True) -> Started:
        port = () if "--port" in arguments else ("--port", "0")
        made = Started(tmp_path / "broker", *port, *arguments, json_=json_)
        started.append(made)
        return made

    yield begin
    for each in started:
        if each.process.poll() is None:
            each.end(signal.SIGKILL)


def test_the_first_start_gives_one_owner_token_and_later_starts_none(
    start: Callable[..., Started], alone: Command, tmp_path: Path
) -> None:
    first = start("--development")
    told = json.loads(first.line())
    assert {"simulated", "tpm", "tdx"} < set(told["evidence"])
    assert told["attests"] == "simulated"
    assert told["owner_token"]
    identity = tmp_path / "broker/identity.json"
    assert told["identity"] == str(identity)
    assert told["digest"] == BrokerIdentity.from_fields(parse_json(identity.read_bytes())).digest
    assert told["owner_token"] not in identity.read_text()

    assert alone("broker", "pin", identity, "--digest", told["digest"]).code == 0
    assert alone("broker", "show", "--json").json["digest"] == told["digest"]
    alone("party", "new", "owner")
    stranger = alone("party", "register", "owner", "--token", "guess", "--json")
    assert stranger.code in {2, 3, 4}
    registered = alone("party", "register", "owner", "--token", "-", fed=told["owner_token"] + "\n")
    assert registered.code == 0
    again = alone("party", "register", "owner", "--token", told["owner_token"], "--json")
    assert again.code != 0
    token = alone("broker", "invite", "--as", "owner", "--json").json["token"]
    _, err, code = first.end()
    assert (err, code) == ("", 0)

    second = start("--development", json_=False)
    lines = [second.line() for _ in range(5)]
    # Every digest stands whole on its line, even on a narrow screen.
    assert any(told["digest"] in line for line in lines)
    # It has another port now, and the keys that were pinned.
    assert alone("broker", "pin", identity).code == 0
    assert alone("broker", "show", "--json").json["digest"] == told["digest"]
    out, err, code = second.end(signal.SIGINT)
    assert "token" not in "".join(lines) + out
    assert "simulated evidence protects from nobody with root" in lines[-1]
    assert err == ""
    assert code == 0
    for store_file in (tmp_path / "broker").glob("broker.db*"):
        content = store_file.read_bytes()
        assert told["owner_token"].encode() not in content
        assert token.encode() not in content


def test_a_broker_that_is_away_is_exit_code_6(
    start: Callable[..., Started], alone: Command, tmp_path: Path
) -> None:
    broker = start("--development")
    broker.line()
    alone("broker", "pin", tmp_path / "broker/identity.json")
    broker.end(signal.SIGKILL)
    answer = alone("broker", "show", "--json")
    assert answer.code == 6
    assert answer.json["error"] == "UnavailableError"
    assert "cenacle broker start" in answer.json["remedy"]
    words = alone("log")
    assert words.code == 6
    assert len(words.err.strip().splitlines()) == 1


def test_a_production_broker_has_no_verifier_of_simulated_evidence(
    start: Callable[..., Started],
) -> None:
    broker = start(json_=False)
    text = "".join(broker.line() for _ in range(4))
    assert "evidence" in text
    assert "simulated" not in text


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--host", "203.0.113.7"], 6, "cannot listen"),
        (["--certificate", "none.pem", "--key", "none.key"], 2, "none.pem"),
        (["--store", "mysql://x"], 2, "mysql"),
    ],
)
def test_a_broker_that_cannot_start_says_why(
    alone: Command, tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    answer = alone(
        "broker", "start", "--dir", tmp_path / "b", "--name", "x/y", "--port", 0, *arguments
    )
    assert answer.code == code
    assert words in answer.err
    assert len(answer.err.strip().splitlines()) == 1


def test_a_certificate_needs_its_key(alone: Command, tmp_path: Path) -> None:
    arguments = ("--dir", tmp_path / "b", "--name", "x/y", "--certificate", tmp_path / "c.pem")
    answer = alone("broker", "start", *arguments)
    assert answer.code == 2
    assert "--certificate and --key go together" in answer.err
    assert not (tmp_path / "b").exists()


def test_a_port_that_is_taken_is_named(alone: Command, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        answer = alone(
            "broker", "start", "--dir", tmp_path / "b", "--name", "x/y", "--port", port, "--json"
        )
    assert answer.code == 6
    assert f"port {port}" in answer.json["found"]


def test_a_folder_of_another_broker_is_refused(alone: Command, tmp_path: Path) -> None:
    BrokerKeys.create(tmp_path / "broker", "other/broker")
    answer = alone("broker", "start", "--dir", tmp_path / "broker", "--name", "x/y", "--json")
    assert answer.code == 2
    assert "of another broker" in answer.json["what"]


# ---------------------------------------------------------------------- pins


def _identity(house: House) -> Path:
    path = house.folder / "identity.json"
    path.write_text(house.identity.model_dump_json())
    return path


def test_a_digest_that_differs_is_not_pinned(alone: Command, house: House) -> None:
    answer = alone("broker", "pin", _identity(house), "--digest", "sha256:" + "0" * 64, "--json")
    assert answer.code == 3
    assert answer.json["expected"] == "sha256:" + "0" * 64
    assert alone("broker", "show").code == 2


def test_another_broker_never_takes_a_name_silently(
    alone: Command, house: House, tmp_path: Path
) -> None:
    assert alone("broker", "pin", _identity(house)).code == 0
    other = BrokerKeys.create(tmp_path / "other", "other/broker")
    path = tmp_path / "other.json"
    path.write_text(other.identity.model_dump_json())
    answer = alone("broker", "pin", path, "--json")
    assert answer.code == 5
    assert "--alias" in answer.json["remedy"]
    assert alone("broker", "show", "--json").json["digest"] == house.identity.digest
    assert alone("broker", "pin", path, "--alias", "second").code == 0
    assert alone("broker", "pin", path, "--alias", "../x").code == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"origin": "x"}', "null"])
def test_a_file_that_is_no_identity_is_refused(
    alone: Command, tmp_path: Path, content: str
) -> None:
    (tmp_path / "identity.json").write_text(content)
    answer = alone("broker", "pin", tmp_path / "identity.json")
    assert answer.code == 2
    assert "Traceback" not in answer.err


def test_an_impostor_at_the_pinned_address_is_not_talked_to(
    alone: Command, house: House, tmp_path: Path
) -> None:
    """Another broker with its own certificate answers where the pinned one did."""
    keys = BrokerKeys.open(tmp_path / "impostor", "test/broker")
    files = ensure_certificate(tmp_path / "impostor")
    with (
        Store.open(tmp_path / "impostor.db") as store,
        serving(Broker.development(store, keys), files) as url,
    ):
        pinned = house.identity.model_copy(update={"url": url})
        (tmp_path / "pinned.json").write_text(pinned.model_dump_json())
        assert alone("broker", "pin", tmp_path / "pinned.json").code == 0
        answer = alone("broker", "show", "--json")
    assert answer.code == 6
    assert "pinned certificate" in answer.json["expected"]


def test_only_the_owner_invites(cli: Command) -> None:
    answer = cli("clinic", "broker", "invite", "--as", "clinic", "--json")
    assert answer.code == 4
    assert answer.json["found"] == "clinic"
    assert answer.json["expected"] == "hospital-a"


def test_a_broker_is_chosen_by_alias_file_or_environment(
    alone: Command, house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _identity(house)
    assert alone("broker", "show", "--broker", path, "--json").code == 0
    assert alone("broker", "show", "--json").code == 2
    monkeypatch.setenv("CENACLE_BROKER", str(path))
    assert alone("broker", "show", "--json").json["digest"] == house.identity.digest


# ---------------------------------------------------------------------- the log


def test_the_log_is_shown_and_remembered(cli: Command, house: House) -> None:
    first = cli("lab", "log", "--json").json
    assert first["new"] == first["size"] >= 4
    assert {entry["kind"] for entry in first["entries"]} == {"party"}
    assert cli("lab", "log", "--json").json["new"] == 0
    house.client.register(house.home("late").new_party("late").envelope, house.spare_token)
    assert cli("lab", "log", "--limit", "1", "--json").json["new"] == 1
    shown = cli("lab", "log", "--limit", "2").out
    assert "late" in shown
    assert "root and consistency verified" in shown


def test_a_log_that_was_rewritten_or_shortened_is_found_out(
    house: House, alone: Command, tmp_path: Path
) -> None:
    """The broker's own keys, but another history: what its owner could do."""
    folder = tmp_path / "broker"
    folder.mkdir(mode=0o700)
    shutil.copy(house.folder / "broker/broker.key", folder)
    keys = BrokerKeys.load(folder)
    files = ensure_certificate(folder)
    assert alone("broker", "pin", _identity(house)).code == 0
    before = alone("log", "--json").json
    with (
        Store.open(folder / "broker.db") as store,
        serving(Broker.development(store, keys), files),
    ):
        (tmp_path / "moved.json").write_text(keys.identity.model_dump_json())
        # The same keys at another address: pinning is allowed, forgetting is not.
        assert alone("broker", "pin", tmp_path / "moved.json").code == 0
        shortened = alone("log", "--json")
        assert shortened.code == 3, shortened.out
        assert shortened.json["error"] == "ProofError"
        assert "shorter" in shortened.json["what"]
        token = Broker.development(store, keys).owner_token()
        for index in range(before["size"] + 1):
            name = f"party-{index}"
            alone("party", "new", name)
            done = alone("party", "register", name, "--token", token, "--json")
            assert done.code == 0, done.out
            token = alone("broker", "invite", "--as", "party-0", "--json").json["token"]
        rewritten = alone("log", "--json")
    assert rewritten.code == 3, rewritten.out
    assert rewritten.json["error"] == "ProofError"
    # The head that was seen before is kept as proof.
    assert alone("broker", "pin", _identity(house)).code == 0
    assert alone("log", "--json").json["new"] == 0


# --- what a broker proves ---------------------------------------------------------------------


@pytest.mark.slow
def test_a_broker_proves_what_it_runs_before_it_gets_a_key(
    start: Callable[..., Started], alone: Command, tmp_path: Path
) -> None:
    told = json.loads(start("--development").line())
    reference, identity = tmp_path / "reference.json", tmp_path / "broker/identity.json"
    measure = ("broker", "measure", "--dir", tmp_path / "broker", "--out", reference)
    assert alone(*measure).code == 0
    assert alone("broker", "pin", identity).code == 0
    unpinned = alone("broker", "attest", "--json")
    assert unpinned.code == 0
    assert unpinned.json["verified"] is False

    assert alone("broker", "pin", identity, "--reference", reference).code == 0
    proved = alone("broker", "attest", "--json")
    assert proved.code == 0, proved.out
    assert proved.json["verified"] is True
    alone("party", "new", "owner")
    alone("party", "register", "owner", "--token", "-", fed=told["owner_token"] + "\n")
    (tmp_path / "terms.yaml").write_text("kind: terms\nexpires: 2036-12-31\n")
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    seal = ("seal", tmp_path / "rows.csv", "--terms", tmp_path / "terms.yaml", "--as", "owner")
    sealed = alone(*seal, "--json")
    assert sealed.code == 0, sealed.out
    assert sealed.json["broker_evidence"] == "simulated"

    # The broker that runs is not the one that was approved: no key leaves, no file stays.
    wrong = json.loads(reference.read_text())
    wrong["reference"]["simulated"]["package"] = ["sha256:" + "0" * 64]
    reference.write_text(json.dumps(wrong))
    assert alone("broker", "pin", identity, "--reference", reference).code == 0
    assert alone("broker", "attest", "--json").code == 3
    refused = alone(*seal, "--out", tmp_path / "second.sealed", "--json")
    assert refused.code == 3
    assert "measurement package" in refused.json["what"]
    assert not (tmp_path / "second.sealed").exists()
    by_file = alone(*seal, "--out", tmp_path / "second.sealed", "--broker", identity, "--json")
    assert by_file.code == 3  # the same broker by another name
    trusting = alone(*seal, "--out", tmp_path / "third.sealed", "--unattested", "--json")
    assert trusting.code == 0
    assert trusting.json["broker_evidence"] is None


# --- production ------------------------------------------------------------------------------


def test_a_production_broker_has_no_place_for_simulated_evidence(
    start: Callable[..., Started], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By option, folder, environment or identity file: it does not hold such a verifier."""
    for name in ("CENACLE_DEVELOPMENT", "CENACLE_EVIDENCE", "DEVELOPMENT", "CENACLE_PRODUCTION"):
        monkeypatch.setenv(name, "simulated")
    broker = start()
    told = json.loads(broker.line())
    assert "simulated" not in told["evidence"]
    assert told["attests"] is None
    broker.end()
    simulated = start("--evidence", "simulated")
    out, _ = simulated.process.communicate(timeout=120)
    assert simulated.process.returncode == 2
    assert "production broker" in out


def test_a_production_broker_does_not_start_with_a_software_tpm_s_root(
    start: Callable[..., Started], alone: Command, tmp_path: Path, root_pem: Path
) -> None:
    trusted = tmp_path / "trusted"
    kept = alone("attest", "trust", root_pem, "--kind", "software-tpm", "--dir", trusted)
    assert kept.code == 0
    refused = start("--trust", str(trusted))
    out, _ = refused.process.communicate(timeout=120)
    assert refused.process.returncode == 3
    assert "production broker cannot hold a simulated verifier" in out
    assert json.loads(start("--trust", str(trusted), "--development").line())["attests"]
