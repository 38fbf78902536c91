"""Query a model that `cenacle serve` serves, so that its operator sees neither input nor output.

Run: python examples/serving_client.py https://HOST:8443 sha256:CONTRACT front.onnx tls.crt
"""

import sys
from pathlib import Path

import numpy as np

from cenacle.serving.client import SealedClient

url, contract, front, certificate = sys.argv[1:5]
with SealedClient(
    url,
    contract,  # digest of the contract: it says who must have signed, and which enclave to trust
    front=front,  # the public part of the model runs here; the enclave gets what comes out of it
    certificate=Path(certificate),
    development="--development" in sys.argv,  # accept simulated evidence, for a first try
) as client:
    takes = client.metadata()["inputs"][0]
    row = np.linspace(-1, 1, int(np.prod(takes["shape"][1:])), dtype=np.float32)
    scores = client.infer({takes["name"]: row.reshape(1, *takes["shape"][1:])})
for name, array in scores.items():
    print(name, array.tolist())
