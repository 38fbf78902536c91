"""From a sealed table to a signed contract, by commands alone; nothing here starts an enclave."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cenacle.documents.asset import Asset
from cenacle.documents.contract import Contract
from cenacle.documents.dsse import Envelope
from tests.support.house import TERMS, House, patient_rows, recipe_job

Command = Callable[..., Any]

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def sealed(cli: Command, house: House) -> dict[str, Any]:
    """What ``cenacle seal`` said about hospital-a's patients."""
    folder = house.folder / "hospital-a"
    (folder / "records.csv").write_text(patient_rows(40))
    (folder / "terms.yaml").write_text(yaml.safe_dump(TERMS))
    answer = cli(
        "hospital-a",
        *("seal", folder / "records.csv", "--terms", folder / "terms.yaml"),
        *("--as", "hospital-a", "--json"),
    )
    assert answer.code == 0, answer.out
    found: dict[str, Any] = answer.json
    return found


def _job(manifest: str, **fields: Any) -> dict[str, Any]:
    return {
        "name": "study",
        "purpose": "research",
        "parties": ["hospital-a", "clinic"],
        "assets": {"a": manifest},
        "job": recipe_job(["a"]),
        "enclave": {
            "reference": {"simulated": {"package": ["sha256:" + "1" * 64]}},
            "layers": ["process"],
        },
        "outputs": [{"name": "model", "kind": "model", "recipient": "clinic"}],
        "approval": {"all_of": ["hospital-a"]},
        "vetoes": ["clinic"],
        "expires": "2036-12-31",
        **fields,
    }


@pytest.fixture(scope="module")
def draft(cli: Command, house: House, sealed: dict[str, Any]) -> Callable[..., Path]:
    """``draft(**fields)``: a contract file, drafted by the operator."""

    def write(**fields: Any) -> Path:
        source, target = house.path("job.yaml"), house.path("contract.yaml")
        source.write_text(
            yaml.safe_dump(_job(sealed["manifest"], name=house.fresh("study"), **fields))
        )
        answer = cli("operator", "draft", source, "--out", target, "--json")
        assert answer.code == 0, answer.out
        assert Contract.from_yaml(target.read_bytes()).digest == answer.json["contract"]
        return target

    return write


@pytest.fixture(scope="module")
def proposed(cli: Command, draft: Callable[..., Path]) -> str:
    """A contract that nobody has signed."""
    return str(cli("clinic", "propose", draft(), "--as", "clinic", "--json").json["contract"])


# ---------------------------------------------------------------------- seal


def test_seal_tells_the_asset_and_leaves_a_signed_manifest(
    house: House, sealed: dict[str, Any]
) -> None:
    envelope = Envelope.from_json(Path(sealed["manifest"]).read_bytes())
    asset = envelope.open(Asset, house.parties["hospital-a"].party.verify_key)
    assert asset.digest == sealed["asset"]
    assert asset.name == "records"
    assert Path(sealed["sealed"]).stat().st_size == sealed["bytes"] == asset.container.size
    assert asset.layout["rows"] == 40
    # The layout is public: names and types, nothing of the rows.
    assert patient_rows(40).splitlines()[1].split(",")[0] not in json.dumps(asset.to_fields())


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("age,age\n1,2\n", "'age'"),
        ("age,dose\n1,2,3\n", ""),
        ("age,dose\n1,\n", "row 1 of column 'dose'"),
        ("", "records"),
        ("age\n\xff\n", ""),
    ],
    ids=["same name twice", "ragged", "empty cell", "empty file", "not UTF-8"],
)
def test_a_table_that_cannot_be_sealed_leaves_nothing(
    cli: Command, house: House, tmp_path: Path, rows: str, words: str
) -> None:
    source, terms = tmp_path / "records.csv", tmp_path / "terms.yaml"
    source.write_bytes(rows.encode("latin-1"))
    terms.write_text(yaml.safe_dump(TERMS))
    before = len(house.log())
    answer = cli("hospital-a", "seal", source, "--terms", terms, "--as", "hospital-a")
    assert answer.code == 2
    assert words in answer.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["records.csv", "terms.yaml"]
    assert len(house.log()) == before


def test_a_sealed_file_whose_key_nobody_took_is_not_left_behind(
    cli: Command, tmp_path: Path, house: House
) -> None:
    """The broker knows no such owner, so the key could never be got back."""
    house.home("operator").new_party("stranger")
    (tmp_path / "records.csv").write_text(patient_rows(3))
    (tmp_path / "terms.yaml").write_text(yaml.safe_dump(TERMS))
    answer = cli(
        "operator",
        *("seal", tmp_path / "records.csv", "--terms", tmp_path / "terms.yaml"),
        *("--as", "stranger", "--json"),
    )
    assert answer.code != 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["records.csv", "terms.yaml"]


