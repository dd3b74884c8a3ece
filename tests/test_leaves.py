"""ZeRO-3 gathers what a module reads of its children, and experts, before they are used."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch
import yaml
from support.families import save_tiny, tiny_model
from support.lora import EPS
from support.patches import patch_train_step
from support.ranks import Ranks, rank_main, run_ranks, world_main
from support.reference_loop import reference_adamw, reference_loop
from support.runs import read_metrics, write_gathering_config, write_recipe
from torch import Tensor, nn
from transformers import AutoTokenizer

from amid_ds.cluster import doctor
from amid_ds.config.parse import load_recipe
from amid_ds.config.recipe import Lora
from amid_ds.distributed.world import World
from amid_ds.engine.leaves import warn_of_large_layers
from amid_ds.errors import InputError
from amid_ds.models.adapters import target_modules
from amid_ds.models.weight_reads import outside_reads

HYBRIDS = ["qwen3_5_text", "qwen3_next", "nemotron_h", "falcon_h1", "granitemoehybrid", "bamba",
           "olmo_hybrid", "lfm2", "mamba2", "jamba", "zamba2"]


def test_what_a_mixer_may_read_of_its_children_is_found_in_its_source():
    """Also what only a fused kernel takes: norm and out_proj of a Mamba-2 mixer."""
    mixer = "model.layers.0.mamba"
    (read,) = outside_reads(tiny_model("bamba"))
    assert read.name == mixer
    assert set(read.parameters) == {f"{mixer}.{name}" for name in (
        "conv1d.weight", "conv1d.bias", "norm.weight", "out_proj.weight")}
    assert outside_reads(tiny_model("llama")) == []


class Helped(nn.Module):
    """Reads of its children in every way that counts, and in ways that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(2, 2, bias=False) for _ in range(2)])
        self.named, self.asked, self.called, self.later = (nn.Linear(2, 2) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        part = self.parts[0]
        return self.called(x.to(self.asked.weight.dtype)) + self.through(x @ part.weight)

    def through(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.named.weight.t(), bias=self.named.bias)

    def never(self) -> Tensor:
        return self.later.weight


def test_a_read_counts_through_names_lists_and_methods_but_not_of_a_dtype():
    model = nn.Module()
    model.base_model_prefix, model.layers = "", nn.ModuleList([Helped()])
    model.get_input_embeddings = lambda: None
    (read,) = outside_reads(model)
    assert set(read.parameters) == {f"layers.0.{name}" for name in (
        "named.weight", "named.bias", "parts.0.weight", "parts.1.weight")}


def test_no_adapter_is_put_where_a_fused_kernel_would_pass_it_by():
    model = tiny_model("falcon_h1")
    targets = target_modules(model, Lora(rank=2, alpha=4))
    assert "model.layers.0.mamba.in_proj" in targets
    assert "model.layers.0.self_attn.o_proj" in targets
    assert not [name for name in targets if name.endswith("out_proj")]
    with pytest.raises(InputError, match=r"out_proj, whose weight model.layers.0.mamba hands"):
        target_modules(model, Lora(rank=2, alpha=4, targets=["out_proj"]))
    # Read as well, but in a model that no kernel serves.
    bloom = target_modules(tiny_model("bloom"), Lora(rank=2, alpha=4))
    assert "transformer.h.0.mlp.dense_4h_to_h" in bloom


def test_doctor_tells_which_packages_of_kernels_a_model_would_use(tmp_path, monkeypatch,
                                                                  instructions_file):
    folder = save_tiny("bamba", tmp_path / "bamba")
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", folder, None, instructions_file,
                                      tmp_path / "run"))
    (tmp_path / "site" / "mamba_ssm").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path / "site")
    (verdict,) = doctor.check_kernels(recipe, World(0, 1, torch.device("cpu")))
    assert verdict.passed
    assert "student would use causal-conv1d (not installed), mamba-ssm (installed)" in str(verdict)


# --- equal to plain transformers ---------------------------------------------------------------

def hidden_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """layer(x), past the layer's hooks, in a place where no class of the model shows it."""
    return nn.functional.linear(x, layer.weight, layer.bias)


