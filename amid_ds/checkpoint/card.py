"""The card of an exported model, its README.md: what it is, how it was trained, and its scores.

It begins with the metadata that the hub reads. A card is made to be shown: of a path of this
machine it has the last part alone, `…/corpus.jsonl`. The run's recipe.yaml and provenance.json have
the whole paths.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amid_ds.checkpoint.state import TrainState
from amid_ds.config.parse import resolved
from amid_ds.config.recipe import EvalSet, MeanTeacher, Recipe
from amid_ds.config.strict import dump_yaml
from amid_ds.data.locate import is_hub_id
from amid_ds.errors import InputError, printable
from amid_ds.files.json_lines import is_number
from amid_ds.run.folder import RunFolder
from amid_ds.run.log import read_evaluations, read_metrics, read_task_scores
from amid_ds.run.places import MODEL_CARD_SIGN
from amid_ds.run.provenance import read_provenance
from amid_ds.run.warm_start import resolve_student

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

CARD_FILE = "README.md"
NO_METADATA = "---\n{}\n---\n"
# The names of scores; the hub takes any word for their types, and knows some.
SCORES = {
    "loss": ("loss", "Loss, nats per token"), "perplexity": ("perplexity", "Perplexity"),
    "kl_to_teacher": ("kl_to_teacher", "KL to the teacher, nats per token"),
    "top1_agreement": ("top1_agreement", "Top-1 agreement with the teacher"),
    "rouge_l": ("rouge", "ROUGE-L")}
TASK_TYPE = "text-generation"
LICENSE_KEYS = ("license", "license_name", "license_link")
# What a license may ask to hand on with a model that is made of its own.
LICENSE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md")
# The section of the scores of tasks, up to the next one.
BENCHMARKS = re.compile(r"\n## Benchmarks\n.*?(?=\n## |\Z)", re.DOTALL)


def model_card(checkpoint: Path, recipe: Recipe, state: TrainState, dtype: str,
               is_adapter: bool = False) -> str:
    """The text of the card of a checkpoint's model. is_adapter: the folder holds adapters alone."""
    run = RunFolder(checkpoint.parent.parent)
    facts = read_provenance(run)
    base = _base_model(run, facts)
    evaluated = _lines_of_last_step(read_evaluations(run.path), state.step)
    datasets = [source.path for source in recipe.data.train if source.path in _hub_data(facts)]
    card = new_card(
        _written(run, recipe, facts, state, dtype, is_adapter, evaluated),
        ["distillation"] if recipe.teacher is not None else [],
        {"library_name": "peft" if is_adapter else "transformers", "base_model": base,
         "base_model_relation": base and ("adapter" if is_adapter else "finetune"),
         "datasets": list(dict.fromkeys(datasets)) or None, **_license(run, recipe, base)})
    if recipe.train.ema is None:
        # What the evaluations measured is else not what is exported.
        _add_results(card, run, [result for line in evaluated if line["step"] == state.step
                                 for result in _results_of(line, recipe.data.eval, facts)])
    return str(_with_task_scores(card, run, state.step))


def published_card(model: Path, license_id: str | None) -> str | None:
    """The text of the card of a model's folder as it is to be published; None where there is none.

    That is the file, with the scores of tasks that its run has by now, and with the license where
    one is given. Raises InputError where its metadata cannot be read.
    """
    from huggingface_hub import ModelCard

    file = model / CARD_FILE
    try:
        text = file.read_text(encoding="utf-8") if file.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read: {error}", "a text in UTF-8",
                         "correct the file, or take it out") from None
    run, step = RunFolder(model.resolve().parent), exported_step(model)
    is_runs = run.is_own and model.resolve() in (run.model.resolve(), run.best_model.resolve())
    if license_id is None and not (is_runs and step is not None and _task_scores(run, step)):
        return text
    try:
        card = ModelCard(NO_METADATA if text is None else text)
    except Exception as error:
        # Whatever YAML's readers say of a text.
        raise InputError(f"the metadata of {file} cannot be read: {error}",
                         "YAML between two lines of ---", "correct the file") from None
    if license_id is not None:
        for key in LICENSE_KEYS:
            card.data.pop(key)
        card.data["license"] = license_id
    return str(_with_task_scores(card, run, step) if is_runs and step is not None else card)


def new_card(text: str, tags: Sequence[str], fields: Mapping[str, object]) -> ModelCard:
    """A card of this text, with further tags and fields of metadata; None leaves a field out."""
    from huggingface_hub import ModelCard

    card = ModelCard(f"{NO_METADATA}\n{printable(text)}\n")
    for key, value in {"library_name": "transformers", "pipeline_tag": TASK_TYPE,
                       "tags": [*tags, MODEL_CARD_SIGN], **fields}.items():
        card.data[key] = value
    return card


