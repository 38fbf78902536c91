"""``cenacle seal``: encrypt data, a model or a program, state its terms, hand over its key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cenacle.broker.client import BrokerClient
from cenacle.cli.home import Home, PartyKeys, write_file
from cenacle.cli.options import AsOption, BrokerOption, OutOption
from cenacle.cli.output import JsonOption, errors_in_words, finish, line, progress_bar, say
from cenacle.cli.trust import user_verifiers
from cenacle.crypto import SecretBytes
from cenacle.documents.asset import Asset
from cenacle.documents.base import format_time
from cenacle.documents.dsse import Envelope
from cenacle.documents.terms import Terms
from cenacle.errors import ConflictError

if TYPE_CHECKING:
    from cenacle.sealing import SealedInfo

__all__ = ["SealedAsset", "manifest_path", "seal", "seal_asset"]


def manifest_path(sealed: Path) -> Path:
    """Where the signed manifest of a sealed file lies: beside it."""
    return sealed.with_name(sealed.name + ".asset.json")


def _require_new(target: Path) -> None:
    """A sealed file that was handed in cannot be made again: contracts name its very bytes."""
    if manifest_path(target).exists():
        raise ConflictError(
            "an asset is sealed under this name already",
            found=str(manifest_path(target)),
            expected="a name without a manifest",
            remedy="choose another --out, or remove both files if no contract uses that asset",
        )


@dataclass(frozen=True)
class SealedAsset:
    """A sealed file whose key is with the broker, and its signed manifest."""

    asset: Asset
    info: SealedInfo
    sealed: Path
    manifest: Path


def seal_asset(
    keys: PartyKeys,
    client: BrokerClient,
    source: Path,
    target: Path,
    terms: Terms,
    *,
    name: str | None = None,
    type_: Literal["dataset", "model"] | None = None,
    kind: str | None = None,
    replaces: str | None = None,
    allow_missing: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> SealedAsset:
    """Seal a file or a program's directory under a fresh key and hand the key to the broker.

    Args:
        source: what :func:`cenacle.sealing.seal_path` takes.
        target: the sealed file; its manifest appears beside it.
        name: of the asset; by default the file's.
        kind: what the content must become; ``file`` seals the bytes as they are.

    Raises:
        ConflictError: an asset is sealed under that name already.
        InputError, DataError: the source cannot be sealed.
        CenacleError: the broker did not take the key; the sealed file is removed again.
    """
    from cenacle.sealing import seal_path

    _require_new(target)
    with SecretBytes.random(32) as key:
        info = seal_path(
            source, target, key, kind=kind, allow_missing=allow_missing, progress=progress
        )
        program = source.is_dir()
        try:
            asset = Asset.from_fields(
                {
                    "name": name or _as_name(source),
                    "owner": keys.party.name,
                    "owner_digest": keys.party.digest,
                    "type": "program" if program else (type_ or "dataset"),
                    "content": info.kind,
                    "container": {
                        "header": info.header_digest,
                        "digest": info.digest,
                        "size": info.size,
                        "plaintext_bytes": info.plaintext_bytes,
                    },
                    "layout": {} if program else info.schema,
                    "package": info.schema.get("package") if program else None,
                    "broker": client.identity.digest,
                    "terms": terms.to_fields(),
                    "replaces": replaces,
                    "created": format_time(datetime.now(UTC)),
                }
            )
            envelope = Envelope.sign(asset, keys.signing_key)
            client.deposit(envelope, key, keys.signing_key)
        except BaseException:
            target.unlink(missing_ok=True)  # its key is gone: nobody could ever open it
            raise
    manifest = manifest_path(target)
    write_file(manifest, envelope.to_json().encode())
    return SealedAsset(asset, info, target, manifest)


def seal(
    source: Annotated[
        Path,
        typer.Argument(
            help="A table (.csv, .parquet, .arrow), tensors (.npz, .safetensors, IDX, .pt), any "
            "file, or a program's directory."
        ),
    ],
    terms: Annotated[Path, typer.Option(help="Your terms, as YAML.")],
    as_: AsOption,
    type_: Annotated[
        Literal["dataset", "model"] | None,
        typer.Option("--type", help="What it is; a directory is a program."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The asset's name; default: the file's.")] = None,
    out: OutOption = None,
    replaces: Annotated[
        str | None, typer.Option(help="Digest of your asset that this one replaces.")
    ] = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Accept empty cells and NaN in a table.")
    ] = False,
    opaque: Annotated[
        bool,
        typer.Option(
            "--opaque",
            help="Seal the bytes as a file: the public manifest then shows no columns, shapes or "
            "number of rows, and only programs can use it.",
        ),
    ] = False,
    unattested: Annotated[
        bool,
        typer.Option(
            "--unattested",
            help="Hand the key over although the broker does not prove what it runs.",
        ),
    ] = False,
    broker: BrokerOption = "default",
    json_: JsonOption = False,
) -> None:
    """Seal an asset under a fresh key, sign its manifest, and hand the key to the broker.

    The key goes to the pinned broker only, wrapped and bound to this manifest and its terms.
    If reference values were pinned with the broker, it must prove first that it
    runs what they say.
    """
    with errors_in_words(json_):
        stated = Terms.from_yaml(terms.read_bytes())
        target = out or source.with_name(source.name + ".sealed")
        home = Home.default()
        with home.client_as(as_, broker) as (keys, client):
            client.check_identity()
            attested = _require_attested(home, client, unattested=unattested, quiet=json_)
            with progress_bar(f"sealing {source.name}", not json_) as bar:
                sealed = seal_asset(
                    keys,
                    client,
                    source,
                    target,
                    stated,
                    name=name,
                    type_=type_,
                    kind="file" if opaque else None,
                    replaces=replaces,
                    allow_missing=allow_missing,
                    progress=bar.report,
                )
        asset, info, manifest = sealed.asset, sealed.info, sealed.manifest
        fields = {
            "asset": asset.digest,
            "sealed": str(target),
            "manifest": str(manifest),
            "content": info.kind,
            "package": asset.package,
            "bytes": info.size,
            "broker_evidence": attested,
        }
        finish(
            fields,
            json_,
            lambda: line(
                f"sealed {target} ({info.kind}, {info.plaintext_bytes:,} bytes of plaintext)\n"
                f"asset  {asset.digest}\n"
                + (
                    f"package {asset.package}  (owners allow this digest)\n"
                    if asset.package
                    else ""
                )
                + f"its key is with {client.identity.origin} alone, bound to your terms"
            ),
        )


def _require_attested(
    home: Home, client: BrokerClient, *, unattested: bool, quiet: bool
) -> str | None:
    """The kind of evidence that the broker showed; ``None`` if nothing was demanded of it."""
    reference = home.broker_reference(client.identity)
    if unattested or reference is None:
        if not quiet:
            why = "--unattested" if unattested else "no reference values are pinned with it"
            say(f"the broker was not asked what it runs: {why}; see `cenacle broker pin --help`")
        return None
    verifiers = user_verifiers(home.folder, client.identity.verify_key)
    return client.require_attested(reference, verifiers).kind


def _as_name(source: Path) -> str:
    cleaned = "".join(c if c.isascii() and c.isalnum() else "-" for c in source.stem.lower())
    return cleaned.strip("-")[:63].strip("-") or "asset"