def hiding(forward: Any) -> Any:
    """The forward of an MLP whose `down_proj` is read and not called."""
    def hidden(self: Any, x: Tensor) -> Tensor:
        layer = self.down_proj
        # A call then meets no hook, of the class or of the layer.
        self._modules["down_proj"] = functools.partial(hidden_linear, layer)
        try:
            return forward(self, x)
        finally:
            self._modules["down_proj"] = layer

    return hidden


def watching_rank(argv: list[str], variables: dict[str, str], log: str) -> None:
    """Run as a rank that writes down, of each step, whether the prefetch trace was whole.

    An MLP of each model reads a weight in a way that its source does not show.
    """
    from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1MLP
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextMLP

    def around(trainer, batch):
        yield
        coordinator = trainer.engine._deepspeed.optimizer.parameter_offload.param_coordinator
        with open(f"{log}.trace", "a") as file:
            file.write(f"{coordinator.is_complete_trace():d}")

    for mlp in (FalconH1MLP, Qwen3NextMLP):
        mlp.forward = hiding(mlp.forward)
    patch_train_step(around)
    rank_main(argv, variables, log)


def assert_equal_run(student: str, teacher: str, tokenizer: Any, data: Any, folder: Any,
                     target: Any = rank_main, zero: dict | None = None,
                     make_optimizer: Any = reference_adamw, **changes: object) -> Ranks:
    """Train on 2 ranks, every weight gathered at each use, and assert plain torch's numbers.

    zero: values of the config's `zero_optimization`.
    """
    words = AutoTokenizer.from_pretrained(tokenizer)
    pair = [save_tiny(name, folder / f"{seed}-{name}", words, seed=seed, vocab_size=400)
            for seed, name in enumerate((student, teacher))]
    recipe = write_recipe(
        folder / "r.yaml", *pair, data, folder / "run", data__prepared=str(folder / "data"),
        data__isolate_documents=False, train__eps=EPS,
        train__learning_rate=1e-4, student__router_aux_loss=0,
        deepspeed=str(write_gathering_config(folder, stage3_max_reuse_distance=0, **(zero or {}))),
        **{"train__steps": 2, **changes})
    ranks = run_ranks(2, "train", recipe, target=target)
    truth, _ = reference_loop(*pair, yaml.safe_load(recipe.read_text()), folder / "data",
                              make_optimizer)
    # Later steps of some of these random models magnify the rounding of the first ones.
    for line, expected in zip(read_metrics(folder / "run"), truth, strict=True):
        for key in ("loss", "kd_loss", "grad_norm"):
            assert line[key] == pytest.approx(expected[key], rel=1e-5), (line["step"], key)
    return ranks


def test_hybrid_student_and_teacher_train_as_plain_transformers_does(llama_pair, instructions_file,
                                                                     tmp_path):
    ranks = assert_equal_run("qwen3_next", "falcon_h1", llama_pair[0], instructions_file, tmp_path,
                             watching_rank, student__activation_checkpointing=True, train__steps=3)
    for rank in range(2):
        trace = ranks.log(rank).with_suffix(".trace").read_text()
        # The first step records it.
        assert trace[1:] == "11", trace


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", HYBRIDS)
def test_every_hybrid_trains_as_plain_transformers_does(llama_pair, instructions_file, tmp_path,
                                                        family, checkpointing):
    assert_equal_run(family, family, llama_pair[0], instructions_file, tmp_path,
                     student__activation_checkpointing=checkpointing)


def stand_in_kernel(states: Tensor, conv: Tensor, *_: Any, outproj_weight: Tensor, **__: Any
                    ) -> Tensor:
    """In the place of mamba-ssm's kernel: a product of what the mixer hands to it."""
    inner = outproj_weight.shape[1]
    return nn.functional.linear(states[..., :inner] * conv[:inner].mean(-1), outproj_weight)


def rank_with_a_kernel(argv: list[str], variables: dict[str, str], log: str) -> None:
    """Run as a rank whose Falcon-H1 takes the fused path in training."""
    from transformers.models.falcon_h1 import modeling_falcon_h1

    modeling_falcon_h1.mamba2_split_conv1d_scan_combined = stand_in_kernel
    rank_main(argv, variables, log)


