"""Recipe + DeepSpeed config -> one engine that holds student and teacher, both loaded sharded. The owner of deepspeed.

The recipe owns batch sizes, clipping, optimizer and schedule; the DeepSpeed config owns precision, ZeRO and
communication. What both name must agree.
"""

from __future__ import annotations

import math
import socket
from typing import Any

import psutil
import torch
from torch import nn

from amid_ds.config.recipe import Recipe
from amid_ds.distributed.world import World
from amid_ds.engine.gather import (
    gathered_head,
    param_coordinator,
)
from amid_ds.models.distiller import Distiller
from amid_ds.models.heads import check_head, check_isolation


def start_step(engine: Any) -> None:
    """For the start of each optimizer step, before the teacher runs: here ZeRO-3's prefetch trace starts anew."""
    if engine.zero_optimization_partition_weights():
        param_coordinator(engine).reset_step()


def optimizer_step(engine: Any, world: World) -> float | None:
    """The optimizer step; the gradients' global norm before clipping, or None: it is not finite, no step was taken.

    Collective. DeepSpeed refuses the step itself, but for stage 0 in fp32, where it neither looks nor tells the norm.
    """
    if engine.zero_optimization() or engine.bfloat16_enabled():
        engine.step()
        return float(engine.get_global_grad_norm()) if engine.was_step_applied() else None
    trained = [p for p in engine.module.parameters() if p.grad is not None]
    whole, split = (sum(float(p.grad.double().square().sum()) for p in trained
                        if hasattr(p, "tensor_model_parallel") == wanted) for wanted in (False, True))
    # Every rank has the gradients of the whole step: world.sum counts each of the dp_size copies.
    norm = math.sqrt(whole + world.sum([split])[0] * world.tp_size / world.dp_size)
    if math.isfinite(norm):
        engine.step()
        return norm
    return None


def fits_whole(engine: Any, model: nn.Module, world: World) -> bool:
    """Whether all the weights of `model` take less than half of what memory every rank has left. Collective."""
    if not engine.zero_optimization_partition_weights():
        return True
    size = sum(p.ds_numel * p.element_size() for p in model.parameters())   # type: ignore[attr-defined]
    return size < min(world.gather(_free_memory(world))) // 2


def choose_teacher_batch(engine: Any, recipe: Recipe, before: int | None, world: World) -> int:
    """How many tokens of the window share one forward call of the teacher, and where its hidden states wait.

    The recipe's `teacher.max_tokens_per_pass`; else what the run's life before took (`before`), because the number of
    rows in a product changes its last digits; else what an eighth of the rank's free memory holds of a layer's
    activations. The same on every rank. Hidden states beyond another eighth wait in pinned host memory.
    """
    distiller: Distiller = engine.module
    if distiller.teacher is None or recipe.teacher is None:
        return 0
    config: Any = distiller.teacher.config
    size = next(distiller.teacher.parameters()).element_size()
    activations = 8 * config.hidden_size + 4 * (getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    if config._attn_implementation == "eager":      # it makes the scores of a row with all the others, twice
        activations += 2 * config.num_attention_heads * recipe.train.seq_length
    budget = min(world.gather(_free_memory(world))) // 8
    window = recipe.train.global_batch_size // world.dp_size * recipe.train.seq_length
    distiller.wait_on_host = world.device.type == "cuda" and window * config.hidden_size * size > budget
    fits = 1 << max(0, (budget // (activations * size)).bit_length() - 1)
    return recipe.teacher.max_tokens_per_pass or before or fits


def _free_memory(world: World) -> int:
    """Bytes that this rank may still take: the GPU's, or its share of the host's."""
    if world.device.type == "cuda":
        return torch.cuda.mem_get_info(world.device)[0]
    host = socket.gethostname()
    return psutil.virtual_memory().available // world.gather(host).count(host)


def check_models(engine: Any, vocab_size: int, isolated: bool) -> None:
    """On a few tokens, at the start of every run: the fused heads give both models' own logits, and documents that are
    to be isolated are."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (2, 16), generator=generator).to(engine.device)
    for name, model in (("student", engine.module.student), ("teacher", engine.module.teacher)):
        if model is not None:
            title = f"the {name} {model.config.name_or_path}"
            check_head(model, title, ids, gathered_head)
            if isolated:
                check_isolation(model, title, ids)
