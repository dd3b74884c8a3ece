"""From the command to the first step: what is imported, read and recorded on the way."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.ranks import rank_main, run_ranks
from support.runs import rank_environment, write_recipe

from amid_ds.run import start

PARTS = ["imports", "joining", "checks", "hashing", "data", "loading", "engine", "check of logits",
         "first step"]
# What a tiny run needs nothing of: all that torch compiles with, and tables of its data.
UNUSED = ("pandas", "torch._inductor.compile_fx", "torch._functorch.partitioners", "datasets",
          "torch.utils.tensorboard")


def python(code: str, *arguments: object) -> str:
    """The last line that `code` prints in a process of its own."""
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True,
                          text=True, env=rank_environment(), timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.fixture
def recipe(llama_pair, text_file, tmp_path) -> Path:
    return write_recipe(tmp_path / "recipe.yaml", *llama_pair, text_file, tmp_path / "run",
                        train__steps=2)


def test_the_parts_of_a_start_add_up_to_it_and_nothing_unused_is_imported(recipe, tmp_path):
    code = ("import sys, time; from amid_ds.cli import main; "
            "assert main(sys.argv[1:]) == 0; print(*sys.modules)")
    before = time.monotonic()
    imported = python(code, "train", recipe).split()
    whole = time.monotonic() - before
    parts = json.loads((tmp_path / "run" / "provenance.json").read_text())["start"]
    assert sorted(parts) == sorted(PARTS)
    # The process's second step and its end came after it.
    assert 0 < sum(parts.values()) < whole
    assert min(parts.values()) >= 0 and parts["imports"] > 0
    assert not set(UNUSED) & set(imported)
    # Where DeepSpeed would compile its Muon, though another optimizer steps.
    assert "deepspeed.runtime.zero.muon.original_muon" in imported


def counting_files(argv: list[str], variables: dict[str, str], log: str) -> None:
    """Run as a rank that writes the names of the files that it hashes, and of those whose headers
    it judges, beside its log."""
    from amid_ds.models import weight_files
    from amid_ds.run import provenance

    def noted(function: Any, kind: str) -> Any:
        names = Path(f"{log}.{kind}")
        names.touch()

        def call(path: Path | str) -> Any:
            with open(names, "a") as file:
                file.write(f"{path}\n")
            return function(path)
        return call

    provenance._name_size_and_ends = noted(provenance._name_size_and_ends, "hashed")
    weight_files.open_for_ranges = noted(weight_files.open_for_ranges, "judged")
    rank_main(argv, variables, log)


def test_rank_0_alone_judges_and_hashes_each_file_once_and_logs_the_start_once(recipe, llama_pair):
    ranks = run_ranks(2, "train", recipe, target=counting_files)
    hashed, judged = ([Path(f"{ranks.log(rank)}.{kind}").read_text().splitlines()
                       for rank in (0, 1)] for kind in ("hashed", "judged"))
    student, teacher = ([str(folder / name) for name in ("config.json", "model.safetensors")]
                        for folder in llama_pair)
    assert hashed == [student + teacher, []]
    assert judged == [[student[1], teacher[1]], []]
    lines = [line for rank in (0, 1) for line in ranks.output(rank).splitlines()
             if "s to the end of the first step: imports" in line]
    assert len(lines) == 1 and lines[0] in ranks.output(0)


def test_commands_start_without_torch_and_the_package_has_its_names():
    code = ("import sys, amid_ds.cli; print('torch' in sys.modules, 'pydantic' in sys.modules, "
            "*(getattr(amid_ds, name).__name__ for name in amid_ds.__all__))")
    assert python(code) == ("False False AMiD AlphaBeta Callback ConcreteScore InputError LMHead "
                            "PerToken Run SampledReverseKL SparseTargets Stopped TrainingError "
                            "VocabShard amid_loss evaluate linear_amid_loss load_recipe plan "
                            "preset train")
    with pytest.raises(AttributeError, match="'amid_ds' has no attribute 'amid_los'"):
        import amid_ds

        amid_ds.amid_los  # noqa: B018


def test_a_part_takes_all_time_since_the_one_before_and_may_come_again(monkeypatch):
    times = iter([3.0, 4.0, 8.0, 9.5])
    monkeypatch.setattr(start.time, "monotonic", lambda: next(times))
    with start.StartClock(began=1.0):
        for name in ("checks", "hashing", "checks"):
            start.end_part(name)
        clock = start.end_start("first step")
        assert clock.parts == {"checks": 6.0, "hashing": 1.0, "first step": 1.5}
        assert str(clock) == ("8.5 s to the end of the first step: checks 6.0, hashing 1.0, "
                              "first step 1.5")
        # It is over: neither of these asks for the time.
        start.end_part("checks")
        assert start.end_start("first step") is None


def test_a_process_knows_its_age():
    # psutil's begin is from the clock on the wall, and may be a second off.
    assert start.process_age() == pytest.approx(
        time.time() - psutil.Process().create_time(), abs=1.5)


def test_modules_that_were_imported_are_left_out_by_the_collector():
    code = ("import gc; from amid_ds.run.start import imports_kept\n"
            "with imports_kept():\n"
            "    on = gc.isenabled()\n"
            "before = gc.get_freeze_count()\n"
            "with imports_kept():\n"
            "    import decimal, xml.dom.minidom\n"
            "print(on, before, gc.isenabled(), gc.get_freeze_count() > 1000)")
    assert python(code) == "False 0 True True"
    assert gc.isenabled()


def test_deepspeeds_muon_is_compiled_when_it_is_called():
    code = ("import sys, torch\n"
            "from amid_ds.engine.backend import import_deepspeed\n"
            "import_deepspeed()\n"
            "from deepspeed.runtime.zero.muon.original_muon import zeropower_via_newtonschulz5\n"
            "compiled = []\n"
            "def compile(function):\n"
            "    compiled.append(function.__name__)\n"
            "    return lambda matrix, steps: 'compiled'\n"
            "torch.compile = compile\n"
            "for _ in range(2):\n"
            "    print([*compiled], zeropower_via_newtonschulz5(torch.ones(2, 2), 1), end=' ')\n"
            "print(compiled)")
    assert python(code) == ("[] compiled ['zeropower_via_newtonschulz5'] compiled "
                            "['zeropower_via_newtonschulz5']")
