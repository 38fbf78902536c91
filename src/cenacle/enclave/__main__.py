"""``python -m cenacle.enclave``: confine this process, then run the agent in it.

Agent and worker are named, not imported: numpy and the like start threads when they are
imported, and that must happen in the confined process.
"""

from __future__ import annotations

from cenacle.enclave.sandbox.entry import enclave_main

if __name__ == "__main__":
    enclave_main("cenacle.enclave.agent:run_agent", worker="cenacle.enclave.worker:work")
