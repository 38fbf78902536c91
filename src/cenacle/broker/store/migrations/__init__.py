"""Alembic migrations of the broker's store; they ship inside the package."""
