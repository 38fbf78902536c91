"""The hospitals' demonstration: three owners, a clinic, an operator, a broker, a privacy budget."""

from __future__ import annotations

import contextlib
import csv
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import yaml

from cenacle.broker.messages import BudgetView
from cenacle.cli.demo_patients import (
    CLASSES,
    HOSPITALS,
    RANGES,
    TARGET,
    hospital_patients,
    share_with_clinic,
)
from cenacle.cli.demo_tables import Outcome, closing_tables, show_budgets, show_layers
from cenacle.cli.machine import prepare_machine
from cenacle.cli.software_tpm import SoftwareTpm
from cenacle.cli.stage import Actor, BackgroundBroker, Stage, check_ended
from cenacle.errors import InputError, RefusedError

__all__ = ["hospital_job", "play", "privacy_plan"]

_DELTA: Final = 1e-4  # well below one over the number of patients

_TERMS: Final = """\
kind: terms
protection: simulated    # a demonstration: a real owner would say tee
recipes: [logistic]
privacy: {{epsilon: {budget}, delta: {delta}}}   # what all jobs ever may tell of one patient
recipients: [clinic]
outputs: [model]
purposes: [breast cancer diagnosis]
uses: 100
expires: 2036-12-31
"""


def hospital_job(number: int = 1) -> dict[str, Any]:
    """What the contract of the ``number``-th job says is to be done: a recipe, no custom code."""
    return {
        "type": "recipe",
        "recipe": {
            "task": "classification",
            "data": {
                "form": "table",
                "assets": list(HOSPITALS),
                "target": TARGET,
                "classes": list(CLASSES),
                "standardize": False,
                "ranges": RANGES,
            },
            "model": {"type": "logistic"},
            "optimizer": {"type": "sgd", "learning_rate": 0.2, "momentum": 0.9},
            "schedule": {"type": "cosine"},
            "epochs": 10,
            "batch_size": 512,
            "seed": 6 + number,
            "holdout": {"fraction": 0.0},
        },
    }


def privacy_plan() -> dict[str, Any]:
    """What each job promises.

    The noise is what `cenacle draft` finds for this epsilon where none is stated: in ten seconds,
    which a demonstration can spare. The broker composes what it amounts to all the same.
    """
    return {
        "epsilon": 1.0,
        "delta": _DELTA,
        "clipping_norm": 0.5,
        "noise_multiplier": 3.381,
        "sampling_probability": 0.1,
    }


def _draft(number: int) -> dict[str, Any]:
    return {
        "name": "diagnosis-model" if number == 1 else f"diagnosis-model-{number}",
        "purpose": "breast cancer diagnosis",
        "parties": [*HOSPITALS, "clinic"],
        "assets": {name: f"../{name}/records.csv.sealed.asset.json" for name in HOSPITALS},
        "job": hospital_job(number),
        "privacy": privacy_plan(),
        "outputs": [{"name": "model", "kind": "model", "recipient": "clinic"}],
        "approval": {"all_of": list(HOSPITALS)},
        "vetoes": ["clinic"],
        "expires": "2036-12-31",
    }


EnclaveKind = Literal["process", "tpm", "vm"]


@dataclass(frozen=True)
class _Ground:
    """Where the enclave runs, and what everybody has to trust for it.

    Attributes:
        kind: of the enclave's evidence.
        options: for `cenacle draft` and `cenacle run`.
        trusted: what is trusted for it beside the vendors: kind of trust, name, and file.
    """

    kind: str
    options: tuple[str, ...] = ()
    trusted: tuple[tuple[str, str, Path], ...] = ()


def _ground(stack: contextlib.ExitStack, root: Path, enclave: EnclaveKind) -> _Ground:
    if enclave == "tpm":
        tpm = stack.enter_context(SoftwareTpm(root / "tpm"))
        options = ("--evidence", "tpm", "--tcti", tpm.tcti)
        return _Ground("tpm", options, (("software-tpm", "tpm-maker.pem", tpm.root),))
    if enclave == "vm":
        image, authority = prepare_machine()
        trusted = (
            ("software-tpm", "tpm-maker.pem", authority),
            ("ima", "allowed-files.jsonl", image / "allow-list.jsonl"),
        )
        return _Ground("ima", ("--enclave", "vm"), trusted)
    return _Ground("simulated")


