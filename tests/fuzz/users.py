"""What users hang into `generate()` and into modules; everything notes what it sees in `seen`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from tests.fuzz.edits import decoder_of


class Thrown(Exception):
    """By a user's code, on purpose."""


class Collect(BaseStreamer):
    """Notes what it is given; with `limit`, raises after so many."""

    def __init__(self, seen: list[Any], limit: int | None) -> None:
        self.seen, self.limit, self.count = seen, limit, 0

    def put(self, value: Tensor) -> None:
        self.seen.append(("streamer", value.flatten().tolist()))
        self.count += 1
        if self.limit is not None and self.count > self.limit:
            raise Thrown("streamer")

    def end(self) -> None:
        self.seen.append(("streamer", "end"))


class Changer:
    """Changes a model between two tokens: at the third call, or at each; hooks go to `handles`."""

    def __init__(self, kind: str, model: Any, handles: list[Any]) -> None:
        self.kind, self.model, self.handles, self.count = kind, model, handles, 0

    def __call__(self) -> None:
        self.count += 1
        down = decoder_of(self.model).layers[1].mlp
        if self.kind == "toggle_hook" and self.handles and self.count % 3 == 0:
            self.handles.pop().remove()
        elif self.kind in ("add_hook", "toggle_hook") and self.count % 3 == 2:
            self.handles.append(down.register_forward_hook(hook("steer", 0, [])))
        elif self.kind == "scale" and self.count == 3:
            for parameter in down.parameters():
                parameter.data.mul_(1.1)
        elif self.kind == "replace" and self.count == 3:
            for module in down.modules():
                for name, parameter in module.named_parameters(recurse=False):
                    setattr(module, name, torch.nn.Parameter(parameter.detach() * 1.1))
        elif self.kind == "forward":
            with torch.no_grad():
                self.model(input_ids=torch.tensor([[3, self.count]]))


class Processor(LogitsProcessor):
    """One of `draw.PROCESSORS`."""

    def __init__(self, kind: str, seen: list[Any], model: Any, base: Any, handles: list[Any]) -> None:
        self.kind, self.seen, self.model, self.count = kind, seen, model, 0
        self.change = Changer(kind, base, handles)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.count += 1
        self.change()
        if self.kind == "raise" and self.count == 3:
            raise Thrown("processor")
        if self.kind == "record":
            self.seen.append(("processor", input_ids.tolist(), scores.argmax(-1).tolist()))
        elif self.kind == "bias":
            scores = scores + torch.arange(scores.shape[-1]) % 3
        elif self.kind == "history":
            scores = scores - 0.1 * torch.nn.functional.one_hot(input_ids, scores.shape[-1]).sum(1) * input_ids.shape[1]
        elif self.kind == "nested" and self.count < 4:
            guess = self.model.generate(input_ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
            scores = scores.scatter_add(1, guess[:, -1:], torch.full_like(scores[:, :1], 2.0))
        return scores


class Criterion(StoppingCriteria):
    """One of `draw.CRITERIA`."""

    def __init__(self, kind: str, base: Any, handles: list[Any]) -> None:
        self.kind, self.count = kind, 0
        self.change = Changer(kind, base, handles)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.count += 1
        self.change()
        if self.kind == "raise" and self.count == 3:
            raise Thrown("criterion")
        rows = torch.arange(input_ids.shape[0])
        if self.kind == "rows":
            return self.count > rows + 1
        return torch.full_like(rows, self.kind == "all_at" and self.count > 3).bool()


def own_loop(model: Any, input_ids: Tensor, generation_config: Any = None, **kwargs: Any) -> Tensor:
    """A greedy loop for `custom_generate`."""
    others = ("logits_processor", "stopping_criteria", "synced_gpus", "streamer", "assistant_model")
    kwargs = {name: value for name, value in kwargs.items() if name not in others}
    for step in range(generation_config.max_new_tokens):
        following = {"next_sequence_length": 1} if step and generation_config.use_cache else {}
        inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=not step, **following, **kwargs)
        outputs = model(**inputs, return_dict=True)
        kwargs = model._update_model_kwargs_for_generation(outputs, kwargs)
        input_ids = torch.cat([input_ids, outputs.logits[:, -1].argmax(-1, keepdim=True)], 1)
    return input_ids


def hook(kind: str, after: int, seen: list[Any]) -> Callable[..., Any]:
    """A forward hook, one of `draw.HOOKS`, but for `halve_input`, which comes before a forward."""
    calls = [0]

    def run(module: Any, args: Any, output: Any) -> Any:
        calls[0] += 1
        tensor = first_tensor(output)
        if kind == "raise" and calls[0] == after + 1:
            raise Thrown("hook")
        if kind == "record":
            seen.append(("hook", tuple(tensor.shape)))
        elif kind == "pool":
            seen.append(("pooled", tensor.detach().mean(1)))
        elif kind == "steer":
            return with_first_tensor(output, tensor + 0.3 * torch.linspace(-1, 1, tensor.shape[-1], dtype=tensor.dtype))
        elif kind == "steer_last":
            changed = tensor.clone()
            changed[:, -1] *= 1.3
            return with_first_tensor(output, changed)
        return None

    return run


def halve_input(module: Any, args: Any, kwargs: Any) -> Any:
    """A pre-hook."""
    if args:
        return (args[0] * 0.8 if args[0].is_floating_point() else args[0], *args[1:]), kwargs
    name = next((name for name in ("hidden_states", "inputs_embeds") if isinstance(kwargs.get(name), Tensor)), None)
    return (args, kwargs) if name is None else (args, {**kwargs, name: kwargs[name] * 0.8})


def wrapped(forward: Callable[..., Any], scale: float, seen: list[Any]) -> Callable[..., Any]:
    """A forward of the user's around a module's."""

    def run(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        tensor = first_tensor(output)
        seen.append(("wrapped", tuple(tensor.shape)))
        return output if scale == 1.0 else with_first_tensor(output, tensor * scale)

    return run


def first_tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def with_first_tensor(output: Any, tensor: Tensor) -> Any:
    if isinstance(output, Tensor):
        return tensor
    if isinstance(output, tuple):
        return (tensor, *output[1:])
    output[next(iter(output.keys()))] = tensor
    return output
