"""Recipe + DeepSpeed config -> one engine that holds student and teacher, both loaded sharded. The owner of deepspeed.

The recipe owns batch sizes, clipping, optimizer and schedule; the DeepSpeed config owns precision, ZeRO and
communication. What both name must agree.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import socket
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from amid_ds.config import DivergenceSpec, Dtype, Loss, Recipe, Teacher
from amid_ds.distiller import Distiller, body_of, check_head, check_isolation, head_of
from amid_ds.distributed import World
from amid_ds.errors import InputError
from amid_ds.host_memory import freed_memory_given_back
from amid_ds.losses import AlphaBeta, AMiD, preset
from amid_ds.origin import student_of
from amid_ds.packaged import folder_of
from amid_ds.tensor_parallel import cut_head, layer_specs, vocab_shard, why_whole

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
OWNED_BY_RECIPE = {"optimizer": "train.learning_rate and train.weight_decay", "scheduler": "train.schedule",
                   "train_batch_size": "train.global_batch_size", "tensor_parallel": "tensor_parallel",
                   "activation_checkpointing": "student.activation_checkpointing"}


def import_deepspeed() -> Any:
    """deepspeed, quiet, and without its just-in-time shared-memory collective.

    That op costs 70 s of compilation and Python's headers at the first run on a CPU, and serves inference alone.
    """
    # DeepSpeed's other ops are built by ninja, which lies beside this interpreter, not always on the PATH.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")   # else it warns of a guess
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(os.environ.get("DEEPSPEED_LOG_LEVEL", "ERROR").upper())
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that torch 2.13 has renamed; nothing that a user could act on.
    warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.distributed\.")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def read_deepspeed_config(recipe: Recipe, data_parallel: int) -> dict[str, Any]:
    """The DeepSpeed config with the recipe's numbers filled in. Raises InputError where the two contradict."""
    path = find_deepspeed_config(recipe.deepspeed)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"it holds a {type(config).__name__}, not a mapping")
    except (OSError, ValueError) as error:
        raise InputError(f"the DeepSpeed config {path} cannot be read: {error}", "a JSON object",
                         "mend the file, or start from one in ds_configs/") from None
    ours = {"train_micro_batch_size_per_gpu": recipe.train.micro_batch_size,
            "gradient_accumulation_steps": accumulation_steps(recipe, data_parallel),
            "gradient_clipping": recipe.train.gradient_clipping}
    conflicts = [f"{key}: {config[key]} in {path.name}, {value} by the recipe" for key, value in ours.items()
                 if config.get(key, "auto") not in ("auto", value)]
    conflicts += [f"{key}: {json.dumps(config[key])} in {path.name}, {owner} in the recipe"
                  for key, owner in OWNED_BY_RECIPE.items() if config.get(key, "auto") != "auto"]
    conflicts += stage_conflicts(recipe, config, path.name)
    if config.get("fp16", {}).get("enabled"):
        conflicts.append(f"fp16.enabled: true in {path.name}, the recipe knows bf16 and fp32")
    bf16 = bool(config.get("bf16", {}).get("enabled"))
    if recipe.student.dtype != "auto" and (recipe.student.dtype == "bf16") != bf16:
        conflicts.append(f"bf16.enabled: {str(bf16).lower()} in {path.name}, "
                         f"student.dtype: {recipe.student.dtype} in the recipe")
    if conflicts:
        lines = "\n".join(f"    - {conflict}" for conflict in conflicts)
        raise InputError(f"recipe and DeepSpeed config contradict each other:\n{lines}",
                         'each value in one place; batch sizes, clipping, optimizer and schedule in the recipe',
                         f'take these keys out of {path}, or set them to "auto", or to what the line asks for')
    for key in OWNED_BY_RECIPE:
        config.pop(key, None)
    if recipe.data.auxiliary is not None:      # each micro-batch has one of the second corpus beside it
        ours["gradient_accumulation_steps"] = 2 * accumulation_steps(recipe, data_parallel)
    return {**config, **ours, "steps_per_print": sys.maxsize}


def stage_of(config: dict[str, Any]) -> Any:
    """The ZeRO stage of a DeepSpeed config: 0 to 3, or what else is written there."""
    return config.get("zero_optimization", {}).get("stage", 0)


