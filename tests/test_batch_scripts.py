"""Batch scripts, without a Slurm: what reaches them, and how they hand on signals."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.runs import write_recipe

from amid_ds.cli import main
from amid_ds.cluster import batch_script, requeue, slurm, submit
from amid_ds.config.grid import parse_swept_key, path_override, sweep_combinations
from amid_ds.config.parse import load_recipe
from amid_ds.errors import InputError

ROOT = Path(__file__).parent.parent
TEMPLATES = sorted(path.stem for path in (ROOT / "slurm").glob("*.sbatch"))
# That of tasks is its one process, which Slurm signals itself.
WITH_STEPS = [name for name in TEMPLATES if name != "eval_tasks"]
OPTIONS = ("partition", "account", "qos", "time", "signal")
# Each would do something if it were not quoted, but for a line break.
ODD = ["a b", "a'b", 'a"b', "$(touch pwned)", "`touch pwned`", "a;touch pwned", "a#b", "%j",
       "größe", "&& touch pwned", "x --wrap=touch", "'; touch pwned; '", "${HOME}", "*", "!!", ""]
BREAKS = ["a\nb", "a\tb", "a\n#SBATCH --wrap=touch", "a\rb", "a\x1b[31mb", "a\x00b", "a\x85b",
          "a\u2028b", "a\x7fb", "a\udcffb"]


@pytest.fixture
def recipe(llama_pair, text_file, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_recipe(tmp_path / "r.yaml", *llama_pair, text_file, tmp_path / "out")


def dry_run(capsys, *words: object) -> str:
    """The script that `submit --dry-run` prints."""
    assert main(["submit", *map(str, words), "--ranks-per-node", "1", "--dry-run"]) == 0
    return capsys.readouterr().out


def options_of(script: str) -> dict[str, str]:
    """sbatch's options as it reads them: lines before the first command, split as a shell does."""
    options = {}
    for line in script.split("\n"):
        if line.startswith("#SBATCH"):
            word, *rest = shlex.split(line.removeprefix("#SBATCH"), comments=True)
            assert rest == [], line
            name, _, value = word.removeprefix("--").partition("=")
            options[name] = value
        elif line and not line.startswith("#"):
            break
    return options


def variables_of(script: str, *names: str, **environment: str) -> list[list[str]]:
    """The variables of a script (an array's items) as bash sets them, before it starts a step."""
    beginning = script.partition("\nstep=''")[0]
    assert beginning != script
    printing = "".join(f'\nprintf "%s\\0" "${{{name}[@]}}"; printf "\\n\\0"' for name in names)
    done = subprocess.run(["bash"], input=(beginning + printing).encode(), capture_output=True,
                          env={"PATH": os.environ["PATH"], "SLURM_NTASKS": "1", **environment})
    assert done.returncode == 0 and done.stderr == b"", done.stderr
    groups = done.stdout.decode().split("\n\0")[:-1]
    return [group.split("\0")[:-1] for group in groups]


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("option", OPTIONS)
def test_a_value_of_sbatchs_options_stays_that_value(option, value):
    template = batch_script.read_template("train")
    script = batch_script.render(template, {option: value})
    options = options_of(script)
    assert options.pop(option) == value
    # Nothing else has changed.
    plain = options_of(batch_script.render(template, {option: "x"}))
    assert options == {name: was for name, was in plain.items() if name != option}
    assert len(script.split("\n")) == len(batch_script.render(template, {option: "x"}).split("\n"))


