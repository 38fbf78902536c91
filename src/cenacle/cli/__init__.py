"""The ``cenacle`` command: one file a verb group, thin over the packages below."""
