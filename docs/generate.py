"""Write the reference pages that follow from the code: JSON Schemas and the command line's help.

python docs/generate.py            writes what is out of date
python docs/generate.py --check    writes nothing; exit code 1 names what is out of date
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel

from cenacle.attestation import Evidence
from cenacle.broker import messages
from cenacle.cli.main import app
from cenacle.documents import (
    Asset,
    Contract,
    Party,
    ReceiptBundle,
    Recipe,
    Statement,
    Terms,
    Veto,
)
from cenacle.documents.base import Frozen
from cenacle.documents.ticket import Ticket, TicketUse

__all__ = ["main", "pages"]

DOCS = Path(__file__).parent
WIDTH = 88
DOCUMENTS: tuple[type[Frozen], ...] = (
    Party,
    Terms,
    Asset,
    Contract,
    Veto,
    Statement,
    ReceiptBundle,
    Recipe,
    Evidence,
    Ticket,
    TicketUse,
)

ENVELOPE = {
    "description": "A DSSE envelope: https://github.com/secure-systems-lab/dsse",
    "type": "object",
    "properties": {
        "payload": {"type": "string", "contentEncoding": "base64"},
        "payloadType": {"type": "string"},
        "signatures": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "keyid": {"type": "string"},
                    "sig": {"type": "string", "contentEncoding": "base64"},
                },
                "required": ["keyid", "sig"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["payload", "payloadType", "signatures"],
    "additionalProperties": False,
}


def pages() -> dict[str, str]:
    """Every generated file: its path below ``docs`` and its text."""
    texts = {
        f"schemas/{_kebab(model.__name__)}.json": _schema(model)
        for model in (*DOCUMENTS, *_messages())
    }
    texts["schemas/envelope.json"] = _as_json(
        {"$schema": _DIALECT, "title": "Envelope", **ENVELOPE}
    )
    texts["cli.md"] = _cli()
    return texts


# --- schemas -------------------------------------------------------------------------------

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def _messages() -> Iterator[type[BaseModel]]:
    for name in messages.__all__:
        found = getattr(messages, name)
        if inspect.isclass(found) and issubclass(found, BaseModel):
            yield found


def _schema(model: type[BaseModel]) -> str:
    fields = model.model_json_schema(by_alias=True)
    if media_type := getattr(model, "media_type", None):
        fields["x-media-type"] = media_type
    return _as_json({"$schema": _DIALECT, **_plain(fields)})


def _plain(value: Any, *, named: bool = False) -> Any:
    """The schema without titles that repeat names and without reStructuredText marks.

    ``named``: the keys are names of fields, not words of JSON Schema.
    """
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept: dict[str, Any] = {}
    for key, item in value.items():
        if not named and key == "title" and isinstance(item, str):
            continue
        if not named and key == "description" and isinstance(item, str):
            kept[key] = inspect.cleandoc(item).replace("``", "`")
        else:
            kept[key] = _plain(item, named=not named and key in {"properties", "$defs"})
    if not named and "patternProperties" in kept:
        kept["additionalProperties"] = False  # a name of another form is refused
    return kept


def _as_json(fields: dict[str, Any]) -> str:
    return json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _kebab(name: str) -> str:
    return "".join(f"-{c.lower()}" if c.isupper() else c for c in name).lstrip("-")


# --- command line --------------------------------------------------------------------------

_INTRODUCTION = """\
# The `cenacle` command

Written by `docs/generate.py` from the program's own help.
"""


def _cli() -> str:
    sections = [_INTRODUCTION]
    for context in _contexts(typer.main.get_command(app), "cenacle", None):
        heading = "#" * min(len(context.command_path.split()) + 1, 4)
        title = f"{heading} {context.command_path}"
        sections.append(f"{title}\n\n```text\n{_help(context)}\n```\n")
    return "\n".join(sections)


def _contexts(command: Any, name: str, parent: Any) -> Iterator[Any]:
    """The context of a command and of each one below it, in the order of the help."""
    command.rich_markup_mode = None  # else rich draws boxes as wide as the terminal
    context = command.context_class(
        command, parent, info_name=name, terminal_width=WIDTH, max_content_width=WIDTH
    )
    yield context
    for inner_name, inner in getattr(command, "commands", {}).items():
        if not inner.hidden:
            yield from _contexts(inner, inner_name, context)


def _help(context: Any) -> str:
    """Plain text of a fixed width, whatever the terminal, its colours or the environment."""
    lines = context.command.get_help(context).splitlines()
    return "\n".join(line.rstrip() for line in lines).strip()


# --- writing -------------------------------------------------------------------------------


def _stale(texts: dict[str, str]) -> Iterator[tuple[Path, str | None]]:
    """Files that differ, with the text that they should have (None: they should not exist)."""
    for name, text in texts.items():
        path = DOCS / name
        if not path.is_file() or path.read_text("utf-8") != text:
            yield path, text
    for path in sorted((DOCS / "schemas").glob("*.json")):
        if path.relative_to(DOCS).as_posix() not in texts:
            yield path, None


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="only say what is out of date")
    check = parser.parse_args().check
    stale = list(_stale(pages()))
    for path, text in stale:
        name = path.relative_to(DOCS.parent)
        if check:
            sys.stderr.write(f"out of date: {name} (run: make docs)\n")
        elif text is None:
            path.unlink()
            sys.stdout.write(f"removed {name}\n")
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, "utf-8")
            sys.stdout.write(f"wrote {name}\n")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
