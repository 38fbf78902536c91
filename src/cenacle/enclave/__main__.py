"""``python -m cenacle.enclave [measure]``: confine this process, then run the agent in it.

With ``measure`` it only measures itself, for the reference values of a contract.

Agent and worker are named, not imported: numpy and the like start threads when they are
imported, and that must happen in the confined process.
"""

from __future__ import annotations

import sys

from cenacle.enclave.sandbox.entry import enclave_main

if __name__ == "__main__":
    # httpx imports its command line if it can: click, pygments and rich, an eighth of the modules
    # that an agent begins with, and none of an enclave's business.
    sys.modules["httpx._main"] = None  # type: ignore[assignment]
    if sys.argv[1:2] == ["measure"]:
        enclave_main("cenacle.enclave.reference:write_measurements")
    enclave_main(
        "cenacle.enclave.agent:run_agent",
        worker="cenacle.enclave.worker:work",
        worker_mounts="asset-",  # not the key that signs simulated evidence
    )