def training(model: nn.Module, train: dict) -> torch.optim.Optimizer:
    """The reference loop's optimizer of a model in training mode without a cache, as kernels ask.
    """
    model.config.use_cache = False
    return reference_adamw(model.train(), train)


@pytest.mark.slow
def test_what_a_fused_kernel_takes_is_there(llama_pair, instructions_file, tmp_path, monkeypatch):
    from transformers.models.falcon_h1 import modeling_falcon_h1

    monkeypatch.setattr(modeling_falcon_h1, "mamba2_split_conv1d_scan_combined", stand_in_kernel)
    assert_equal_run("falcon_h1", "falcon_h1", llama_pair[0], instructions_file, tmp_path,
                     rank_with_a_kernel, make_optimizer=training,
                     student__activation_checkpointing=True)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [
    {"zero_hpz_partition_size": 2}, {"offload_param": {"device": "cpu"}},
    {"stage3_prefetch_bucket_size": 0}], ids=["hpZ", "offload", "no prefetch"])
def test_hybrids_train_so_under_each_kind_of_zero_3(llama_pair, instructions_file, tmp_path, zero):
    assert_equal_run("zamba2", "mamba", llama_pair[0], instructions_file, tmp_path, zero=zero,
                     student__activation_checkpointing=True)


def observing_rank(argv: list[str], variables: dict[str, str], log: str) -> None:
    """Run as a rank that writes down which of the student's weights are there as a mixer begins its
    forward, and as it begins its backward."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    from amid_ds.engine import build

    register = build.register_outside_reads

    def observed(models: Any) -> None:
        register(models)
        named = [(name, each) for name, each in models[0].named_parameters()]

        def write(when: str, mixer: str) -> None:
            there = [name for name, each in named if each.ds_status == ZeroParamStatus.AVAILABLE]
            with open(f"{log}.there", "a") as file:
                file.write(json.dumps([when, mixer, there]) + "\n")

        def after(name: str, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            if output.requires_grad:
                output.register_hook(lambda _: write("backward", name))

        for read in outside_reads(models[0]):
            read.module.register_forward_pre_hook(
                lambda *_, name=read.name: write("forward", name))
            read.module.register_forward_hook(lambda *call, name=read.name: after(name, call[-1]))

    build.register_outside_reads = observed
    rank_main(argv, variables, log)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["falcon_h1", "mamba", "zamba2"])
def test_a_mixer_has_its_own_weights_and_those_it_reads_and_leaves_none_behind(
        llama_pair, instructions_file, tmp_path, family):
    words = AutoTokenizer.from_pretrained(llama_pair[0])
    student = save_tiny(family, tmp_path / "student", words, vocab_size=400)
    config = write_gathering_config(tmp_path, stage3_max_reuse_distance=0,
                                    stage3_prefetch_bucket_size=0)
    recipe = write_recipe(
        tmp_path / "r.yaml", student, None, instructions_file, tmp_path / "run", train__steps=2,
        data__isolate_documents=False, deepspeed=str(config))
    ranks = run_ranks(2, "train", recipe, target=observing_rank)
    model = tiny_model(family)
    expected = {read.name: set(read.parameters) | {
        f"{read.name}.{name}" for name, _ in read.module.named_parameters(recurse=False)}
        for read in outside_reads(model)}
    seen = set()
    for line in ranks.log(0).with_suffix(".there").read_text().splitlines():
        when, mixer, there = json.loads(line)
        seen.add((when, mixer))
        of_mixers = {name for name in there for each in expected if name.startswith(f"{each}.")}
        # As it begins its backward, it has none yet.
        assert of_mixers == (expected[mixer] if when == "forward" else set()), (when, mixer)
    assert seen == {(when, mixer) for when in ("forward", "backward") for mixer in expected}


# --- experts -----------------------------------------------------------------------------------

class ListedExperts(nn.Module):
    """A mixture of modules, as models with code of their own have it: each token takes one."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, count)
        self.experts = nn.ModuleList([nn.Linear(width, width) for _ in range(count)])

    def forward(self, states: Tensor) -> Tensor:
        scores = self.gate(states).softmax(-1)
        chosen = scores.argmax(-1)
        out = torch.zeros_like(states)
        for number in chosen.unique().tolist():
            rows = (chosen == number).nonzero()[:, 0]
            out = out.index_add(0, rows, self.experts[number](states[rows])
                                * scores[rows, number, None])
        return out


