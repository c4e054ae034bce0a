"""How many experts the tokens of a step choose, counted on the device by the steps that are replayed.

With random weights rows may route alike; then fewer experts are read than a user's rows would read, and a time is no
measure of theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from hf_fastattn.eval.generate_speed.cases import Case
from hf_fastattn.eval.generate_speed.systems import System

# Below this share of the expected number a run is not comparable.
LEAST = 0.9
MOST_LAYERS = 1024


@dataclass(frozen=True)
class Distinct:
    """Distinct experts a layer and step.

    Attributes:
        counted: the mean, and `least` the mean of the layer that has fewest; 0 if no router of ours ran.
        expected: if each token chooses any experts alike.
    """

    counted: float
    least: float
    expected: float

    @property
    def comparable(self) -> bool:
        """Whether about as many experts were read as for rows that have nothing to do with each other."""
        return self.counted >= LEAST * self.expected

    def record(self) -> dict[str, Any]:
        """For the report."""
        return {**asdict(self), "comparable": self.comparable}


def expected_experts(experts: int, top_k: int, rows: float) -> float:
    """How many experts `rows` tokens are expected to choose, if each chooses any `top_k` of them alike."""
    return experts * (1.0 - (1.0 - top_k / experts) ** rows)


def experts_of(model: Any) -> tuple[int, int] | None:
    """Experts a layer, and experts a token; None of a model without."""
    config = model.config.get_text_config()
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    return (experts, config.num_experts_per_tok) if experts else None


def count_distinct(system: System, case: Case) -> Distinct:
    """Count in a whole call.

    Args:
        system: freshly patched, without graphs: they are recorded with the count in them.
        case: what is called.
    """
    found = experts_of(system.model)
    assert found is not None
    with counting(system.device, case.rows) as sums:
        system.seconds(case, 0, 1 + system.new)
        # Recording runs a step more than once.
        sums.zero_()
        system.seconds(case, 1, 1 + system.new)
    chosen, times = sums[:, sums[1] > 0].double().tolist()
    means = [total / count for total, count in zip(chosen, times, strict=True)]
    expected = expected_experts(*found, sum(case.steps(system.new)) / system.new)
    return Distinct(sum(means) / len(means) if means else 0.0, min(means, default=0.0), expected)


@contextmanager
def counting(device: torch.device, rows: int) -> Iterator[Tensor]:
    """`[2, layers]` on the device: distinct experts that up to `rows` tokens chose, and how often, while in the block."""
    # Not before: it imports Triton.
    from hf_fastattn.kernels import rehearsal
    from hf_fastattn.patches.fused import mixture

    sums = torch.zeros(2, MOST_LAYERS, dtype=torch.int64, device=device)
    places: dict[int, int] = {}
    route = mixture.route

    def counted(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        routing = route(x, weight, *args, **kwargs)
        # In a rehearsal nothing was chosen: what is there are any numbers.
        if x.shape[0] <= rows and not rehearsal.is_under_way():
            place = places.setdefault(weight.data_ptr(), len(places))
            seen = torch.zeros(len(weight), dtype=torch.int64, device=x.device)
            seen.index_fill_(0, routing.chosen.flatten().long(), 1)
            sums[0, place] += seen.sum()
            sums[1, place] += 1
        return routing

    mixture.route = counted  # type: ignore[assignment]
    try:
        yield sums
    finally:
        mixture.route = route
