"""`amid-ds chain`: teacher assistants (arXiv 1902.03393), runs that teach one another in turn.

A student that is much smaller than its teacher may learn more from a model between the two, which
has learnt from the teacher itself. Each link is an ordinary run, made as a sweep's runs are; the
next link's teacher is the model that it leaves. So the same command again skips a finished link and
resumes a broken one, and a link whose teacher has changed since is refused, as any resumed run is.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from amid_ds.checkpoint.manifest import Manifest, list_checkpoints, newest_state
from amid_ds.cluster.submit import SubmitArgs, submit
from amid_ds.config.chain import ChainFile, ChainLink, read_chain
from amid_ds.config.grid import path_override
from amid_ds.config.parse import load_recipe
from amid_ds.config.recipe import Recipe, Student
from amid_ds.data import load_tokenizer, read_batches, vocabulary_size
from amid_ds.distributed.devices import choose_device
from amid_ds.errors import InputError, Stopped, TrainingError
from amid_ds.eval.evaluate import load_model, score_model, sum_scores
from amid_ds.experiments.sweep import is_finished, markdown_table, run_one, signals_to
from amid_ds.files.atomic import replace_text
from amid_ds.files.ownership import require_own_file, require_own_folder
from amid_ds.models.adapter_folders import model_source
from amid_ds.models.loading import load_causal_lm, meta_model
from amid_ds.run.folder import RunFolder
from amid_ds.run.log import read_evaluations
from amid_ds.run.places import BEFORE_TRAINING
from amid_ds.run.provenance import model_hash
from amid_ds.run.warm_start import resolve_student
from amid_ds.training.job import check_recipe

logger = logging.getLogger(__name__)

# In a link's folder: how far its model is from the chain's first teacher.
DISTANCE_FILE = "first_teacher.json"
TITLES = ("link", "parameters", "steps", "set", "KL to its teacher", "KL to the first teacher",
          "perplexity")


@dataclass(frozen=True)
class Link:
    """A run of a chain: its name, recipe and overrides, which name its folder and its teacher.

    recipe: what they come to. known: the same with the student that its teacher begins as, until
    that has been trained: of its vocabulary and its size.
    """

    name: str
    recipe_path: str
    overrides: tuple[str, ...]
    recipe: Recipe
    known: Recipe

    @property
    def run(self) -> RunFolder:
        return RunFolder(Path(self.recipe.output_dir))

    @property
    def is_finished(self) -> bool:
        return is_finished(self.run.path, self.recipe)


@dataclass(frozen=True)
class Chain:
    """The links in the order of their training, and the folder of their runs."""

    folder: Path
    links: tuple[Link, ...]

    @property
    def unfinished(self) -> list[Link]:
        return [link for link in self.links if not link.is_finished]


def plan_chain(path: str, overrides: Sequence[str], ranks: int) -> Chain:
    """The chain in a file, each link checked as `train` does on so many ranks.

    overrides: for all links, after their own. Raises one InputError with the problems of all links.
    """
    file = read_chain(path)
    folder = Path(file.output_dir)
    _require_own_chain(file, folder)
    links: list[Link] = []
    problems: list[str] = []
    remedies: list[str] = []
    for number, own in enumerate(file.chain):
        before = file.chain[number - 1].name if number else None
        known = resolve_student(links[-1].known) if links else None
        try:
            links.append(_make_link(file, own, overrides, before, known))
            check_recipe(links[-1].known, ranks)
            if own is not file.chain[-1] and links[-1].recipe.student.lora is not None:
                raise InputError("its student.lora leaves adapters, which are no teacher for the "
                                 "link after it", "adapters in the last link alone",
                                 "leave student.lora out of the others; or train such a link by "
                                 "itself, merge it (amid-ds export RUN OUT --merge), and begin a "
                                 "chain with OUT as its teacher")
        except InputError as error:
            problems.append(f"link {own.name}: {error.found}")
            remedies.append(error.remedy)
    if problems:
        raise InputError("\n    - ".join([f"the chain {path}:", *problems]),
                         "recipes that train would take, each taught by the one before",
                         "; ".join(dict.fromkeys(remedies)))
    return Chain(folder, tuple(links))


def _make_link(file: ChainFile, own: ChainLink, overrides: Sequence[str], before: str | None,
               known: Student | None) -> Link:
    """A link of the chain. before: the link that teaches it, None for the first; known: the student
    of that, None where it could not be read. Raises InputError."""
    asked = [*own.overrides, *overrides]
    path, output = file.recipe_of(own), Path(file.output_dir) / own.name
    if before is None:
        recipe = load_recipe(path, [*asked, path_override("output_dir", output)])
        if recipe.live_teacher is None:
            raise InputError("it names no teacher that is a model", "the chain's first teacher",
                             "set teacher.model in its recipe")
        return Link(own.name, path, (*asked, path_override("output_dir", output)), recipe, recipe)
    teacher = RunFolder(output.parent / before).model
    named = file.named_teacher(own, asked)
    if named is not None and (named[0] != "teacher.model"
                              or os.path.realpath(named[1]) != os.path.realpath(teacher)):
        raise InputError(f"its {named[0]} is {named[1]}, and its teacher {teacher}",
                         f"the model of the link {before}",
                         "leave the teacher out of links but the first, and name it in the base")
    asked += [path_override("output_dir", output), path_override("teacher.model", teacher),
              "teacher.revision=null"]
    recipe = load_recipe(path, asked)
    taught = recipe.live_teacher
    assert taught is not None
    if taught.delta is not None:
        raise InputError("it has a teacher.delta, whose base is that of another teacher",
                         "a delta in the first link alone",
                         "add teacher.delta=null to the overrides of the others")
    if teacher.is_dir():
        return Link(own.name, path, tuple(asked), recipe, recipe)
    student = known or recipe.student
    stand_in = taught.model_copy(update={"model": student.model, **student.hub_kwargs})
    # A run that has begun under the real teacher is the same one.
    policy = recipe.checkpoint.model_copy(update={
        "allow_change": [*recipe.checkpoint.allow_change, "teacher"]})
    return Link(own.name, path, tuple(asked), recipe,
                recipe.model_copy(update={"teacher": stand_in, "checkpoint": policy}))


def _require_own_chain(file: ChainFile, folder: Path) -> None:
    """Raise InputError unless the folder is new, or holds runs of this chain."""
    own = {link.name for link in file.chain} | set(BEFORE_TRAINING)
    require_own_folder(folder, any(RunFolder(folder / link.name).exists for link in file.chain),
                       "output_dir",
                       lambda entry: entry.name in own or entry.suffix in (".yaml", ".yml"))
    report = folder / "chain.md"
    require_own_file(report, lambda text: text.startswith(f"| {TITLES[0]} "), "the report")
    require_own_file(folder / "chain.csv", lambda text: text.startswith(f"{TITLES[0]},"),
                     "the report")


def run_chain(chain: Chain, ranks: int) -> None:
    """Train the unfinished links in turn, then report.

    Raises Stopped, after its link has stopped in good order; TrainingError for a link that failed:
    none is begun after it; InputError for one whose teacher is another than it has learnt from.
    """
    for number, link in enumerate(chain.links, 1):
        if number > 1:
            _require_same_teacher(link)
        title = f"[{number}/{len(chain.links)}] {link.name}"
        if run_one(title, link.recipe_path, link.overrides, ranks):
            raise TrainingError(f"the link {link.name} failed: {link.run.path} says why\n"
                                "  the same command again goes on with it")
    report_chain(chain)


def _require_same_teacher(link: Link) -> None:
    """Raise InputError where a link is finished and its teacher is another than it learnt from.

    An unfinished one is refused by its own run.
    """
    teacher, checkpoints = link.recipe.live_teacher, list_checkpoints(link.run.checkpoints)
    if teacher is None or not checkpoints or not link.is_finished:
        return
    if Manifest.read(checkpoints[-1]).identity.get("teacher.sha256") != model_hash(teacher.model):
        raise InputError(f"the link {link.name} has learnt from another model than is in "
                         f"{teacher.model} now", "the one that it learnt from",
                         f"move {link.run.path} away, and those of the links after it, to train "
                         "them again")


def submit_chain(chain: Chain, args: SubmitArgs, dry_run: bool) -> None:
    """Submit a Slurm job for each unfinished link, each after the success of the one before.

    Prints the jobs' ids, the last one last; a dry run their scripts.
    """
    for link in chain.unfinished:
        job = submit(link.recipe_path, link.overrides, args, dry_run, checked=link.known)
        args = replace(args, after=job)


def report_chain(chain: Chain) -> None:
    """Measure what is not measured yet, and print and write the table of all links.

    Raises Stopped where a signal asks for it.
    """
    def stop() -> None:
        raise Stopped("stopped before the report; the same command makes it")

    with signals_to(stop, lambda: os.kill(os.getpid(), signal.SIGKILL)):
        rows = [row for link in chain.links for row in _rows(chain, link)]
    table = markdown_table(TITLES, rows)
    replace_text(chain.folder / "chain.md", table)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([TITLES, *rows])
    replace_text(chain.folder / "chain.csv", text.getvalue())
    print(f"{table}\nalso {chain.folder / 'chain.csv'} and chain.md; curves of all links: amid-ds "
          f"report {' '.join(str(link.run.path) for link in chain.links)}")


def _rows(chain: Chain, link: Link) -> Iterator[list[object]]:
    """The lines of a finished link: one for each set that it has evaluated, one without numbers if
    it has none. A set that the recipe has got since is in none.
    """
    source = model_source(str(link.run.model),
                          trust_remote_code=link.recipe.student.trust_remote_code)
    model = meta_model(source.model, **source.hub_kwargs)
    state = newest_state(link.run)
    facts = [link.name, sum(p.numel() for p in model.parameters()), state.step if state else None]
    latest = {line["name"]: line for line in read_evaluations(link.run.path)}
    evaluated = {each.name: latest[each.name] for each in link.recipe.data.eval
                 if each.name in latest}
    distances = _distances(chain.links[0], link, sorted(evaluated)) if evaluated else {}
    for name, line in evaluated.items():
        yield [*facts, name, line["kl_to_teacher"], distances[name], line["perplexity"]]
    if not evaluated:
        yield [*facts, None, None, None, None]


def _distances(first: Link, link: Link, sets: list[str]) -> Mapping[str, float | None]:
    """KL(first teacher ‖ the link's model) over each of the link's `sets`, in nats.

    Measured once for the model: by both models whole in this process, as `eval` does. Of the first
    link as it was evaluated, unless another model, the mean, is what it leaves. None where `eval`
    cannot: the first teacher has a delta, or another vocabulary.
    """
    path, teacher = link.run.path / DISTANCE_FILE, first.recipe.live_teacher
    assert teacher is not None
    if link is first and link.recipe.train.ema is None:
        return {line["name"]: line["kl_to_teacher"] for line in read_evaluations(link.run.path)}
    if teacher.delta is not None or teacher.vocabulary == "grown":
        return dict.fromkeys(sets)
    made_of = {"model": model_hash(str(link.run.model)), "teacher": teacher.model,
               "teacher_sha256": model_hash(teacher.model), "revision": teacher.revision,
               "sets": sets}
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["of"] == made_of:
            kept: Mapping[str, float | None] = known["kl"]
            return kept
    logger.info(f"{link.name}: its distance to the first teacher, {teacher.model}")
    distances = _measure_distances(link, first, sets)
    replace_text(path, json.dumps({"of": made_of, "kl": distances}, indent=1) + "\n")
    return distances


def _measure_distances(link: Link, first: Link, sets: list[str]) -> dict[str, float | None]:
    teacher = first.recipe.live_teacher
    assert teacher is not None
    device = choose_device(0)
    recipe, path = link.recipe, str(link.run.model)
    trusted = recipe.student.trust_remote_code
    model = load_model(path, trusted).to(device)
    guide = load_causal_lm(teacher.model, teacher.dtype, **teacher.hub_kwargs).eval().to(device)
    size = vocabulary_size(load_tokenizer(path, trust_remote_code=trusted))
    distances = {}
    for name in sets:
        batches = read_batches(recipe.prepared_dir / "eval" / name,
                               recipe.train.micro_batch_size, 0, 1)
        scores = score_model(sum_scores(model, guide, batches, size), has_teacher=True)
        distances[name] = scores.kl_to_teacher
    return distances
