"""``cenacle broker keys``: a broker's keys sealed to its machine's TPM, and its recovery shares."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from cenacle.cli.output import JsonOption, errors_in_words, finish, line
from cenacle.errors import InputError

if TYPE_CHECKING:
    from cenacle.crypto.shamir import RecoveryShare

__all__ = ["app"]

_MAX_SHARE_FILE: Final = 4096

app = typer.Typer(
    no_args_is_help=True,
    help="Seal a broker's keys to its machine's TPM, and recover them after an update.",
    epilog="Example: cenacle broker keys seal --dir broker --tcti device:/dev/tpmrm0 "
    "--threshold 2 --share a.share --share b.share --share c.share",
)

_Folder = Annotated[Path, typer.Option("--dir", help="The broker's folder.")]
_Tcti = Annotated[
    str | None, typer.Option(help="Where the TPM is, if not where it was when they were sealed.")
]
_Threshold = Annotated[int, typer.Option(help="How many shares recover the keys.")]
_Shares = Annotated[
    list[Path],
    typer.Option("--share", help="File for one recovery share, mode 0600; give one a holder."),
]
_Registers = Annotated[
    str, typer.Option(help="Registers (PCRs of the SHA-256 bank) that must stay as they are.")
]


def _numbers(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and int(part) < 24 for part in parts):
        raise InputError("registers are not given as numbers", found=text[:80], expected="0,4,7")
    return tuple(int(part) for part in parts)


def _check_new(files: Sequence[Path]) -> None:
    if len({file.resolve() for file in files}) != len(files):
        raise InputError("two recovery shares go into one file", expected="a file for each")
    for file in files:
        if os.path.lexists(file) or not file.parent.is_dir():
            raise InputError(
                "a recovery share cannot be written",
                found=str(file),
                expected="a new file in a folder that exists",
            )


def _hand_out(files: Sequence[Path], shares: Sequence[RecoveryShare]) -> None:
    from cenacle.broker.identity import write_private

    for file, share in zip(files, shares, strict=True):
        write_private(file, share.to_text().encode() + b"\n")


def _read(file: Path) -> RecoveryShare:
    from cenacle.crypto.shamir import RecoveryShare
    from cenacle.sealing.disk import disk_errors

    with disk_errors(f"read {file}"), file.open("rb") as opened:
        text = opened.read(_MAX_SHARE_FILE).decode("ascii", "replace")
    return RecoveryShare.from_text(text)


def _tell(files: Sequence[Path], threshold: int) -> None:
    line(f"any {threshold} of these recover them; hand each to its holder, and keep none here:")
    for file in files:
        line(f"  {file}")


@app.command(
    epilog="Example: cenacle broker keys seal --dir broker --tcti device:/dev/tpmrm0 "
    "--threshold 2 --share a.share --share b.share --share c.share"
)
def seal(
    folder: _Folder,
    share: _Shares,
    tcti: Annotated[
        str, typer.Option(help="Where the TPM is, e.g. device:/dev/tpmrm0.")
    ] = "device:/dev/tpmrm0",
    registers: _Registers = "0,2,4,7",
    threshold: _Threshold = 2,
    json_: JsonOption = False,
) -> None:
    """Seal a broker's keys to this machine; they are then nowhere in the clear on its disk.

    Do this before parties hand in asset keys: what the disk kept of the old
    file is not wiped. `cenacle broker start` then asks the TPM.
    """
    from cenacle.broker.sealed_keys import seal_keys

    with errors_in_words(json_):
        chosen = _numbers(registers)
        _check_new(share)
        _hand_out(share, seal_keys(folder, tcti, chosen, threshold, len(share)))
        fields = {"shares": [str(file) for file in share], "threshold": threshold}
        finish(fields, json_, lambda: _tell(share, threshold))


@app.command(
    epilog="Example: cenacle broker keys recover a.share c.share --dir broker",
)
def recover(
    shares: Annotated[list[Path], typer.Argument(help="Files of recovery shares.")],
    folder: _Folder,
    tcti: _Tcti = None,
    registers: Annotated[
        str | None, typer.Option(help="Registers that must stay as they are; default: as before.")
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Recover a broker's keys after its machine was updated, and seal them to it as it is now.

    The shares stay valid. Look at what changed first: whoever gives a share
    says that this machine may have the keys.
    """
    from cenacle.broker.sealed_keys import recover_keys

    with errors_in_words(json_):
        chosen = None if registers is None else _numbers(registers)
        keys = recover_keys(folder, [_read(file) for file in shares], chosen, tcti)
        digest = keys.identity.digest
        finish({"digest": digest}, json_, lambda: line(f"recovered and sealed: {digest}"))


@app.command(
    epilog="Example: cenacle broker keys share --dir broker --threshold 2 --share a.share "
    "--share b.share"
)
def share(
    folder: _Folder,
    share: _Shares,
    threshold: _Threshold = 2,
    tcti: _Tcti = None,
    json_: JsonOption = False,
) -> None:
    """Make new recovery shares, on the machine that the keys are sealed to.

    Older shares stay valid among themselves.
    """
    from cenacle.broker.sealed_keys import new_shares

    with errors_in_words(json_):
        _check_new(share)
        _hand_out(share, new_shares(folder, threshold, len(share), tcti))
        fields = {"shares": [str(file) for file in share], "threshold": threshold}
        finish(fields, json_, lambda: _tell(share, threshold))