def exported_step(model: Path) -> int | None:
    """The step that the card of an exported model names; None where it cannot be read."""
    try:
        card = (model / CARD_FILE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    title = re.search(r"^# .*, step (\d+)$", card, re.MULTILINE)
    return None if title is None else int(title[1])


def _written(run: RunFolder, recipe: Recipe, facts: Mapping[str, Any], state: TrainState,
             dtype: str, is_adapter: bool, evaluated: Sequence[Mapping[str, Any]]) -> str:
    """What a reader is told, without the scores of tasks."""
    mean = ("" if recipe.train.ema is None else
            f" They are the running mean of the run's, with a decay of {recipe.train.ema:g}; what "
            "evaluations during the training have measured are the run's own.")
    logged = _lines_of_last_step(read_metrics(run.path), state.step)
    # A slash marks times, speeds and memory.
    metrics = [f"| {key} | {value:g} |" for key, value in (logged[-1] if logged else {}).items()
               if value is not None and "/" not in key]
    sources = [f"- {_shown(source.path)}: {', '.join(f'`{field}`' for field in source.fields)}"
               + f", split `{source.split}`" * (source.path in _hub_data(facts))
               + f", weight {source.weight:g}" * (len(recipe.data.train) > 1)
               for source in recipe.data.train]
    parts = [f"# {printable(run.path.resolve().name, keep='')}, step {state.step}",
             f"{_shown(recipe.student.model)}{_taught_by(recipe, facts)}, trained by amid_ds: "
             f"{state.step} of {recipe.train.total_steps} steps, {state.tokens:,} tokens. "
             f"{'Adapters' if is_adapter else 'Weights'} in {dtype}.{mean}",
             "## Data\n\n" + "\n".join(sources),
             "## Metrics of the last logged step\n\n| | |\n|---|---:|\n" + "\n".join(metrics)]
    if evaluated:
        parts.append(f"## Evaluation at step {evaluated[0]['step']}\n\n" + _table(evaluated))
    if facts:
        parts.append("## Provenance\n\n```json\n"
                     + json.dumps(without_places(facts), indent=1, ensure_ascii=False) + "\n```")
    parts.append("## Recipe\n\n```yaml\n" + dump_yaml(without_places(resolved(recipe))).strip()
                 + "\n```")
    return "\n\n".join(parts)


def _lines_of_last_step(lines: Sequence[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    """The last step's lines, up to `step`: one of metrics.jsonl, one per set of eval.jsonl."""
    lines = [line for line in lines if line["step"] <= step]
    return [line for line in lines if line["step"] == lines[-1]["step"]]


def _table(lines: Sequence[Mapping[str, Any]]) -> str:
    """A row for each line by its name, a column for each number that one of them has."""
    columns = list(dict.fromkeys(key for line in lines for key, value in line.items()
                                 if key not in ("step", "name") and value is not None))
    rows = [[str(line["name"]).replace("|", "\\|").replace("\n", " "),
             *("–" if line.get(key) is None else f"{line[key]:g}" for key in columns)]
            for line in lines]
    head = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    return "\n".join(head + ["| " + " | ".join(row) + " |" for row in rows])


def _taught_by(recipe: Recipe, facts: Mapping[str, Any]) -> str:
    """Of which teacher the model learnt, for a sentence.

    The cache of a teacher may be elsewhere by now: its run has noted whose it was.
    """
    objective = " through the AMiD objective ([paper](https://arxiv.org/abs/2510.15982))"
    if recipe.live_teacher is not None:
        return f", distilled from {_shown(recipe.live_teacher.model)}{objective}"
    if isinstance(recipe.teacher, MeanTeacher):
        return (f", distilled from its own running mean (decay {recipe.teacher.ema:g})"
                f"{objective}")
    if recipe.cached_teacher is None:
        return ""
    try:
        teacher = facts["teacher"]
        return (f", distilled from {_shown(teacher['model'])} by its distributions in a cache "
                f"({teacher['method']} {teacher['kept']}){objective}")
    except (KeyError, TypeError, AttributeError):
        return f", distilled from the cache {_shown(recipe.cached_teacher.cached)}{objective}"


def _shown(path: str) -> str:
    """A model or a source for a sentence."""
    return f"`{without_places(path)}`"


def without_places(value: Any) -> Any:
    """A value of JSON whose absolute paths are cut to their last part."""
    if isinstance(value, dict):
        return {key: without_places(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_places(each) for each in value]
    if isinstance(value, str) and value.startswith(("/", "~")):
        return f"…/{os.path.basename(value.rstrip('/'))}"
    return value


def _hub_data(facts: Mapping[str, Any]) -> Sequence[str]:
    """The ids of the run's data sets of the hub, as it noted them when it began: a path that has
    gone since looks like one. [] for runs of earlier versions."""
    found = facts.get("hub_data")
    return found if isinstance(found, list) else []


def _base_model(run: RunFolder, facts: Mapping[str, Any]) -> str | None:
    """The hub's id of the model that the student was; None where it was a folder of unknown origin.

    A student that this package made, by a run or by `prune`, has the base that its card names.
    """
    student = facts.get("student")
    if isinstance(student, dict) and student.get("files_sha256", "") is None:
        # Of a folder there is a hash.
        model = student.get("model")
        return model if isinstance(model, str) and is_hub_id(model) else None
    for found in map(_metadata, (run.start_model / CARD_FILE, run.student_files / CARD_FILE)):
        tags, base = found.get("tags"), found.get("base_model")
        if isinstance(tags, list) and MODEL_CARD_SIGN in tags and isinstance(base, str):
            return base
    return None


def _license(run: RunFolder, recipe: Recipe, base: str | None) -> dict[str, str]:
    """The fields of the license that the student's own card names; {} where it is silent."""
    own = Path(resolve_student(recipe, run.path).model)
    return (license_fields(run.student_files / CARD_FILE, base)
            or license_fields(own / CARD_FILE, base))


def license_fields(card: Path, base: str | None) -> dict[str, str]:
    """The fields of the license that a model's card names, for what is made of that model.

    base: the model's id on the hub, or that of its base. {} where the card is silent, or not there.
    """
    found = _metadata(card)
    fields = {key: found[key] for key in LICENSE_KEYS if isinstance(found.get(key), str)}
    if "license" not in fields:
        return {}
    link = fields.pop("license_link", None)
    goes_along = link in LICENSE_FILES and card.with_name(link).is_file()
    if link is not None and "://" not in link and not goes_along:
        link = base and f"https://huggingface.co/{base}/blob/main/{link}"
    return fields if link is None else {**fields, "license_link": link}


def _metadata(file: Path) -> Mapping[str, Any]:
    """The metadata of a card; {} where there is none that can be read."""
    from huggingface_hub import metadata_load

    try:
        return metadata_load(file) or {}
    except Exception:
        # Anybody's file: nothing in it may end an export.
        return {}


def _results_of(line: Mapping[str, Any], sets: Sequence[EvalSet], facts: Mapping[str, Any]
                ) -> list[EvalResult]:
    """The scores of a line of eval.jsonl, for the metadata."""
    from huggingface_hub import EvalResult

    found = [each for each in sets if each.name == line["name"] and each.path in _hub_data(facts)]
    # The hub joins results on one data set: two sets of its rows are told apart by their names.
    origin = (found[0] if found and [each.path for each in sets].count(found[0].path) == 1
              else None)
    place: Mapping[str, Any] = {} if origin is None else {
        "dataset_config": origin.config, "dataset_split": origin.split,
        "dataset_revision": origin.revision}
    return [EvalResult(
        task_type=TASK_TYPE, task_name="Text Generation", dataset_name=line["name"],
        dataset_type=line["name"] if origin is None else origin.path, **place,
        metric_type=SCORES[key][0], metric_name=SCORES[key][1], metric_value=value)
        for key, value in line.items() if key in SCORES and value is not None]


def _task_scores(run: RunFolder, step: int) -> list[dict[str, Any]]:
    """The lines of eval_tasks.jsonl on the model of `step`; of a task's several the last."""
    return list({line["name"]: {key: value for key, value in line.items()
                                if key == "name" or (key != "step" and is_number(value))}
                 for line in read_task_scores(run.path) if line["step"] == step}.values())


def _with_task_scores(card: ModelCard, run: RunFolder, step: int) -> ModelCard:
    """The card with the scores that its run's model of `step` has on tasks, in place of earlier
    ones."""
    from huggingface_hub import EvalResult

    scores = _task_scores(run, step)
    if not scores:
        return card
    _add_results(card, run, [
        EvalResult(task_type=TASK_TYPE, task_name="Text Generation", dataset_type=line["name"],
                   dataset_name=line["name"], metric_type=key, metric_value=value)
        for line in scores for key, value in line.items()
        if key != "name" and not key.endswith("_stderr")])
    text = BENCHMARKS.sub("", card.text).rstrip("\n")
    card.text = f"{text}\n\n## Benchmarks\n\n{printable(_table(scores))}\n"
    return card


def _add_results(card: ModelCard, run: RunFolder, results: Sequence[EvalResult]) -> None:
    """Put results into the metadata, each in place of one of the same metric on the same set."""
    kept = [each for each in card.data.get("eval_results", []) if not any(
        each.is_equal_except_value(result) for result in results)]
    if kept or results:
        card.data["eval_results"] = [*kept, *results]
        card.data["model_name"] = card.data.get("model_name", printable(run.path.resolve().name,
                                                                        keep=""))