def stage_conflicts(recipe: Recipe, config: dict[str, Any], name: str) -> Iterator[str]:
    """What is wrong with the ZeRO stage in itself or for the recipe's layout."""
    stage = stage_of(config)
    bf16 = bool(config.get("bf16", {}).get("enabled"))
    if stage not in (0, 1, 2, 3):
        yield f"zero_optimization.stage: {stage!r} in {name}, the stages are 0 to 3"
    elif stage == 0 and bf16 and recipe.tensor_parallel > 1:
        # DeepSpeed's optimizer of that stage gets the gradient norm of a split model wrong (0.780 for 0.883).
        yield f"zero_optimization.stage: 0 with bf16 in {name}, tensor_parallel: {recipe.tensor_parallel} needs stage 1"
    elif stage < 3 and bf16 and recipe.teacher is not None and not teacher_apart(recipe, config) and (
            recipe.teacher.dtype == "fp32" or (recipe.teacher.dtype == "auto" and checkpoint_dtype(
                recipe.teacher.model, **recipe.teacher.opened_with) == torch.float32)):
        # Below stage 3 DeepSpeed casts every parameter of the engine to bf16, the teacher's too.
        yield (f"zero_optimization.stage: {stage} with bf16 in {name}, a teacher in fp32 on tensor-parallel ranks "
               "needs stage 3, or set teacher.placement: replicated, or teacher.dtype: bf16")


def teacher_apart(recipe: Recipe, config: dict[str, Any]) -> bool:
    """Whether every rank holds the teacher whole, beside the engine: asked for, or because nothing would shard it."""
    return recipe.teacher is not None and (
        recipe.teacher.placement == "replicated" or (stage_of(config) != 3 and recipe.tensor_parallel == 1))


def build_teacher(teacher: Teacher, config: dict[str, Any]) -> Any:
    """A teacher by itself, sharded over all ranks by ZeRO-3 in an engine that does not train. Collective."""
    deepspeed = import_deepspeed()
    model = load(teacher.model, teacher.dtype, config, **teacher.opened_with)
    bf16 = next(model.parameters()).dtype == torch.bfloat16
    engine, *_ = deepspeed.initialize(model=model.requires_grad_(False), dist_init_required=False,
                                      config={**config, "bf16": {"enabled": bf16}})
    engine.eval()
    return engine


def find_deepspeed_config(name: str) -> Path:
    """`name` as given, or, where there is no such file, the packaged one of that name."""
    if Path(name).is_file():
        return Path(name)
    folder = folder_of("ds_configs")
    packaged = folder / Path(name).name
    if packaged.is_file() and Path(name).parent.name in ("", "ds_configs"):
        return packaged
    ready = ", ".join(sorted(p.name for p in folder.glob("*.json")))
    raise InputError(f"the DeepSpeed config {name} is not there", f"a JSON file, or one of ours: {ready}",
                     "check `deepspeed:` in the recipe")


def build_objective(loss: Loss) -> AMiD:
    """The recipe's objective. Raises InputError for a preset, divergence or order that does not exist."""
    own = {"preset", "kd_weight", "ce_weight"}
    values: dict[str, Any] = {key: value for key, value in loss if key not in own}
    if isinstance(loss.divergence, DivergenceSpec):
        values["divergence"] = AlphaBeta(loss.divergence.alpha_beta.alpha, loss.divergence.alpha_beta.beta)
    try:
        if loss.preset is None:
            return AMiD(**values)
        return preset(loss.preset, **{key: values[key] for key in loss.model_fields_set - own})
    except (ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the recipe's loss: {error}", "an objective as in the README",
                         "mend the `loss:` section") from None


def data_parallel(recipe: Recipe, ranks: int) -> int:
    """How many ranks see different tokens. Raises InputError where tensor_parallel does not divide `ranks`."""
    size = recipe.tensor_parallel
    if ranks % size:
        fitting = ", ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)
        raise InputError(f"tensor_parallel {size} on {ranks} rank(s)", "a divisor of the number of ranks",
                         f"set tensor_parallel to one of {fitting}; or start a multiple of {size} ranks")
    return ranks // size


def accumulation_steps(recipe: Recipe, data_parallel: int) -> int:
    """Micro-batches per rank and optimizer step. Raises InputError where the global batch does not divide."""
    train = recipe.train
    steps, rest = divmod(train.global_batch_size, data_parallel * train.micro_batch_size)
    if rest or not steps:
        whole, left = divmod(train.global_batch_size, train.micro_batch_size)
        fitting = [] if left else [n * recipe.tensor_parallel for n in range(1, whole + 1) if whole % n == 0]
        numbers = ", ".join(map(str, fitting)) or "none"
        raise InputError(
            f"train.global_batch_size {train.global_batch_size} on {data_parallel} data-parallel rank(s) of "
            f"train.micro_batch_size {train.micro_batch_size}",
            f"a multiple of ranks × micro-batch = {data_parallel * train.micro_batch_size}",
            f"start on one of these numbers of ranks: {numbers}; or change one of the two keys")
    return steps


