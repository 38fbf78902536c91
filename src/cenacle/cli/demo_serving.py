"""The serving demonstration: a tail behind a public network, trained on private data and sold."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import yaml
from numpy.typing import NDArray

from cenacle.cli.demo_serving_tables import TIMED, closing_tables
from cenacle.cli.output import progress_bar
from cenacle.cli.serving_process import BackgroundService
from cenacle.cli.stage import BackgroundBroker, Stage, check_ended
from cenacle.errors import InputError, RefusedError

if TYPE_CHECKING:
    from cenacle.cli.demo_serving_models import Material

__all__ = ["play"]

Kind = Literal["digits", "photos", "notes"]

_PURPOSES: Final = {
    "digits": "reading handwriting",
    "photos": "sorting photographs",
    "notes": "sorting triage notes",
}
_ASKED: Final = 32  # rows of a query by command
_QUERIES: Final = 2 * _ASKED + 2 * (TIMED + 1)

_DATA_TERMS: Final = """\
kind: terms
protection: simulated    # a demonstration: a real owner would say tee
recipes: [graph]
privacy: unbounded       # the tail is not differentially private
recipients: [vendor]
outputs: [model, metrics]
purposes: [{purpose}]
uses: 3
expires: 2036-12-31
"""

_TAIL_TERMS: Final = """\
kind: terms
protection: simulated
privacy: unbounded
serving:
  outputs: {{form: top-k, k: 2, decimals: 2}}   # the most that a query may be told
  tickets: true                               # and only for a ticket
