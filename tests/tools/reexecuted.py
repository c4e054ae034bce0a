"""Captured steps without a GPU, for tests: what evaluations use too."""

from hf_fastattn.eval.accuracy.reexecuted import ReadBack, ReexecutedLoopStep, ReexecutedStep, reexecuted, reexecuted_loop

__all__ = ["ReadBack", "ReexecutedLoopStep", "ReexecutedStep", "reexecuted", "reexecuted_loop"]
