"""The cells of the matrix: a family in a state, called in one way. A cell is a line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch


@dataclass(frozen=True)
class Cell:
    """One line of the matrix.

    Attributes:
        family: of `families.FAMILIES`.
        state: the dtype of the weights, then words of `states.STATES`, joined by `+`.
        call: of `calls.CALLS`.
    """

    family: str
    state: str
    call: str

    @property
    def name(self) -> str:
        """As `--cell` matches it."""
        return f"{self.family}/{self.state}/{self.call}"


TRAINER = "fp32+accelerate+train+checkpointing+lora"
CELLS = (
    # Every call.
    Cell("llama", "bf16", "greedy"),
    Cell("llama", "bf16", "batch"),
    Cell("llama", "bf16", "penalty"),
    Cell("llama", "bf16", "sampled"),
    Cell("llama", "bf16", "min-p"),
    Cell("llama", "bf16", "typical"),
    Cell("llama", "bf16", "samples"),
    Cell("llama", "bf16", "repeated"),
    Cell("llama", "bf16", "beams"),
    Cell("llama", "bf16", "padded"),
    Cell("llama", "bf16", "chat"),
    Cell("llama", "bf16", "embeds"),
    Cell("llama", "bf16", "streamer"),
    Cell("llama", "bf16", "processor"),
    Cell("llama", "bf16", "lookup"),
    Cell("llama", "bf16", "no cache"),
    # Every state.
    Cell("llama", "fp16", "greedy"),
    Cell("llama", "fp16", "padded"),
    Cell("llama", "fp32", "greedy"),
    Cell("llama", "fp32", "beams"),
    Cell("llama", "fp32", "padded"),
    Cell("llama", "fp32", "sampled"),
    Cell("llama", "fp32", "chat"),
    Cell("llama", "fp32+autocast", "greedy"),
    Cell("llama", "fp32+autocast", "samples"),
    Cell("llama", "fp32+autocast", "padded"),
    Cell("llama", "fp32+accelerate", "greedy"),
    Cell("llama", "fp32+accelerate", "repeated"),
    Cell("llama", "bf16+train", "repeated"),
    Cell("llama", "bf16+train+checkpointing", "repeated"),
    Cell("llama", "bf16+lora", "greedy"),
    Cell("llama", "bf16+lora", "repeated"),
    Cell("llama", "bf16+lora", "beams"),
    Cell("llama", "bf16+lora", "padded"),
    Cell("llama", TRAINER, "repeated"),
    # Every family.
    Cell("qwen2", "bf16", "greedy"),
    Cell("qwen2", "bf16", "samples"),
    Cell("qwen2", "fp32+autocast", "repeated"),
    Cell("qwen2", TRAINER, "repeated"),
    Cell("qwen3", "bf16", "greedy"),
    Cell("qwen3", "bf16", "padded"),
    Cell("qwen3", "bf16", "sampled"),
    Cell("qwen3", "fp32+accelerate", "repeated"),
    Cell("mistral", "bf16", "greedy"),
    Cell("mistral", "bf16", "padded"),
    Cell("mistral", "bf16", "samples"),
    Cell("mistral", "bf16", "lookup"),
    Cell("qwen3_moe", "bf16", "greedy"),
    Cell("qwen3_moe", "bf16", "repeated"),
    Cell("qwen3_next", "bf16", "greedy"),
    Cell("qwen3_next", "bf16", "repeated"),
    Cell("gemma2", "bf16", "greedy"),
    Cell("gemma2", "bf16", "padded"),
    Cell("gemma2", "bf16", "samples"),
    Cell("gemma2", "bf16", "chat"),
    Cell("gemma2", "bf16", "beams"),
    Cell("gemma2", "fp16", "greedy"),
    Cell("gemma2", "fp32", "greedy"),
    Cell("gemma2", "fp32+autocast", "greedy"),
    Cell("phi3", "bf16", "greedy"),
    Cell("phi3", "bf16", "padded"),
    Cell("phi3", "bf16", "embeds"),
    Cell("gpt_oss", "bf16", "greedy"),
)
A_CALL = (
    "looking whether modules, mask and cache are what they seem, and making pages, takes the host 0.5 to 1 ms a call, of "
    "the 5 to 12 ms that four small layers take; a model of 135 million parameters takes 0.98 to 1.01 of stock's time"
)
USERS_CODE = "modules are looked at before each token, since code of the user's runs between two of them"
A_STEP = (
    "looking whether modules are what they seem, and keeping page tables, takes the host 0.2 to 0.4 ms a step, of the 3 to "
    "6 ms that four small layers take; a model of 135 million parameters takes 0.90 to 1.00 of stock's time"
)
# Calls whose prompts are computed row by row, as in stock; and of which Transformers' own part of a step is small.
ROW_BY_ROW = ("greedy", "batch", "penalty", "sampled", "min-p", "typical", "padded", "chat", "embeds", "processor", "lookup")
SHORT_STEPS = ("*/greedy", "*/padded", "*/chat", "*/embeds", "*/lookup", "*/beams", "*+lora/*")
# Cells that may be slower than others, by device, and at what: the most that their time may be of stock's, and why.
ALLOWED: dict[str, dict[str, tuple[float, str]]] = {
    "cuda": {},
    "cpu": {
        **{f"*/{call}: first token": (1.25, A_CALL) for call in (*ROW_BY_ROW, "streamer")},
        **{f"*/{call}: a token": (1.20, USERS_CODE) for call in ("streamer", "processor")},
        **{f"{cells}: a token": (1.15, A_STEP) for cells in SHORT_STEPS},
    },
}
QUICK = (
    "llama/fp32/greedy",
    "llama/fp32+autocast/greedy",
    "llama/bf16/samples",
    "qwen3/bf16/padded",
    "gemma2/fp32/greedy",
)


def allowed(name: str, timed: str, device: str) -> tuple[float, str] | None:
    """The limit of a cell that may be slower than others at its "first token" or "a token", and the reason."""
    found = [entry for pattern, entry in ALLOWED[device].items() if fnmatch(f"{name}: {timed}", pattern)]
    return found[0] if found else None


def choose(patterns: Sequence[str] | None, quick: bool) -> list[Cell]:
    """The cells that a command line names.

    Args:
        patterns: of names, as the shell's; all cells if None.
        quick: only those in QUICK.

    Raises:
        ValueError: a pattern matches nothing.
    """
    cells = [cell for cell in CELLS if not quick or cell.name in QUICK]
    for pattern in patterns or ():
        if not any(fnmatch(cell.name, pattern) for cell in cells):
            raise ValueError(
                f"argument --cell: {pattern!r} matches no cell; a name is like {cells[0].name!r}, '*/bf16/*' matches"
            )
    return [cell for cell in cells if patterns is None or any(fnmatch(cell.name, pattern) for pattern in patterns)]
