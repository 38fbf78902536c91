"""The whole flow as a library: two hospitals, a clinic, a broker, an enclave, a receipt.

The same as `cenacle demo hospitals`, smaller and without the command line::

    python examples/library_use.py
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from cenacle.attestation.registry import VerifierSet
from cenacle.attestation.simulated import SimulatedVerifier
from cenacle.broker.client import BrokerClient
from cenacle.broker.identity import BrokerKeys
from cenacle.broker.receipts import read_bundle, verify_receipt
from cenacle.broker.server import serving
from cenacle.broker.service import Broker
from cenacle.broker.store import Store
from cenacle.broker.tls import ensure_certificate
from cenacle.cli.enclave import measure_here
from cenacle.cli.home import Home
from cenacle.cli.seal import seal_asset
from cenacle.documents import Contract, Terms
from cenacle.documents.base import unb64
from cenacle.documents.receipt import OutputRecord
from cenacle.enclave.launcher import LaunchRequest, ProcessLauncher
from cenacle.enclave.sandbox import plan
from cenacle.sealing import SealedReader

TERMS = Terms.from_fields(
    {
        "protection": "simulated",  # a real owner would say tee
        "recipes": ["logistic"],
        "privacy": "unbounded",
        "recipients": ["clinic"],
        "outputs": ["model", "metrics"],
        "purposes": ["risk study"],
        "expires": "2036-12-31",
    }
)
RECIPE = {
    "task": "classification",
    "data": {"form": "table", "assets": ["a", "b"], "target": "ill", "classes": [0, 1]},
    "model": {"type": "logistic"},
    "optimizer": {"type": "adam", "learning_rate": 0.05},
    "epochs": 10,
}


def patients(path: Path, seed: int) -> Path:
    """A table of made-up patients whose illness follows from age and dose."""
    random = np.random.default_rng(seed)
    rows = [(a, d, int(a + d > 0)) for a, d in random.normal(size=(100, 2)).round(4)]
    path.write_text("\n".join(["age,dose,ill", *(f"{a},{d},{i}" for a, d, i in rows)]) + "\n")
    return path


def main(folder: Path) -> dict[str, Any]:
    """Play the job in a folder; returns the metrics that the clinic opened."""
    keys = BrokerKeys.open(folder / "broker", "example/broker")
    with Store.open(folder / "broker" / "broker.db") as store:
        broker = Broker.development(store, keys)  # development: takes simulated evidence
        with serving(broker, ensure_certificate(folder / "broker")):
            return job(folder, broker)


def job(folder: Path, broker: Broker) -> dict[str, Any]:
    client = BrokerClient(broker.identity)  # parties get this identity and check its digest
    home = Home(folder / "home")  # here all parties share one; each would have its own
    token = broker.owner_token() or ""
    parties = {}
    for name in ("hospital-a", "hospital-b", "clinic"):
        parties[name] = home.new_party(name)
        client.register(parties[name].envelope, token)
        token = client.invite(parties["hospital-a"].signing_key, "hospital-a").token
    sealed = {}
    for alias in ("a", "b"):
        source = patients(folder / f"{alias}.csv", seed=ord(alias))
        owner, target = parties[f"hospital-{alias}"], source.with_suffix(".sealed")
        sealed[alias] = seal_asset(owner, client, source, target, TERMS)

    # Which enclave may run it: this machine's, as measured now, in all layers that work here.
    contract = Contract.from_fields(
        {
            "name": "risk-model",
            "purpose": "risk study",
            "broker": broker.identity.digest,
            "parties": {name: keys.party.digest for name, keys in parties.items()},
            "assets": {
                alias: {"digest": each.asset.digest, "owner": each.asset.owner}
                for alias, each in sealed.items()
            },
            "job": {"type": "recipe", "recipe": RECIPE},
            "enclave": measure_here(home, layers=None),
            "outputs": [
                {"name": name, "kind": name, "recipient": "clinic"} for name in ("model", "metrics")
            ],
            "approval": {"all_of": ["hospital-a", "hospital-b"]},
            "expires": "2036-12-31",
        }
    )
    digest = client.propose(contract, parties["clinic"].signing_key)
    for name in ("hospital-a", "hospital-b"):
        client.sign(digest, parties[name].signing_key)

    results, checkpoints = folder / "results", folder / "checkpoints"
    results.mkdir()
    checkpoints.mkdir()
    address = urlsplit(broker.identity.url or "")
    request = LaunchRequest(
        broker=(address.hostname or "", address.port or 0),
        plan=plan(contract.enclave.layers),
        config={"contract": digest, "broker": broker.identity.to_fields()},
        read_only={
            "installation": home.installation_path,
            **{f"asset-{i}": sealed[a].sealed for i, a in enumerate(sorted(sealed))},
        },
        writable={"outputs": results, "checkpoints": checkpoints},
    )
    with ProcessLauncher().launch(request) as enclave:
        enclave.wait()

    # Anyone who knows the broker's digest can verify the receipt, offline and years later.
    bundle = read_bundle((results / "receipt.json").read_bytes())
    verifiers = VerifierSet.of_development(SimulatedVerifier())
    verified = verify_receipt(bundle, broker_digest=broker.identity.digest, verifiers=verifiers)
    output = next(o for o in verified.receipt.outputs if o.name == "metrics")
    context = OutputRecord.wrapping_context(digest, output.name, output.header)
    key = parties["clinic"].hpke_key.open(unb64(output.wrapped_key), *context)
    with SealedReader(results / "metrics.sealed", key, expected_digest=output.content) as reader:
        metrics: dict[str, Any] = json.loads(reader.read_range(0, reader.size))
    client.close()
    return metrics


if __name__ == "__main__":
    where = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="cenacle-"))
    print(json.dumps(main(where)))
