"""``python -m cenacle``: the same as the ``cenacle`` command."""

from __future__ import annotations

from cenacle.cli.main import main

if __name__ == "__main__":
    main()
