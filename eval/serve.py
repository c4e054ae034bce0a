"""`transformers serve` with patched models.

    hf-fastattn serve Qwen/Qwen2.5-0.5B-Instruct --continuous-batching --patch prefix_cache=on

Server, routes and options are Transformers' own (`pip install transformers[serving]`); see `hf_fastattn.serving`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer
from transformers.cli.serve import Serve
from transformers.utils.import_utils import is_serve_available

from hf_fastattn.eval.accuracy import variants
from hf_fastattn.eval.arguments import parser
from hf_fastattn.serving import patch_served


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until the server ends; its exit status."""
    made = parser("serve")
    options, others = made.parse_known_args(list(sys.argv[1:] if arguments is None else arguments))
    try:
        asked = dict(variants.parse(options.patch).options)
    except ValueError as error:
        made.error(f"argument --patch: {error}")
    if not is_serve_available():
        made.error("Transformers' server needs fastapi, uvicorn, openai and pydantic: pip install 'transformers[serving]'")
    app = typer.Typer(add_completion=False)
    app.command()(Serve)
    with patch_served(**asked):
        try:
            app(others, prog_name=made.prog)
        except SystemExit as ended:
            return ended.code if isinstance(ended.code, int) else 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
