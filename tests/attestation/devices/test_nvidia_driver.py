"""The driver library's exchange, recorded, and the bindings below it."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from cenacle.attestation.nvidia_driver import (
    DriverState,
    NvidiaAttester,
    NvmlLibrary,
    gpu_attesters,
)
from cenacle.errors import UnavailableError

NOW = datetime(2027, 2, 1, 10, 0, 0, tzinfo=UTC)
BOUND = bytes(range(64))


class NvmlFailure(Exception):
    """Stands for ``pynvml.NVMLError``."""


class Nvml:
    """The bindings' functions, as `nvidia-ml-py` 13 has them, over test GPUs."""

    NVMLError = NvmlFailure

    def __init__(self, *gpus: Any) -> None:
        self.gpus = gpus
        self.feature, self.devtools, self.environment, self.multi = 1, 0, 2, 0
        self.status = 0
        self.calls: list[str] = []

    def nvmlInit(self) -> None:
        self.calls.append("init")

    def nvmlShutdown(self) -> None:
        self.calls.append("shutdown")

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:
        if index >= len(self.gpus):
            raise NvmlFailure("Not Found")
        return self.gpus[index]

    def nvmlSystemGetConfComputeState(self) -> Any:
        return SimpleNamespace(
            ccFeature=self.feature, devToolsMode=self.devtools, environment=self.environment
        )

    def c_nvmlSystemConfComputeSettings_v1_t(self) -> Any:
        return SimpleNamespace(multiGpuMode=0)

    @staticmethod
    def byref(settings: Any) -> Any:
        return settings

    def nvmlSystemGetConfComputeSettings(self, settings: Any) -> int:
        settings.multiGpuMode = self.multi
        return self.status

    def nvmlDeviceGetConfComputeGpuAttestationReport(self, device: Any, nonce: bytes) -> Any:
        self.calls.append("report")
        report = device.report(nonce)
        room = list(report) + [0] * (0x2000 - len(report))
        return SimpleNamespace(attestationReportSize=len(report), attestationReport=room)

    def nvmlDeviceGetConfComputeGpuCertificate(self, device: Any) -> Any:
        chain = device.pem()
        room = list(chain) + [0] * (0x1400 - len(chain))
        return SimpleNamespace(attestationCertChainSize=len(chain), attestationCertChain=room)


def test_exchange(gpu: Any, make_gpu: Any) -> None:
    nvml = Nvml(make_gpu(serial="1"), gpu)
    library = NvmlLibrary(nvml)
    assert library.count() == 2
    body = NvidiaAttester(1, library).collect(BOUND, NOW)
    assert body == gpu.body(nonce=gpu.verifier().part_binding(BOUND))
    assert nvml.calls.count("init") == nvml.calls.count("shutdown") == 4


def test_all_gpus(gpu: Any, make_gpu: Any) -> None:
    gpus = [gpu, make_gpu(serial="2")]
    attesters = gpu_attesters(NvmlLibrary(Nvml(*gpus)))
    nonce = gpu.verifier().part_binding(BOUND)
    assert [a.collect(BOUND, NOW) for a in attesters] == [g.body(nonce=nonce) for g in gpus]
    with pytest.raises(UnavailableError, match="has no GPU"):
        gpu_attesters(NvmlLibrary(Nvml()))


def test_alone_it_makes_no_evidence(gpu: Any) -> None:
    with pytest.raises(UnavailableError, match="alone does not show"):
        NvidiaAttester(0, NvmlLibrary(Nvml(gpu))).attest(BOUND, {}, (), NOW)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"feature": 0}, "confidential computing off"),
        ({"feature": 0, "multi": 1, "status": 3}, "confidential computing off"),
        ({"devtools": 1}, "development mode"),
        ({"environment": 1}, "no production environment"),
        ({"environment": 0}, "no production environment"),
    ],
)
def test_modes_that_protect_nothing(gpu: Any, change: dict[str, int], found: str) -> None:
    nvml = Nvml(gpu)
    vars(nvml).update(change)
    with pytest.raises(UnavailableError, match=f"does not protect.*{found}"):
        NvidiaAttester(0, NvmlLibrary(nvml)).collect(BOUND, NOW)
    assert "report" not in nvml.calls


def test_protected_pcie_counts_as_protected(gpu: Any) -> None:
    nvml = Nvml(gpu)
    nvml.feature, nvml.multi = 0, 1
    assert NvmlLibrary(nvml).state() == DriverState(True, False, True)


def test_bindings_without_the_newer_call(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Nvml, "nvmlSystemGetConfComputeSettings")
    monkeypatch.delattr(Nvml, "c_nvmlSystemConfComputeSettings_v1_t")
    assert NvmlLibrary(Nvml(gpu)).state() == DriverState(True, False, True)


def test_no_such_gpu(gpu: Any) -> None:
    nvml = Nvml(gpu)
    with pytest.raises(UnavailableError, match="Not Found"):
        NvidiaAttester(1, NvmlLibrary(nvml)).collect(BOUND, NOW)
    assert nvml.calls[-1] == "shutdown"


def test_the_driver_is_not_loaded(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: Nvml) -> None:
        raise NvmlFailure("Driver Not Loaded")

    monkeypatch.setattr(Nvml, "nvmlInit", missing)
    with pytest.raises(UnavailableError, match="Driver Not Loaded"):
        NvmlLibrary(Nvml(gpu)).count()


def test_a_chain_that_does_not_parse(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "pem", lambda: b"nothing")
    with pytest.raises(UnavailableError, match="no certificate chain"):
        NvidiaAttester(0, NvmlLibrary(Nvml(gpu))).collect(BOUND, NOW)


def test_bindings_are_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(UnavailableError, match=r"not installed.*cenacle\[nvidia\]"):
        NvmlLibrary().count()
