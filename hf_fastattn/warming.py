"""`warm_up(model)`: the kernels that calls of given sizes need, compiled ahead, by several processes at once.

Triton compiles a kernel when it is first launched, one after the other, and keeps it on disk. Which kernels a call needs
does not depend on how many layers a model has, nor on its weights. So worker processes (`python -m hf_fastattn.warming`)
build a model of the same configuration with as few layers as show every kind, and generate a few tokens each.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from hf_fastattn.patching import patch

# Tokens that a worker generates: a step launched by itself, and one captured and replayed.
NEW_TOKENS = 4
# A model of one layer with its vocabulary, and a CUDA context, take a few gigabytes a process.
MOST_WORKERS = 8
SECONDS = 900.0
# What configurations of towers call the number of their layers.
DEPTHS = ("depth", "num_hidden_layers", "encoder_layers")


class Size(NamedTuple):
    """A call to be ready for.

    Attributes:
        rows: of the batch.
        prompt: tokens of each row.
        do_sample: draw, or take the likeliest.
    """

    rows: int
    prompt: int
    do_sample: bool


def warm_up(
    model: Any,
    rows: Sequence[int] = (1,),
    prompts: Sequence[int] = (512,),
    do_sample: Sequence[bool] = (False, True),
    *,
    workers: int | None = None,
) -> float:
    """Compile what `model.generate()` needs for batches and prompts of these sizes, for this machine and GPU.

    What is compiled lies in Triton's cache on disk afterwards, for this process and later ones. The model itself is not
    run, and nothing of it is changed. On a CPU there is nothing to compile.

    Args:
        model: patched, on the device where it will run.
        rows: batch sizes, beams and samples counted; a size stands for all of its bucket (1, 2, 4, 8, 16, 32, 64 tokens).
        prompts: tokens of a prompt.
        do_sample: for greedy search, for sampling, or for both.
        workers: processes that compile at once; by default one a size, as many as there are CPU cores, at most 8.

    Returns:
        Seconds that it took.

    Raises:
        ValueError: the model is not patched, has an attention variant, or a size is not positive.
        RuntimeError: a worker failed; the message ends with what it said.
    """
    if not hasattr(model, "_fastattn"):
        raise ValueError(f"model is a {type(model).__name__} that is not patched; call hf_fastattn.patch(model) first")
    if model.device.type != "cuda":
        return 0.0
    if model._fastattn.runtime.variants:
        raise ValueError("the model has an attention variant, which other processes cannot be given; generate a few tokens")
    options, sizes = asdict(model._fastattn.runtime.config), _sizes(rows, prompts, do_sample)
    return warm_up_config(model.config, model.dtype, model.device, options, sizes, workers, type(model).__name__)


def warm_up_config(
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    options: dict[str, Any],
    sizes: Sequence[Size],
    workers: int | None = None,
    architecture: str | None = None,
) -> float:
    """`warm_up` for a model that need not be there: only its configuration is read.

    Args:
        config: of the model; of composite ones the text model alone is built, if Transformers has a class for it.
        dtype: of its weights.
        device: where workers run.
        options: of `patch`.
        sizes: of calls.
        workers: processes at once.
        architecture: class of the model; by default what the configuration names.

    Raises:
        ValueError: the text model cannot be built alone, and no class of the whole is known.
        RuntimeError: a worker failed.
    """
    count = min(workers or os.cpu_count() or 1, len(sizes), MOST_WORKERS)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        small, built = buildable(config, architecture)
        small.save_pretrained(folder)
        tasks = [
            {"folder": folder, "architecture": built, "dtype": str(dtype).removeprefix("torch."), "device": str(device),
             "options": options, "sizes": sizes[number::count]}
            for number in range(count)
        ]  # fmt: skip
        _run(tasks)
    return time.perf_counter() - began


def shallow(config: Any) -> Any:
    """The text model's configuration with its first layers only, among which is one of every type."""
    text = copy.deepcopy(config.get_text_config(decoder=True))
    types = getattr(text, "layer_types", None)
    text.num_hidden_layers = 1 if types is None else max(types.index(kind) for kind in set(types)) + 1
    if types is not None:
        text.layer_types = types[: text.num_hidden_layers]
    return text


def buildable(config: Any, architecture: str | None = None) -> tuple[Any, str | None]:
    """The configuration of as small a model as shows every kind of decoder layer, and its class.

    Args:
        config: of the model.
        architecture: its class.

    Returns:
        The text model's, and None, where `AutoModelForCausalLM` knows it; else the whole model's, with a tower that is as
        short as can be, since prompts of text alone do not run it.
    """
    text = shallow(config)
    if type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return text, None
    name = architecture or next(iter(getattr(config, "architectures", None) or ()), None)
    if name is None or not hasattr(transformers, name):
        raise ValueError(
            f"a {type(text).__name__} cannot be built alone, and architecture={name!r} is no class of Transformers"
        )
    whole, decoder = copy.deepcopy(config), config.get_text_config(decoder=True)
    for part in whole.sub_configs:
        if getattr(config, part, None) is decoder:
            setattr(whole, part, text)
        else:
            _shorten(getattr(whole, part, None))
    return whole, name


def _shorten(tower: Any) -> None:
    for depth in DEPTHS:
        if isinstance(getattr(tower, depth, None), int):
            setattr(tower, depth, 1)


def _sizes(rows: Iterable[int], prompts: Sequence[int], do_sample: Sequence[bool]) -> list[Size]:
    for name, values in (("rows", rows), ("prompts", prompts)):
        if not all(isinstance(value, int) and value > 0 for value in values):
            raise ValueError(f"{name}={tuple(values)} must be positive numbers, for example {name}=(1, 8)")
    return [Size(count, prompt, sampled) for count in rows for prompt in prompts for sampled in do_sample]


def _run(tasks: Sequence[dict[str, Any]]) -> None:
    """Run a worker for each task, and wait for all."""
    # Not what lies in the current folder: this package, wherever it was imported from.
    command = [sys.executable, "-P", "-m", "hf_fastattn.warming"]
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    running = [
        subprocess.Popen([*command, json.dumps(task)], stderr=subprocess.PIPE, text=True, env=environment) for task in tasks
    ]
    try:
        for process in running:
            _, said = process.communicate(timeout=SECONDS)
            if process.returncode:
                raise RuntimeError(f"a worker that compiles kernels failed: {(said.strip().splitlines() or ['?'])[-1]}")
    finally:
        for process in running:
            process.kill()
            process.communicate()


def worker(task: dict[str, Any]) -> None:
    """Generate a few tokens for each size of a task."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(task["folder"])
    name, dtype = task.get("architecture"), getattr(torch, task["dtype"])
    with torch.device(task["device"]):
        if name is None:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        else:
            model = getattr(transformers, name)._from_config(config, dtype=dtype).eval()
    patch(model, **task["options"])
    for size in (Size(*given) for given in task["sizes"]):
        ids = torch.full((size.rows, size.prompt), 1, device=task["device"])
        # Rows that differ, or the prompt would be computed once.
        ids[:, 0] = torch.arange(size.rows) % config.get_text_config(decoder=True).vocab_size
        # A prompt's graph is recorded when its size comes up for the second time.
        for _ in range(2):
            model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=size.do_sample, top_k=50, pad_token_id=0,
                eos_token_id=None, max_new_tokens=NEW_TOKENS,
            )  # fmt: skip


if __name__ == "__main__":
    worker(json.loads(sys.argv[1]))
