"""Which operators' domains a graph may use, on the host and in the enclave alike."""

from __future__ import annotations

from typing import Final

__all__ = ["CONTRIBUTED", "DOMAINS"]

# Operators of ONNX Runtime's own domain that its optimizer and its quantizer write. Not taken:
# those that read files (EPContext), call Python (PythonOp), or loop over whole models.
_CONTRIBUTED = """Attention BiasAdd BiasGelu BiasSoftmax DequantizeLinear DynamicQuantizeLSTM
DynamicQuantizeMatMul EmbedLayerNormalization FastGelu FusedConv FusedGemm FusedMatMul
GatherBlockQuantized Gelu GroupNorm GroupQueryAttention MatMulBnb4 MatMulIntegerToFloat
MatMulNBits MultiHeadAttention NhwcConv NhwcFusedConv NhwcMaxPool QAttention
QEmbedLayerNormalization QGemm QLinearAdd QLinearAveragePool QLinearConcat QLinearConv
QLinearGlobalAveragePool QLinearLeakyRelu QLinearMul QLinearReduceMean QLinearSigmoid
QLinearSoftmax QLinearWhere QuantizeLinear QuickGelu RelativePositionBias RotaryEmbedding
SkipGroupNorm SkipLayerNormalization SkipSimplifiedLayerNormalization TransposeMatMul"""

CONTRIBUTED: Final = frozenset(_CONTRIBUTED.split())

DOMAINS: Final = frozenset({"", "ai.onnx", "com.microsoft"})
"""ONNX's own, whose operators compute and do nothing else; and of ``com.microsoft``
:data:`CONTRIBUTED`."""
