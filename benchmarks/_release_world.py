"""The hospitals' contracts, prepared in a broker's store before it is measured."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from cenacle.broker.identity import BrokerKeys
from cenacle.broker.messages import AssetDeposit, AssetUpload, Registration, SignatureUpload
from cenacle.broker.service import Broker
from cenacle.broker.store import Store
from cenacle.cli.demo_hospitals import hospital_job
from cenacle.cli.demo_patients import HOSPITALS
from cenacle.crypto import HpkePrivateKey, SecretBytes, SigningKey
from cenacle.documents.asset import Asset
from cenacle.documents.base import b64, format_time
from cenacle.documents.contract import Contract, RecipeJob
from cenacle.documents.dsse import Envelope
from cenacle.documents.party import Party

__all__ = ["ORIGIN", "Prepared", "postgres", "prepare"]

ORIGIN: Final = "benchmark/broker"
PURPOSE: Final = "breast cancer diagnosis"
LAYERS: Final = ("no-core-dumps", "seccomp")
_EXPIRES: Final = "2099-12-31"


@dataclass(frozen=True)
class Prepared:
    """Contracts that wait for their enclaves, and what an enclave must show.

    Attributes:
        contracts: all on the same three assets.
        apart: each on three assets of its own.
    """

    contracts: tuple[str, ...]
    apart: tuple[str, ...]
    measurements: dict[str, str]


def _measured(name: str) -> str:
    return "sha256:" + name.encode().hex().ljust(64, "0")[:64]


def _layout() -> dict[str, Any]:
    # As large as that of the demonstration's table: 30 columns of numbers and the diagnosis.
    columns = [{"name": f"feature_{i}", "type": "float64"} for i in range(30)]
    return {"form": "table", "rows": 190, "columns": [*columns, {"name": "diagnosis"}]}


def prepare(
    folder: Path, target: str, count: int, installation: SigningKey, *, apart: int = 0
) -> Prepared:
    """Make a broker's folder and store with ``count`` signed contracts on the same three assets.

    And with ``apart`` contracts that share no asset. Everything goes through the broker's own
    methods, as if the parties had sent it.
    """
    keys = BrokerKeys.open(folder, ORIGIN)
    with Store.open(target) as store:
        broker = Broker.development(store, keys)
        parties = _parties(broker)
        assets = {name: _deposit(broker, *parties[name]) for name in HOSPITALS}
        recipe = RecipeJob.from_fields(hospital_job())
        measurements = {
            name: _measured(name) for name in ("interpreter", "package", "dependencies", "sandbox")
        }
        reference = {**measurements, "installation": _installation(installation)}

        def contract(number: int, assets: dict[str, str]) -> str:
            document = Contract.from_fields(
                {
                    "name": f"diagnosis-model-{number}",
                    "purpose": PURPOSE,
                    "broker": broker.identity.digest,
                    "parties": {name: party.digest for name, (party, _, _) in parties.items()},
                    "assets": {
                        name: {"digest": digest, "owner": name} for name, digest in assets.items()
                    },
                    "job": recipe.to_fields(),
                    "enclave": {
                        "reference": {
                            "simulated": {name: [value] for name, value in reference.items()}
                        },
                        "layers": list(LAYERS),
                    },
                    "outputs": [
                        {"name": kind, "kind": kind, "recipient": "clinic"}
                        for kind in ("model", "metrics")
                    ],
                    "approval": {"all_of": list(HOSPITALS)},
                    "vetoes": ["clinic"],
                    "expires": _EXPIRES,
                }
            )
            proposal = Envelope.sign(document, parties["clinic"][1])
            digest = broker.propose(proposal).digest
            for name in HOSPITALS:
                key = parties[name][1]
                signature = Envelope.sign(document, key).signatures[key.verify_key.keyid]
                upload = SignatureUpload(keyid=key.verify_key.keyid, signature=b64(signature))
                broker.add_signature(digest, upload)
            return digest

        with ThreadPoolExecutor(16) as pool:
            contracts = tuple(pool.map(lambda number: contract(number, assets), range(count)))
            alone = tuple(
                pool.map(
                    lambda number: contract(
                        number, {n: _deposit(broker, *parties[n], number) for n in HOSPITALS}
                    ),
                    range(count, count + apart),
                )
            )
    program = recipe.program_digest()
    return Prepared(contracts, alone, {**measurements, "program": program})


def _installation(key: SigningKey) -> str:
    from cenacle.attestation.simulated import InstallationKey  # noqa: PLC0415

    return InstallationKey(key).measurement


def _now() -> str:
    return format_time(datetime.now(UTC) - timedelta(minutes=1))


_Keys = tuple[Party, SigningKey, HpkePrivateKey]


def _parties(broker: Broker) -> dict[str, _Keys]:
    token = broker.owner_token()
    found: dict[str, _Keys] = {}
    owner = HOSPITALS[0]
    for name in (*HOSPITALS, "clinic"):
        signing, hpke = SigningKey.generate(), HpkePrivateKey.generate()
        party = Party(
            name=name,
            signing_key=b64(signing.verify_key.raw),
            hpke_key=b64(hpke.public_key.raw),
            created=_now(),
        )
        assert token is not None
        broker.register(Registration(party=Envelope.sign(party, signing).to_fields(), token=token))
        found[name] = (party, signing, hpke)
        token = _invitation(broker, owner, found[owner][1])
    return found


def _invitation(broker: Broker, owner: str, key: SigningKey) -> str:
    from cenacle.broker.messages import PartyRequest  # noqa: PLC0415

    request = PartyRequest(
        broker=broker.identity.digest,
        party=owner,
        action="invite",
        issued=format_time(datetime.now(UTC)),
        nonce=b64(os.urandom(16)),
    )
    return broker.invite(Envelope.sign(request, key)).token


def _deposit(
    broker: Broker, owner: Party, signing: SigningKey, _: HpkePrivateKey, number: int | None = None
) -> str:
    digest = _measured(owner.name)
    asset = Asset.from_fields(
        {
            "name": f"{owner.name}-records" + ("" if number is None else f"-{number}"),
            "owner": owner.name,
            "owner_digest": owner.digest,
            "type": "dataset",
            "content": "table",
            "container": {"header": digest, "digest": digest, "size": 9, "plaintext_bytes": 8},
            "layout": _layout(),
            "broker": broker.identity.digest,
            "terms": {
                "protection": "simulated",
                "recipes": ["mlp", "logistic"],
                "privacy": "unbounded",
                "recipients": ["clinic"],
                "outputs": ["model", "metrics"],
                "purposes": [PURPOSE],
                "uses": 1_000_000,
                "expires": _EXPIRES,
            },
            "created": _now(),
        }
    )
    with SecretBytes.random(32) as key:
        wrapped = broker.identity.hpke_public.seal(key.view(), *asset.wrapping_context())
    deposit = AssetDeposit(
        asset=asset.digest, broker=broker.identity.digest, wrapped_key=b64(wrapped)
    )
    upload = AssetUpload(
        manifest=Envelope.sign(asset, signing).to_fields(),
        deposit=Envelope.sign(deposit, signing).to_fields(),
    )
    return broker.deposit(upload).digest


@contextlib.contextmanager
def postgres() -> Iterator[str | None]:
    """The URL of a new database on a server of our own, or None where there is no PostgreSQL.

    The server's data lie in the temporary folder, durable as in production, without TCP.
    """
    programs = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3])
    )
    found = shutil.which("initdb") or (programs[-1] if programs else None)
    if found is None:
        yield None
        return
    binaries = Path(found).resolve().parent
    folder = Path(tempfile.mkdtemp(prefix="cenacle-pg-"))
    user = []
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        name = "postgres" if _has_user("postgres") else "nobody"
        shutil.chown(folder, name)
        user = ["setpriv", f"--reuid={name}", "--regid=nogroup", "--clear-groups"]
    data = str(folder / "data")
    control = [*user, str(binaries / "pg_ctl"), "-D", data, "-w", "-l", str(folder / "log")]
    options = f"-c listen_addresses='' -c unix_socket_directories={folder}"
    quiet: dict[str, Any] = {"check": True, "stdout": subprocess.DEVNULL, "cwd": "/"}
    try:
        initdb = [str(binaries / "initdb"), "-D", data, "-A", "trust", "-U", "cenacle"]
        subprocess.run([*user, *initdb, "-E", "UTF8", "--no-locale"], **quiet)
        subprocess.run([*control, "-o", options, "start"], **quiet)
        try:
            yield f"postgresql://cenacle@/postgres?host={folder}"
        finally:
            subprocess.run([*control, "-m", "fast", "stop"], **quiet)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _has_user(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True
