"""The gang: this process among its peers, and the few words they exchange.

accelerate sets up device, precision and process group from torchrun's environment. Beside the
device's group a gloo group on the CPU carries control words, so that agreeing on a stop never
waits for a GPU.
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

T = TypeVar("T")

# A collective that takes this long has lost a peer that did not close its connections.
COLLECTIVE_TIMEOUT: Final = datetime.timedelta(minutes=10)
# While words are awaited, one process may be fetching a model or writing a checkpoint.
CONTROL_TIMEOUT: Final = datetime.timedelta(hours=6)


@dataclass
class World:
    """This process's place, device and channels."""

    accelerator: Accelerator
    control: dist.ProcessGroup | None
    """CPU group for words; None in a gang of one."""

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
        """Processes of a node."""
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
        """What ``make`` returns in the first process, in every process. Its failure is every
        process's failure, so that nobody waits for a peer that has given up."""
        word: list[Any] = [None, None]
        if self.is_main:
            try:
                word[0] = make()
            except Exception as error:
                word[1] = self._tell(error)
        if self.control is not None:
            dist.broadcast_object_list(word, src=0, group=self.control)
        if word[1] is not None:
            raise word[1]
        result: T = word[0]
        return result

    def on_all(self, work: Callable[[], T]) -> list[T]:
        """Results of ``work`` from all processes, by rank; the first failure is everyone's."""
        mine: tuple[T | None, TrainerError | None]
        try:
            mine = (work(), None)
        except Exception as error:
            mine = (None, self._tell(error))
        everyone: list[Any] = [mine]
        if self.control is not None:
            everyone = [None] * self.size
            dist.all_gather_object(everyone, mine, group=self.control)
        for _, failure in everyone:
            if failure is not None:
                raise failure
        return [result for result, _ in everyone]

    def _tell(self, error: Exception) -> TrainerError:
        """An exception as one that travels (library exceptions often cannot be pickled); alone,
        the exception itself is raised."""
        if self.control is None:
            raise error
        return recognise(error)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all processes of a small CPU tensor."""
        if self.control is not None:
            dist.all_reduce(values, group=self.control)
        return values

    def sum_on_device(self, values: torch.Tensor) -> torch.Tensor:
        """As ``sum``, of a small tensor on the device, without waiting for it there."""
        if self.control is not None:
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        if self.control is not None:
            dist.barrier(group=self.control)

    def with_own_control_group(self) -> World:
        """The same gang, for words of another thread; every process must ask for it."""
        return replace(self, control=None if self.control is None else _control_group())

    def context_group(self, size: int) -> ContextGroup:
        """This process's place in a group of so many neighbours; every process must ask for it."""
        if size == 1:
            return ALONE
        group, _ = dist.new_subgroups(size)
        return ContextGroup(self.rank % size, size, group)

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def join(spec: FineTuneJobSpec) -> World:
    """Take this process's place, as torchrun's environment says.

    Raises:
        NodeFailure: where the peers cannot be reached.
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
        raise NodeFailure(PEER_LOST, f"the gang did not form: {error}") from error
    if precision.copies and not dist.is_initialized():
        # FSDP wants a group, though this process is alone.
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    control = None
    if accelerator.num_processes > 1:
        control = _control_group()
    return World(accelerator, control)


def _control_group() -> dist.ProcessGroup:
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT))


class Agreement:
    """Wishes of single processes, answered alike in all of them, one step later.

    Each step sends this process's wishes into an asynchronous sum; the answer is read in the next
    step, when it has long arrived: nobody waits for it, and all processes read the same answer at
    the same step. A gang of one is answered at once.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._word: torch.Tensor | None = None
        self._handle: dist.Work | None = None

    def exchange(self, *wishes: bool) -> tuple[bool, ...]:
        """Which wishes any process had in the step before."""
        if self._world.control is None:
            return wishes
        answer = self.settle() or (False,) * len(wishes)
        self._word = torch.tensor([float(w) for w in wishes])
        self._handle = dist.all_reduce(self._word, group=self._world.control, async_op=True)
        return answer

    def settle(self) -> tuple[bool, ...] | None:
        """Finish the exchange under way; its answer, or None where there is none."""
        if self._handle is None or self._word is None:
            return None
        self._handle.wait()
        answer = tuple(bool(x > 0) for x in self._word.tolist())
        self._handle = self._word = None
        return answer
