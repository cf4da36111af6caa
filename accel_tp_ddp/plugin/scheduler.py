"""Learning-rate schedulers that step once for every replica."""

from __future__ import annotations

from typing import Any

from accelerate.scheduler import AcceleratedScheduler


class _SchedulerOverReplicas(AcceleratedScheduler):
    """Steps once for every replica, where Accelerate steps once for every process."""

    def __init__(self, prepared: AcceleratedScheduler, dp_size: int):
        super().__init__(prepared.scheduler, prepared.optimizers, prepared.step_with_optimizer, prepared.split_batches)
        self._dp_size = dp_size

    def step(self, *args: Any, **kwargs: Any) -> None:
        if self.split_batches or not self.step_with_optimizer or not self.gradient_state.sync_gradients:
            super().step(*args, **kwargs)
            return
        if any(optimizer.step_was_skipped for optimizer in self.optimizers):
            return
        for _ in range(self._dp_size):
            total = getattr(self.scheduler, "total_steps", None)
            if total is None or self.scheduler._step_count <= total:  # OneCycleLR raises beyond its end
                self.scheduler.step(*args, **kwargs)