def build_engine(recipe: Recipe, config: dict[str, Any], objective: AMiD, vocab_size: int, world: World) -> Any:
    """The DeepSpeedEngine around a Distiller. Collective: every rank calls it with the same recipe."""
    with freed_memory_given_back():
        return _build_engine(recipe, config, objective, vocab_size, world)


def _build_engine(recipe: Recipe, config: dict[str, Any], objective: AMiD, vocab_size: int, world: World) -> Any:
    deepspeed = import_deepspeed()
    shard = vocab_shard(vocab_size, world.tp_rank, world.tp_size, world.tp_group)
    teacher, apart = None, teacher_apart(recipe, config)
    if recipe.teacher is not None:
        teacher = load(recipe.teacher.model, recipe.teacher.dtype, {} if apart else config,
                       **recipe.teacher.opened_with)
        teacher.to(world.device if apart else None)
    student_dtype: Dtype = "bf16" if config.get("bf16", {}).get("enabled") else "fp32"
    begins = student_of(recipe)
    student = load(begins.model, student_dtype, config, **begins.opened_with)
    if recipe.student.activation_checkpointing:
        student.gradient_checkpointing_enable(   # type: ignore[operator]
            gradient_checkpointing_kwargs={"use_reentrant": False})
    distiller = Distiller(student, teacher, objective, vocab_size=vocab_size, shard=shard,
                          kd_weight=1.0, ce_weight=0.0, apart=apart)      # until a step pursues its own
    distiller.train()      # from_pretrained leaves a model in eval mode: no dropout, no activation checkpointing
    if shard is not None:
        for model in filter(None, (student, teacher)):
            cut_head(model, shard, vocab_size, gathered_head)
        config = {**config, "tensor_parallel": _autotp(distiller, world)}
    trainable = [p for p in distiller.parameters() if p.requires_grad]
    # The loop sets the learning rate of every step. At stage 0 in bf16 DeepSpeed takes a step without gradients to make
    # Adam's state: with a rate of 0 it moves nothing, and below it is made not to count.
    optimizer = torch.optim.AdamW(trainable, lr=0.0, weight_decay=recipe.train.weight_decay)
    with _split_layer_by_layer(distiller) if shard is not None and stage_of(config) == 3 else contextlib.nullcontext():
        engine, *_ = deepspeed.initialize(model=distiller, model_parameters=trainable, optimizer=optimizer,
                                          config=config, dist_init_required=False)
    for values in optimizer.state.values():
        values["step"].zero_()
    if stage_of(config) == 3:
        engine.gathered = Gathered()
        for held in distiller.parameters():
            held.all_gather_coalesced = partial(   # type: ignore[attr-defined]
                _gather_in_order, held.all_gather_coalesced, engine.gathered)   # type: ignore[attr-defined]
            held.all_gather = partial(   # type: ignore[attr-defined]
                _gather_alone, held.all_gather, engine.gathered, held)   # type: ignore[attr-defined]
        # ZeRO-3 prefetches along a trace of modules that it starts anew at every forward, and drops where one differs
        # from the one before. The teacher runs once in a window of several: one trace spans it all (`begin_window`).
        engine.optimizer.parameter_offload.fwd_pre_hook.remove()
        # The student's head is read by FusedHead, not by the module that owns it: tell ZeRO-3's hooks.
        head = head_of(student)
        for parameter in (head.weight, head.bias):
            if parameter is not None:
                deepspeed.zero.register_external_parameter(distiller.head, parameter)
    return engine


