"""lm-evaluation-harness's own command, which then knows `--model hf-fastattn` and the tasks that come with the project.

    hf-fastattn lm-eval --model hf-fastattn --model_args pretrained=Qwen/Qwen2.5-0.5B --tasks hellaswag --batch_size 8

All options are the harness's. Its `run` is the default, as there, and our model the default one.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from hf_fastattn.eval.arguments import parser
from hf_fastattn.eval.harness.recorded import TASKS_FOLDER

NOT_INSTALLED = "lm-evaluation-harness is not installed: pip install 'hf-fastattn[eval]'"
COMMANDS = ("run", "ls", "validate")
# With these somebody else says which model it is.
NAME_MODEL = ("--model", "-M", "--config", "-C")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the harness; its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        harness = importlib.import_module("lm_eval.__main__")
        # It registers itself.
        importlib.import_module("hf_fastattn.eval.harness.model")
    except ImportError as error:
        parser("lm-eval").error(NOT_INSTALLED if (error.name or "").startswith("lm_eval") else str(error))
    if words[:1] not in [[name] for name in COMMANDS]:
        words = ["run", *words]
    if words[0] == "run" and not any(word.partition("=")[0] in NAME_MODEL for word in words):
        words += ["--model", "hf-fastattn"]
    if not any(word.partition("=")[0] == "--include_path" for word in words):
        words += ["--include_path", str(TASKS_FOLDER)]
    given = sys.argv
    try:
        sys.argv = ["hf-fastattn lm-eval", *words]
        harness.cli_evaluate()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1
    finally:
        sys.argv = given
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
