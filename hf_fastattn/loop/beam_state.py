"""`BeamState`: what a beam search keeps on the device: running and finished sequences, their scores, and what ends it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_fastattn.kernels.launch import power_of_2
from hf_fastattn.kernels.sampling.loop_tensors import MOST_ENDS
from hf_fastattn.loop.beam_request import BeamRequest

# Least columns of sequences, and new tokens, that there is room for: longer calls need new tensors and new graphs.
MIN_COLUMNS, MIN_NEW = 256, 64
# As in Transformers: the score of what is not to be chosen.
NEVER = -1.0e9
# Whose reciprocal is another one if it is rounded to fp32 first.
NOT_IN_FP32 = 3**0.6


@dataclass(frozen=True)
class BeamShape:
    """What the launches of a beam search's step depend on.

    Attributes:
        prompts: of the call (N).
        beams: of each prompt (M).
        kept: continuations of each prompt that are looked at (K).
        columns: of the tensors of sequences.
        new: new tokens a row that there is room for.
        early_stopping: True, False or "never".
        looks_ahead: see `BeamRequest`.
    """

    prompts: int
    beams: int
    kept: int
    columns: int
    new: int
    early_stopping: bool | str
    looks_ahead: bool

    @staticmethod
    def of(request: BeamRequest, rows: int, prompt: int) -> BeamShape:
        """That of a call with `rows` rows, all beams counted, of `prompt` tokens."""
        new = request.loop.max_new
        columns = max(power_of_2(prompt + new), MIN_COLUMNS)
        early = request.early_stopping, request.looks_ahead
        return BeamShape(rows // request.beams, request.beams, request.kept, columns, max(power_of_2(new), MIN_NEW), *early)

    @property
    def rows(self) -> int:
        """Of all prompts."""
        return self.prompts * self.beams


class BeamState:
    """Static tensors, by the names that Transformers' `_beam_search` has for most of them; a graph's key by identity.

    Attributes:
        running_sequences: `[N, M, columns]` int64.
        running_scores: `[N, M]` fp32, sums of logarithms.
        running_indices: `[N, M, new]` int32: the row that each token was chosen in, -1 where there is none yet.
        sequences: finished ones, or what stands for them; with `scores` and `indices`, as above.
        is_finished: `[N, M]` bool, whether `sequences` are finished.
        may_improve: `[N, 1]` bool, whether running beams may still beat finished ones.
        is_done: `[N * M]` bool, all alike: the search has ended; later steps change no result.
        packed: `[N * M]` int64 for the host: `is_done` at `FINISHED_BIT`.
        parents: `[N * M]` int64, the row that each row continues.
        prompt: `[1]` int64, tokens of the prompt.
        last: `[1]` int64, the greatest number of new tokens.
        ends: `[MOST_ENDS]` int64 end tokens, -1 where there are fewer.
        divisors: `[new + 2]` fp32, by the number of new tokens: what scores are divided by; reciprocals on a GPU.
        is_first: `[K]` bool: the best continuations, which alone may become finished sequences.
        live, moves, places: see `ForkTensors`.

    Args:
        shape: of the search.
        device: of the model.
        windows: attention windows of the model.
        page_tensors: K and V of its layers.
    """

    def __init__(self, shape: BeamShape, device: torch.device, windows: int, page_tensors: int) -> None:
        self.shape, self.device = shape, device
        size = (shape.prompts, shape.beams)

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        # Tensors made inside inference mode could not be written outside of it later.
        with torch.inference_mode(False):
            self.running_sequences, self.sequences = zeros(*size, shape.columns), zeros(*size, shape.columns)
            self.running_scores, self.scores = zeros(*size, dtype=torch.float32), zeros(*size, dtype=torch.float32)
            self.running_indices = zeros(*size, shape.new, dtype=torch.int32)
            self.indices = zeros(*size, shape.new, dtype=torch.int32)
            self.is_finished = zeros(*size, dtype=torch.bool)
            self.may_improve = zeros(shape.prompts, 1, dtype=torch.bool)
            self.is_done = zeros(shape.rows, dtype=torch.bool)
            self.packed, self.parents = zeros(shape.rows), zeros(shape.rows)
            self.prompt, self.last, self.ends = zeros(1), zeros(1), zeros(MOST_ENDS)
            self.divisors = zeros(shape.new + 2, dtype=torch.float32)
            self.is_first = zeros(shape.kept, dtype=torch.bool)
            self.is_first[: shape.beams] = True
            self.first_rows = torch.arange(shape.prompts, device=device)[:, None] * shape.beams
            self.live = zeros(1, dtype=torch.int32)
            self.moves = zeros(windows, shape.rows, 2, dtype=torch.int32)
            self.places = zeros(page_tensors, 3)

    def begin(self, request: BeamRequest, input_ids: Tensor) -> None:
        """A call starts, with nothing in flight; `input_ids [N * M, S]` are its prompts."""
        columns = input_ids.shape[1]
        self.running_sequences.fill_(request.fill)
        self.running_sequences[:, :, :columns] = input_ids.reshape(*self.is_finished.shape, columns)
        self.sequences.copy_(self.running_sequences)
        self.running_indices.fill_(-1)
        self.indices.fill_(-1)
        # At first all beams of a prompt are the same, and only one of them goes on.
        self.running_scores.fill_(NEVER)[:, 0] = 0
        self.scores.fill_(NEVER)
        self.is_finished.zero_()
        self.may_improve.fill_(True)
        self.is_done.zero_()
        self.live.fill_(1)
        self.prompt.fill_(columns)
        self.last.fill_(request.loop.max_new)
        ends = request.loop.ends
        self._write(self.ends, [*ends, *[-1] * (MOST_ENDS - len(ends))])
        self._write(self.divisors, self._divisors(request.powers).tolist())

    def _divisors(self, powers: tuple[float, ...]) -> Tensor:
        held = torch.tensor(powers, dtype=torch.float64, device="cpu")
        if self.device.type != "cuda":
            return held.float()
        # PyTorch divides by a number of the host so on a GPU: it multiplies by the reciprocal.
        return (1.0 / held).float() if divides_in_fp64(self.device) else 1.0 / held.float()

    def _write(self, target: Tensor, values: list[float]) -> None:
        host = torch.tensor(values, dtype=target.dtype, device="cpu")
        target[: len(values)].copy_(host, non_blocking=True)

    def changing(self) -> list[Tensor]:
        """What a step changes and a later one reads."""
        return [
            self.running_sequences, self.running_scores, self.running_indices, self.sequences, self.scores, self.indices,
            self.is_finished, self.may_improve, self.is_done, self.live,
        ]  # fmt: skip

    def result(self, request: BeamRequest, prompt: int) -> Tensor:
        """The sequences that the call returns, as long as the longest of them; waits for the device."""
        sequences = self.sequences[:, : request.returned, : prompt + request.loop.max_new].flatten(0, 1)
        indices = self.indices[:, : request.returned, : request.loop.max_new].flatten(0, 1)
        longest = int((indices + 1).bool().sum(1).max())
        return sequences[:, : prompt + longest].clone()


@functools.cache
def divides_in_fp64(device: torch.device) -> bool:
    """Whether PyTorch rounds the reciprocal of a number of the host to fp32 there, and not the number before it."""
    number = torch.tensor(NOT_IN_FP32, dtype=torch.float64, device="cpu")
    return bool((torch.ones(1, device=device) / NOT_IN_FP32).cpu() == (1.0 / number).float())


class Length:
    """A number of new tokens that is on the device, as far as `_update_finished_beams` calculates with one.

    Args:
        state: its `divisors`.
        count: `[1]`, the number.
    """

    def __init__(self, state: BeamState, count: Tensor) -> None:
        self._state, self._count = state, count

    def __add__(self, other: int) -> Length:
        return Length(self._state, self._count + other)

    def __sub__(self, other: int) -> Length:
        return Length(self._state, self._count - other)

    def __pow__(self, exponent: float) -> Divisor:
        return Divisor(self._state.divisors.index_select(0, self._count), self._state.device.type == "cuda")


class Divisor:
    """A power of a `Length`: scores are divided by it as PyTorch divides by a number of the host.

    Args:
        value: `[1]` fp32, or its reciprocal.
        is_reciprocal: which of the two.
    """

    def __init__(self, value: Tensor, is_reciprocal: bool) -> None:
        self._value, self._is_reciprocal = value, is_reciprocal

    def __rtruediv__(self, scores: Tensor) -> Tensor:
        return scores * self._value if self._is_reciprocal else scores / self._value
