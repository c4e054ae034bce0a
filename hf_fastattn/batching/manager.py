"""`FastBatchingManager`: Transformers' manager of continuous batching, whose thread runs our `Engine`."""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.continuous_api import BackgroundThreadStatus
from transformers.generation.continuous_batching.utils import drain_queue

from hf_fastattn.autocast import autocast_as, forward_dtype
from hf_fastattn.batching.choice import Choice
from hf_fastattn.batching.engine import Engine
from hf_fastattn.batching.engine_parts import EngineParts
from hf_fastattn.batching.outputs import LoopRouter
from hf_fastattn.batching.requests import Request

# Seconds that the thread waits for its turn at a time, and for new requests.
PATIENCE, IDLE = 0.05, 0.1
# Seconds that it waits at first for as many as are expected.
GATHER = 0.02


class FastBatchingManager(ContinuousBatchingManager):
    """Takes requests, and gives outputs, as Transformers' own does.

    The thread has the model's turn while it works, and gives it to a `generate()` of another thread between two steps.

    Args:
        choice: how tokens are chosen.
        model, generation_config, continuous_batching_config, workload_hints: as of Transformers' own.
    """

    # Transformers asks whether there is one.
    batch_processor: Any
    output_router: LoopRouter

    def __init__(self, choice: Choice, model: Any, **options: Any) -> None:
        super().__init__(model=model, **options)
        self.output_router = LoopRouter(self.cancel_queue.put)
        self._turn = model._fastattn.runtime.turn
        self._choice, self._hints = choice, options.get("workload_hints")
        self._parts: EngineParts | None = None
        self._expected = (getattr(self._hints, "num_requests", 0) or 0) // max(self.num_return_sequences, 1)

    def switch_to_cb_friendly_attn(self, model: Any, *args: Any, **kwargs: Any) -> None:
        """The model's attention stays what it is."""

    def warmup(self) -> None:
        """Compile kernels, and record the steps of as many rows as are expected; the thread, if it runs, does so itself."""
        if not self.is_running():
            self._in_turn(lambda: self._parts_made().warm_up(self._hints))
        self.warmed_up = True

    def stop(
        self, block: bool = True, timeout: float | None = None, keep_for_next_session: bool = False, hard_stop: bool = False
    ) -> None:
        """Stop the thread; memory stays as after `generate()`, for the next manager.

        Args:
            block: wait for the thread, `timeout` seconds at most.
            keep_for_next_session: the model keeps the manager.
            hard_stop: requests that are not done fail.
        """
        status = self.background_thread_status
        if self._generation_thread is None:
            return
        if getattr(status, "is_pause_requested", _never)(local=True):
            raise RuntimeError("the manager was to be stopped inside pause(), where its thread waits; leave pause() before")
        how = BackgroundThreadStatus.HARD_STOP if hard_stop else BackgroundThreadStatus.FLUSH_AND_STOP
        status.request_stop(how, self.distributed_helper.global_rank)
        self._wake_up().set()
        if block:
            self.join(time.perf_counter(), timeout)
        if keep_for_next_session:
            self.model._cached_continuous_batching_manager = self
        else:
            self.batch_processor = None

    def register_result_handler(self, request_id: str, callback: Any) -> None:
        """Transformers' own; what has arrived already, since the request was added before, goes to the callback too."""
        router = self.output_router
        super().register_result_handler(request_id, router.once(callback))
        with router._lock:
            handler, loop = router.result_handlers[request_id]
            for output in drain_queue(router.output_queue):
                if output.request_id == request_id:
                    loop.call_soon_threadsafe(handler, output)
                else:
                    router.output_queue.put(output)

    def _parts_made(self) -> EngineParts:
        if self._parts is None:
            self._parts = EngineParts(self.model, self._choice, self.continuous_batching_config)
        return self._parts

    # ---- the thread -------------------------------------------------------------------------------------------

    def _run_generation_loop(self, use_inference_mode: bool = False) -> None:
        engine: Engine | None = None
        # In this order: to leave inference mode is to have gradients, whatever was said before.
        with torch.inference_mode(use_inference_mode), torch.no_grad():
            try:
                device = self.model.device
                if device.type == "cuda" and device.index is not None:
                    torch.cuda.set_device(device)
                self.batch_processor = self  # type: ignore[assignment]
                engine = self._in_turn(lambda: self._parts_made().engine(self._deliver, self._hints))
                while self._goes_on(engine):
                    self._in_turn(lambda: self._work(engine))
                self._end(engine, RuntimeError("the manager was stopped before this request was done"))
            except Exception as error:
                status = self.background_thread_status
                status.request_stop(BackgroundThreadStatus.HARD_STOP, self.distributed_helper.global_rank)
                cause = self._in_turn(functools.partial(self._parts_made().cause_of, error))
                self._end(engine, cause)
                status.record_fatal_error(cause)
            finally:
                self.background_thread_status.mark_as_stopped()

    def _in_turn(self, work: Any) -> Any:
        """What `work` returns, done while no other thread works with the model, in the autocast of accelerate's wrapper."""
        turn = self._turn
        while True:
            done = (turn.take(PATIENCE), [self._cast(work)] if turn.is_mine() else [])[1]
            if done:
                return done[0]
            time.sleep(PATIENCE / 10)

    def _cast(self, work: Any) -> Any:
        with autocast_as(self.model.device, forward_dtype(self.model)):
            return work()

    def _goes_on(self, engine: Engine) -> bool:
        """Whether there is work; waits for it, or for a stop."""
        status = self.background_thread_status
        while True:
            self._pause_if_asked(engine)
            status.update_with_tp_status(status.local_status)
            if status.tp_status == BackgroundThreadStatus.HARD_STOP:
                return False
            if not engine.is_idle or not self.input_queue.empty():
                return True
            if status.tp_status == BackgroundThreadStatus.FLUSH_AND_STOP:
                return False
            wake = self._wake_up()
            wake.wait(IDLE)
            wake.clear()

    def _wake_up(self) -> Any:
        return getattr(self, "_wake_up_loop", None) or self._has_new_requests

    def _pause_if_asked(self, engine: Engine) -> None:
        status = self.background_thread_status
        if getattr(status, "is_pause_requested", _never)():
            self._in_turn(engine.settle)
            status.pause_and_wait()
            # Whoever asked has probably written to the weights.
            self._in_turn(lambda: self._parts_made().renew())

    def _work(self, engine: Engine) -> None:
        """Rounds, until there is no work, or somebody else wants the model, or the thread to stop."""
        parts = self._parts_made()
        parts.check()
        self._gather()
        parts.enter(True)
        try:
            self._rounds(engine)
        finally:
            parts.enter(False)

    def _rounds(self, engine: Engine) -> None:
        turn, status = self._turn, self.background_thread_status
        while True:
            # Whoever cancels a request has added it before: it is among those that are taken after.
            cancelled = drain_queue(self.cancel_queue)
            for state in drain_queue(self.input_queue):
                self._add(engine, state)
            self._cancel(engine, cancelled)
            if engine.is_idle:
                return
            engine.run()
            stops = status.local_status == BackgroundThreadStatus.HARD_STOP
            if stops or turn.is_wanted() or getattr(status, "is_pause_requested", _never)():
                engine.settle()
                return

    def _cancel(self, engine: Engine, names: list[str]) -> None:
        """Nobody listens to these requests any more: their handlers, which nothing else would take away, go too."""
        if not names:
            return
        engine.cancel(names)
        with self.output_router._lock:
            for name in names:
                self.output_router.result_handlers.pop(name, None)

    def _gather(self) -> None:
        """Whoever said how many requests will come adds them at once: they begin together."""
        expected, self._expected = self._expected, 0
        until = time.monotonic() + GATHER
        while self.input_queue.qsize() < expected and time.monotonic() < until:
            time.sleep(GATHER / 50)

    def _add(self, engine: Engine, state: Any) -> None:
        try:
            self.logit_processor.check_kwargs(state.logit_processor_kwargs)
            engine.add(state)
        except (TypeError, ValueError) as error:
            self.output_router.fail_and_deliver(state, error)

    def _deliver(self, requests: list[Request]) -> None:
        self.output_router.deliver_batch([request.state.to_generation_output() for request in requests])

    def _end(self, engine: Engine | None, error: Exception) -> None:
        for state in drain_queue(self.input_queue):
            self.output_router.fail_and_deliver(state, error)
        if engine is not None:
            self._in_turn(lambda: self._release(engine, error))

    def _release(self, engine: Engine, error: Exception) -> None:
        engine.fail_all(error)
        self._parts_made().release(engine)


def _never(local: bool = False) -> bool:
    """For a Transformers whose managers cannot be paused."""
    return False
