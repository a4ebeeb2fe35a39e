"""`plan models`: the models whose configs are bundled, so that they can be named without a network."""

from __future__ import annotations

import json
from collections.abc import Sequence

from planner.commands import options
from planner.commands.layout import parameters_words
from planner.errors import InputError
from planner.models import CatalogueEntry, catalogue


def run(argv: Sequence[str]) -> int:
    """Print the models of the catalogue, all or those that match a text."""
    parser = options.Parser(prog="plan models", description="List the models of the bundled catalogue.")
    parser.add_argument("text", nargs="?", default="", help="only models with this in their name, family or type")
    options.add_output_options(parser)
    args = parser.parse_args(argv)
    found = [entry for entry in catalogue() if _matches(entry, args.text)]
    if not found:
        raise InputError(
            f"no model of the catalogue matches {args.text!r}; plan models lists all, and --model also takes "
            "a folder with a config.json or a name on the Hub"
        )
    if args.json:
        entries = [
            {"id": e.id, "family": e.family, "parameters": e.parameters, "aliases": list(e.aliases),
             "model_type": e.model_type}
            for e in found
        ]  # fmt: skip
        options.say_json(json.dumps(entries, indent=1))
        return 0
    width = max(len(entry.id) for entry in found)
    options.say("\n".join(f"{e.id:{width}}  {parameters_words(e.parameters):>13}  {e.family}" for e in found))
    return 0


def _matches(entry: CatalogueEntry, text: str) -> bool:
    words = (entry.id, entry.family, entry.model_type, *entry.aliases)
    return any(text.lower() in word.lower() for word in words)
