"""The objective fused with both heads: hidden states in, loss and gradients out, never all the logits at once.

Tokens are taken in blocks that fit a workspace of fixed size. A block's logits are made by two matrix products, turned
into the loss and, in place, into their own gradient (block.py), and two more products add that gradient to those of the
hidden states and the head. So the gradients are made in the forward pass, with four products instead of the six of a
recomputation; backward only multiplies them by the scalar that arrives. The trade-off: a call that will be
differentiated pays for its gradients at once, and has no second derivative.

Memory beyond inputs and gradients: the workspace (`workspace_bytes`, by default 96 MB on a CPU and 1 GiB elsewhere;
below 13 MB on a CPU, 210 MB elsewhere, blocks are single tokens),
a few vectors per token, and one copy of the head's and of the hidden states' gradient in fp32 where these are of lower
precision, because sums over blocks are made in fp32. Masked tokens are dropped before any work.
Collectives under a shard: at most three per block, of row sums; one in backward, of the hidden states' gradient; and
one check at the first call with a VocabShard object.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amid_ds.distributed.vocab_parallel import VocabShard
from amid_ds.errors import InputError
from amid_ds.losses import elementwise, tiles
from amid_ds.losses.block import Backend, Block, Logits, solve
from amid_ds.losses.objective import AMiD

IGNORE_INDEX = -100


@dataclass(frozen=True)
class LMHead:
    """A language model's head: logits = scale · (h Wᵀ + b), then softcap · tanh(logits / softcap) where there is a cap.

    weight [V_local, H], bias [V_local] or None, of the hidden states' dtype.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.softcap is not None and not self.softcap > 0:
            raise InputError(f"softcap={self.softcap}", "a cap above 0, or None", "None means no cap")


class LossOutput(NamedTuple):
    """loss: scalar, differentiable; kd, ce: per token [N], detached, 0 for a masked token, None where not computed."""

    loss: Tensor
    kd: Tensor | None
    ce: Tensor | None


def default_workspace_bytes(device: torch.device | str) -> int:
    """The workspace of a call that names none: 96 MB on a CPU, 1 GiB on an accelerator."""
    return 96_000_000 if torch.device(device).type == "cpu" else 1 << 30


def amid_loss(
    student_logits: Tensor,            # [..., V_s] of any float dtype
    teacher_logits: Tensor,            # [..., V_t]
    objective: AMiD,
    *,
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
    backend: str = "auto",
    workspace_bytes: int | None = None,
) -> Tensor:                           # [...] fp32 (fp64 where an input is)
    """Per-token objective from logits; the naive code that it replaces is `reference.naive_loss`.

    vocab_size: only ids below it count, on both sides, renormalised; without it the two widths must be equal.
    shard: this rank's columns of both; every rank gets the whole loss, and its own columns' gradient.
    At most three collectives per block in forward, none in backward. Raises InputError.
    """
    _check_objective(objective)
    _check_logits(student_logits, teacher_logits)
    device, lead = student_logits.device, student_logits.shape[:-1]
    student, teacher = (logits[None].flatten(0, -2) for logits in (student_logits, teacher_logits.detach()))
    rows = {"student_logits": student.shape[1], "teacher_logits": teacher.shape[1]}
    place = _placement(rows, vocab_size, shard, student.shape[0], device)
    size = _tokens_per_block(place, [student, teacher], workspace_bytes)
    chosen = _backend(backend, objective, [student, teacher])
    per_token: Tensor = _LogitLoss.apply(student, teacher, objective, place, size, chosen, _wants_gradient(student))
    return per_token.reshape(lead)


