"""GPU attestation reports through NVIDIA's driver library (NVML).

The bindings are NVIDIA's own `nvidia-ml-py` (module ``pynvml``), an optional dependency. A
report does not say whether the driver runs in its development mode, in which a GPU signs reports
and protects nothing; the library does, so evidence is refused here and the code that refuses it
is measured with the agent.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from typing import Any, Final, NamedTuple, Protocol, TypeVar

from cenacle.attestation.accelerator_evidence import AcceleratorAttester
from cenacle.attestation.nvidia import NvidiaVerifier
from cenacle.errors import InputError, UnavailableError

__all__ = ["DriverLibrary", "DriverState", "NvidiaAttester", "NvmlLibrary", "gpu_attesters"]

T = TypeVar("T")

_PRODUCTION: Final = 2  # NVML_CC_SYSTEM_ENVIRONMENT_PROD
_PROTECTED_PCIE: Final = 1  # NVML_CC_SYSTEM_MULTIGPU_PROTECTED_PCIE


class DriverState(NamedTuple):
    """How the driver runs (nvmlSystemGetConfComputeSettings).

    Attributes:
        protected: confidential computing, or Protected PCIe, is on.
        development: the development mode is on.
        production: hardware and driver are no simulation.
    """

    protected: bool
    development: bool
    production: bool


class DriverLibrary(Protocol):
    """What is needed of the driver library; each raises :class:`UnavailableError`."""

    def count(self) -> int:
        """How many GPUs there are."""
        ...

    def state(self) -> DriverState: ...

    def report(self, index: int, nonce: bytes) -> bytes:
        """An attestation report of one GPU for a nonce of 32 bytes."""
        ...

    def certificates(self, index: int) -> bytes:
        """The GPU's attestation certificate chain in PEM, its own first."""
        ...


class NvmlLibrary:
    """NVML, initialised for each call and shut down after it.

    Args:
        module: ``pynvml``, which a test replaces; imported when it is needed otherwise.
    """

    def __init__(self, module: Any = None) -> None:
        self._module = module

    def _call(self, use: Callable[[Any], T]) -> T:
        try:
            nvml = self._module or importlib.import_module("pynvml")
        except ImportError:
            raise UnavailableError(
                "the bindings of NVIDIA's driver library are not installed",
                expected="nvidia-ml-py",
                remedy="install cenacle[nvidia]",
            ) from None
        try:
            nvml.nvmlInit()
            try:
                return use(nvml)
            finally:
                with suppress(nvml.NVMLError):
                    nvml.nvmlShutdown()
        except nvml.NVMLError as error:
            raise UnavailableError(
                "NVIDIA's driver library gives no attestation report",
                found=str(error)[:120],
                remedy="run on a GPU in confidential-computing mode, with NVIDIA's driver loaded",
            ) from None

    def count(self) -> int:
        return self._call(lambda nvml: int(nvml.nvmlDeviceGetCount()))

    def state(self) -> DriverState:
        def read(nvml: Any) -> DriverState:
            old = nvml.nvmlSystemGetConfComputeState()
            protected = bool(old.ccFeature)
            with suppress(nvml.NVMLError, AttributeError):  # old drivers and bindings lack it
                settings = nvml.c_nvmlSystemConfComputeSettings_v1_t()
                # This binding leaves the status to the caller.
                if nvml.nvmlSystemGetConfComputeSettings(nvml.byref(settings)) == 0:
                    protected |= settings.multiGpuMode == _PROTECTED_PCIE
            return DriverState(protected, bool(old.devToolsMode), old.environment == _PRODUCTION)

        return self._call(read)

    def report(self, index: int, nonce: bytes) -> bytes:
        def read(nvml: Any) -> bytes:
            device = nvml.nvmlDeviceGetHandleByIndex(index)
            made = nvml.nvmlDeviceGetConfComputeGpuAttestationReport(device, nonce)
            return bytes(made.attestationReport[: made.attestationReportSize])

        return self._call(read)

    def certificates(self, index: int) -> bytes:
        def read(nvml: Any) -> bytes:
            device = nvml.nvmlDeviceGetHandleByIndex(index)
            made = nvml.nvmlDeviceGetConfComputeGpuCertificate(device)
            return bytes(made.attestationCertChain[: made.attestationCertChainSize])

        return self._call(read)


class NvidiaAttester(AcceleratorAttester):
    """Asks one GPU for a report.

    Args:
        index: which GPU, counted from 0 as the driver does.
    """

    kind = "nvidia"

    def __init__(self, index: int = 0, library: DriverLibrary | None = None) -> None:
        self._index = index
        self._library = NvmlLibrary() if library is None else library

    def collect(self, bound: bytes, now: datetime) -> dict[str, Any]:
        del now  # a GPU has no clock that it signs
        state = self._library.state()
        if not state.protected or state.development or not state.production:
            raise UnavailableError(
                "the GPU does not protect what is computed on it",
                found="development mode"
                if state.development
                else "no production environment"
                if state.protected
                else "confidential computing off",
                expected="confidential computing on, development mode off",
                remedy="set the mode with NVIDIA's host tools and restart the machine",
            )
        nonce = NvidiaVerifier().part_binding(bound)
        report = self._library.report(self._index, nonce)
        chain = self._library.certificates(self._index)
        try:
            return NvidiaVerifier.body_of(report, chain)
        except InputError as error:
            raise UnavailableError(
                "NVIDIA's driver library gave no certificate chain", found=error.what
            ) from None


def gpu_attesters(library: DriverLibrary | None = None) -> tuple[NvidiaAttester, ...]:
    """One attester for each GPU that the driver has, in its order.

    Raises:
        UnavailableError: it has none, or cannot be asked.
    """
    asked = NvmlLibrary() if library is None else library
    count = asked.count()
    if count == 0:
        raise UnavailableError("NVIDIA's driver has no GPU", found="0", expected="1 or more")
    return tuple(NvidiaAttester(index, asked) for index in range(count))
