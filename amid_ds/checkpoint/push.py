"""A model as a repository on the hub: chosen, checked and shown here, sent by huggingface_hub.

All files go in one commit, so nobody finds half a model there, and nothing there is deleted.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import logging
import os
import re
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from amid_ds.checkpoint.card import CARD_FILE, exported_step, published_card
from amid_ds.checkpoint.manifest import checkpoint_step, list_checkpoints
from amid_ds.distributed.background import BackgroundWork
from amid_ds.errors import InputError, TrainingError
from amid_ds.models.adapter_folders import ADAPTER_FILE
from amid_ds.models.adapters import CONFIG_FILE, is_adapter_folder
from amid_ds.models.weight_files import read_weight_table
from amid_ds.models.weights import readable_weights
from amid_ds.run.folder import RunFolder
from amid_ds.run.warm_start import find_run

logger = logging.getLogger(__name__)

# Beside hidden files: rows, logs, and what resumes a training.
NOT_PUBLISHED = (
    "*.jsonl", "*.parquet", "*.arrow", "*.csv", "*.log", "*.pt", "*.pth", "__pycache__",
    "checkpoint-*", "global_step*", "optimizer.bin", "scheduler.bin", "random_states_*",
    "trainer_state.json", "training_args.bin", "events.out.tfevents*")
# What decides in a repository which weights from_pretrained and others open.
WEIGHT_FILES = re.compile(r"(model|pytorch_model|adapter_model)[^/]*\.(safetensors|bin)"
                          r"(\.index\.json)?|adapter_config\.json")
# Of a file beside the weights, where paths are looked for.
MOST_TEXT_BYTES = 1 << 20
ABSOLUTE_PATH = re.compile(
    r"""(?<=")/[^"\n]+(?=")|(?<=`)/[^`\n]+(?=`)|(?<=: )/[^\n,]+$"""
    r"""|(?<![\w/:.…])/[^\s"'`,;()\[\]<>|]+""", re.MULTILINE)
# The most characters of what the hub says in a message.
MOST_TOLD = 500
# Seconds that the hub may take to connect, to answer, to take bytes, and to have a connection free.
TIMEOUTS = (30.0, 120.0, 120.0, 120.0)


@dataclass(frozen=True)
class Upload:
    """What goes where.

    files: by their names in the repository. card: what goes as README.md; None: nothing.
    left_out: names in the folder. revision: None is the main branch.
    """

    model: Path
    repository: str
    private: bool
    revision: str | None
    files: Mapping[str, Path]
    left_out: Sequence[str]
    card: str | None

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes by name of all that goes, the card first."""
        card = {} if self.card is None else {CARD_FILE: len(self.card.encode())}
        return card | {name: file.stat().st_size for name, file in self.files.items()}

    @property
    def url(self) -> str:
        """Where it is found."""
        from huggingface_hub import constants

        branch = "" if self.revision is None else f"/tree/{quote(self.revision, safe='')}"
        return f"{constants.ENDPOINT}/{self.repository}{branch}"


def push(source: str, repository: str, private: bool = False, revision: str | None = None,
         license_id: str | None = None, dry_run: bool = False) -> None:
    """Send the model of a run, or a model's folder, to the hub, and print its address.

    repository: `owner/name`, made if it is not there, private only then. revision: a branch, made
    if it is not there. dry_run: print what would go, without a network or a token. Raises
    InputError, before anything is sent, and TrainingError where the hub cannot be reached.
    """
    upload = plan_upload(source, repository, private, revision, license_id)
    if dry_run:
        print_upload(upload)
        return
    for file, paths in named_places(upload).items():
        logger.warning("%s names places of this machine: %s", file, ", ".join(paths))
    if upload.left_out:
        logger.info("left out: %s", ", ".join(upload.left_out))
    with _explained(upload):
        # The client's own threads would first send, after Ctrl-C, what they have begun.
        sending = BackgroundWork(0, lambda: _send(upload))
        while sending.goes_on():
            pass
        sending.result()
    print(upload.url)


def plan_upload(source: str, repository: str, private: bool = False, revision: str | None = None,
                license_id: str | None = None) -> Upload:
    """What of `source` would go where. Reads the headers of its weights. Raises InputError."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(f"{repository!r} names no repository: {error}", "owner/name",
                         "name one as it is in its address on the hub") from None
    if repository.count("/") != 1:
        raise InputError(f"the repository {repository!r}", "owner/name",
                         "put your name on the hub, or your organization's, before it")
    if revision is not None and not re.fullmatch(r"(?!refs/|.*\.\.)\w[\w./-]*(?<![/.])", revision):
        raise InputError(f"--revision {revision!r}", "the name of a branch", "name a branch")
    if license_id is not None and not re.fullmatch(r"[\w.-]+", license_id):
        raise InputError(f"--license {license_id!r}", "the hub's id of a license, as apache-2.0",
                         "look it up: https://huggingface.co/docs/hub/repositories-licenses")
    model = pushed_folder(source)
    require_whole_model(model)
    files, left_out = chosen_files(model)
    files.pop(CARD_FILE, None)
    return Upload(model, repository, private, None if revision == "main" else revision, files,
                  left_out, published_card(model, license_id))


