"""Offload schemes, one a file. Importing this package registers all of them."""

from cenacle.offload.schemes.base import SCHEMES, Gradients, Needs, Scheme, Site, make_scheme
from cenacle.offload.schemes.enclave import Enclave
from cenacle.offload.schemes.measured import Measured

__all__ = [
    "SCHEMES",
    "Enclave",
    "Gradients",
    "Measured",
    "Needs",
    "Scheme",
    "Site",
    "make_scheme",
]