@pytest.mark.parametrize("value", BREAKS)
def test_a_line_break_or_control_character_is_refused_wherever_it_comes_from(value):
    for name, given in (*((option, value) for option in OPTIONS), ("output", value),
                        ("NODE_LOG", value), ("PYTHON", value), ("RUNS", value),
                        ("SETTINGS", ["loss.lam=1", value])):
        with pytest.raises(InputError) as raised:
            batch_script.render(batch_script.read_template("sweep"), {name: given})
        message = str(raised.value)
        # It reaches no terminal either.
        assert "in the batch script" in message and message.replace("\n", "").isprintable()


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_that_would_be_a_line_of_the_script_leaves_nothing(recipe, tmp_path, capsys,
                                                                     option):
    assert main(["submit", str(recipe), "--ranks-per-node", "1",
                 f"--{option}=x\n#SBATCH --wrap=touch"]) == 2
    assert "in the batch script" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_output_folder_reaches_logs_runs_and_jobs_as_it_is(recipe, tmp_path, capsys, odd):
    name = f"out{odd}".replace("/", "_")
    script = dry_run(capsys, recipe, path_override("output_dir", name), "--sweep",
                     "loss.lam=0.1,0.9", "--at-once", "1")
    logs = str(tmp_path / name / "logs")
    # Slurm writes %% as %.
    assert options_of(script)["output"] == logs.replace("%", "%%") + "/%A_%a.log"
    (node_log,), (runs,), (python,), settings = variables_of(script, "NODE_LOG", "RUNS", "PYTHON",
                                                             "SETTINGS")
    assert node_log == logs.replace("%", "%%") + "/%A_%a-%N.log"
    assert (runs, python) == (name, sys.executable)
    jobs = [load_recipe(recipe, shlex.split(setting)) for setting in settings]
    assert [(job.output_dir, job.loss.lam) for job in jobs] == [
        (f"{name}/loss.lam={lam}", lam) for lam in (0.1, 0.9)]
    assert options_of(script)["array"] == "0-1%1"
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("name", ['"out\\nx"', '"out\\e[31m"', "out\\x"])
def test_an_output_folder_that_sbatch_would_read_otherwise_is_refused(recipe, tmp_path, capsys,
                                                                      name):
    assert main(["submit", str(recipe), "--ranks-per-node", "1", f"output_dir={name}"]) == 2
    message = capsys.readouterr().err
    # The recipe's own check has refused a NUL already.
    assert ("no path has a NUL" if "\\0" in name else "in the batch script") in message
    assert "remedy" in message and "\x1b" not in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.yaml"]


def write_program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}")
    path.chmod(0o755)


@pytest.fixture
def fake_slurm(tmp_path) -> dict[str, str]:
    """An environment with stand-ins for srun, scontrol and the interpreter.

    The step writes its words to `step`, waits for USR1 if WAIT is set, and ends with STEP_STATUS,
    after a signal with 75 or SIGNAL_STATUS; what is called at its end is in `calls`.
    """
    programs = tmp_path / "bin"
    programs.mkdir()
    write_program(programs / "srun", f'''
trap 'sleep 0.1; exit ${{SIGNAL_STATUS:-75}}' USR1
printf '%s\\0' "$@" > {tmp_path}/step.new
mv {tmp_path}/step.new {tmp_path}/step
[ -z "${{WAIT-}}" ] || for i in $(seq 600); do sleep 0.05; done
exit "${{STEP_STATUS:-0}}"
''')
    write_program(programs / "scontrol", f'''
case "$*" in
    "show hostnames"*) echo n1 ;;
    "show job"*) echo "JobId=7 JobState=$JOB_STATE Reason=$REASON StdOut=/x" ;;
    *) echo "scontrol $*" >> {tmp_path}/calls ;;
esac
''')
    write_program(programs / "python", f'echo "$3 $4" >> {tmp_path}/calls\n')
    return {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHON": str(programs / "python"),
            "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_NTASKS": "1",
            "SLURM_ARRAY_TASK_ID": "0", "JOB_STATE": "RUNNING", "REASON": "None"}


def run_script(template: str, folder: Path, environment: dict[str, str], *numbers: int) -> int:
    """Run a template with its words `R.yaml` and `a b`; send it the signals; its exit status."""
    script = str(ROOT / "slurm" / f"{template}.sbatch")
    process = subprocess.Popen(["bash", script, "R.yaml", "a b"], env=environment, cwd=folder,
                               stdout=subprocess.DEVNULL)
    for number in numbers:
        deadline = time.monotonic() + 60
        while not (folder / "step").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        time.sleep(0.02)
    return process.wait(60)


def calls(folder: Path) -> str:
    return (folder / "calls").read_text() if (folder / "calls").exists() else ""


@pytest.mark.parametrize("numbers", [
    (signal.SIGUSR1,), (signal.SIGTERM,), (signal.SIGHUP,), (signal.SIGUSR1, signal.SIGTERM)],
    ids=["usr1", "term", "hup", "both"])
@pytest.mark.parametrize("template", WITH_STEPS)
def test_a_signal_to_the_script_goes_on_to_the_step_whose_status_is_the_scripts(
        template, numbers, fake_slurm, tmp_path):
    assert run_script(template, tmp_path, {**fake_slurm, "WAIT": "yes"}, *numbers) == 75
    restarts = template in ("prepare", "cache")
    assert calls(tmp_path) == ("scontrol requeue 7\n" if restarts else "requeue 75\n")


@pytest.mark.parametrize("status", [0, 1, 2, 75, 137])
@pytest.mark.parametrize("template", WITH_STEPS)
def test_a_script_ends_with_its_steps_status(template, status, fake_slurm, tmp_path):
    assert run_script(template, tmp_path, {**fake_slurm, "STEP_STATUS": str(status)}) == status
    words = (tmp_path / "step").read_text().split("\0")
    assert words[words.index("R.yaml") + 1] == "a b"
    expected = {0: "", 2: ""}.get(status, f"requeue {status}\n")
    if template in ("prepare", "cache"):
        expected = "scontrol requeue 7\n" if status == 75 else ""
    if (template, status) == ("sweep", 0):
        expected = "sweep runs/sweep\n"
    assert calls(tmp_path) == expected


