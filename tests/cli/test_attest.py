"""``cenacle attest``: evidence of vendors judged offline, and what a user chooses to trust."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cenacle.attestation import InstallationKey, SimulatedAttester
from cenacle.attestation.result import verify_result
from cenacle.cli.home import Home
from cenacle.crypto import SigningKey
from cenacle.documents.base import format_time

Command = Callable[..., Any]

BOUND = b"b" * 64
PACKAGE = "sha256:" + "1" * 64


@pytest.fixture(scope="module")
def samples() -> Path:
    """Genuine evidence of vendors."""
    here = Path(__file__).resolve().parents[2].parent / "shared" / "evidence"
    folder = Path(os.environ.get("CENACLE_EVIDENCE") or here)
    if not folder.is_dir():
        pytest.skip(f"no genuine evidence in {folder}; set CENACLE_EVIDENCE to the folder")
    return folder


@pytest.fixture
def key() -> InstallationKey:
    return InstallationKey(SigningKey.generate())


@pytest.fixture
def evidence(tmp_path: Path, key: InstallationKey) -> Path:
    made = SimulatedAttester(key).attest(
        BOUND, {"package": PACKAGE}, ("seccomp",), datetime.now(UTC).replace(microsecond=0)
    )
    path = tmp_path / "evidence.json"
    path.write_bytes(made.canonical_bytes())
    return path


def reference(tmp_path: Path, key: InstallationKey, **values: Any) -> Path:
    path = tmp_path / "reference.json"
    accepted = {"package": [PACKAGE], "installation": [key.measurement], **values}
    path.write_text(json.dumps({"reference": {"simulated": accepted}}))
    return path


def test_evidence_against_reference_values(
    alone: Command, tmp_path: Path, evidence: Path, key: InstallationKey
) -> None:
    wanted = reference(tmp_path, key)
    answer = alone(
        "attest", "verify", evidence, "--reference", wanted, "--report-data", BOUND.hex(), "--json"
    )
    assert answer.code == 0, answer.err
    assert answer.json["verified"] is True
    assert answer.json["bound"] is True
    assert answer.json["claims"]["protection"] == "simulated"
    words = alone("attest", "verify", evidence)
    assert words.code == 0
    assert "protects from nobody with root" in words.out
    assert "not bound to anything" in words.err
    assert "compared with nothing" in words.err


def test_what_an_agent_states_is_compared_only_if_it_is_bound(
    alone: Command, tmp_path: Path, evidence: Path, key: InstallationKey
) -> None:
    answer = alone("attest", "verify", evidence, "--reference", reference(tmp_path, key), "--json")
    assert answer.code == 2
    assert "--report-data" in answer.json["remedy"]


def test_a_contract_s_enclave_field_serves_as_reference(
    alone: Command, tmp_path: Path, evidence: Path, key: InstallationKey
) -> None:
    path = reference(tmp_path, key)
    path.write_text(json.dumps({"name": "a-contract", "enclave": json.loads(path.read_text())}))
    answer = alone(
        "attest", "verify", evidence, "--reference", path, "--report-data", BOUND.hex(), "--json"
    )
    assert answer.code == 0, answer.out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"package": ["sha256:" + "2" * 64]}, "measurement package"),
        ({"kernel": [PACKAGE]}, "measurement kernel"),
    ],
)
def test_another_reference_is_exit_code_3(
    alone: Command,
    tmp_path: Path,
    evidence: Path,
    key: InstallationKey,
    change: dict[str, Any],
    said: str,
) -> None:
    wanted = reference(tmp_path, key, **change)
    given = ("--reference", wanted, "--report-data", BOUND.hex())
    answer = alone("attest", "verify", evidence, *given, "--json")
    assert answer.code == 3
    assert said in answer.json["what"]
    words = alone("attest", "verify", evidence, *given)
    assert words.code == 3
    assert "FAILED" in words.out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--report-data", "00" * 64), 3, "another nonce"),
        (("--report-data", "xyz"), 2, "hexadecimal"),
        (("--kind", "snp"), 3, "another kind"),
        (("--kind", "psychic"), 3, "another kind"),
        (("--collateral", "{self}"), 2, "collateral in it already"),
        (("--reference", "{self}", "--report-data", BOUND.hex()), 2, "not valid"),
        (("--now", "yesterday"), 2, "time"),
        (("--token", "{out}"), 2, "party to sign"),
    ],
)
def test_what_does_not_fit(
    alone: Command,
    tmp_path: Path,
    evidence: Path,
    arguments: tuple[str, ...],
    code: int,
    said: str,
) -> None:
    given = [a.format(self=evidence, out=tmp_path / "token") for a in arguments]
    answer = alone("attest", "verify", evidence, *given, "--json")
    assert answer.code == code, answer.out
    assert said in answer.json["what"] + str(answer.json.get("expected"))
    assert not (tmp_path / "token").exists()


def test_old_evidence_is_stale_unless_it_is_judged_at_its_time(
    alone: Command, tmp_path: Path, key: InstallationKey
) -> None:
    then = datetime.now(UTC).replace(microsecond=0) - timedelta(days=30)
    path = tmp_path / "old.json"
    path.write_bytes(SimulatedAttester(key).attest(BOUND, {}, (), then).canonical_bytes())
    given = ("attest", "verify", path, "--report-data", BOUND.hex(), "--json")
    assert alone(*given).code == 3
    assert alone(*given, "--now", format_time(then)).code == 0


@pytest.mark.parametrize(
    "content", [b"", b"{", b"{}", b'{"kind": "simulated"}', b"\x00" * 600, b"[" * 10_000]
)
def test_what_is_no_evidence(alone: Command, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    answer = alone("attest", "verify", path, "--json")
    assert answer.code in {2, 3}
    assert answer.json["what"]


def test_a_result_travels_as_a_token(
    alone: Command, tmp_path: Path, evidence: Path, key: InstallationKey
) -> None:
    assert alone("party", "new", "verifier").code == 0
    token = tmp_path / "result.jwt"
    answer = alone(
        *("attest", "verify", evidence, "--reference", reference(tmp_path, key)),
        *("--report-data", BOUND.hex(), "--token", token, "--as", "verifier", "--json"),
    )
    assert answer.code == 0, answer.out
    party = Home(tmp_path / "home").party("verifier").party
    found = verify_result(token.read_text(), party.verify_key, now=datetime.now(UTC), nonce=BOUND)
    (enclave,) = found["submods"].values()
    assert enclave["ear.status"] == "contraindicated"  # simulated


# --- genuine evidence, as the folder's README says what must be found ------------------------

GENUINE = [
    pytest.param(
        *("tdx", "dcap/tdx_quote", "dcap/tdx_quote_collateral.json", "issue"), 0, "UpToDate",
        id="tdx",
    ),
    pytest.param(
        *("sgx", "dcap/sgx_quote", "dcap/sgx_quote_collateral.json", "issue"), 0,
        "ConfigurationAndSWHardeningNeeded", id="sgx",
    ),
    pytest.param(
        *("tdx", "dcap/tdx_quote_outdated", "dcap/tdx_quote_outdated_collateral.json", "issue"),
        3, "TCB", id="tdx outdated",
    ),
    pytest.param(
        *("tdx", "dcap/tdx_quote", "dcap/tdx_quote_collateral.json", None), 3, "expired",
        id="tdx, today",
    ),
    pytest.param(
        *("nitro", "nitro/nitro_attestation.bin", None, "2025-12-25T13:20:00Z"), 0, "pcr0",
        id="nitro",
    ),
    pytest.param(
        *("nitro", "nitro/nitro_attestation_debug.bin", None, "2025-12-25T08:30:00Z"), 3, "debug",
        id="nitro debug",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "file", "collateral", "now", "code", "said"), GENUINE)
def test_genuine_evidence(
    alone: Command,
    samples: Path,
    kind: str,
    file: str,
    collateral: str | None,
    now: str | None,
    code: int,
    said: str,
) -> None:
    extra: list[object] = ["--collateral", samples / collateral] if collateral else []
    if now == "issue":
        assert collateral is not None
        fields = json.loads((samples / collateral).read_bytes())
        issued = datetime.fromisoformat(json.loads(fields["tcb_info"])["issueDate"])
        now = format_time(issued + timedelta(hours=1))
    if now is not None:
        extra += ["--now", now]
    answer = alone("attest", "verify", samples / file, "--kind", kind, *extra, "--json")
    assert answer.code == code, answer.out
    assert said in answer.out
    if code == 0:
        assert answer.json["verified"] is False  # it was compared with nothing
        assert answer.json["claims"]["protection"] == "tee"


# --- trust -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tpm", "software-tpm"])
def test_a_root_is_kept_under_its_digest(
    alone: Command, tmp_path: Path, root_pem: Path, kind: str
) -> None:
    root = root_pem
    answer = alone("attest", "trust", root, "--kind", kind, "--json")
    assert answer.code == 0, answer.out
    kept = Path(answer.json["file"])
    assert kept.parent == tmp_path / "home" / "trust" / kind
    assert kept.read_bytes() == root.read_bytes()
    assert alone("attest", "trust", root, "--kind", kind).code == 0  # again is no harm
    assert len(list(kept.parent.iterdir())) == 1


@pytest.mark.parametrize("kind", ["tpm", "software-tpm", "ima"])
@pytest.mark.parametrize("content", [b"", b"text", b"-----BEGIN CERTIFICATE-----\nAA==\n"])
def test_what_cannot_be_trusted(alone: Command, tmp_path: Path, kind: str, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    answer = alone("attest", "trust", path, "--kind", kind, "--json")
    assert answer.code in {2, 3}, answer.out
    assert not (tmp_path / "home" / "trust").exists()


# --- this machine ----------------------------------------------------------------------------


def test_show_tries_every_kind(alone: Command) -> None:
    answer = alone("attest", "show", "--json")
    assert answer.code == 0
    rows = {row["kind"]: row for row in answer.json["kinds"]}
    assert rows["simulated"]["missing"] is None
    assert {"tpm", "ima", "sgx", "tdx", "snp", "nitro"} < set(rows)
    assert all(row["missing"] for row in rows.values() if row["protection"] != "simulated") or (
        answer.json["strongest"] != "simulated"
    )
    assert "simulated" in alone("attest", "show").out
