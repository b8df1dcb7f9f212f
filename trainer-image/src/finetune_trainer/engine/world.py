"""The world: this process's rank, device and process groups, and control messages between ranks.

accelerate sets up device, precision and process group from torchrun's environment. A second, gloo
group on the CPU carries control messages, so that agreeing on a stop never waits for a GPU.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.engine.backends import choose_backends
from finetune_trainer.engine.packing.context import ALONE, ContextGroup
from finetune_trainer.engine.precision import precision_of
from finetune_trainer.failures import PEER_LOST, NodeFailure, TrainerError, recognise
from finetune_trainer.liveness import START_SECONDS

T = TypeVar("T")

# A collective that takes this long has lost a rank that did not close its connections.
COLLECTIVE_TIMEOUT: Final = datetime.timedelta(minutes=10)
# A rank may be downloading a model or writing a checkpoint while others wait for its message.
CONTROL_TIMEOUT: Final = datetime.timedelta(seconds=START_SECONDS)


@dataclass
class World:
    """This process's rank, device and process groups."""

    accelerator: Accelerator
    control: dist.ProcessGroup | None
    """CPU group for control messages; None in a world of one process."""
    control_timeout: datetime.timedelta = CONTROL_TIMEOUT
    """Longest wait for a control message."""

    @property
    def rank(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def size(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        return bool(self.accelerator.local_process_index == 0)

    @property
    def processes_per_node(self) -> int:
        """Processes per node."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.size))

    @property
    def nodes(self) -> int:
        return self.size // self.processes_per_node

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    def autocast(self) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self.accelerator.autocast()
        return context

    def on_main(self, make: Callable[[], T]) -> T:
        """Run ``make`` on rank 0 and return its result on every rank. An error is raised on every
        rank too, so that none waits for a failed rank 0."""
        message: list[Any] = [None, None]
        if self.is_main:
            try:
                message[0] = make()
            except Exception as error:
                message[1] = self._portable(error)
        if self.control is not None:
            dist.broadcast_object_list(message, src=0, group=self.control)
        if message[1] is not None:
            raise message[1]
        result: T = message[0]
        return result

    def on_all(self, work: Callable[[], T]) -> list[T]:
        """Run ``work`` on every rank and return the results by rank. The first error by rank is
        raised on every rank."""
        mine: tuple[T | None, TrainerError | None]
        try:
            mine = (work(), None)
        except Exception as error:
            mine = (None, self._portable(error))
        everyone: list[Any] = [mine]
        if self.control is not None:
            everyone = [None] * self.size
            dist.all_gather_object(everyone, mine, group=self.control)
        for _, failure in everyone:
            if failure is not None:
                raise failure
        return [result for result, _ in everyone]

    def _portable(self, error: Exception) -> TrainerError:
        """Convert an exception to one that can be sent (library exceptions often cannot be
        pickled); in a world of one process, raise the exception itself."""
        if self.control is None:
            raise error
        return recognise(error)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a small CPU tensor over all ranks, in place."""
        if self.control is not None:
            dist.all_reduce(values, group=self.control)
        return values

    def sum_on_device(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a small device tensor over all ranks, in place; does not wait for the device."""
        if self.control is not None:
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        if self.control is not None:
            dist.barrier(group=self.control)

    def with_own_control_group(self) -> World:
        """Return this world with a new control group, for another thread; a collective."""
        control = None if self.control is None else _control_group(self.control_timeout)
        return replace(self, control=control)

    def context_group(self, size: int) -> ContextGroup:
        """Return the context-parallel group of ``size`` consecutive ranks; a collective."""
        if size == 1:
            return ALONE
        group, _ = dist.new_subgroups(size)
        return ContextGroup(self.rank % size, size, group)

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def join(spec: FineTuneJobSpec) -> World:
    """Join the world that torchrun's environment describes.

    Raises:
        NodeFailure: if the other ranks cannot be reached.
    """
    cuda = torch.cuda.is_available()
    precision = precision_of(spec, cuda)
    if cuda:
        choose_backends()
    try:
        accelerator = Accelerator(
            cpu=not cuda,
            mixed_precision="bf16" if precision.autocast else "no",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT)],
        )
    except (RuntimeError, ConnectionError, TimeoutError) as error:
        raise NodeFailure(PEER_LOST, f"the process group did not form: {error}") from error
    if precision.copies and not dist.is_initialized():
        # FSDP needs a process group even in a world of one process.
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    asked = datetime.timedelta(seconds=spec.failure_policy.progress_deadline_seconds or 0)
    timeout = max(CONTROL_TIMEOUT, asked)
    control = _control_group(timeout) if accelerator.num_processes > 1 else None
    return World(accelerator, control, timeout)


def _control_group(timeout: datetime.timedelta) -> dist.ProcessGroup:
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout))


class Agreement:
    """Requests of single ranks, reported to all ranks identically, one step later.

    Each step sends this rank's requests into an asynchronous sum. The sum is read in the next step,
    when it has long arrived: no rank waits, and all ranks read the same sum at the same step. A
    world of one process gets its requests back immediately.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._flags: torch.Tensor | None = None
        self._handle: dist.Work | None = None

    def exchange(self, *flags: bool) -> tuple[bool, ...]:
        """Send this step's requests, and return which of the previous step any rank made."""
        if self._world.control is None:
            return flags
        answer = self.settle() or (False,) * len(flags)
        self._flags = torch.tensor([float(w) for w in flags])
        self._handle = dist.all_reduce(self._flags, group=self._world.control, async_op=True)
        return answer

    def settle(self) -> tuple[bool, ...] | None:
        """Finish the pending exchange and return its sum; None if none is pending."""
        if self._handle is None or self._flags is None:
            return None
        self._handle.wait()
        answer = tuple(bool(x > 0) for x in self._flags.tolist())
        self._handle = self._flags = None
        return answer