def linear_amid_loss(
    student_hidden: Tensor,            # [N, H_s]
    student_head: Tensor | LMHead,     # weight [V_local, H_s], or LMHead
    teacher_hidden: Tensor | None,     # [N, H_t]
    teacher_head: Tensor | LMHead | None,
    objective: AMiD | None,
    *,
    token_weights: Tensor,             # [N]; 0 masks a token
    labels: Tensor | None = None,      # [N] int, already shifted; -100: no cross entropy here
    ce_weight: float = 0.0,
    kd_weight: float = 1.0,
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
    backend: str = "auto",
    workspace_bytes: int | None = None,
) -> LossOutput:
    """loss = Σ_i token_weights_i · (kd_weight · kd_i + ce_weight · ce_i), fused with both heads.

    Replaces `naive_loss(student_hidden @ W_sᵀ, teacher_hidden @ W_tᵀ, objective)` and `F.cross_entropy` on the same
    (untempered) student logits. The gradient reaches student_hidden, weight and bias, in their dtypes; the teacher has
    none, and the weights count as constants. kd [N] and ce [N] (None without labels) are detached, fp32 (fp64 where an
    input is). The logits' gradient is held in the inputs' dtype between the products, as autograd does: with fp16 keep
    token_weights where that does not underflow, for a scale on the loss comes too late.
    Plain training: with kd_weight=0 the teacher's hidden states and head may both be None (then so may the objective,
    which is not read, and kd is None).
    With a shard both heads hold the rows [start, stop), and the hidden states, weights and labels are the same on every
    rank of the group; the hidden states' gradient comes back whole. Raises InputError.
    """
    head = student_head if isinstance(student_head, LMHead) else LMHead(student_head)
    target = LMHead(teacher_head) if isinstance(teacher_head, Tensor) else teacher_head
    _check_linear(student_hidden, head, teacher_hidden, target, objective, token_weights, labels, ce_weight, kd_weight)
    rows = {"student_head": head.weight.shape[0]}
    if target is not None:
        rows["teacher_head"] = target.weight.shape[0]
    place = _placement(rows, vocab_size, shard, student_hidden.shape[0], student_hidden.device)
    _check_values(token_weights, labels, place.vocabulary)
    task = _Task(teacher_hidden, head, target, objective if target is not None else None,
                 token_weights, labels, float(ce_weight), float(kd_weight), place,
                 _backend(backend, objective, [x for x in (student_hidden, teacher_hidden) if x is not None]),
                 workspace_bytes,
                 tuple(_wants_gradient(x) for x in (student_hidden, head.weight, head.bias)))
    return LossOutput(*_LinearLoss.apply(student_hidden, head.weight, head.bias, task))


@torch.no_grad()
def linear_argmax(
    hidden: Tensor,                    # [N, H]
    head: LMHead,                      # weight [V_local, H]
    *,
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
    workspace_bytes: int | None = None,
) -> Tensor:                           # [N] int64
    """The id below vocab_size with the highest logit, the lowest one among equals: a model's first choice.

    Blocks of tokens as in the loss, the same answer on every rank of a shard's group. A scale is taken to be above 0,
    so neither it nor a soft cap changes the order. One collective per block. Raises InputError.
    """
    _check_side("the", hidden, head)
    place = _placement({"head": head.weight.shape[0]}, vocab_size, shard, hidden.shape[0], hidden.device)
    size = _tokens_per_block(place, [head.weight], workspace_bytes)
    chosen = torch.empty(len(hidden), dtype=torch.int64, device=hidden.device)
    space = torch.empty(min(size, len(hidden)) * place.valid, dtype=head.weight.dtype, device=hidden.device)
    for rows in _blocks(len(hidden), size):
        raw = _logits(hidden[rows], head, place.valid, space).raw
        best = torch.full((2, len(raw)), -torch.inf, dtype=torch.float64, device=hidden.device)   # (logit, its id)
        if place.valid:                # a shard may be empty
            peak, index = raw.max(-1)
            best = torch.stack([peak.double(), (index + place.shard.start).double()])
        shards = place.shard.gather(best)
        first = shards[:, 0].argmax(0)
        chosen[rows] = shards[first, 1, torch.arange(len(raw), device=hidden.device)].long()
    return chosen


class _Place(NamedTuple):
    """Where this rank's columns lie: `valid` of them count; the group's widest shard sets everyone's block size."""

    shard: VocabShard
    valid: int
    widest: int
    vocabulary: int


class _Task(NamedTuple):
    """What a call of the linear loss is besides the three tensors that may have a gradient."""

    teacher_hidden: Tensor | None
    student_head: LMHead
    teacher_head: LMHead | None
    objective: AMiD | None
    token_weights: Tensor
    labels: Tensor | None
    ce_weight: float
    kd_weight: float
    place: _Place
    backend: Backend
    workspace_bytes: int | None
    wants: tuple[bool, ...]            # a gradient of hidden, weight, bias