@pytest.mark.parametrize("template", ["prepare", "cache"])
@pytest.mark.parametrize("status", [129, 130, 138, 143])
def test_a_signal_that_ends_its_step_starts_it_again_unless_slurm_ends_the_job(
        status, template, fake_slurm, tmp_path):
    environment = {**fake_slurm, "STEP_STATUS": str(status)}
    for changed, again in (({}, True), ({"JOB_STATE": "COMPLETING"}, False),
                           ({"JOB_STATE": "COMPLETING", "REASON": "TimeLimit"}, True),
                           ({"REQUEUE": "no"}, False)):
        (tmp_path / "calls").unlink(missing_ok=True)
        assert run_script(template, tmp_path, {**environment, **changed}) == status
        assert calls(tmp_path) == ("scontrol requeue 7\n" if again else ""), changed


@pytest.mark.parametrize("facts, ends", [
    ({}, False), ({"JobState": "RUNNING", "Reason": "None"}, False),
    ({"JobState": "COMPLETING", "Reason": "TimeLimit"}, False),
    # After scancel.
    ({"JobState": "COMPLETING", "Reason": "None"}, True), ({"JobState": "CANCELLED"}, True)])
def test_a_job_that_is_cancelled_while_it_saves_stays_cancelled(facts, ends):
    assert (requeue._end_by_slurm(facts) is not None) == ends


def test_srun_that_dies_of_the_signal_before_its_tasks_start_counts_as_stopped_in_order():
    assert requeue.first_exit_status(138, "") == 75
    assert requeue.first_exit_status(138, "srun: error: n1: task 0: Killed\n") == 138


def test_requeue_reads_the_log_that_it_writes_whatever_its_name(tmp_path, monkeypatch):
    code = ("from amid_ds.cluster import requeue; import sys; "
            "sys.stderr.write(requeue._attempt_log())")
    log = tmp_path / "a%b JobState=x $(y).log"
    log.write_text("amid-ds: attempt 1\nold\namid-ds: attempt 2\nsrun: error: n1: task 0: Killed\n")
    with open(log, "a") as file:
        done = subprocess.run([sys.executable, "-c", code], stdout=file, stderr=subprocess.PIPE,
                              text=True, check=True)
    assert done.stderr == "amid-ds: attempt 2\nsrun: error: n1: task 0: Killed\n"
    # A pipe would never end.
    ours, theirs = os.pipe()
    monkeypatch.setattr(requeue, "OWN_OUTPUT", Path(f"/proc/self/fd/{theirs}"))
    assert requeue._attempt_log() == ""
    os.close(ours)
    os.close(theirs)


def test_a_path_in_slurms_facts_is_no_other_fact():
    line = "JobId=7 JobState=RUNNING Reason=None Command=/a JobState=FAILED/x WorkDir=/a Reason=b"
    facts = slurm._parse_facts(line)
    assert (facts["JobState"], facts["Reason"]) == ("RUNNING", "None")


NODES = "64|all*|n1|gpu:4\n4|small|s1|gpu:1\n6|small|s2|gpu:1\n128|small|s3|(null)\n"


@pytest.mark.parametrize("nodes, partition, cpus", [
    (1, None, 64), (1, "all", 64), (1, "small", 6), (2, "small", 4), (2, "all,small", 6),
    (3, "small", None), (1, "nosuch", None)])
def test_the_cpus_of_as_many_nodes_as_a_job_has(monkeypatch, nodes, partition, cpus):
    monkeypatch.setattr(slurm, "slurm_available", lambda: True)
    monkeypatch.setattr(slurm, "_call", lambda *command: NODES)
    assert slurm.cpus_of_nodes(nodes, partition) == cpus


@pytest.mark.parametrize("words, line", [
    ([], "8"), (["--partition", "small"], "3"), (["--partition", "small", "--nodes", "2"], "2"),
    (["--partition", "small", "--cpus-per-rank", "9"], "9"), (["--partition", "nosuch"], "8"),
    (["--partition", "small", "--template", "train_deepspeed"], "6"),
    (["--partition", "small", "--template", "prepare"], "6")])
