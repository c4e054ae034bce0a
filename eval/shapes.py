"""Models of known shapes with random weights, for measurements where no checkpoint is at hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hf_fastattn.eval.choices import SHAPES
from hf_fastattn.parallel.shards import is_distributed, local_of

# Of random weights.
DEVIATION = 0.02


def random_model(shape: str, device: str | torch.device, dtype: torch.dtype, layers: int | None = None) -> Any:
    """A model of one of `SHAPES`, built on the device, with so many layers if they are given.

    Raises:
        ValueError: the shape is unknown.
    """
    config = shape_config(shape, layers)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def shape_config(shape: str, layers: int | None = None) -> Any:
    """The configuration of one of `SHAPES`.

    Raises:
        ValueError: the shape is unknown.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape={shape!r} is unknown; choose one of {sorted(SHAPES)}")
    entries = dict(SHAPES[shape])
    if layers is not None:
        entries["num_hidden_layers"] = layers
    return AutoConfig.for_model(entries.pop("model_type"), **entries)


def random_part(config: Any, mesh: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The part of a random model that this process holds, as `tp_plan="auto"` would spread it; no process holds all of it.

    Args:
        config: of the model.
        mesh: of the processes.
        device: of this process.
    """
    # Not before: it imports DTensors.
    from torch.distributed.tensor import DTensor
    from transformers.distributed import tensor_parallel

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model._tp_size, model._device_mesh = mesh.size(), mesh
    if hasattr(model, "_expand_parallel_plan"):
        tensor_parallel.apply_tensor_parallelism(model, mesh, model._expand_parallel_plan(model.tp_plan))
    else:
        # Before Transformers 5.23 the function asks the model for its plan.
        tensor_parallel.apply_tensor_parallelism(model, mesh)
    rank = torch.distributed.get_rank(mesh.get_group())
    held = [
        (module, name) for module in model.modules() for name, weight in module._parameters.items() if weight is not None
    ]
    for number, (module, name) in enumerate(held):
        weight: Any = module._parameters[name]
        spread = is_distributed(weight)
        # What is whole is the same everywhere.
        seed = number * (1 + mesh.size()) + (1 + rank if spread else 0)
        part = torch.empty(local_of(weight).shape, dtype=weight.dtype, device=device)
        if weight.ndim == 1:
            part.fill_(0.0 if name == "bias" else 1.0)
        else:
            part.normal_(0, DEVIATION, generator=torch.Generator(device).manual_seed(seed))
        if spread:
            part = DTensor.from_local(
                part, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
            )
        module._parameters[name] = nn.Parameter(part, requires_grad=False)
    decoder = model.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(config=decoder.config).to(device)
    return model