@contextlib.contextmanager
def _split_layer_by_layer(distiller: Distiller) -> Iterator[None]:
    """Within it AutoTP's part of a layer goes into ZeRO-3's partitions before the next layer is gathered.

    By itself DeepSpeed partitions all of them at the end, and a rank holds its whole tensor-parallel share of both
    models until then.
    """
    from deepspeed.module_inject.auto_tp import AutoTP
    from deepspeed.utils import groups

    partitioned: Any = next(p for p in distiller.parameters() if hasattr(p, "ds_id"))
    replace_layer = AutoTP._replace_with_config

    def replace(autotp: Any, child: nn.Module, name: str) -> nn.Module:
        before: list[Any] = list(child.parameters(recurse=False))
        layer = replace_layer(autotp, child, name)
        if layer is not child:
            for parameter in before:      # AutoTP keeps the parameter, to know it by; its data would stay with it
                parameter.ds_tensor.data = parameter.ds_tensor.data.new_empty(0)
        fresh: list[Any] = [p for p in layer.parameters(recurse=False) if not hasattr(p, "ds_id")]
        for parameter in fresh:
            parameter.ds_zero_partition_process_group = groups.get_data_parallel_group()
        partitioned.convert_to_zero_parameters(param_list=fresh)
        return layer

    AutoTP._replace_with_config = replace
    try:
        yield
    finally:
        AutoTP._replace_with_config = replace_layer


@dataclass
class Gathered:
    """Bytes of weights that ZeRO-3 has put together on this rank since the engine was built."""

    student: int = 0
    teacher: int = 0

    def add(self, parameters: Iterable[Any]) -> None:
        for parameter in parameters:
            size = parameter.ds_numel * parameter.element_size()
            if parameter.requires_grad:
                self.student += size
            else:
                self.teacher += size


def begin_window(engine: Any) -> None:
    """For the start of each optimizer step, before the teacher runs: here ZeRO-3's prefetch trace starts anew."""
    if engine.zero_optimization_partition_weights():
        _coordinator(engine).reset_step()


def _coordinator(engine: Any) -> Any:
    """What ZeRO-3's hooks ask; without an optimizer there is the offload alone."""
    return getattr(engine.optimizer, "parameter_offload", engine.optimizer).get_param_coordinator()


def _gather_in_order(gather: Callable[..., Any], gathered: Gathered, parameters: Iterable[Any], **options: Any) -> Any:
    """DeepSpeed's gather of several parameters, counted, and its groups of ranks in the same order on every rank.

    Under tensor parallelism parameters lie over two groups (all ranks, the data-parallel ones). DeepSpeed takes the
    groups in the order of a Python set, that is of addresses, and NCCL may wait for ever where ranks differ in it.
    """
    ordered = sorted(parameters, key=lambda parameter: parameter.ds_id)
    gathered.add(ordered)
    return gather(ordered, **options)


def _gather_alone(gather: Callable[..., Any], gathered: Gathered, own: Any, param_list: list[Any] | None = None,
                  **options: Any) -> Any:
    """DeepSpeed's gather that waits, of `param_list` or of the parameter that it belongs to, counted."""
    gathered.add([own] if param_list is None else param_list)
    return gather(param_list, **options)


def _autotp(distiller: Distiller, world: World) -> dict[str, Any]:
    """DeepSpeed's `tensor_parallel` block: which weights of the two bodies AutoTP splits. Says what stays whole."""
    specs = []
    for name, model in (("student", distiller.student), ("teacher", distiller.teacher)):
        if name not in distiller._modules or model is None:      # a teacher apart from the engine is whole by request
            continue
        reason = why_whole(model, world.tp_size)
        if reason is None:
            specs += layer_specs(model, name, trains=name == "student")
        elif world.is_main:
            print(f"tensor_parallel {world.tp_size}: the {name}'s body stays whole on every rank, its head is split: "
                  f"{reason}", flush=True)
    return {"autotp_size": world.tp_size, "partition_config": {"use_default_specs": False, "layer_specs": specs}}


def load(model: str, dtype: Dtype, config: dict[str, Any], revision: str | None = None,
         trust_remote_code: bool = False) -> nn.Module:
    """A causal LM. Under ZeRO-3 it is loaded straight into shards: rank 0 reads, each rank keeps its part."""
    from transformers import AutoModelForCausalLM
    from transformers import logging as transformers_logging
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    transformers_logging.set_verbosity_error()      # its advice on generating and padding is not for us
    transformers_logging.disable_progress_bar()
    torch_dtype = DTYPES.get(dtype) or checkpoint_dtype(model, revision, trust_remote_code)
    if stage_of(config) < 3:
        return AutoModelForCausalLM.from_pretrained(model, revision=revision, dtype=torch_dtype,
                                                    trust_remote_code=trust_remote_code)
    holder = _ShardedLoading({**config, "bf16": {"enabled": torch_dtype == torch.bfloat16}})
    set_hf_deepspeed_config(holder)
    try:
        return AutoModelForCausalLM.from_pretrained(model, revision=revision, dtype=torch_dtype,
                                                    trust_remote_code=trust_remote_code)
    finally:
        unset_hf_deepspeed_config()


