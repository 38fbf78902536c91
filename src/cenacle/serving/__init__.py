"""Inference from an enclave over HTTP: the operator's untrusted side, and clients for both."""