def pushed_folder(source: str) -> Path:
    """The folder of the model that is meant by `source`: a finished run's, or `source` itself.

    Raises InputError for an unfinished run, and for what is no model.
    """
    path, run = Path(source), RunFolder(Path(source))
    exported = f"`amid-ds export {shlex.quote(source)} OUT`"
    if run.exists:
        newest = [*map(checkpoint_step, list_checkpoints(run.checkpoints))][-1:]
        step = exported_step(run.model)
        if not run.model.is_dir() or (step is not None and newest > [step]):
            found = "has no model yet" if not run.model.is_dir() else f"its model is of step {step}"
            raise InputError(f"the run {source} has not finished: {found}", "a finished run, or "
                             "the folder of a model", "wait for it; or "
                             + (f"{exported} exports its checkpoint of step {newest[0]}: push OUT"
                                if newest else "push the folder of another model"))
        return run.model
    if find_run(source) or list_checkpoints(path) or [*path.glob("*_states.pt")]:
        raise InputError(f"{source} holds a checkpoint's shards", "a run, or a folder that "
                         "from_pretrained opens", f"{exported} makes one of it: push OUT")
    if not path.is_dir():
        raise InputError(f"there is no folder {source}", "a finished run, or the folder of a model",
                         "check the path")
    return path


def require_whole_model(model: Path) -> None:
    """Raise InputError unless from_pretrained opens the folder, here and elsewhere."""
    from safetensors import SafetensorError, safe_open

    is_adapter = is_adapter_folder(str(model))
    config = model / (CONFIG_FILE if is_adapter else "config.json")
    try:
        facts = json.loads(config.read_text(encoding="utf-8"))
        assert isinstance(facts, dict)
    except (OSError, ValueError, RecursionError, AssertionError) as error:
        raise InputError(f"{model} is no model's folder: {config.name}: "
                         f"{error or 'holds no object'}",
                         "a folder that from_pretrained opens, as `amid-ds export` makes it",
                         "check the path") from None
    if not is_adapter:
        with readable_weights(str(model)):
            read_weight_table(str(model), fetch=False, named=facts.get("transformers_weights"))
        return
    base = str(facts.get("base_model_name_or_path"))
    if os.path.isabs(base) or os.path.isdir(base):
        raise InputError(f"{model} holds adapters of the model {base}, a folder of this machine",
                         "adapters of a model that others can open",
                         "push the whole model (`amid-ds export RUN OUT --merge`), or push the "
                         f"base and put its id on the hub into {config}")
    try:
        with safe_open(model / ADAPTER_FILE, "pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise InputError(f"the adapters of {model} cannot be read: {error}",
                         f"{ADAPTER_FILE}, whole", "export the run again") from None


def chosen_files(model: Path) -> tuple[dict[str, Path], list[str]]:
    """(the files that go by their names in the repository, the names of what does not).

    All that is visible goes, but NOT_PUBLISHED and folders that are links. Raises InputError for a
    file that cannot be read.
    """
    files, left_out = {}, []
    for folder, subfolders, names in os.walk(model):
        place = Path(folder)
        for name in sorted([*subfolders, *names]):
            path, is_folder = place / name, name in subfolders
            goes = not name.startswith(".") and not any(
                fnmatch.fnmatch(name, pattern) for pattern in NOT_PUBLISHED)
            inside = path.relative_to(model).as_posix() + "/" * is_folder
            if not goes or (is_folder and path.is_symlink()):
                left_out.append(inside)
                if is_folder:
                    subfolders.remove(name)
            elif not is_folder:
                if not path.is_file() or not os.access(path, os.R_OK):
                    raise InputError(f"{path} is no file that can be read",
                                     "files, or links to files", "mend it, or take it out")
                files[inside] = path
        subfolders.sort()
    return files, left_out


def named_places(upload: Upload) -> dict[str, list[str]]:
    """The paths of this machine that texts to be sent name, by the file."""
    texts = {name: file.read_text(encoding="utf-8", errors="replace")
             for name, file in upload.files.items()
             if name.endswith((".json", ".md")) and file.stat().st_size < MOST_TEXT_BYTES}
    found = {name: sorted({path for path in ABSOLUTE_PATH.findall(text)
                           if path.count("/") > 1 and os.path.lexists(path)})
             for name, text in {CARD_FILE: upload.card or "", **texts}.items()}
    return {name: paths for name, paths in found.items() if paths}


