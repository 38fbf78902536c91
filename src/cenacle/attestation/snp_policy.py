"""What a contract may demand of SEV-SNP evidence beside its measurements, and the verdict.

What weakens a guest is refused unless the policy allows it; what only some processors can do is
demanded where the policy asks for it. A minimum TCB has no safe default: AMD raises it with each
security bulletin, so a policy without one accepts no machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Final, Self

from pydantic import Field, StringConstraints, model_validator

from cenacle.attestation.amd_roots import Product
from cenacle.attestation.claims import Claims
from cenacle.attestation.snp_report import Signer
from cenacle.documents.base import Frozen, JsonObject, Timestamp
from cenacle.documents.clauses import Clause, check
from cenacle.errors import CenacleError

__all__ = [
    "AzSnpVtpmPolicy",
    "GuestPolicy",
    "Mitigations",
    "Platform",
    "Revocations",
    "SnpPolicy",
    "SnpProperties",
    "TcbFloor",
    "judge_az_snp_vtpm",
    "judge_snp",
]

_Svn = Annotated[int, Field(ge=0, le=255)]
_Hex = Annotated[str, StringConstraints(pattern=r"^(?:[0-9a-f]{2})+$")]
_Id = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
_ChipId = Annotated[str, StringConstraints(pattern=r"^(?:[0-9a-f]{16}|[0-9a-f]{128})$")]
_Sha384 = Annotated[str, StringConstraints(pattern=r"^sha384:[0-9a-f]{96}$")]
_VmId = Annotated[str, StringConstraints(pattern=r"^[0-9A-F]{8}(?:-[0-9A-F]{4}){3}-[0-9A-F]{12}$")]

_TCBS: Final = ("reported", "committed", "current", "launch")
_REMEDY_TCB: Final = "have the host's firmware and microcode updated, and start the guest again"
_REMEDY_GUEST: Final = "start the guest with another policy, or allow this in the contract"
_REMEDY_HOST: Final = "use a host that has it, or do not demand it in the contract"


class Mitigations(Frozen):
    """Mitigation vectors (report version 5), as hexadecimal numbers."""

    launch: _Hex
    current: _Hex


class Revocations(Frozen):
    """When the revocation list was made, and until when it is valid."""

    this_update: Timestamp
    next_update: Timestamp


class GuestPolicy(Frozen):
    """What the guest's owner allowed at launch; see :class:`~.snp_report.SnpReport`."""

    smt: bool
    migrate_ma: bool
    debug: bool
    single_socket: bool
    cxl_allow: bool
    mem_aes_256_xts: bool
    rapl_dis: bool
    ciphertext_hiding_dram: bool
    page_swap_disable: bool


class Platform(Frozen):
    """What the machine has switched on."""

    smt_en: bool
    tsme_en: bool
    ecc_en: bool
    rapl_dis: bool
    ciphertext_hiding_dram_en: bool
    alias_check_complete: bool
    tio_en: bool


class SnpProperties(Frozen):
    """The properties of claims from an SNP report.

    Attributes:
        product, product_name: the line of processors, and AMD's name with the stepping.
        chip_id: the chip, in hexadecimal (64 bytes, 8 from Turin on): from the VCEK's
            certificate; with a VLEK, from the report unless the host masks it.
        csp_id: the cloud provider that holds the VLEK.
        guest_policy: what the guest's owner allowed, platform: what the machine has on; by the
            ABI's names.
        tcb: security versions by component, of the ``reported``, ``committed``, ``current`` and
            ``launch`` TCB.
        firmware: ``current`` and ``committed``, as "major.minor.build".
        id_key_digest, author_key_digest: who signed the guest's identity block, if there is one.
    """

    product: Product
    product_name: str
    signer: Signer
    chip_id: _ChipId | None = None
    csp_id: str | None = None
    report_version: int
    guest_svn: int
    guest_abi: str
    guest_policy: GuestPolicy
    vmpl: int
    platform: Platform
    tcb: dict[str, dict[str, _Svn]]
    firmware: dict[str, str]
    cpuid: tuple[int, int, int] | None = None
    family_id: _Id
    image_id: _Id
    report_id: _Hex
    report_id_ma: _Hex
    id_key_digest: _Sha384 | None = None
    author_key_digest: _Sha384 | None = None
    mitigations: Mitigations | None = None
    revocations: Revocations | None = None


