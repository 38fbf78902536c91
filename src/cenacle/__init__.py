"""Cenacle: confidential machine learning between mutually distrusting parties."""

__version__ = "0.1.0"
