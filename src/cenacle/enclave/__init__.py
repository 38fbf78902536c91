"""Launchers, the sandbox and the agent: where plaintext may exist."""