class TcbFloor(Frozen):
    """The least security version of each part of the firmware; ``fmc`` from Turin on."""

    fmc: _Svn | None = None
    bootloader: _Svn
    tee: _Svn
    snp: _Svn
    microcode: _Svn


class SnpPolicy(Frozen):
    """What a contract demands of an SNP guest and its machine.

    Attributes:
        minimum_tcb: the floor for each accepted line of processors. Judged against all four TCBs
            of the report: a guest that was launched on old firmware stays suspect.
        allow_smt: another guest or the host may run on the sibling thread.
        allow_migration_agent: a migration agent may move the guest's memory.
        allow_cxl: memory behind CXL, outside the processor's package.
        allow_tio: devices inside the trust boundary (SEV-TIO).
        require_alias_check: the firmware looked for aliased memory (BadRAM, AMD-SB-3015).
        require_single_socket, require_aes_256_xts, require_rapl_disabled,
        require_ciphertext_hiding, require_page_swap_disabled, require_ecc: what newer
            processors and hosts offer. AES-256-XTS, a single socket and page swaps are judged
            by the guest's policy, the rest also holds if the machine has it on.
        vmpls: accepted privilege levels of who asked for the report. Above 0 something more
            privileged, e.g. a paravisor, is in the guest.
        chip_ids: accepted chips; ``None`` accepts every genuine one.
        vlek_csp_ids: cloud providers whose VLEK is accepted; with none, only VCEKs are.
        id_key_digests, author_key_digests: accepted signers of the identity block.
        family_id, image_id, minimum_guest_svn: what the identity block must say. It says
            nothing unless its signer is known, so one of the two lists above must be given.
        required_mitigations: bits that must be set in both mitigation vectors.
        require_crl: the evidence must come with a valid revocation list.
    """

    minimum_tcb: dict[Product, TcbFloor] = Field(default_factory=dict)
    allow_smt: bool = False
    allow_migration_agent: bool = False
    allow_cxl: bool = False
    allow_tio: bool = False
    require_alias_check: bool = True
    require_single_socket: bool = False
    require_aes_256_xts: bool = False
    require_rapl_disabled: bool = False
    require_ciphertext_hiding: bool = False
    require_page_swap_disabled: bool = False
    require_ecc: bool = False
    vmpls: tuple[Annotated[int, Field(ge=0, le=3)], ...] = (0,)
    chip_ids: tuple[_ChipId, ...] | None = None
    vlek_csp_ids: tuple[str, ...] = ()
    id_key_digests: tuple[_Sha384, ...] | None = None
    author_key_digests: tuple[_Sha384, ...] | None = None
    family_id: _Id | None = None
    image_id: _Id | None = None
    minimum_guest_svn: Annotated[int, Field(ge=0, lt=1 << 32)] = 0
    required_mitigations: Annotated[int, Field(ge=0, lt=1 << 53)] = 0
    require_crl: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        for product, floor in self.minimum_tcb.items():
            if (floor.fmc is None) == (product == "Turin"):
                raise ValueError(f"minimum_tcb.{product}: fmc is of Turin, and needed there")
        names_identity = self.family_id or self.image_id or self.minimum_guest_svn
        if names_identity and self.id_key_digests is None and self.author_key_digests is None:
            raise ValueError(
                "family_id, image_id and minimum_guest_svn need id_key_digests or "
                "author_key_digests: anybody can sign an identity block"
            )
        return self