def test_a_rank_gets_no_more_cpus_than_the_nodes_have(recipe, capsys, monkeypatch, words, line):
    monkeypatch.setattr(slurm, "slurm_available", lambda: True)
    monkeypatch.setattr(slurm, "_call", lambda *command: NODES)
    monkeypatch.delenv("SBATCH_PARTITION", raising=False)
    assert main(["submit", str(recipe), "--ranks-per-node", "2", "--dry-run", *words]) == 0
    assert options_of(capsys.readouterr().out)["cpus-per-task"] == line


def test_two_submissions_at_once_get_two_folders(tmp_path):
    made: list[Path] = []
    threads = [threading.Thread(target=lambda: made.append(submit._new_submission(tmp_path)))
               for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.name for path in made) == [f"{number:04d}" for number in range(1, 9)]


def test_at_once_needs_a_sweep(recipe, capsys):
    assert main(["submit", str(recipe), "--at-once", "2"]) == 2
    assert "--at-once 2 without --sweep" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["#SBATCH --comment=\"don't", "#SBATCH --output=gone%%/%j.log"])
def test_a_template_that_sbatch_cannot_split_or_log_is_refused(recipe, capsys, text):
    Path("mine.sbatch").write_text(f"#!/bin/bash\n{text}\nsrun true\n")
    assert main(["submit", str(recipe), "--template", "mine.sbatch", "--ranks-per-node", "1"]) == 2
    message = capsys.readouterr().err
    assert "line 2" in message and "Traceback" not in message
    Path("mine.sbatch").write_bytes(b"#!/bin/bash\n\xff")
    assert main(["submit", str(recipe), "--template", "mine.sbatch"]) == 2
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("argument, values", [
    ("k='a,b',c", ["'a,b'", "c"]), ('k="a\\",b", c', ['"a\\",b"', "c"]),
    ("k='it''s, so',x", ["'it''s, so'", "x"]), ("k=it's,b", ["it's", "b"]),
    ("k={a: 'x,}', b: [1, 2]},y", ["{a: 'x,}', b: [1, 2]}", "y"]), ("k='a,b'", ["'a,b'"]),
    ("k='a,b", ["'a", "b"])])
def test_a_comma_in_quotes_belongs_to_the_value(argument, values):
    assert parse_swept_key(argument) == ("k", values)


def test_a_runs_folder_has_a_name_that_file_systems_allow(tmp_path):
    runs = sweep_combinations([f"data.train.0.text={'ö' * 300}a,{'ö' * 300}b"])
    assert len({run.name for run in runs}) == 2
    for run in runs:
        (tmp_path / run.name).mkdir()


@pytest.mark.parametrize("path", ["a # b", "a: b", "null", "010", "a,b", "[x]", "it's \"y\"", "-",
                                  "runs/größe", "*x", "~", "1/2", "runs/a-b.c_d=e+f"])
def test_a_path_reaches_a_run_of_a_sweep_as_it_is(recipe, path):
    run, _ = sweep_combinations(["loss.lam=0.1,0.9"])
    override = run.overrides(path)[-1]
    assert load_recipe(recipe, [override]).output_dir == f"{path}/loss.lam=0.1"
    assert parse_swept_key(override)[1] == [override.partition("=")[2]]


@pytest.mark.parametrize("value", ["'a b'", "'a\"b'", "'it''s'", "$(touch pwned)", "a`touch pwned`",
                                   "a;touch pwned", "'a,b'", "größe", "'%j'", "a\\b"])
def test_a_swept_value_reaches_its_job_as_it_is(recipe, capsys, tmp_path, value):
    script = dry_run(capsys, recipe, "--sweep", f"data.prepared={value},text")
    (settings,) = variables_of(script, "SETTINGS")
    swept, _ = shlex.split(settings[0])
    assert swept == f"data.prepared={value}" and not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("value", ['"a\nb"', "a\x1bb", "a\u2028b"])
def test_a_swept_value_with_a_line_break_is_refused(recipe, capsys, value):
    assert main(["submit", str(recipe), "--ranks-per-node", "1", "--sweep",
                 f"data.prepared={value},text"]) == 2
    message = capsys.readouterr().err
    assert "\x1b" not in message and "expected" in message


def test_every_script_without_an_edit_is_what_bash_understands():
    for template in TEMPLATES:
        text = batch_script.read_template(template)
        assert batch_script.render(text, {}) == text
        batch_script.refuse_faults(text, Path("/nowhere"))
        traps = re.search(r"^trap .* USR1 TERM INT HUP$", text, re.M)
        assert traps or template not in WITH_STEPS, template


def test_a_value_that_cannot_be_quoted_names_its_remedy():
    with pytest.raises(InputError) as raised:
        batch_script.render("#SBATCH --x=1   # EDIT\n", {"x": "a\\b"})
    assert "backslash" in raised.value.expected
