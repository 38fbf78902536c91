"""The trust manager: rules, ledger, transparency log, store, service and client."""