class _LogitLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, objective: AMiD, place: _Place, size: int,
                backend: Backend, wants_gradient: bool) -> Tensor:
        dtype = _arithmetic(student, teacher)
        tokens, valid = student.shape[0], place.valid
        student = student.detach()
        per_token = torch.empty(tokens, dtype=dtype, device=student.device)
        gradient = torch.empty_like(student, memory_format=torch.contiguous_format) if wants_gradient else None
        for rows in _blocks(tokens, size):
            block = Block(Logits(student[rows, :valid]), Logits(teacher[rows, :valid]), objective, dtype)
            if gradient is not None:
                gradient[rows, valid:] = 0
                block.gradient, block.kd_scale = gradient[rows, :valid], torch.ones_like(per_token[rows])
            kd, _ = solve(block, place.shard, backend)
            assert kd is not None
            per_token[rows] = kd
        ctx.gradients = [gradient]
        return per_token

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradient, = _take(ctx)
        assert gradient is not None
        for rows in _blocks(len(upstream), 64):    # a product with fp32 of low precision makes a temporary in fp32
            gradient[rows].mul_(upstream[rows, None])
        return (gradient, *[None] * 6)


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None,
                task: _Task) -> tuple[Tensor, Tensor | None, Tensor | None]:
        with torch.autocast(hidden.device.type, enabled=False):
            loss, kd, ce, gradients = _forward(hidden, task)
        ctx.gradients, ctx.shard = gradients, task.place.shard
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.mark_non_differentiable(*[x for x in (kd, ce) if x is not None])
        ctx.set_materialize_grads(False)
        return loss, kd, ce

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients = _take(ctx)
        if upstream is None:
            return (None,) * 4
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(upstream)
        if gradients[0] is not None:
            ctx.shard.add_up(gradients[0])
        return (*[None if g is None else g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)], None)


def _take(ctx: Any) -> list[Tensor | None]:
    """The gradients that forward left, to be scaled in place; copies of them where the graph is to be kept."""
    if torch.is_grad_enabled():        # in a backward: create_graph=True
        raise RuntimeError("the fused loss has no second derivative: its gradients are made in forward, as numbers; "
                           "call backward without create_graph=True")
    if ctx.gradients is None:
        raise RuntimeError("backward was called a second time on the fused loss, whose gradients have been given away; "
                           "call the loss again, or the first backward with retain_graph=True")
    if torch._C._autograd._get_current_graph_task_keep_graph():    # retain_graph=True: backward may come again
        return [None if gradient is None else gradient.clone() for gradient in ctx.gradients]
    gradients, ctx.gradients = ctx.gradients, None
    return gradients


def _forward(hidden: Tensor, task: _Task) -> tuple[Tensor, Tensor | None, Tensor | None, list[Tensor | None]]:
    """loss, kd, ce and the gradients of hidden, weight and bias for an upstream of 1, in the arithmetic's dtype."""
    place, dtype = task.place, _arithmetic(hidden, task.teacher_hidden)
    weights = task.token_weights.to(dtype)
    kd = None if task.objective is None else torch.zeros_like(weights)
    ce = None if task.labels is None else torch.zeros_like(weights)
    gradients = _Gradients(hidden, task.student_head, place.valid, dtype, task.wants)
    heads = [head for head in (task.student_head, task.teacher_head) if head is not None]
    size = _tokens_per_block(place, [head.weight for head in heads], task.workspace_bytes)
    index = weights.nonzero()[:, 0]
    spaces = [torch.empty(min(size, len(index)) * place.valid, dtype=head.weight.dtype, device=hidden.device)
              for head in heads] if len(index) else []
    for rows in _blocks(len(index), size):
        tokens = index[rows]
        block, inputs = _make_block(hidden, task, tokens, weights[tokens], spaces, dtype)
        block_kd, block_ce = solve(block, place.shard, task.backend)
        if kd is not None and block_kd is not None:
            kd[tokens] = block_kd
        if ce is not None and block_ce is not None:
            ce[tokens] = block_ce
        if block.gradient is not None:
            gradients.add(block.gradient, inputs, tokens)
    loss = weights.new_zeros(())
    for weight, values in ((task.kd_weight, kd), (task.ce_weight, ce)):
        if values is not None and weight:
            loss = loss + weight * torch.dot(weights, values)
    return loss, kd, ce, gradients.finished()


