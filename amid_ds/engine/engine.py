"""One DeepSpeed engine around student and teacher, its methods in the trainer's own terms."""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from amid_ds.config.recipe import Recipe
from amid_ds.data import Batch
from amid_ds.distributed.world import World
from amid_ds.engine import gather, leaves, memory, optimizer, restore, staging, tensor_files
from amid_ds.engine.body_split import check_split
from amid_ds.engine.ema import RunningMeans
from amid_ds.errors import TrainingError
from amid_ds.models.delta import parts_of
from amid_ds.models.distiller import Distiller, LossPart, MicroBatchLoss
from amid_ds.models.heads import check_head, check_isolation, ids_to_check
from amid_ds.models.router_loss import real_tokens
from amid_ds.models.sizes import default_teacher_tokens, hidden_states_fit, teacher_bytes_per_token
from amid_ds.models.tensor_parallel import split_kinds


class TeacherBatch(NamedTuple):
    """The teacher's way through an accumulation window: tokens that share a forward call, and
    whether its hidden states wait in pinned host memory. The same on every rank."""

    tokens_per_pass: int
    on_host: bool


class Engine:
    """The only face of DeepSpeed: what a training step, a checkpoint and generation ask of it.

    module: the `Distiller`, or for generation a causal LM by itself.
    gathered_bytes: bytes of weights that ZeRO-3 has gathered on this rank so far, counted in
    training. decayed: the parameters with weight decay, which are in a group of their own. means:
    those of the student's weights that the run keeps.
    """

    def __init__(self, deepspeed_engine: Any, world: World,
                 gathered_bytes: gather.GatheredBytes | None = None,
                 decayed: optimizer.DecayedParameters = "all",
                 means: RunningMeans | None = None) -> None:
        self._deepspeed, self.world, self.decayed = deepspeed_engine, world, decayed
        self._means = means
        self.gathered_bytes = gathered_bytes or gather.GatheredBytes()
        self.module: nn.Module = deepspeed_engine.module
        self._step_hooks: OrderedDict[int, Callable[[], None]] = OrderedDict()
        self.is_partitioned = bool(deepspeed_engine.zero_optimization_partition_weights())
        self.zero_stage = int(deepspeed_engine.zero_optimization_stage())
        self.student_dtype = "bf16" if deepspeed_engine.bfloat16_enabled() else "fp32"
        self._pinned = staging.PinnedBuffers() if world.device.type == "cuda" else None

    @property
    def distiller(self) -> Distiller:
        """The engine's module where it trains: student, teacher and the fused head."""
        assert isinstance(self.module, Distiller)
        return self.module

    @property
    def split_kinds(self) -> tuple[str, ...]:
        """What tensor parallelism has split of the student's body."""
        split = getattr(self.distiller.student, "split", None)
        return () if split is None else split_kinds(split.blocks)

    def start_step(self, learning_rate: float) -> None:
        """Begin an optimizer step, before the teacher runs; learning_rate: AdamW's."""
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate * group["ratio"]
        self.reset_prefetch()

    def reset_prefetch(self) -> None:
        """Start ZeRO-3's prefetch trace anew: at each optimizer step and each generated token.

        DeepSpeed itself would restart it at every forward, and drop it where the order of modules
        differs. Our order (teacher once, then the student's micro-batches) repeats per step only.
        """
        if self.is_partitioned:
            gather.param_coordinator(self._deepspeed).reset_step()

    def forward(self, batch: Batch, token_weights: Tensor, teacher_hidden: Tensor | None,
                parts: Sequence[LossPart], last: bool, routed: bool = True) -> MicroBatchLoss:
        """The loss of one micro-batch on the device, see `Distiller.forward`.

        Its `teacher_targets` are learnt from where it has them. last: whether it is the last one of
        the accumulation window. routed: it counts for the losses of a mixture's routers.
        """
        self._deepspeed.set_gradient_accumulation_boundary(last)
        real = real_tokens(batch) if routed and self.distiller.routers is not None else None
        loss: MicroBatchLoss = self._deepspeed(
            batch.input_ids, batch.valid, batch.targets, token_weights, teacher_hidden,
            batch.positions, batch.sequences, parts=parts, documents=batch.documents,
            targets=batch.teacher_targets, real=real)
        return loss

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of the sum over ranks of `loss`.

        DeepSpeed averages gradients over the data-parallel ranks, hence the factor.
        """
        self._deepspeed.backward(loss * self.world.dp_size, scale_wrt_gas=False)

    def optimizer_step(self) -> float | None:
        """The gradients' global norm before clipping, after the step; None: not finite, no step.

        Collective. DeepSpeed refuses such a step itself, except at stage 0 in fp32, where it
        neither checks nor reports the norm.
        """
        for hook in self._step_hooks.values():
            hook()
        engine = self._deepspeed
        if engine.zero_optimization() or engine.bfloat16_enabled():
            engine.step()
            return float(engine.get_global_grad_norm()) if engine.was_step_applied() else None
        # Of parameters that every rank has whole, and of those that tensor parallelism splits.
        squares = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                is_split = int(hasattr(parameter, "tensor_model_parallel"))
                squares[is_split] += parameter.grad.double().square().sum()
        # Every rank has the gradients of the whole step: world.sum counts each of the dp_size
        # copies.
        whole, split = self.world.sum(squares)
        norm = math.sqrt((whole + split * self.world.tp_size) / self.world.dp_size)
        if not math.isfinite(norm):
            return None
        engine.step()
        return norm

    def teacher_hidden_states(self, batches: Sequence[Batch], micro_batch_tokens: int,
                              teacher_batch: TeacherBatch) -> list[Tensor]:
        """The teacher's hidden states of every micro-batch; see the `Distiller`'s method."""
        micro_batches = max(1, teacher_batch.tokens_per_pass // micro_batch_tokens)
        return self.distiller.teacher_hidden_states(batches, micro_batches,
                                                    teacher_batch.on_host)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """A context in which the student is in eval mode."""
        self._deepspeed.eval()
        try:
            yield
        finally:
            self._deepspeed.train()

    def gathered_head(self, model: nn.Module | None) -> contextlib.AbstractContextManager[None]:
        """A context in which every rank can read the whole head of `model`. Collective."""
        return gather.gathered_head(model)

    def gathered(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """A context in which every rank holds its tensor-parallel share of `model`, all of it.

        Gathered once, however often the model runs in it. Collective.
        """
        return (gather.gathered_model(self._deepspeed, model) if self.is_partitioned
                else contextlib.nullcontext())

    def fits_gathered(self, model: nn.Module) -> bool:
        """True where the weights of `model` take less than half of every rank's free memory.

        Collective.
        """
        if not self.is_partitioned:
            return True
        size = sum(gather.full_numel(p) * p.element_size() for p in model.parameters())
        return size < memory.least_free_memory(self.world) // 2

    def choose_teacher_batch(self, recipe: Recipe, previous: int | None) -> TeacherBatch:
        """The window's tokens that share one forward call of the teacher. Collective.

        That is the recipe's `teacher.max_tokens_per_pass`; else what the run's attempt before took
        (`previous`), because the number of rows in a product changes its last digits; else what an
        eighth of the free memory holds of a layer's activations. If the window's hidden
        states exceed another eighth, all of them wait in pinned host memory, on a GPU.
        """
        teacher = self.distiller.teacher
        if teacher is None:
            return TeacherBatch(0, False)
        parts = parts_of(teacher)
        element_size = next(teacher.parameters()).element_size()
        free = memory.least_free_memory(self.world)
        window = recipe.train.global_batch_size // self.world.dp_size * recipe.train.seq_length
        on_host = (self.world.device.type == "cuda"
                   and not hidden_states_fit(parts, element_size, window, free))
        per_token = teacher_bytes_per_token(parts, element_size, recipe.train.seq_length)
        most = None if recipe.live_teacher is None else recipe.live_teacher.max_tokens_per_pass
        tokens = most or previous or default_teacher_tokens(free, per_token)
        return TeacherBatch(tokens, on_host)

    def check_models(self, vocab_size: int, isolated: bool) -> None:
        """Raise InputError unless the fused heads give both models' own logits on a few tokens,
        and, under tensor parallelism, the split bodies what the whole ones give.

        Where documents are to be isolated (`isolated`), also unless they are. Collective.
        """
        models = [("student", self.distiller.student),
                  *(("teacher", part) for part in parts_of(self.distiller.teacher))]
        grown = self.distiller.head.first_pieces
        for name, model in models:
            title = f"the {name} {model.config.name_or_path}"   # type: ignore[union-attr]
            is_older = name == "teacher" and grown is not None
            known = vocab_size - len(grown.pieces) if is_older else vocab_size  # type: ignore
            ids = ids_to_check(model, known).to(self.world.device)
            with self.reads_registered():
                check_split(model, title, ids, self.world)
                check_head(model, title, ids, self.gathered_head)
                if isolated:
                    check_isolation(model, title, ids)

    def reads_registered(self) -> contextlib.AbstractContextManager[None]:
        """A context for the first forwards; see engine/leaves.py."""
        return (leaves.reads_registered(self.module) if self.is_partitioned
                else contextlib.nullcontext())

    def stage_checkpoint(self) -> dict[str, object]:
        """This rank's part of a checkpoint, by file name, copied to host memory. Collective.

        On a GPU the next call overwrites it.
        """
        return staging.stage_checkpoint(self._deepspeed, self._pinned)

    def save_checkpoint(self, folder: Path, tag: str) -> None:
        """DeepSpeed's own save, which waits until all is written: for comparison. Collective."""
        self._deepspeed.save_checkpoint(str(folder), tag=tag, exclude_frozen_parameters=True)

    def load_checkpoint(self, checkpoint: Path) -> None:
        """Restore weights and optimizer in the layout that they were saved in. Collective.

        Raises TrainingError where the files are not what DeepSpeed wrote.
        """
        tensor_files.read_safely(self._deepspeed)
        try:
            with optimizer.options_kept(self._deepspeed):
                loaded, _ = self._deepspeed.load_checkpoint(
                    str(checkpoint.parent), tag=checkpoint.name, load_module_strict=False)
        except TrainingError:
            raise
        # DeepSpeed takes its files' content for granted: a changed one can make it raise anything.
        except Exception as error:
            raise TrainingError(f"{checkpoint} could not be loaded: {type(error).__name__}: "
                                f"{error}") from error
        if loaded is None:
            raise TrainingError(f"DeepSpeed could not load {checkpoint}")
        self._settle_means()

    def load_tensors(self, read: Callable[[str], Mapping[str, Tensor]], step: int) -> None:
        """Restore weights and optimizer from whole tensors, see restore.py. Collective."""
        restore.load_tensors(self._deepspeed, read, step,
                             () if self._means is None else self._means.decays)
        self._settle_means()

    def _settle_means(self) -> None:
        if self._means is not None:
            self._means.settle()

    def resident_bytes(self) -> dict[str, int]:
        """Bytes that stay on this rank from step to step: both models' weights, the optimizer."""
        return memory.resident_bytes(self._deepspeed)

    def gradient_bytes(self) -> int:
        """Bytes of the gradients that wait for the optimizer on this rank."""
        return memory.gradient_bytes(self._deepspeed)

    def gathered_now_bytes(self, model: nn.Module) -> int:
        """Bytes of those weights of `model` that are whole on this rank at the moment."""
        return memory.gathered_now_bytes(model.parameters())

    def before_optimizer_step(self, hook: Callable[[], None]) -> RemovableHandle:
        """Call `hook` before each optimizer step, until the returned handle is removed."""
        handle = RemovableHandle(self._step_hooks)
        self._step_hooks[handle.id] = hook
        return handle
