"""made_from.json in a run's folder: what the run learns from, from its start on and before there is a checkpoint to say so."""

from datetime import datetime
from pathlib import Path

from mlx_finetune.errors import UserError
from mlx_finetune.files import read_json, write_json
from mlx_finetune.installed import PACKAGES, versions
from mlx_finetune.training.checkpoint import Origin

FILE, FORMAT = "made_from.json", 1


def write_made_from(run: Path, origin: Origin) -> None:
    """Of a run that begins now."""
    begun = datetime.now().astimezone().isoformat(timespec="seconds")
    write_json(run / FILE, {"format": FORMAT, **vars(origin), "begun": begun, "versions": versions(PACKAGES)})


def check_made_from(run: Path, origin: Origin) -> None:
    """Raises UserError where the run began with other data, another model, or another adapter; older runs have no such file."""
    if not (run / FILE).is_file():
        return
    found = read_json(run / FILE)
    if not isinstance(found, dict) or type(found.get("format")) is not int:
        raise UserError(f"{run / FILE}: not what train writes", hint="bring the file back, or start a new run with another --out")
    if found["format"] > FORMAT:
        message = f"{run / FILE}: of format {found['format']}; this version reads format {FORMAT}"
        raise UserError(message, hint="update mlx-finetune")
    for name, now in vars(origin).items():
        if found.get(name) != now:
            hint = "bring that one back, or start a new run with another --out"
            raise UserError(f"{run}: begun with {name} {found.get(name)}, this is {name} {now or 'none'}", hint=hint)