recipients: [vendor]
outputs: [metrics]
purposes: [{purpose}]
uses: 3
expires: 2036-12-31
"""


@dataclass
class _Play:
    """One performance.

    Attributes:
        figures: what is known so far, as JSON values.
    """

    stage: Stage
    matter: Material
    whole: bool
    figures: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = ("broker", "hospital", "vendor", "operator", "client")
        self.broker, self.hospital, self.vendor, self.operator, self.client = (
            self.stage.actor(name) for name in names
        )
        self.purpose = _PURPOSES[self.matter.kind]
        rows = len(self.matter.tensors["labels"])
        self.sealed = min(rows - _ASKED, int(rows * 0.9))

    def perform(self) -> None:
        with BackgroundBroker(
            self.broker,
            *("--dir", "store", "--name", "demo/broker", "--port", "0", "--development"),
        ) as broker:
            self._meet(broker.announced)
            self._cut()
            self._seal()
            self._train()
            self._compare()
            digest = self._sell()
            self._serve(digest)

    # ------------------------------------------------------------------ scenes

    def _meet(self, announced: dict[str, Any]) -> None:
        stage = self.stage
        stage.heading("1. A hospital and a vendor make keys, pin the broker, and register")
        pin = ("broker", "pin", "../broker/store/identity.json", "--digest", announced["digest"])
        parties = (self.hospital, self.vendor)
        stage.together(*((one, ("party", "new", one.name), None) for one in parties))
        stage.together(*((one, pin, None) for one in (*parties, self.operator, self.client)))
        # Tokens are secrets: they are piped, and the answers that hold them are not shown.
        register = ("party", "register")
        stage.together((self.hospital, (*register, "hospital", "--token", "-"),
                        announced["owner_token"]))  # fmt: skip
        token = self.hospital.ask("broker", "invite", "--as", "hospital")["token"]
        stage.together((self.vendor, (*register, "vendor", "--token", "-"), token))

    def _cut(self) -> None:
        from cenacle.cut.sources import load_model, parse_input

        matter = self.matter
        self.stage.heading(
            f"2. The vendor freezes {matter.network} up to {matter.at}: that front is public, and "
            "stays so; a new tail will be trained"
        )
        specs = [parse_input(text, position=k) for k, text in enumerate(matter.inputs)]
        with progress_bar(f"exporting {matter.network}", not self.stage.quiet):
            self.model = load_model(matter.builder, inputs=specs)
        self.model.save(self.vendor.folder / "network.onnx")
        labels = f"0-{len(matter.classes) - 1}"
        cut = self.vendor.ask(
            *("cut", "retrain", "network.onnx", "--at", matter.at, "--head", "dense"),
            *("--samples", matter.samples, "--classes", labels, "--standardize"),
            *(("--integers",) if matter.kind == "notes" else ()),
            *(part for pair in matter.feeds.items() for part in ("--feed", "=".join(pair))),
            *("--epochs", "8" if matter.kind != "notes" else "40", "--seed", "7"),
            *("--batch-size", "64" if matter.kind != "notes" else "16"),
            *("--owner", "hospital", "--purpose", self.purpose, "--out", "tail"),
        )
        self.figures["front"] = cut["front"]["digest"]
        self.figures["crossing"] = cut["crossing"]
        (self.vendor.folder / "terms.yaml").write_text(_DATA_TERMS.format(purpose=self.purpose))
        self.vendor.run(
            *("seal", "tail/front.safetensors", "--out", "tail/front.safetensors.sealed"),
            *("--terms", "terms.yaml", "--as", "vendor"),
        )

    def _seal(self) -> None:
        self.stage.heading(
            f"3. The hospital seals {self.sealed} samples ({self.matter.source}) under its terms"
        )
        folder = self.hospital.folder
        mine = {name: array[: self.sealed] for name, array in self.matter.tensors.items()}
        np.savez(folder / "samples.npz", allow_pickle=False, **mine)
        (folder / "terms.yaml").write_text(_DATA_TERMS.format(purpose=self.purpose))
        self.hospital.run("seal", "samples.npz", "--terms", "terms.yaml", "--as", "hospital")

    def _train(self) -> None:
        self.stage.heading(
            "4. Both sign a contract, and the operator runs it: in the enclave each sample goes "
            "once through the front, and the tail is trained"
        )
        job = yaml.safe_load((self.vendor.folder / "tail" / "job.yaml").read_text())
        job["assets"] = {
            "data": "../hospital/samples.npz.sealed.asset.json",
            "front": "../vendor/tail/front.safetensors.sealed.asset.json",
        }
        digest = self._agree("train", job)
        sealed = ("../hospital/samples.npz.sealed", "../vendor/tail/front.safetensors.sealed")
        data = [part for path in sealed for part in ("--data", path)]
        with progress_bar("training in the enclave", not self.stage.quiet):
            ran = self.operator.ask("run", digest, *data, "--out", "trained", "--threads", "1")
        receipt = "../operator/trained/receipt.json"
        opened = ("open", receipt)
        self.vendor.run(*opened, "model", "--as", "vendor", "--out", "model.safetensors")
        self.vendor.run(*opened, "metrics", "--as", "vendor", "--out", "metrics.json")
        self.hospital.run("verify", receipt)
        metrics = json.loads((self.vendor.folder / "metrics.json").read_bytes())
        self.figures["accuracy"] = metrics["pooled"]["accuracy"]
        self.figures["measured_rows"] = metrics["pooled"].get("rows")
        self.figures["training_seconds"] = ran["stages"]["steps"]
        self.figures["training_receipt"] = str(self.operator.folder / "trained" / "receipt.json")

    def _agree(self, name: str, job: dict[str, Any]) -> str:
        (self.operator.folder / f"{name}.yaml").write_text(yaml.safe_dump(job, sort_keys=False))
        self.operator.run("draft", f"{name}.yaml", "--out", f"{name}-contract.yaml")
        path = f"../operator/{name}-contract.yaml"
        digest = str(self.vendor.ask("propose", path, "--as", "vendor")["contract"])
        signing = [one for one in (self.hospital, self.vendor) if one.name in job["parties"]]
        self.stage.together(*((one, ("sign", digest, "--as", one.name), None) for one in signing))
        return digest

    def _compare(self) -> None:
        """In the open, here, on the same samples: it is no job, and nobody gets a model."""
        from cenacle.cut.rehearsal import rehearse_tail
        from cenacle.cut.retraining import Head, prepare
        from cenacle.documents.recipe import Recipe

        self.stage.heading("5. For comparison alone, in the open: the same samples without a cut")
        text = (self.vendor.folder / "tail" / "job.yaml").read_text()
        agreed = yaml.safe_load(text)["job"]["recipe"]
        tensors = {name: array[: self.sealed] for name, array in self.matter.tensors.items()}
        last = "encoder" if self.matter.kind == "notes" else "network.avg_pooling"
        plans: list[tuple[str, str, Head, int]] = [("linear_probe", last, "linear", 40)]
        if self.whole and self.matter.kind != "notes":
            plans.append(("whole", "prepare", "fresh", 3))
        for name, at, head, epochs in plans:
            # Few steps would leave statistics of normalization between ImageNet's and these.
            one = prepare(
                self.model, at, len(self.matter.classes), head=head, fold_norms=True, seed=7
            )
            recipe = dict(agreed)
            front = {k: v for k, v in agreed["data"]["front"].items() if k == "inputs"}
            recipe["data"] = agreed["data"] | {
                "front": one.front_fields("front") | front,
                "standardize": head == "linear",
            }
            recipe["model"] = one.model_fields("weights" if one.graph.tensors else None)
            recipe["epochs"] = epochs
            with progress_bar(f"training a {name.replace('_', ' ')}", not self.stage.quiet) as bar:
                done = rehearse_tail(one, Recipe.from_fields(recipe), tensors, progress=bar.report)
            self.figures[name] = {
                "accuracy": done.accuracy,
                "rows": done.rows[1],
                "seconds": round(done.seconds, 1),
            }

    def _sell(self) -> str:
        self.stage.heading(
            "6. The vendor makes its model a tail, seals it, and states what a query may be told"
        )
        vendor = self.vendor
        vendor.run(
            *("cut", "export", "model.safetensors", "--front", "tail/front.onnx"),
            *("--probabilities", "--out", "served"),
        )
        (vendor.folder / "serving.yaml").write_text(_TAIL_TERMS.format(purpose=self.purpose))
        tail = "served/tail.safetensors"
        vendor.run("seal", tail, "--type", "model", "--out", f"{tail}.sealed",
                   "--terms", "serving.yaml", "--as", "vendor")  # fmt: skip
        shutil.copy(vendor.folder / "tail" / "front.onnx", self.operator.folder / "front.onnx")
        return self._agree(
            "serve",
            {
                "name": "served-tail",
                "purpose": self.purpose,
                "parties": ["vendor"],
                "assets": {"reader": f"../vendor/{tail}.sealed.asset.json"},
                "job": {
                    "type": "serve",
                    "model": "reader",
                    "front": self.figures["front"],
                    "outputs": {"form": "top-k", "k": 2, "decimals": 2},
                    "tickets": "vendor",
                },
                "outputs": [{"name": "usage", "kind": "metrics", "recipient": "vendor"}],
                "approval": "vendor",
                "expires": "2036-12-31",
            },
        )

    def _serve(self, digest: str) -> None:
        self.stage.heading(
            f"7. The operator serves it; the vendor sells the client {_QUERIES} queries"
        )
        with BackgroundService(
            self.operator,
            *(digest, "--data", "../vendor/served/tail.safetensors.sealed"),
            *("--front", "front.onnx", "--out", "served", "--listen", "127.0.0.1:0"),
            *("--threads", "1", "--front-threads", "1"),
        ) as service:
            self.client.run("ticket", "key", "new", "client.key")
            self.vendor.run(
                *("ticket", "new", digest, "--client", "../client/client.key.pub"),
                *("--queries", str(_QUERIES), "--expires", "2036-12-31"),
                *("--as", "vendor", "--out", "../client/ticket.json"),
            )
            self._query(digest, service.announced)
            service.drain()
        receipt = "../operator/served/receipt.json"
        self.stage.heading("9. The service ends: its report of use goes to the vendor, sealed")
        self.vendor.run("open", receipt, "usage", "--as", "vendor", "--out", "usage.json")
        self.client.run("verify", receipt)
        self.figures["usage"] = json.loads((self.vendor.folder / "usage.json").read_bytes())
        self.figures["serving_receipt"] = str(self.operator.folder / "served" / "receipt.json")

    # ------------------------------------------------------------------ queries

    def _rows(self, start: int, count: int) -> dict[str, NDArray[Any]]:
        """Samples that nobody trained on, as the front takes them, from the end of all."""
        names = (self.matter.samples, *self.matter.feeds.values())
        kind = np.int64 if self.matter.kind == "notes" else np.float32
        all_ = len(self.matter.tensors["labels"])
        places = self.sealed + (start + np.arange(count)) % (all_ - self.sealed)
        return {name: self.matter.tensors[name][places].astype(kind) for name in names}

    def _query(self, digest: str, announced: dict[str, Any]) -> None:
        self.stage.heading(
            "8. The client asks: in plain through the operator, then sealed to the enclave, which "
            "the operator cannot read; and once more, when the ticket is used up"
        )
        client, url = self.client, str(announced["url"])
        shutil.copy(self.vendor.folder / "tail" / "front.onnx", client.folder / "front.onnx")
        np.savez(client.folder / "rows.npz", allow_pickle=False, **self._rows(0, _ASKED))
        paid = ("--ticket", "ticket.json", "--key", "client.key")
        common = (*paid, "--certificate", str(announced["certificate"]), "--input", "rows.npz")
        plain = ("infer", url, "--model", "reader", *common)
        sealed = ("infer", url, "--sealed", "--contract", digest, "--front", "front.onnx")
        answers = [
            client.ask(*plain),
            client.ask(*sealed, *common, "--development"),
        ]
        truth = self._truth(_ASKED)
        labels = [_labels(answer["outputs"]) for answer in answers]
        self.figures["served_accuracy"] = float(np.mean(labels[0] == truth))
        self.figures["asked_rows"] = _ASKED
        self.figures["same_answers"] = bool((labels[0] == labels[1]).all())
        self.figures["latency_ms"] = self._time(digest, url, str(announced["certificate"]))
        code = client.attempt(*plain)
        self.figures["refused_when_used_up"] = code == RefusedError.exit_code
        if not self.figures["refused_when_used_up"]:
            check_ended(plain, code or 1)

    def _truth(self, count: int) -> NDArray[Any]:
        labels = self.matter.tensors["labels"]
        places = self.sealed + np.arange(count) % (len(labels) - self.sealed)
        return np.asarray(labels[places])

    def _time(self, digest: str, url: str, certificate: str) -> dict[str, float]:
        """Single rows, one after the other, by the clients of :mod:`cenacle.serving.client`."""
        from cenacle.cli.ticket import read_client_key
        from cenacle.documents.dsse import Envelope
        from cenacle.serving.client import Client, SealedClient

        folder = self.client.folder
        paid: dict[str, Any] = {
            "certificate": Path(certificate),
            "ticket": Envelope.from_json((folder / "ticket.json").read_bytes()),
            "key": read_client_key(folder / "client.key"),
        }
        found = {}
        for name, client in (
            ("plain", Client(url, "reader", **paid)),
            (
                "sealed",
                SealedClient(url, digest, front=folder / "front.onnx", development=True, **paid),
            ),
        ):
            seconds = []
            with client:
                for row in range(TIMED + 1):
                    started = time.perf_counter()
                    client.infer(self._rows(row, 1))
                    seconds.append(time.perf_counter() - started)
            found[name] = round(1000 * float(np.median(seconds[1:])), 2)
        return found


def _labels(outputs: dict[str, Any]) -> NDArray[np.int64]:
    """The most likely class of each row."""
    name = next(name for name in outputs if name.endswith(".label"))
    return np.asarray(outputs[name])[:, 0]


def play(
    kind: Kind, folder: Path | None, data: Path | None, *, whole: bool, quiet: bool
) -> tuple[dict[str, Any], Callable[[], None]]:
    """Play it. Returns the figures, and what prints the closing tables.

    Args:
        kind: of the samples.
        folder: keeps everything; a new one by default.
        data: MNIST's files, or photographs.
        whole: also train all of the network, to compare with.

    Raises:
        InputError: the folder holds an earlier performance, or the data cannot be used.
    """
    from cenacle.cli.demo_serving_models import material

    started = time.monotonic()
    matter = material(kind, data)
    root = Path(tempfile.mkdtemp(prefix="cenacle-demo-")) if folder is None else folder.resolve()
    if (root / "broker" / "store").exists():
        raise InputError(
            "the folder holds an earlier demonstration", found=str(root), remedy="choose another"
        )
    stage = Stage(root, quiet=quiet)
    stage.heading(f"Everything of this demonstration lies in {root}")
    performance = _Play(stage, matter, whole)
    performance.figures |= {"source": matter.source, "samples": performance.sealed}
    performance.perform()
    figures = performance.figures
    figures["seconds"] = round(time.monotonic() - started, 1)
    return figures, lambda: closing_tables(stage, matter, figures)
