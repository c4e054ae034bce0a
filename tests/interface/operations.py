"""Operations of PyTorch that code calls, counted."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# Views launch nothing.
VIEWS = ("view", "slice", "select", "transpose", "expand", "unsqueeze", "as_strided", "t.", "detach", "alias", "permute")


class Operations(TorchDispatchMode):
    """Counts what would be launched."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        if not any(word in name for word in VIEWS):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))
