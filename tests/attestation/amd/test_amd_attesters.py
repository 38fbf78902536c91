"""Attesters: a kernel's answers and a software TPM's, judged by the verifiers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cenacle.attestation.az_snp_vtpm import AzSnpVtpmVerifier
from cenacle.attestation.az_snp_vtpm_attester import AzSnpVtpmAttester
from cenacle.attestation.configfs_tsm import TsmDirectory, TsmReporter
from cenacle.attestation.snp import SnpVerifier, kds_url
from cenacle.attestation.snp_attester import SnpAttester
from cenacle.attestation.snp_report import SnpReport
from cenacle.documents.base import unb64
from cenacle.errors import EvidenceError, InputError, UnavailableError
from tests.support.swtpm import Manufacturer, require_swtpm, run_swtpm

REPORT_DATA = bytes(range(64))
HCL_INDEX, AK_HANDLE = 0x01400001, 0x81000003


class Kernel(TsmDirectory):
    """configfs-tsm with a guest behind it."""

    def __init__(
        self, amd: Any, guest: Any, table: bytes, provider: bytes = b"sev_guest\n"
    ) -> None:
        super().__init__(Path("/nowhere"))
        self.amd, self.guest, self.table, self.provider = amd, guest, table, provider
        self.wrote: dict[str, bytes] = {}

    @property
    def available(self) -> bool:
        return True

    def make(self, name: str) -> None:
        self.wrote = {}

    def remove(self, name: str) -> None:
        pass

    def write(self, name: str, attribute: str, data: bytes) -> None:
        self.wrote[attribute] = data

    def read(self, name: str, attribute: str) -> bytes:
        if attribute == "outblob":
            self.guest.report_data = self.wrote["inblob"]
            return self.guest.report()  # type: ignore[no-any-return]
        generation = f"{len(self.wrote)}\n".encode()
        answers = {"provider": self.provider, "generation": generation, "auxblob": self.table}
        return answers[attribute]


def _table(amd: Any, guest: Any) -> bytes:
    roots = amd.roots()[guest.product]
    return amd.make_table(  # type: ignore[no-any-return]
        {"ARK": roots.ark, "other": b"platform", "ASK": roots.ask, guest.signer: guest.leaf()}
    )


@pytest.mark.parametrize("product", ["Milan", "Genoa", "Turin"])
@pytest.mark.parametrize("version", [2, 3, 5])
def test_a_guest_attests_with_the_hosts_table(
    amd: Any, verifier: SnpVerifier, product: str, version: int
) -> None:
    guest = amd.Guest(product=product, version=version)
    attester = SnpAttester(TsmReporter(Kernel(amd, guest, _table(amd, guest))))
    evidence = attester.attest(REPORT_DATA, {"package": "sha256:" + "00" * 32}, ("s",), amd.NOW)
    claims = verifier.authenticate(evidence, REPORT_DATA, amd.NOW)
    assert set(claims.measurements) == {"launch", "package"}
    assert claims.layers == ("s",)
    assert len(evidence.body["certificates"]) == 3
    with pytest.raises(EvidenceError, match="bound to another nonce"):
        verifier.authenticate(evidence, REPORT_DATA[::-1], amd.NOW)


def test_a_guest_attests_with_fetched_certificates(amd: Any, verifier: SnpVerifier) -> None:
    guest = amd.Guest()
    attester = SnpAttester(TsmReporter(Kernel(amd, guest, b"")), guest.leaf(), vmpl=0)
    evidence = attester.attest(REPORT_DATA, {}, (), amd.NOW)
    assert verifier.authenticate(evidence, REPORT_DATA, amd.NOW).measurements


def test_a_provider_with_its_own_key_signs_for_many_chips(amd: Any, verifier: SnpVerifier) -> None:
    guest = amd.Guest(signer="VLEK")
    table = amd.make_table({"VLEK": guest.leaf(), "ASK": amd.roots()["Milan"].asvk})
    attester = SnpAttester(TsmReporter(Kernel(amd, guest, table)))
    evidence = attester.attest(REPORT_DATA, {}, (), amd.NOW)
    assert verifier.authenticate(evidence, REPORT_DATA, amd.NOW).properties["signer"] == "VLEK"


def test_where_to_fetch_a_missing_certificate_is_said(amd: Any) -> None:
    guest = amd.Guest(product="Turin")
    url = (
        "https://kdsintf.amd.com/vcek/v1/Turin/0102030405060708"
        "?fmcSPL=03&blSPL=05&teeSPL=02&snpSPL=09&ucodeSPL=71"
    )
    assert kds_url(SnpReport.parse(guest.report())) == url
    with pytest.raises(UnavailableError, match="no certificate of the VCEK") as caught:
        SnpAttester(TsmReporter(Kernel(amd, guest, b""))).attest(REPORT_DATA, {}, (), amd.NOW)
    assert url in caught.value.diagnostics()


@pytest.mark.parametrize(
    "change", [{"version": 2}, {"signer": "VLEK"}, {"chip_id": b""}, {"put": {0x188: b"\x17"}}]
)
def test_no_place_is_named_where_the_report_does_not_tell(amd: Any, change: dict[str, Any]) -> None:
    assert kds_url(SnpReport.parse(amd.Guest(**change).report())) is None


def test_milans_place(amd: Any) -> None:
    url = kds_url(SnpReport.parse(amd.Guest().report()))
    assert url is not None
    assert url.startswith(
        f"https://kdsintf.amd.com/vcek/v1/Milan/{amd.hwid('Milan').hex()}?blSPL=04&"
    )


@pytest.mark.parametrize(
    ("change", "provider", "reason"),
    [
        ({}, b"tdx_guest\n", "another kind; found tdx_guest"),
        ({"put": {0x50: bytes(64)}}, b"sev_guest\n", "for other report data"),
        ({"version": 9}, b"sev_guest\n", "no report that can be used"),
    ],
)
def test_another_answer_is_no_evidence(
    amd: Any, change: dict[str, Any], provider: bytes, reason: str
) -> None:
    guest = amd.Guest(**change)
    attester = SnpAttester(TsmReporter(Kernel(amd, guest, b"", provider)))
    with pytest.raises(UnavailableError, match=reason):
        attester.attest(REPORT_DATA, {}, (), amd.NOW)


# Azure: the vTPM is a software TPM with the paravisor's index and key put into it.


@contextmanager
def _vtpm(folder: Path) -> Iterator[Any]:
    state = folder / "state"
    state.mkdir()
    with run_swtpm(Manufacturer(folder), state) as tpm:
        yield tpm.tcti


def _install(amd: Any, tcti: str, guest: Any) -> None:
    """Make the attestation key, and a report that names it, where the paravisor has them."""
    import tpm2_pytss as tss  # noqa: PLC0415

    with tss.ESAPI(tcti) as esapi:
        attributes = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda|restricted|sign"
        template = tss.TPM2B_PUBLIC.parse("rsa2048:rsassa-sha256:null", attributes)
        handle, public, *_ = esapi.create_primary(None, template)
        esapi.evict_control(tss.ESYS_TR.OWNER, handle, AK_HANDLE)
        esapi.flush_context(handle)
        modulus = bytes(public.publicArea.unique.rsa)
        vm = amd.AzureVm(guest=guest)
        vm.runtime["keys"] = [amd.jwk(amd.rsa_key("ak"), n=amd.b64url(modulus))]
        hcl = amd.make_hcl_report(vm.report(), vm.runtime_data())
        size = tss.TPM2B_NV_PUBLIC(
            nvPublic=tss.TPMS_NV_PUBLIC(
                nvIndex=HCL_INDEX,
                nameAlg=tss.TPM2_ALG.SHA256,
                attributes=tss.TPMA_NV.OWNERWRITE | tss.TPMA_NV.OWNERREAD,
                dataSize=len(hcl),
            )
        )
        index = esapi.nv_define_space(None, size)
        for at in range(0, len(hcl), 512):
            esapi.nv_write(index, hcl[at : at + 512], at, auth_handle=tss.ESYS_TR.OWNER)


@pytest.mark.processes
def test_an_azure_vm_attests_through_its_vtpm(amd: Any, tmp_path: Path) -> None:
    require_swtpm()
    azure, guest = AzSnpVtpmVerifier(amd.roots()), amd.Guest(product="Genoa")
    with _vtpm(tmp_path) as tcti:
        with pytest.raises(UnavailableError, match="no report of Azure's paravisor"):
            AzSnpVtpmAttester(tcti, guest.leaf()).attest(REPORT_DATA, {}, (), amd.NOW)
        _install(amd, tcti, guest)
        with pytest.raises(UnavailableError, match="no certificate of the VCEK") as caught:
            AzSnpVtpmAttester(tcti).attest(REPORT_DATA, {}, (), amd.NOW)
        assert "https://kdsintf.amd.com/vcek/v1/Genoa/" in caught.value.diagnostics()
        for registers in ((0, 7), tuple(range(24))):
            attester = AzSnpVtpmAttester(tcti, guest.leaf(), registers)
            evidence = attester.attest(REPORT_DATA, {}, (), amd.NOW)
            claims = azure.authenticate(evidence, REPORT_DATA, amd.NOW)
            assert set(claims.measurements) == {"launch", *(f"pcr{n}" for n in registers)}
            assert unb64(evidence.body["runtime_data"])
            with pytest.raises(EvidenceError, match="bound to another nonce"):
                azure.authenticate(evidence, REPORT_DATA[::-1], amd.NOW)


@pytest.mark.parametrize("registers", [(), (24,), (-1, 3)])
def test_registers_that_a_vtpm_lacks_are_refused(registers: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="cannot vouch"):
        AzSnpVtpmAttester(registers=registers)


def test_no_tpm_is_said_so(amd: Any) -> None:
    pytest.importorskip("tpm2_pytss", reason="pip install cenacle[tpm]")
    with pytest.raises(UnavailableError):
        AzSnpVtpmAttester("device:/dev/null").attest(REPORT_DATA, {}, (), amd.NOW)
