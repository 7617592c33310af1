"""Uploads a folder that was written to a repository of the Hugging Face hub, with a model card: README.md.

huggingface_hub takes the token from the environment or the saved login. The card holds no path of this machine.
"""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, errors
from huggingface_hub.utils import HFValidationError, logging, validate_repo_id

from litpeft.core.checksums import hub_origin
from litpeft.core.errors import ConfigError, ResourceError, scaled
from litpeft.core.json import read_optional
from litpeft.core.terminal import say
from litpeft.exchange.run import Run

CARD = "README.md"
LOGIN = "set HF_TOKEN to a token that may write, or log in with `hf auth login`"


def check_repo(repo: str | None) -> None:
    """Raises unless this is None or the id of a repository, before anything is written."""
    if repo is None:
        return
    with suppress(HFValidationError):
        validate_repo_id(repo)
        if repo.count("/") == 1:
            return
    raise ConfigError(f"{repo!r} is not the id of a hub repository", where="push", hint="give ORG/NAME")


def write_card(folder: Path, repo: str, source: Path, run: Run | None, what: str) -> None:
    """Writes the model card: base, method, data and figures, as far as the run's record has them."""
    base = origin(Path(run.facts["base"]["path"])) if run else origin(source)
    method = run.facts["method"] if run else None
    facts = {"pipeline_tag": "text-generation", "base_model": base, "tags": ["litpeft", *([method] if method else [])]}
    lines = [f"{key}: {json.dumps(value)}" for key, value in facts.items() if value is not None]
    text = ["---", *lines, "---", "", f"# {repo.split('/')[1]}", "", f"{what} of {base or source.name}."]
    if run:
        rows = {"Base": base or Path(run.facts["base"]["path"]).name, "Method": method} | figures(run)
        text += ["", "| | |", "|---|---|", *(f"| {name} | {inline(value)} |" for name, value in rows.items())]
        settings = json.dumps(run.facts["settings"], indent=2, ensure_ascii=False)
        text += ["", f"Settings of {method}:", "", "```json", settings, "```"]
    text += ["", "Made with litpeft."]
    (folder / CARD).write_text("\n".join(text) + "\n", encoding="utf-8", newline="\n")


def figures(run: Run) -> dict[str, Any]:
    """Returns what the record and report of a run say of its data and result, by name."""
    facts, report = run.facts, read_optional(run.folder.parent / "report.json")
    found = {"Chat template": facts["template"]["name"], "System message": facts["template"]["system"]}
    found["Optimizer step"] = f"{facts['step']:,}"
    path = re.search(r"^  path: (.+)$", read_text(run.folder.parent / "run.yaml"), re.M)
    on_hub = path is not None and path[1].startswith(("hf://", "preset:"))  # with its commit
    found["Data"] = path[1] if on_hub else Path(path[1]).name if path else None
    if "trained_tokens" in report:
        found["Tokens"] = f"{report['tokens']:,} read, {report['trained_tokens']:,} of them trained on"
        found["Trained parameters"] = f"{scaled(report['trainable'])} of {scaled(report['parameters'])}"
        found["Precision"] = report["precision"]
        found["Versions"] = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    if report.get("validation"):
        first, best = report["validation"][0][1], report["best"][1]
        unit = report.get("preference") or "nats per token"
        found["Held-out loss"] = f"{first:.3f} before, {best:.3f} after ({unit})"
        if report["metric"] != "loss":
            found["Held-out loss"] = f"{first:.3f} before ({unit})"
            found[f"{report['metric'].capitalize()} answers"] = f"{best:.1%}"
    return {name: value for name, value in found.items() if value is not None}


def origin(folder: Path) -> str | None:
    """Returns the hub's name of a model that `litpeft download` fetched from there."""
    found = hub_origin(folder)
    return found[0] if found else None


def read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def inline(value: Any) -> str:
    """Returns a text for a cell of a table."""
    return " ".join(str(value).replace("|", "\\|").split())


def push(folder: Path, repo: str) -> None:
    """Uploads the folder; the repository is made if there is none."""
    logging.set_verbosity_error()
    api = HfApi()
    try:
        api.create_repo(repo, exist_ok=True)
        commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload with litpeft")
    except (errors.HTTPError, OSError, ValueError) as error:
        status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
        what = f"the hub at {constants.ENDPOINT} refuses the upload ({status})"
        if status is None:
            what = f"the upload failed: {type(error).__name__}"
        hint = f"{LOGIN}; {folder} is whole: `hf upload {repo} {folder}` uploads it, too"
        raise ResourceError(what, where=repo, hint=hint) from None
    say(f"uploaded to {commit.repo_url}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