class Mixtures(nn.Module):
    """Experts in a list and, as transformers has them, in a stack; a frozen layer before them."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        config = MixtralConfig(hidden_size=8, intermediate_size=12, num_local_experts=4,
                               num_experts_per_tok=1)
        config._experts_implementation = "eager"
        self.listed, self.stacked = ListedExperts(8, 4), MixtralSparseMoeBlock(config)
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=draw))
            for gate in (self.listed.gate.weight, self.stacked.gate.weight):
                # Experts 0 and 1 for the sign of the first number; nobody takes 2 and 3.
                gate.zero_()
                gate[0, 0], gate[1, 0] = 9.0, -9.0
            self.listed.gate.bias.copy_(torch.tensor([0.0, 0.0, -99.0, -99.0]))

    def forward(self, states: Tensor) -> Tensor:
        # The input has no gradient.
        once = self.listed(states=states)
        again = self.stacked(states[None])
        again = again[0] if isinstance(again, tuple) else again
        return (once * again[0]).sum()


def rows_of(rank: int) -> Tensor:
    """A rank's tokens: of rank 0 the first number is positive, of rank 1 negative."""
    rows = torch.randn(5, 8, generator=torch.Generator().manual_seed(7 + rank))
    rows[:, 0] = rows[:, 0].abs().clamp_min(0.5) * (1 - 2 * rank)
    return rows


def disjoint_experts(world: Any, out: str) -> None:
    """Run by every rank: three steps of plain SGD under ZeRO-3, on the rank's own tokens."""
    from amid_ds.engine.backend import import_deepspeed
    from amid_ds.engine.leaves import mark_leaves, without_listed_leaves

    deepspeed = import_deepspeed()
    model = Mixtures()
    mark_leaves([model])
    config = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True,
              "gradient_clipping": 0.0,
              "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1e-2),
        config=without_listed_leaves(config), dist_init_required=False)
    for _ in range(3):
        engine.backward(engine(rows_of(world.rank)))
        engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        if world.rank == 0:
            torch.save({name: each.detach().clone() for name, each in model.named_parameters()},
                       out)


def test_ranks_whose_tokens_choose_disjoint_experts_step_as_one_process(tmp_path):
    ranks = Ranks(2, str(tmp_path / "weights.pt"),
                  target=functools.partial(world_main, disjoint_experts))
    statuses = ranks.wait(100)
    assert statuses == [0, 0], ranks.output(0) + ranks.output(1)
    model = Mixtures()
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (sum(model(rows_of(rank)) for rank in range(2)) / 2).backward()
        optimizer.step()
    trained = torch.load(tmp_path / "weights.pt")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trained[name], parameter.detach(), rtol=1e-5, atol=1e-6,
                                   msg=lambda m, n=name: f"{n}: {m}")
    changed = {name for name, each in trained.items() if not torch.equal(each, before[name])}
    assert changed >= {"listed.experts.0.weight", "listed.experts.1.weight"}
    assert not changed & {"listed.experts.2.weight", "listed.experts.3.weight"}


def test_a_layer_of_more_experts_than_may_live_is_named_before_training(caplog):
    model, limit = tiny_model("mixtral"), 5000
    experts = sum(each.numel() for each in model.model.layers[0].mlp.experts.parameters())
    assert experts > limit
    for allowed in (limit, experts):
        warn_of_large_layers([model, tiny_model("llama")],
                             {"zero_optimization": {"stage3_max_live_parameters": allowed}})
    (line,) = caplog.messages
    assert f"model.layers.0.mlp.experts of  has {experts:,} parameters" in line
    assert "stage3_max_live_parameters (5,000)" in line and "expert_parallel" in line
