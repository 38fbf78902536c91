"""Media types of the service beside those of the Open Inference Protocol."""

from __future__ import annotations

from typing import Final

__all__ = ["ANSWER_TYPE", "QUERY_TYPE"]

QUERY_TYPE: Final = "application/vnd.cenacle.sealed-query"
ANSWER_TYPE: Final = "application/vnd.cenacle.sealed-answer"