class AzSnpVtpmPolicy(SnpPolicy):
    """What a contract demands of a confidential VM in Azure.

    Attributes:
        require_secure_boot: the virtual firmware checks signatures of what it boots.
        allow_console: the serial console is connected.
        vm_ids: accepted ``vmUniqueId``; ``None`` accepts every VM.
    """

    require_secure_boot: bool = True
    allow_console: bool = False
    vm_ids: tuple[_VmId, ...] | None = None


def judge_snp(claims: Claims, policy: SnpPolicy) -> list[Clause]:
    """One clause for each demand that the policy makes."""
    return _judge("snp", claims, policy)


def judge_az_snp_vtpm(claims: Claims, policy: AzSnpVtpmPolicy) -> list[Clause]:
    """The demands of :func:`judge_snp`, then what the paravisor says of the VM."""
    clauses = _judge("az-snp-vtpm", claims, policy)
    found = claims.properties.get("vm_configuration")
    vm = found if isinstance(found, dict) else {}
    secure_boot, console = vm.get("secure-boot"), vm.get("console-enabled")
    if policy.require_secure_boot:
        clauses.append(
            _clause(
                "secure boot",
                secure_boot is True,
                secure_boot,
                "on",
                "create the VM with secure boot, or do not demand it in the contract",
            )
        )
    if not policy.allow_console:
        clauses.append(
            _clause(
                "console",
                console is False,
                console,
                "disconnected",
                "disable boot diagnostics and the serial console of the VM, or allow it in the "
                "contract",
            )
        )
    if policy.vm_ids is not None:
        vm_id = vm.get("vmUniqueId")
        clauses.append(
            _clause(
                "VM",
                vm_id in policy.vm_ids,
                vm_id,
                " or ".join(policy.vm_ids) or "none is accepted",
                "use a VM that the contract names",
            )
        )
    return clauses


def _clause(name: str, met: bool, found: object, demanded: object, remedy: str) -> Clause:
    return check("contract", name, met, "not stated" if found is None else found, demanded, remedy)


def _judge(kind: str, claims: Claims, policy: SnpPolicy) -> list[Clause]:
    fields: JsonObject = {
        name: value for name, value in claims.properties.items() if name in _PROPERTY_NAMES
    }
    try:
        shown = SnpProperties.from_fields(fields)
    except CenacleError as error:
        return [
            _clause(
                f"{kind} properties",
                False,
                error.diagnostics(),
                "the properties of an SNP report",
                "verify the evidence with this version of cenacle",
            )
        ]
    clauses = [*_tcb(shown, policy), *_guest(shown, policy), *_identity(shown, policy)]
    return [*clauses, *_machine(shown, policy)]


_PROPERTY_NAMES: Final = frozenset(SnpProperties.model_fields)