def _make_block(hidden: Tensor, task: _Task, tokens: Tensor, weights: Tensor, spaces: list[Tensor],
                dtype: torch.dtype) -> tuple[Block, Tensor]:
    """The block of `tokens` with its logits made in `spaces`, and the student's hidden states in it."""
    valid, shard = task.place.valid, task.place.shard
    inputs = hidden[tokens]
    student = _logits(inputs, task.student_head, valid, spaces[0])
    teacher = None
    if task.teacher_head is not None and task.teacher_hidden is not None:
        teacher = _logits(task.teacher_hidden[tokens], task.teacher_head, valid, spaces[1])
    block = Block(student, teacher, task.objective, dtype)
    if task.labels is not None:
        labels = task.labels[tokens]
        block.labels = torch.where(labels == IGNORE_INDEX, -1, labels - shard.start)
    if any(task.wants):
        block.gradient = student.raw
        block.kd_scale = weights * task.kd_weight if task.kd_weight and teacher is not None else None
        if block.labels is not None and task.ce_weight:
            labelled = task.labels[tokens] != IGNORE_INDEX   # type: ignore[index]
            block.ce_scale = weights * task.ce_weight * labelled
    return block, inputs


def _logits(inputs: Tensor, head: LMHead, valid: int, space: Tensor) -> Logits:
    raw = space[:inputs.shape[0] * valid].view(inputs.shape[0], valid)
    weight = head.weight.detach()[:valid].t()
    if head.bias is None:
        torch.mm(inputs, weight, out=raw)
    else:
        torch.addmm(head.bias.detach()[:valid], inputs, weight, out=raw)
    return Logits(raw, head.scale, head.softcap)