def test_an_asset_that_was_handed_in_is_never_replaced(cli: Command, tmp_path: Path) -> None:
    (tmp_path / "records.csv").write_text(patient_rows(3))
    (tmp_path / "terms.yaml").write_text(yaml.safe_dump(TERMS))
    arguments = ("seal", tmp_path / "records.csv", "--terms", tmp_path / "terms.yaml")
    assert cli("hospital-a", *arguments, "--as", "hospital-a").code == 0
    kept = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    again = cli("hospital-a", *arguments, "--as", "hospital-a", "--json")
    assert again.code == 5
    assert "--out" in again.json["remedy"]
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == kept


def test_a_program_is_sealed_with_the_digest_that_owners_allow(
    cli: Command, tmp_path: Path, house: House
) -> None:
    program = tmp_path / "statistics"
    program.mkdir()
    (program / "main.py").write_text("def run(ctx): pass\n")
    (tmp_path / "terms.yaml").write_text(yaml.safe_dump(TERMS))
    arguments = ("seal", program, "--terms", tmp_path / "terms.yaml", "--as", "lab")
    answer = cli("lab", *arguments)
    assert answer.code == 0
    again = cli("lab", *arguments, "--out", tmp_path / "again.sealed", "--name", "again", "--json")
    assert f"package {again.json['package']}" in answer.out


# ---------------------------------------------------------------------- draft, propose, review


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"assets": {"a": "missing.asset.json"}}, "the .asset.json file that `cenacle seal` wrote"),
        ({"parties": ["hospital-a", "nobody"]}, "nobody"),
        ({"enclave": "that-machine"}, "this-machine, or reference values"),
        ({"unknown": 1}, "unknown"),
        ({"expires": "yesterday"}, "expires"),
        ({"outputs": []}, "outputs"),
        ({"vetoes": ["lab"]}, "lab"),
        ({"approval": {"at_least": 3, "of": ["hospital-a"]}}, ""),
    ],
)
def test_a_job_that_makes_no_contract_is_refused_with_the_field(
    cli: Command, tmp_path: Path, sealed: dict[str, Any], fields: dict[str, Any], words: str
) -> None:
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({**_job(sealed["manifest"]), **fields}))
    answer = cli("operator", "draft", tmp_path / "job.yaml", "--out", tmp_path / "contract.yaml")
    assert answer.code == 2
    assert words in answer.err
    assert not (tmp_path / "contract.yaml").exists()


def test_a_draft_without_a_file_is_printed(
    cli: Command, tmp_path: Path, sealed: dict[str, Any]
) -> None:
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(_job(sealed["manifest"])))
    answer = cli("operator", "draft", tmp_path / "job.yaml")
    digest = cli("operator", "draft", tmp_path / "job.yaml", "--json").json["contract"]
    assert Contract.from_yaml(answer.out.encode()).digest == digest


def test_a_review_says_in_words_what_a_contract_permits(cli: Command, proposed: str) -> None:
    shown = cli("hospital-a", "review", proposed, "--as", "hospital-a").out
    for words in (
        "for the purpose 'research', trains a logistic model (classification) for 4 epochs",
        "no custom code",
        "It reads a of hospital-a: table, 40 rows.",
        "It gives model (model) to clinic.",
        "SIMULATED: protects from nobody with root",
        "sandbox layers demanded: process",
        "Nothing is sent to accelerators.",
        "The outputs are NOT differentially private.",
        "signed so far: nobody; may veto: clinic",
        "It ends at 2036-12-31T23:59:59Z.",
        "your clauses (hospital-a)",
        "clauses of others that fail",
    ):
        assert words in shown, shown
    assert shown.count("FAILED") == 2  # the owner's signature is missing, under both names


def test_a_review_of_hostile_words_shows_them_without_their_control_characters(
    cli: Command, house: House, draft: Callable[..., Path], sealed: dict[str, Any]
) -> None:
    file = draft(purpose="research\x1b[8m and sell everything\x1b[1A")
    digest = cli("clinic", "propose", file, "--as", "clinic", "--json").json["contract"]
    shown = cli("hospital-a", "review", digest).out
    assert "and sell everything" in shown
    assert "\x1b[8m" not in shown
    assert "\x1b[1A" not in shown


