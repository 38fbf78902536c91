"""Offload schemes, one a file. Importing this package registers all of them."""

from cenacle.offload.schemes.base import SCHEMES, Gradients, Needs, Scheme, Site, make_scheme
from cenacle.offload.schemes.enclave import Enclave
from cenacle.offload.schemes.lowrank import LowRank
from cenacle.offload.schemes.masked import Masked
from cenacle.offload.schemes.masked_training import MaskedTraining
from cenacle.offload.schemes.measured import Measured
from cenacle.offload.schemes.permuted import Permuted

__all__ = [
    "SCHEMES",
    "Enclave",
    "Gradients",
    "LowRank",
    "Masked",
    "MaskedTraining",
    "Measured",
    "Needs",
    "Permuted",
    "Scheme",
    "Site",
    "make_scheme",
]