def _parts(versions: dict[str, int]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _tcb(shown: SnpProperties, policy: SnpPolicy) -> Iterator[Clause]:
    floor = policy.minimum_tcb.get(shown.product)
    if floor is None:
        yield _clause(
            "minimum TCB",
            False,
            shown.product,
            f"a floor for {', '.join(sorted(policy.minimum_tcb)) or 'each accepted line'}",
            f"state minimum_tcb.{shown.product} in the contract, from AMD's security bulletins",
        )
        return
    least = {name: value for name, value in floor if value is not None}
    for which in _TCBS:
        found = shown.tcb.get(which, {})
        yield _clause(
            f"{which} TCB",
            all(found.get(name, -1) >= version for name, version in least.items()),
            _parts(found),
            f"at least {_parts(least)}",
            _REMEDY_TCB,
        )


def _guest(shown: SnpProperties, policy: SnpPolicy) -> Iterator[Clause]:
    guest, platform = shown.guest_policy, shown.platform
    moves = guest.migrate_ma
    # What the machine has off today cannot come on while the guest runs, unless it moves.
    smt = guest.smt and (platform.smt_en or moves)
    for name, allowed, found in (
        ("SMT", policy.allow_smt, smt),
        ("migration agent", policy.allow_migration_agent, moves),
        ("CXL memory", policy.allow_cxl, guest.cxl_allow),
        ("SEV-TIO", policy.allow_tio, platform.tio_en),
    ):
        if not allowed:
            yield _clause(name, not found, "on" if found else "off", "off", _REMEDY_GUEST)
    for name, required, found in (
        ("alias check", policy.require_alias_check, platform.alias_check_complete),
        ("single socket", policy.require_single_socket, guest.single_socket),
        ("AES-256-XTS", policy.require_aes_256_xts, guest.mem_aes_256_xts),
        (
            "RAPL disabled",
            policy.require_rapl_disabled,
            guest.rapl_dis or (platform.rapl_dis and not moves),
        ),
        (
            "ciphertext hiding",
            policy.require_ciphertext_hiding,
            guest.ciphertext_hiding_dram or (platform.ciphertext_hiding_dram_en and not moves),
        ),
        ("page swaps disabled", policy.require_page_swap_disabled, guest.page_swap_disable),
        ("ECC memory", policy.require_ecc, platform.ecc_en),
    ):
        if required:
            yield _clause(name, found, "yes" if found else "no", "yes", _REMEDY_HOST)
    yield _clause(
        "VMPL",
        shown.vmpl in policy.vmpls,
        shown.vmpl,
        " or ".join(map(str, policy.vmpls)) or "none is accepted",
        "ask for the report at an accepted privilege level",
    )


def _identity(shown: SnpProperties, policy: SnpPolicy) -> Iterator[Clause]:
    for name, accepted, digest in (
        ("ID key", policy.id_key_digests, shown.id_key_digest),
        ("author key", policy.author_key_digests, shown.author_key_digest),
    ):
        if accepted is not None:
            yield _clause(
                name,
                digest in accepted,
                digest,
                " or ".join(accepted) or "none is accepted",
                "launch the guest with an identity block by an accepted key",
            )
    for name, demanded, found in (
        ("family ID", policy.family_id, shown.family_id),
        ("image ID", policy.image_id, shown.image_id),
    ):
        if demanded is not None:
            yield _clause(name, found == demanded, found, demanded, "launch the approved guest")
    if policy.minimum_guest_svn:
        yield _clause(
            "guest SVN",
            shown.guest_svn >= policy.minimum_guest_svn,
            shown.guest_svn,
            f"at least {policy.minimum_guest_svn}",
            "launch a newer version of the guest",
        )


def _machine(shown: SnpProperties, policy: SnpPolicy) -> Iterator[Clause]:
    if shown.signer == "VLEK":
        yield _clause(
            "VLEK",
            shown.csp_id in policy.vlek_csp_ids,
            shown.csp_id,
            " or ".join(policy.vlek_csp_ids) or "a VCEK, the chip's own key",
            "have the report signed by the VCEK, or accept the provider in vlek_csp_ids",
        )
    if policy.chip_ids is not None:
        yield _clause(
            "chip",
            shown.chip_id in policy.chip_ids,
            shown.chip_id or "masked by the host",
            " or ".join(f"{chip[:16]}…" for chip in policy.chip_ids) or "none is accepted",
            "use a machine that the contract names",
        )
    if policy.required_mitigations:
        vectors = shown.mitigations
        least = policy.required_mitigations
        yield _clause(
            "mitigations",
            vectors is not None
            and all(int(v, 16) & least == least for v in (vectors.launch, vectors.current)),
            None if vectors is None else f"launch {vectors.launch}, current {vectors.current}",
            f"bits {least:#x}",
            _REMEDY_TCB,
        )
    if policy.require_crl:
        yield _clause(
            "revocation list",
            shown.revocations is not None,
            "none" if shown.revocations is None else f"valid to {shown.revocations.next_update}",
            "a valid one in the evidence",
            "put AMD's revocation list of this line of processors into the evidence",
        )