class _ShardedLoading:
    """What from_pretrained asks to know whether, and with which config, to build a model under zero.Init."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def is_zero3(self) -> bool:
        return True


def model_config(model: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The model's transformers config, without its weights. Raises InputError where there is none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise InputError(f"the model {model!r} comes with Python code of its own", "one that transformers knows",
                             "read its code; if you trust it, set trust_remote_code: true beside the model") from None
        first_line = str(error).strip().splitlines()[0]
        raise InputError(f"no model can be read from {model!r}: {first_line}",
                         "a folder with config.json and weights, or the id of a model on the hub",
                         "check the path; relative paths start where the command is run") from None


def shell_of(model: str, revision: str | None = None, trust_remote_code: bool = False) -> nn.Module:
    """The model without its weights: every parameter on the meta device. Raises what transformers raises."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model_config(model, revision, trust_remote_code),
                                                trust_remote_code=trust_remote_code)


def refuse_unfit(model: str, revision: str | None = None, trust_remote_code: bool = False) -> None:
    """Raise InputError for a model that the one engine or the fused head cannot take. Judged without its weights."""
    config = model_config(model, revision, trust_remote_code)
    problem = None
    if getattr(config, "quantization_config", None) is not None:
        problem = "its weights are quantized"
    else:
        try:
            shell: Any = shell_of(model, revision, trust_remote_code)
        except (ValueError, ImportError, KeyError) as error:
            problem = str(error).strip().splitlines()[0][:200]
        else:
            head = shell.get_output_embeddings()
            if not isinstance(head, nn.Linear) or body_of(shell) is shell:
                problem = f"{type(shell).__name__} is not a body with one linear head"
    if problem is not None:
        raise InputError(f"the model {model} (model_type {config.model_type}) cannot be distilled here: {problem}",
                         "a causal language model of transformers: a body, a linear head, weights in bf16 or fp32",
                         "choose such a model, or save this one's weights unquantized with save_pretrained")


def checkpoint_dtype(model: str, revision: str | None = None, trust_remote_code: bool = False) -> torch.dtype:
    """The dtype that the checkpoint's config names; fp32 where it names none that we run in."""
    named = model_config(model, revision, trust_remote_code).dtype
    return named if named in DTYPES.values() else torch.float32


def take_step(engine: Any, world: World) -> float | None:
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


@contextlib.contextmanager
def gathered_head(model: nn.Module | None) -> Iterator[None]:
    """Within it the whole head of `model` can be read on every rank, gathered once however often it is read."""
    deepspeed = import_deepspeed()
    head = head_of(model) if model is not None else None
    parameters = [p for p in (head.weight, head.bias) if p is not None] if head is not None else []
    with deepspeed.zero.GatheredParameters(parameters):
        yield


@contextlib.contextmanager
def whole(engine: Any, model: nn.Module) -> Iterator[None]:
    """Within it every rank holds all the weights of `model` that tensor parallelism leaves it, gathered once.

    ZeRO-3's hooks, which would gather and release them module by module, do nothing meanwhile, and so its trace of a
    training step stays as it is. Collective.
    """
    if not engine.zero_optimization_partition_weights():
        yield
        return
    deepspeed = import_deepspeed()
    coordinator = _coordinator(engine)
    work = ("trace_prologue", "record_module", "fetch_sub_module", "release_sub_module")      # what the hooks ask for
    with deepspeed.zero.GatheredParameters(partitioned(model)):
        vars(coordinator).update({name: _nothing for name in work})      # before the class's own
        try:
            yield
        finally:
            for name in work:
                delattr(coordinator, name)


def _nothing(*_: Any, **__: Any) -> None:
    """What a hook asks for while all is there."""


def partitioned(model: nn.Module) -> list[Any]:
    """The parameters of which a rank holds a part now: not those that ZeRO-3 leaves whole because they are small."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    return [p for p in model.parameters() if getattr(p, "ds_status", None) == ZeroParamStatus.NOT_AVAILABLE]


def fits_whole(engine: Any, model: nn.Module, world: World) -> bool:
    """Whether all the weights of `model` take less than half of what memory every rank has left. Collective."""
    if not engine.zero_optimization_partition_weights():
        return True
    size = sum(p.ds_numel * p.element_size() for p in model.parameters())   # type: ignore[attr-defined]
    return size < min(world.gather(_free_memory(world))) // 2


def plan_teaching(engine: Any, recipe: Recipe, before: int | None, world: World) -> int:
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
