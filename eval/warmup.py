"""Compile ahead what `generate()` will need on this machine, from a model's configuration alone.

    python -m hf_fastattn.eval.warmup <hub id or path> --batch 1 8 64 --prompt 512

See `hf_fastattn.warming`. Weights are not read.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from transformers import AutoConfig

from hf_fastattn.eval.arguments import parser
from hf_fastattn.eval.models import check, named
from hf_fastattn.eval.reporting.environment import default_device
from hf_fastattn.warming import Size, warm_up_config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 if all is compiled."""
    made = parser("warmup")
    options = made.parse(list(sys.argv[1:] if arguments is None else arguments))
    device = torch.device(options.device or default_device())
    try:
        check(options.model)
        with named(options.model, "model"):
            config = AutoConfig.from_pretrained(options.model)
    except ValueError as error:
        made.error(str(error))
    if device.type != "cuda":
        print(f"nothing is compiled for {device}: there the operations are PyTorch's")
        return 0
    text = config.get_text_config(decoder=True)
    dtype = getattr(torch, options.dtype) if options.dtype != "auto" else getattr(text, "dtype", None) or torch.bfloat16
    sizes = [Size(rows, prompt, sampled) for rows in options.batch for prompt in options.prompt for sampled in (False, True)]
    seconds = warm_up_config(config, dtype, device, {}, sizes, options.workers)
    print(f"compiled for {len(sizes)} sizes of calls of {options.model}, {dtype}, in {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
