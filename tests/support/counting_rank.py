"""A rank that counts each optimizer step's costs: gathers, teacher passes, rows of the loss."""

from __future__ import annotations

import json

from support.patches import patch_train_step
from support.ranks import rank_main


def counting_rank(argv: list[str], variables: dict[str, str], log: str) -> None:
    """Run as a rank that writes the counts of each optimizer step to RANK.jsonl in its run."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import (
        PartitionedParameterCoordinator as Coordinator,
    )

    from amid_ds.models import distiller, heads

    count = {"invalidations": 0, "losses": 0, "loss_rows": 0, "teacher_calls": 0}
    invalidate, loss = Coordinator._invalidate_trace, distiller.linear_amid_loss
    body_of = heads.body_of

    def counted(name, function, rows=lambda *_: 0):
        def call(*arguments, **options):
            count[name] += 1
            count["loss_rows"] += rows(*arguments)
            return function(*arguments, **options)
        return call

    def body(model):
        frozen = not any(parameter.requires_grad for parameter in model.parameters())
        count["teacher_calls"] += frozen
        return body_of(model)

    def around(trainer, batch):
        gathered = trainer.engine.gathered_bytes
        before = dict(count), gathered.teacher, gathered.student
        yield
        optimizer = trainer.engine._deepspeed.optimizer
        coordinator = optimizer.parameter_offload.get_param_coordinator()
        named = list(trainer.engine.distiller.named_parameters())
        line = {
            **{name: value - before[0][name] for name, value in count.items()},
            "teacher_bytes": gathered.teacher - before[1],
            "student_bytes": gathered.student - before[2],
            "complete": coordinator.is_complete_trace(),
            "micro_batches": len(batch.window),
            "valid": sum(int((each.labels != -100).sum()) for each in batch.window),
            "parameters": sum(p.ds_numel * p.element_size() for name, p in named
                              if name.startswith("teacher."))
            + sum(p.numel() * p.element_size() for _, p in named if not hasattr(p, "ds_id")),
        }
        with open(trainer.job.run.path / f"{variables['RANK']}.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    Coordinator._invalidate_trace = counted("invalidations", invalidate)
    distiller.linear_amid_loss = counted("losses", loss, lambda hidden, *_: hidden.shape[0])
    heads.body_of = body
    patch_train_step(around)
    rank_main(argv, variables, log)