class _Play:
    """One performance in one folder.

    Attributes:
        number: of the job in this folder, from 1.
    """

    def __init__(self, root: Path, budget: float, ground: _Ground, *, quiet: bool) -> None:
        self.budget = budget
        self.stage = Stage(root, quiet=quiet)
        self.hospitals = [self.stage.actor(name) for name in HOSPITALS]
        self.clinic, self.operator = self.stage.actor("clinic"), self.stage.actor("operator")
        self.number = 1 + len(list(self.operator.folder.glob("contract*.yaml")))
        self.suffix = "" if self.number == 1 else f"-{self.number}"
        self.results = f"results{self.suffix}"
        if self.number == 1 and (root / "broker" / "store").exists():
            raise InputError(
                "the folder holds a demonstration that did not come to its contract",
                found=str(root),
                remedy=f"remove it and begin anew: rm -r {root}",
            )
        self.outcome = Outcome(number=self.number, evidence=ground.kind)
        self.ground = ground

    def perform(self) -> None:
        """Raises RefusedError with the figures when the budget does not suffice any more."""
        columns, everybody = hospital_patients()
        patients, held = share_with_clinic(everybody)
        stage = self.stage
        stage.heading(f"Everything of this demonstration lies in {stage.folder}")
        self.broker = stage.actor("broker")
        if self.ground.trusted and self.number == 1:
            self._trust()
        with BackgroundBroker(
            self.broker,
            *("--dir", "store", "--name", "demo/broker", "--port", "0", "--development"),
            *(("--trust", "trusted") if self.ground.trusted else ()),
        ) as broker:
            if self.number == 1:
                self._meet(broker.announced)
                self._seal(columns, patients, held)
            else:
                stage.heading(
                    f"Job {self.number} on the same patients: the broker is back, and remembers"
                )
                self._pin(broker.announced)
            digest = self._agree()
            self._compute(digest)
            self._receive(columns, patients)
            self._budgets()

    # ------------------------------------------------------------------ scenes

    def _trust(self) -> None:
        self.stage.heading(
            "0. The operator's TPM is one in software: everybody decides to trust its maker, which "
            "protects from nobody with root there"
        )
        everyone = (*self.hospitals, self.clinic, self.operator)
        for kind, name, source in self.ground.trusted:
            shutil.copy(source, self.operator.folder / name)
            trust = ("attest", "trust", f"../operator/{name}", "--kind", kind)
            self.stage.together(
                (self.broker, (*trust, "--dir", "trusted"), None),
                *((actor, trust, None) for actor in everyone),
            )

    def _pin(self, announced: dict[str, Any]) -> None:
        identity = "../broker/store/identity.json"
        reference = ("--reference", "../broker/reference.json")
        pin = ("broker", "pin", identity, "--digest", str(announced["digest"]), *reference)
        everyone = (*self.hospitals, self.clinic, self.operator)
        self.stage.together(*((actor, pin, None) for actor in everyone))

    def _meet(self, announced: dict[str, Any]) -> None:
        stage, parties = self.stage, (*self.hospitals, self.clinic)
        stage.heading(
            "1. The parties make keys, pin the broker and what it must prove to run, and register"
        )
        measure = ("broker", "measure", "--dir", "store", "--out", "reference.json")
        stage.together(
            (self.broker, measure, None),
            *((actor, ("party", "new", actor.name), None) for actor in parties),
        )
        self._pin(announced)

        def register(actor: Actor, token: str) -> tuple[Actor, tuple[str, ...], str]:
            return actor, ("party", "register", actor.name, "--token", "-"), token

        # The broker's first token makes its owner, who invites the others. Tokens are secrets:
        # they are piped, and the answers that hold them are not shown.
        owner = self.hospitals[0]
        stage.together(register(owner, announced["owner_token"]))
        tokens = [owner.ask("broker", "invite", "--as", owner.name)["token"] for _ in parties[1:]]
        stage.together(*map(register, parties[1:], tokens))

    def _seal(
        self, columns: list[str], patients: dict[str, list[list[Any]]], held: list[list[Any]]
    ) -> None:
        self.stage.heading(
            "2. Each hospital states its terms, with a privacy budget, and seals its records"
        )
        _write_rows(self.clinic.folder / "patients.csv", columns, held)
        for actor in self.hospitals:
            _write_rows(actor.folder / "records.csv", columns, patients[actor.name])
            terms = _TERMS.format(budget=self.budget, delta=_DELTA)
            (actor.folder / "terms.yaml").write_text(terms)
        seal = ("seal", "records.csv", "--terms", "terms.yaml", "--as")
        self.stage.together(*((actor, (*seal, actor.name), None) for actor in self.hospitals))

    def _agree(self) -> str:
        self.stage.heading(
            "3. The operator drafts a contract, the clinic proposes it, the hospitals sign"
        )
        draft, contract = f"job{self.suffix}.yaml", f"contract{self.suffix}.yaml"
        written = yaml.safe_dump(_draft(self.number), sort_keys=False)
        (self.operator.folder / draft).write_text(written)
        self.outcome.layers = self.operator.ask("enclave", "layers")["layers"]
        show_layers(self.stage, self.outcome.layers)
        digest = str(
            self.operator.ask("draft", draft, "--out", contract, *self.ground.options)["contract"]
        )
        self.clinic.run("propose", f"../operator/{contract}", "--as", self.clinic.name)
        first = self.hospitals[0]
        first.run("review", digest, "--as", first.name)
        self.stage.together(
            *((actor, ("sign", digest, "--as", actor.name), None) for actor in self.hospitals)
        )
        return digest

    def _compute(self, digest: str) -> None:
        self.stage.heading(
            "4. The operator runs it: evidence, keys, private training, all inside the enclave"
        )
        data = [part for name in HOSPITALS for part in ("--data", f"../{name}/records.csv.sealed")]
        code = self.operator.attempt(
            "run", digest, *data, "--out", self.results, *self.ground.options
        )
        if code == RefusedError.exit_code:
            review = self.operator.ask("review", digest, shown=False)["clauses"]
            if any(c["name"] == "privacy" and c["verdict"] == "failed" for c in review):
                self._refused()
        check_ended(("run", digest), code)

    def _refused(self) -> None:
        self.stage.heading("5. The broker let no key go: the privacy budget does not suffice")
        views = self._budgets()
        limit = views[0].epsilon or 0.0
        left = min(limit - (view.spent or 0.0) for view in views)
        raise RefusedError(
            f"the privacy budget allows no job number {self.number} on these patients",
            found=f"{left:.3f} of epsilon {limit:g} left at delta {_DELTA:g}, after "
            f"{views[0].jobs} jobs",
            expected="enough for one more job of epsilon "
            f"{privacy_plan()['epsilon']:g}, composed with the earlier ones",
            remedy=f"that is what it is for; to begin anew: rm -r {self.stage.folder}",
        )

    def _receive(self, columns: list[str], patients: dict[str, list[list[Any]]]) -> None:
        stage, clinic, hospital = self.stage, self.clinic, self.hospitals[0]
        stage.heading("5. The clinic opens its model and measures it on patients of its own")
        receipt = f"../{self.operator.name}/{self.results}/receipt.json"
        model = f"model{self.suffix}.safetensors"
        stage.together(
            (clinic, ("open", receipt, "model", "--as", clinic.name, "--out", model), None),
            (hospital, ("verify", receipt), None),
            (hospital, ("log", "--limit", "5"), None),
        )
        with ThreadPoolExecutor(1) as pool:
            measured = pool.submit(clinic.ask, "evaluate", model, "patients.csv")
            # For comparison only; meanwhile, since both begin by loading torch.
            contract = self.operator.folder / f"contract{self.suffix}.yaml"
            for name in HOSPITALS:
                self.outcome.alone[name] = _alone(
                    name, contract, columns, patients[name], clinic.folder / "patients.csv"
                )
            self.outcome.pooled = measured.result()
        self.outcome.receipt = self.operator.folder / self.results / "receipt.json"
        self.outcome.model = model

    def _budgets(self) -> list[BudgetView]:
        self.stage.heading("6. What is left of each hospital's privacy budget")
        manifest = "records.csv.sealed.asset.json"
        with ThreadPoolExecutor(2) as pool:
            asked = [
                pool.submit(actor.ask, "budget", manifest, "--as", actor.name)
                for actor in self.hospitals
            ]
            views = [BudgetView.from_fields(one.result()) for one in asked]
        show_budgets(self.stage, HOSPITALS, views)
        self.outcome.views = views
        return views