class _Gradients:
    """The sums over blocks of the gradients of hidden, weight and bias, in the arithmetic's dtype."""

    def __init__(self, hidden: Tensor, head: LMHead, valid: int, dtype: torch.dtype, wants: tuple[bool, ...]) -> None:
        self.weight = head.weight.detach()[:valid]
        self.valid, self.first = valid, True
        shapes = [x.shape if x is not None and want else None
                  for x, want in zip((hidden, head.weight, head.bias), wants, strict=True)]
        self.hidden, self.head, self.bias = (
            None if shape is None else torch.empty(shape, dtype=dtype, device=hidden.device) for shape in shapes)
        if self.hidden is not None:
            self.hidden.zero_()        # masked tokens are not written to
        for tensor in (self.head, self.bias):
            if tensor is not None:
                tensor[valid:] = 0     # nor are the vocabulary's padding rows; the others, by the first block

    def add(self, gradient: Tensor, inputs: Tensor, tokens: Tensor) -> None:
        """gradient [n, valid] of the raw logits, inputs [n, H] their hidden states."""
        beta = 0 if self.first else 1
        if self.hidden is not None:
            self.hidden[tokens] = torch.mm(gradient, self.weight).to(self.hidden.dtype)
        if self.head is not None:
            self._add_product(self.head[:self.valid], gradient.t(), inputs, beta)
        if self.bias is not None:
            sums = gradient.sum(0, dtype=self.bias.dtype)
            self.bias[:self.valid] = sums if self.first else self.bias[:self.valid] + sums
        self.first = False

    def finished(self) -> list[Tensor | None]:
        if self.first:
            for tensor in (self.head, self.bias):
                if tensor is not None:
                    tensor.zero_()     # no valid token: zero gradients, and the graph stays connected
        return [self.hidden, self.head, self.bias]

    def _add_product(self, total: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
        """total = beta · total + a @ b, tile by tile where the product's dtype is not the total's."""
        if total.dtype == a.dtype:
            total.addmm_(a, b, beta=beta)
            return
        step = max(1, tiles.product_elements(total.device) // b.shape[1])
        for start in range(0, total.shape[0], step):
            part = torch.mm(a[start:start + step], b)
            total[start:start + step] = part if beta == 0 else total[start:start + step].add_(part)


def _arithmetic(student: Tensor, teacher: Tensor | None) -> torch.dtype:
    """fp32, or fp64 where an input is."""
    return torch.float64 if torch.float64 in (student.dtype, teacher.dtype if teacher is not None else None) \
        else torch.float32


def _wants_gradient(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


def _blocks(tokens: int, size: int) -> Iterator[slice]:
    """Blocks of nearly equal length, none above `size`."""
    count = -(-tokens // size)
    step = -(-tokens // count) if count else 1
    return (slice(start, min(start + step, tokens)) for start in range(0, tokens, step))


def _tokens_per_block(place: _Place, models: list[Tensor], workspace_bytes: int | None) -> int:
    """As many tokens as the workspace holds logits for, beside the arithmetic's tiles; the same on all of a group.

    models: a tensor of each model's dtype.
    """
    device = models[0].device
    budget = default_workspace_bytes(device) if workspace_bytes is None else workspace_bytes
    if budget <= 0:
        raise InputError(f"workspace_bytes={budget}", "a number of bytes above 0", "leave it out for the default")
    temporaries, most = tiles.tiling(device)
    products = 2 * tiles.product_elements(device)
    per_token = max(1, place.widest) * sum(model.element_size() for model in models)
    return min(most, max(1, (budget - temporaries - products) // per_token))


def _placement(rows: dict[str, int], vocab_size: int | None, shard: VocabShard | None, tokens: int,
               device: torch.device) -> _Place:
    """Check the widths and find how many of this rank's columns lie below vocab_size."""
    if vocab_size is not None and vocab_size <= 0:
        raise InputError(f"vocab_size={vocab_size}", "a number of ids above 0", "leave it out to use every column")
    if shard is None:
        widths = sorted(set(rows.values()))
        if vocab_size is None and len(widths) > 1:
            raise InputError(f"two widths of the vocabulary, {rows}", "equal widths, or a vocab_size",
                             "pass vocab_size, the number of ids that count on both sides")
        end = widths[0] if vocab_size is None else vocab_size
        if end > widths[0] or end == 0:
            raise InputError(f"a vocabulary of {end} ids and {rows}", "at least one id, and rows for all of them",
                             "lower vocab_size to the number of ids that the two models share")
        return _Place(VocabShard(0, end), end, end, end)
    widest, end = shard.agree(rows, vocab_size, tokens, device)
    end = end if vocab_size is None else vocab_size
    return _Place(shard, min(max(end - shard.start, 0), shard.width), widest, end)


def _backend(name: str, objective: AMiD | None, logits: list[Tensor]) -> Backend:
    """`auto`: Triton where there is a GPU, Triton, and kernels for what is asked; plain torch elsewhere."""
    if name not in ("auto", "torch", "triton"):
        raise InputError(f"backend={name!r}", "auto, torch or triton", "auto takes triton on a GPU and torch elsewhere")
    on_gpu = logits[0].device.type == "cuda"
    if name == "torch" or (name == "auto" and not on_gpu):
        return elementwise
    try:
        from amid_ds.losses import kernels
    except ImportError as error:
        if name == "auto":
            return elementwise
        raise InputError(f"backend='triton', but: {error}", "Triton", "pip install triton, or backend='auto'") from None
    dtypes = [tensor.dtype for tensor in logits]
    if (on_gpu or kernels.INTERPRETED) and kernels.supports(objective, dtypes):
        return kernels
    if name == "auto":
        return elementwise
    raise InputError(f"backend='triton' on {logits[0].device} for {objective} and logits of {dtypes}",
                     "a GPU (or TRITON_INTERPRET=1), a built-in divergence, and fp32, bf16 or fp16",
                     "use backend='auto' or 'torch'")


def _check_objective(objective: object) -> None:
    if not isinstance(objective, AMiD):
        raise InputError(f"an objective of type {type(objective).__name__}", "an AMiD",
                         "e.g. AMiD(alpha=-5.0, lam=0.1)")


def _check_float(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        found = f"of {tensor.dtype}" if isinstance(tensor, Tensor) else f"of type {type(tensor).__name__}"
        raise InputError(f"{name} {found}", "a tensor of a float dtype", f"check what is passed as {name}")


def _check_logits(student: Tensor, teacher: Tensor) -> None:
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        _check_float(name, logits)
        if logits.dim() == 0:
            raise InputError(f"{name} of shape {list(logits.shape)}", "[..., V]",
                             "the vocabulary is the last dimension")
    if student.shape[:-1] != teacher.shape[:-1]:
        raise InputError(f"student_logits {list(student.shape)} and teacher_logits {list(teacher.shape)}",
                         "the same tokens on both sides", "all dimensions but the last must be equal")


def _check_linear(student_hidden: Tensor, student_head: LMHead, teacher_hidden: Tensor | None,
                  teacher_head: LMHead | None, objective: AMiD | None, token_weights: Tensor, labels: Tensor | None,
                  ce_weight: float, kd_weight: float) -> None:
    """Everything that shapes, dtypes and arguments tell; `_check_values` looks into the tensors."""
    _check_side("student", student_hidden, student_head)
    if (teacher_hidden is None) != (teacher_head is None) or (teacher_head is None and kd_weight != 0):
        raise InputError(f"teacher_hidden {'missing' if teacher_hidden is None else 'given'}, teacher_head "
                         f"{'missing' if teacher_head is None else 'given'}, kd_weight={kd_weight}",
                         "both, or neither and kd_weight=0", "without a teacher pass kd_weight=0 and ce_weight above 0")
    if teacher_hidden is not None and teacher_head is not None:
        _check_objective(objective)
        _check_side("teacher", teacher_hidden, teacher_head)
        if teacher_hidden.shape[0] != student_hidden.shape[0]:
            raise InputError(f"{student_hidden.shape[0]} tokens of the student, {teacher_hidden.shape[0]} of teacher",
                             "the same tokens on both sides", "both models must have seen the same batch")
    for name, weight in (("kd_weight", kd_weight), ("ce_weight", ce_weight)):
        if not 0 <= weight < float("inf"):
            raise InputError(f"{name}={weight}", "a finite number of at least 0", f"give {name} such a value")
    if ce_weight and labels is None:
        raise InputError(f"ce_weight={ce_weight} without labels", "labels [N]", "pass labels, or ce_weight=0")
    if teacher_head is None and labels is None:
        raise InputError("neither a teacher nor labels", "one of them", "there is nothing to learn from; pass one")
    for name, tensor in (("token_weights", token_weights), ("labels", labels)):
        if tensor is not None and tensor.shape != student_hidden.shape[:1]:
            raise InputError(f"{name} of shape {list(tensor.shape)}", f"[N] = [{student_hidden.shape[0]}]",
                             f"one entry of {name} per row of student_hidden")
    _check_float("token_weights", token_weights)
    if labels is not None and (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool):
        raise InputError(f"labels of {labels.dtype}", "an integer dtype", "labels are token ids, -100 to ignore")


def _check_side(side: str, hidden: Tensor, head: LMHead) -> None:
    _check_float(f"{side}_hidden", hidden)
    _check_float(f"{side}_head's weight", head.weight)
    if hidden.dim() != 2 or head.weight.dim() != 2 or hidden.shape[1] != head.weight.shape[1]:
        raise InputError(f"{side}_hidden {list(hidden.shape)} and {side}_head {list(head.weight.shape)}",
                         "[N, H] and [V, H] with one H",
                         "flatten batch and sequence; a head that ZeRO-3 partitions must be gathered first")
    if head.bias is not None and head.bias.shape != head.weight.shape[:1]:
        raise InputError(f"{side}_head's bias {list(head.bias.shape)}", f"[V] = {list(head.weight.shape[:1])}",
                         "one entry of the bias per row of the weight")
    if any(x is not None and x.dtype != hidden.dtype for x in (head.weight, head.bias)):
        raise InputError(f"{side}_hidden of {hidden.dtype} and {side}_head of {head.weight.dtype}",
                         "one dtype on a side", "cast the hidden states to the head's dtype")


def _check_values(token_weights: Tensor, labels: Tensor | None, vocabulary: int) -> None:
    """One look into the tensors, one synchronisation: weights at least 0 and finite, labels inside the vocabulary."""
    bad_weight = ~((token_weights >= 0) & (token_weights < torch.inf))
    bad_label = torch.zeros((), dtype=torch.bool, device=token_weights.device)
    if labels is not None:
        bad_label = (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= vocabulary))
    found = torch.stack([bad_weight.any(), bad_label.any()]).tolist()
    if found[0]:
        raise InputError(f"token_weights such as {token_weights[bad_weight][0].item()}", "finite weights of at least 0",
                         "0 masks a token")
    if found[1] and labels is not None:
        raise InputError(f"labels such as {labels[bad_label][0].item()}", f"ids below {vocabulary}, or {IGNORE_INDEX}",
                         "check that labels and vocab_size belong to the same tokenizer")