def print_upload(upload: Upload) -> None:
    """`--dry-run`: the files with their sizes, the place, what is left out, the metadata."""
    from huggingface_hub import ModelCard
    from rich.table import Table

    from amid_ds.run.console import PlainConsole
    from amid_ds.run.reading import size_text

    sizes = upload.sizes
    kind = "private" if upload.private else "public, unless it is there already and private"
    table = Table(show_footer=True)
    table.add_column("file", "all", overflow="fold")
    table.add_column("size", size_text(sum(sizes.values())), justify="right")
    for name, size in sizes.items():
        table.add_row(name, size_text(size))
    console = PlainConsole()
    console.print(table)
    lines = [f"from {upload.model} to {upload.url}",
             f"repository: {upload.repository}, {kind}; branch {upload.revision or 'main'}"]
    if upload.left_out:
        lines.append(f"left out: {', '.join(upload.left_out)}")
    lines += [f"{file} names places of this machine: {', '.join(paths)}"
              for file, paths in named_places(upload).items()]
    metadata = ""
    if upload.card is None:
        lines.append("there is no card: write a README.md")
    else:
        metadata = str(ModelCard(upload.card, ignore_metadata_errors=True).data)
        if "license:" not in metadata:
            lines.append("the card names no license: --license ID")
    console.print("\n".join([*lines, *([f"the card's metadata:\n{metadata}"] if metadata else []),
                             "nothing was sent"]), soft_wrap=True)


def _send(upload: Upload) -> None:
    from huggingface_hub import CommitOperationAdd, HfApi, get_session, get_token
    from huggingface_hub.utils import disable_progress_bars

    if get_token() is None:
        raise InputError("there is no token of the hub's here", "one that may write to "
                         f"{upload.repository.partition('/')[0]}",
                         "`hf auth login`, or set HF_TOKEN")
    if not sys.stderr.isatty():
        disable_progress_bars()
    # By default it waits for ever.
    get_session().timeout = TIMEOUTS
    api = HfApi()
    api.create_repo(upload.repository, private=upload.private or None, exist_ok=True)
    there = api.model_info(upload.repository)
    if upload.private and not there.private:
        raise InputError(f"--private, and {upload.repository} is there already and public",
                         "a private repository, or a new one", "make it private on its page, name "
                         "another, or leave --private out")
    if upload.revision is not None:
        api.create_branch(upload.repository, branch=upload.revision, exist_ok=True)
        there = api.model_info(upload.repository, revision=upload.revision)
    foreign = [each.rfilename for each in there.siblings or ()
               if WEIGHT_FILES.fullmatch(each.rfilename) and each.rfilename not in upload.files]
    if foreign:
        raise InputError(f"{upload.repository} holds weights of another model, which would be "
                         f"opened in place of these or with them: {', '.join(sorted(foreign))}",
                         "a repository without weights, or with files of the same names",
                         "delete them on its page, or push to another repository")
    contents: dict[str, Any] = {name: str(file) for name, file in upload.files.items()}
    if upload.card is not None:
        contents[CARD_FILE] = upload.card.encode()
    step = exported_step(upload.model)
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        api.create_commit(
            upload.repository, [CommitOperationAdd(name, content)
                                for name, content in contents.items()],
            commit_message=f"Upload by amid_ds{'' if step is None else f': step {step}'}",
            revision=upload.revision)
    for note in noted:
        # The hub's, on the card; others are for developers.
        if note.category is UserWarning:
            logger.warning("%s", note.message)


@contextlib.contextmanager
def _explained(upload: Upload) -> Iterator[None]:
    """A context in which what the hub refuses is an InputError, and any other failure of the
    sending a TrainingError."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except (InputError, TrainingError):
        raise
    except KeyboardInterrupt:
        raise TrainingError(f"the sending to {upload.url} was stopped: the same command sends what "
                            "is missing") from None
    except Exception as error:
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
            chain.append(cause)
        if any(isinstance(each, OfflineModeIsEnabled) for each in chain):
            raise InputError("huggingface_hub is told not to use the network", "a network",
                             "unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE") from None
        refused = next((each for each in chain if isinstance(each, HfHubHTTPError)), None)
        status = 0 if refused is None else refused.response.status_code
        told = refused.server_message if refused is error else None
        reason = " ".join((told or str(error) or type(error).__name__).split())[:MOST_TOLD]
        owner = upload.repository.partition("/")[0]
        if status == 401:
            raise InputError(f"the hub does not know the token: {reason}", "a token that is valid",
                             "`hf auth login` again, or set HF_TOKEN") from None
        if status == 403:
            raise InputError(f"the token may not write to {upload.repository}: {reason}",
                             f"one with the right to write, of a member of {owner}",
                             "make one on https://huggingface.co/settings/tokens, or name another "
                             "owner") from None
        if 400 <= status < 500 and status not in (408, 429):
            raise InputError(f"the hub refuses {upload.repository}: {reason}",
                             "what the hub takes", "correct what it names") from None
        raise TrainingError(f"{upload.model} could not be sent to {upload.url}: {reason}\n"
                            "  no file there has changed; the same command sends what is "
                            "missing") from None
