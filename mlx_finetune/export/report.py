"""verification.json: what was proven of a folder before it appeared, the same on every machine, with no text of anyone's in it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_finetune.files import write_json
from mlx_finetune.installed import PACKAGES, versions

FILE, VERSION = "verification.json", 2
RAN = (*PACKAGES, "peft")


def write_report(folder: Path, verified: Mapping[str, Any], made: Mapping[str, str]) -> dict[str, Any]:
    """Writes verification.json and gives it back.

    version: of these keys. made_from: see `training/manifest.py`. verified: what `Verified` (verify.py) or `Opened`
    (adapter_folder.py) says, by its field names.
    versions: of the packages that were asked, by name.
    """
    report = {"version": VERSION, "made_from": dict(made), "verified": dict(verified), "versions": versions(RAN)}
    write_json(folder / FILE, report)
    return report


def told(tensors: int, verified: Mapping[str, Any]) -> list[str]:
    """What `fuse` did and found, in lines for people; `verified`: as in verification.json."""
    found = verified["weights"]
    if found is None:
        how = f"verified by {verified['backend']}: no missing and no unexpected keys,"
        apart = f"{verified['largest_difference']:.1e}, allowed {verified['tolerance']:.1e}"
        return [f"{tensors} tensors changed; {how}", f"largest logit difference from base + adapter {apart}"]
    how = "recomputed in float64 by other code" if found["independent"] else "recomputed, but by the code that fused them"
    return [
        f"not run: {verified['not_run']}; every one of {found['numbers']:,} numbers was recomputed instead",
        f"{tensors} tensors changed, {how}: no missing and no unexpected keys,",
        f"largest deviation {found['largest_deviation']:.2f} units in the last place; {found['changed']:,} numbers changed",
    ]
