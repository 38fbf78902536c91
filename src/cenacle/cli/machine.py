"""Enclaves in measured virtual machines, as commands see them: what one would show."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cenacle.errors import InputError

if TYPE_CHECKING:
    from cenacle.enclave.launcher import Launcher
    from cenacle.enclave.sandbox import SandboxPlan

__all__ = ["EnclaveOption", "ImageOption", "Machine", "machine_reference", "prepare_machine"]

EnclaveOption = Annotated[
    Literal["process", "vm"],
    typer.Option("--enclave", help="process: a sandboxed process; vm: a measured virtual machine."),
]
ImageOption = Annotated[
    Path | None,
    typer.Option("--image", help="Image of the virtual machine; default: `cenacle image build`'s."),
]


class Machine:
    """One image on this host: its launcher, and the sandbox inside.

    Args:
        image: the image's folder, or ``None`` for the default one.
    """

    def __init__(self, image: Path | None) -> None:
        from cenacle.enclave.vm.launcher import VmLauncher
        from cenacle.enclave.vm.manifest import ImageManifest

        made = VmLauncher(image)
        self.image = made.image
        self.launcher: Launcher = made
        self.manifest = ImageManifest.load(self.image)

    def plan(self, layers: Sequence[str] | None, *, serving: bool = False) -> SandboxPlan:
        """The sandbox of an enclave inside; ``serving`` if it answers queries."""
        from cenacle.enclave.vm.guest_plan import guest_plan

        return guest_plan(self.manifest, layers, platform=True, serving=serving)


def prepare_machine() -> tuple[Path, Path]:
    """The default image's folder, and the certificate of the authority of its software TPM.

    Raises:
        InputError: no image was built.
    """
    from cenacle.enclave.vm.launcher import default_tpm
    from cenacle.enclave.vm.tpm import TpmIdentity

    image = Machine(None).image
    identity = TpmIdentity(default_tpm())
    identity.prepare()
    return image, identity.authority


def machine_reference(
    image: Path | None, layers: Sequence[str] | None, *, serving: bool = False
) -> dict[str, Any]:
    """Reference values of a virtual machine on this host, as a contract's ``enclave`` field.

    All but the TPM's name is computed from the image and the firmware; nothing is booted.

    Raises:
        UnavailableError: a program for the virtual machine or its TPM is missing.
        InputError: there is no image, or its firmware's layout is not known.
    """
    from cenacle.cli.image_measure import measure_image

    machine = Machine(image)
    plan = machine.plan(layers, serving=serving)
    measured = measure_image(machine.image, None, None)
    if measured["missing"]:
        raise InputError(
            "this firmware's first register cannot be computed",
            found=", ".join(measured["missing"]),
            expected="Debian's OVMF",
            remedy="boot the image once, run `cenacle image measure --event-log LOG`, and write "
            "the values into the job",
        )
    keys, root = _endorsement()
    return {
        "reference": {"ima": {**measured["reference"], "ek": keys, "sandbox": [plan.digest]}},
        "policy": {"ima": {"roots": [root]}},
        "layers": list(plan.layers),
    }


def _endorsement() -> tuple[list[str], str]:
    """Digests of the keys of this host's software TPMs and of the root that vouches for it."""
    from cenacle.attestation.tpm_endorsement import certificate_digest
    from cenacle.cli.trust import read_certificates
    from cenacle.enclave.vm.launcher import default_tpm
    from cenacle.enclave.vm.tpm import TpmIdentity

    identity = TpmIdentity(default_tpm())
    identity.prepare()
    (root,) = read_certificates([identity.authority])
    return list(identity.endorsement_keys()), certificate_digest(root)