def _write_rows(path: Path, columns: list[str], rows: list[list[Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def _alone(
    name: str, contract: Path, columns: list[str], rows: list[list[Any]], test: Path
) -> dict[str, Any]:
    """The contract's recipe and plan on one hospital's rows: what it could do by itself.

    Trained in the open, here, to compare: it is no job, and nobody gets the model.
    """
    import pyarrow as pa
    import pyarrow.csv

    from cenacle.documents.contract import Contract, RecipeJob
    from cenacle.documents.recipe import Recipe
    from cenacle.training import MemoryTable, Privacy, train, write_model
    from cenacle.training.evaluation import evaluate

    agreed = Contract.from_yaml(contract.read_bytes())
    assert isinstance(agreed.job, RecipeJob)
    assert agreed.privacy is not None
    fields = agreed.job.recipe.to_fields()
    fields["data"]["assets"] = [name]
    table = pa.table({column: [row[i] for row in rows] for i, column in enumerate(columns)})
    result = train(
        Recipe.from_fields(fields),
        {name: MemoryTable(table)},
        privacy=Privacy(agreed.privacy, secrets.token_bytes(32)),
    )
    return evaluate(write_model(result.model_tensors, result.metadata), pyarrow.csv.read_csv(test))


def play(
    folder: Path | None, budget: float, enclave: EnclaveKind = "process", *, quiet: bool
) -> tuple[dict[str, Any], Callable[[], None]]:
    """Play one job. Returns its figures, and what prints the closing tables.

    Args:
        folder: a new one, or one in which jobs were played: the next one is played on the same
            patients, with what is left of their budget.
        budget: the epsilon that each hospital allows over all jobs, in a new folder.
        enclave: ``process``: simulated evidence; ``tpm``: evidence of a TPM in software;
            ``vm``: a measured virtual machine, with the same kind of TPM.

    Raises:
        RefusedError: the privacy budget does not suffice; the figures were shown.
        InputError: the folder holds something else.
    """
    root = Path(tempfile.mkdtemp(prefix="cenacle-demo-")) if folder is None else folder.resolve()
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        performance = _Play(root, budget, _ground(stack, root, enclave), quiet=quiet)
        performance.perform()
    outcome = performance.outcome
    outcome.seconds = round(time.monotonic() - started, 1)
    return outcome.figures(), lambda: closing_tables(performance.stage, outcome)
