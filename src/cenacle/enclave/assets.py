"""The sealed files of a job, checked without keys; see ``readers`` for what opens them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cenacle.documents.asset import Asset
from cenacle.errors import CenacleError, InputError, SealError
from cenacle.sealing import verify_digest

__all__ = ["asset_path", "check_files"]


def asset_path(paths: Mapping[str, Path], index: int) -> Path:
    """Where the launcher put the contract's ``index``-th asset (mount ``asset-N``)."""
    path = paths.get(f"asset-{index}")
    if path is None:
        raise InputError("the launcher handed over too few assets", found=f"no asset-{index}")
    return path


def check_files(assets: Mapping[str, Asset], paths: Mapping[str, Path]) -> None:
    """Compare every sealed file with its manifest, before a key is asked for or a use spent.

    Raises:
        SealError: a file is not, byte for byte, the one that its owner's manifest pins.
    """
    for index, (alias, asset) in enumerate(assets.items()):
        try:
            verify_digest(asset_path(paths, index), asset.container.digest)
        except CenacleError as error:
            raise SealError(
                f"the sealed file of asset {alias} is not the one in its manifest",
                found=error.found or error.what,
                expected=asset.container.digest,
                remedy=f"get the file again from {asset.owner}, and pass it with --data",
            ) from None