def test_a_review_in_json_has_every_clause(cli: Command, proposed: str) -> None:
    found = cli("hospital-a", "review", proposed, "--json").json
    assert found["contract"] == proposed
    assert found["signed"] == []
    names = {(c["subject"], c["name"]): c["verdict"] for c in found["clauses"]}
    assert names["contract", "approval"] == "failed"
    assert names["asset a of hospital-a", "purpose"] == "met"
    assert names["asset a of hospital-a", "uses"] == "pending"


def test_signatures_and_the_list_of_contracts(cli: Command, draft: Callable[..., Path]) -> None:
    digest = cli("clinic", "propose", draft(), "--as", "clinic", "--json").json["contract"]
    assert cli("hospital-a", "sign", digest, "--as", "hospital-a", "--json").json["signed"] == [
        "hospital-a"
    ]
    listed = cli("clinic", "contracts", "--as", "clinic", "--json").json["contracts"]
    assert digest in {item["digest"] for item in listed}
    shown = cli("hospital-a", "contracts", "--as", "hospital-a").out
    assert digest in shown
    assert cli("lab", "contracts", "--as", "lab").out.strip() == "none"
    again = cli("hospital-a", "sign", digest, "--as", "hospital-a", "--json")
    assert again.code in {0, 5}


def test_a_stranger_neither_signs_nor_vetoes(cli: Command, proposed: str) -> None:
    signed = cli("lab", "sign", proposed, "--as", "lab", "--json")
    assert signed.code == 3
    assert signed.json["error"] == "SignatureError"
    vetoed = cli("lab", "veto", proposed, "--as", "lab", "--reason", "no", "--json")
    assert vetoed.code == 4
    assert "cenacle" not in vetoed.json["found"]


def test_a_veto_stands_in_every_later_review(cli: Command, draft: Callable[..., Path]) -> None:
    digest = cli("clinic", "propose", draft(), "--as", "clinic", "--json").json["contract"]
    reason = "the recipe\x1b[2K is wrong"
    assert cli("clinic", "veto", digest, "--as", "clinic", "--reason", reason).code == 0
    shown = cli("hospital-a", "review", digest).out
    assert "is wrong" in shown
    assert "\x1b[2K" not in shown


@pytest.mark.parametrize("command", ["review", "sign", "run", "abandon"])
def test_a_contract_that_the_broker_does_not_know(
    cli: Command, tmp_path: Path, command: str
) -> None:
    extra: dict[str, tuple[object, ...]] = {
        "review": (),
        "sign": ("--as", "clinic"),
        "abandon": ("--as", "clinic"),
        "run": ("--data", tmp_path, "--out", tmp_path / "out"),
    }
    for digest in ("sha256:" + "0" * 64, "nonsense", "../../identity"):
        answer = cli("clinic", command, digest, *extra[command], "--json")
        assert answer.code in {2, 3, 5}, answer.out
        assert answer.json["error"]
        assert not (tmp_path / "out").exists()


def test_sealed_files_that_are_not_there_are_named(
    cli: Command, proposed: str, tmp_path: Path
) -> None:
    (tmp_path / "other.sealed").write_bytes(b"not a sealed file")
    answer = cli("operator", "run", proposed, "--data", tmp_path, "--out", tmp_path / "out")
    assert answer.code == 2
    assert "nothing for a" in answer.err
    assert "--data" in answer.err
    missing = cli("operator", "run", proposed, "--data", tmp_path / "no", "--out", tmp_path / "out")
    assert missing.code == 2


def test_there_is_nothing_to_resume_or_abandon(
    cli: Command, proposed: str, sealed: dict[str, Any], tmp_path: Path
) -> None:
    data = ("--data", sealed["sealed"], "--out", tmp_path / "out")
    resumed = cli("operator", "run", proposed, *data, "--resume", "--json")
    assert resumed.code == 5
    assert "without --resume" in resumed.json["remedy"]
    abandoned = cli("clinic", "abandon", proposed, "--as", "clinic", "--json")
    assert abandoned.code == 5


def test_a_folder_that_holds_another_jobs_receipt_is_not_written_to(
    cli: Command, proposed: str, sealed: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "receipt.json").write_text("{}")
    answer = cli("operator", "run", proposed, "--data", sealed["sealed"], "--out", out, "--json")
    assert answer.code == 5
    assert "choose another --out" in answer.json["remedy"]
    assert [p.name for p in out.iterdir()] == ["receipt.json"]
