"""Random problems for the loss, and objectives; the truth is the naive twin on full logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from amid_ds import AlphaBeta, AMiD, LMHead, PerToken, amid_loss, linear_amid_loss
from amid_ds.losses import fused
from amid_ds.losses.divergences import DIVERGENCES, ConcreteScore
from amid_ds.losses.reference import naive_loss, naive_values

# Those with parameters that have to be given, or that make them a function for gradcheck.
INSTANCES = {"alpha_beta": AlphaBeta(0.2, 0.7),
             "concrete_score": ConcreteScore("teacher", "uniform")}
EVERY_DIVERGENCE = [INSTANCES.get(name, name) for name, of in DIVERGENCES.items()
                    if not of.needs_labels]
OBJECTIVES = [AMiD(-5.0, 0.1),
              AMiD(0.5, 0.3, AlphaBeta(0.2, 0.7), {"pr": 0.5, "qr": 0.5}, 2.0),
              AMiD(1.0, 0.4, order="rq", detach_assistant=True),
              AMiD(3.0, 0.7, "squared_hellinger", "rp")]
# Numbers per token: constants of the teacher, of the student, of both, of sequences; at the ends of
# λ and on both sides of α = 1.
PER_TOKEN = [
    AMiD(-5.0, PerToken("teacher_entropy", (0.1, 0.5), (0.5, 3.0))),
    AMiD(PerToken("overlap", (-4.0, 4.0), (0.0, 0.5)), 0.3, "total_variation", "qr"),
    AMiD(PerToken("overlap", (1.0, -1.0), (0.2, 0.3)), PerToken("divergence", (0.0, 1.0), (0.5, 2)),
         AlphaBeta(0.2, 0.7), {"pr": PerToken("student_entropy", (0, 1), (2, 3)), "rq": 0.5},
         {"student": 2.0, "teacher": 0.7}),
    AMiD(1.0, 0.4, order="rq", detach_assistant=True,
         token_weight=PerToken("label_probability", (0.0, 2.0), (0.0, 0.1))),
    AMiD(3.0, PerToken("student_entropy", (0.9, 0.1), (1.0, 3.0), over="sequence"), "kl",
         {"qr": 0.3, "rp": 0.7}, power=1.5, token_weight=PerToken("teacher_entropy", top=0.5)),
    AMiD(1.0, 1 / 1.8, "squared_hellinger", "rq", power=1.8, temperature={"student": 0.8,
                                                                         "teacher": 1.3}),
]


class LossProblem:
    """Random hidden states and heads, weights with masked tokens, labels with ignored ones."""

    def __init__(self, tokens: int = 11, vocabulary: int = 41, student: int = 6, teacher: int = 8,
                 dtype: torch.dtype = torch.float64, seed: int = 0, padding: int = 3,
                 scale: float = 2.0) -> None:
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            numbers = torch.randn(*shape, generator=draw, dtype=torch.float64)
            return (numbers * scale).to(dtype)

        self.vocab_size = vocabulary
        self.student, self.teacher = normal(tokens, student), normal(tokens, teacher)
        self.weight = normal(vocabulary + 1, student, scale=scale * student**-0.5)
        self.bias = normal(vocabulary + 1)
        self.teacher_weight = normal(vocabulary + padding, teacher, scale=scale * teacher**-0.5)
        self.weights = torch.rand(tokens, generator=draw)
        self.weights[::4] = 0
        self.labels = torch.randint(0, vocabulary, (tokens,), generator=draw)
        self.labels[::3] = -100
        # Runs of uneven length, whose numbers do not rise.
        self.sequences = 90 - torch.arange(tokens).double().sqrt().long()
        for tensor in self.leaves():
            tensor.requires_grad_()

    def leaves(self) -> list[Tensor]:
        """The tensors with gradients: the student's hidden states, its head and its bias."""
        return [self.student, self.weight, self.bias]

    def to(self, dtype: torch.dtype, device: str = "cpu") -> LossProblem:
        """The same numbers in another dtype, on another device."""
        other = object.__new__(LossProblem)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                is_input = value.is_floating_point() and name != "weights"
                value = value.detach().to(device, dtype if is_input else value.dtype)
            setattr(other, name, value)
        for tensor in other.leaves():
            tensor.requires_grad_()
        return other

    def fused(self, objective: AMiD, softcap: float | None = None, scale: float = 1.0,
              **options) -> fused.LossOutput:
        """The loss by linear_amid_loss: 0.9 of the divergence and 0.4 of the cross entropy."""
        head = LMHead(self.weight, self.bias, softcap, scale)
        if objective is not None and objective.needs_sequences:
            options["sequences"] = self.sequences
        defaults = {"labels": self.labels, "ce_weight": 0.4, "kd_weight": 0.9}
        return linear_amid_loss(self.student, head, self.teacher, self.teacher_weight, objective,
                                token_weights=self.weights, vocab_size=self.vocab_size,
                                **{**defaults, **options})

    def naive(self, objective: AMiD, softcap: float | None = None, scale: float = 1.0) -> Tensor:
        """The same loss by the naive twin, on full logits in at least fp32."""
        student = scale * F.linear(self.student, self.weight, self.bias)
        student = student if softcap is None else softcap * (student / softcap).tanh()
        teacher = self.teacher @ self.teacher_weight.t()
        student, teacher = (
            logits[:, :self.vocab_size].to(torch.promote_types(logits.dtype, torch.float32))
            for logits in (student, teacher))
        ce = F.cross_entropy(student, self.labels, reduction="none")
        tokens = (self.labels, self.sequences, self.weights > 0)
        kd, weights = naive_loss(student, teacher, objective, *tokens), self.weights
        if objective.token_weight is not None:
            values = naive_values(student, teacher, objective, *tokens)[objective.token_weight]
            weights = weights * torch.tensor(values, dtype=kd.dtype)
        return (weights * (0.9 * kd + 0.4 * ce)).sum()

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """The loss's gradients, in the order of leaves()."""
        return list(torch.autograd.grad(loss, self.leaves()))


def random_logits(tokens: int = 6, vocabulary: int = 23) -> tuple[Tensor, Tensor]:
    """The student's (with a gradient) and the teacher's [tokens, vocabulary] in float64."""
    draw = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(tokens, vocabulary, generator=draw, dtype=torch.float64)
                        for _ in range(2))
    return student.requires_grad_(), teacher


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """‖actual − truth‖ / ‖truth‖ in float64."""
    return ((actual.double() - truth.double()).norm() / truth.double().norm()).item()


def with_zeros(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """(student's, teacher's) logits [4, 37]: none is -inf; one of both; the student's; the
    teacher's."""
    student, teacher = (
        2 * torch.randn(4, 37, generator=torch.Generator().manual_seed(seed)).to(dtype)
        for seed in (4, 5))
    student[1, 3] = teacher[1, 3] = student[2, 5] = teacher[3, 7] = -torch.inf
    return student.requires_grad_(), teacher


def value_and_gradient(student: Tensor, teacher: Tensor, objective: AMiD,
                       **options) -> tuple[Tensor, Tensor]:
    """The loss per token, and the gradient of the sum of its finite ones."""
    loss = amid_loss(student, teacher, objective, **options)
    return loss.detach(), torch.autograd.grad(loss[loss.isfinite()].sum(), student)[0]
