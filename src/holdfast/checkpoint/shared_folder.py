"""Whether all processes see one folder, asked before anything is written that needs it.

The disks of several machines may have the same paths. A checkpoint in parts would then have its parts on several disks,
complete on none of them, and a best checkpoint would be there for some processes only.
"""

import socket
import tempfile
from pathlib import Path

from holdfast.agreement import of_all, process, raised_together


def check_shared(folder: Path, request: str, remedy: str) -> None:
    """ValueError on all processes where one does not see what the first one writes into `folder`. The message begins
    with `request`, a sentence without its end, and ends with `remedy`. Collective."""
    name = ""
    with raised_together():
        if process() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder, prefix=".seen-by-all-", delete=False) as file:
                name = Path(file.name).name
    name = of_all(name)[0]
    found = of_all(((folder / name).exists(), socket.gethostname()))
    if process() == 0:
        (folder / name).unlink(missing_ok=True)
    blind = [f"{number} on {host}" for number, (sees, host) in enumerate(found) if not sees]
    if blind:
        raise ValueError(
            f"{request}, which needs a folder that all processes see, but what process 0 on {found[0][1]} writes into "
            f"{folder.absolute()} is not seen by process {', '.join(blind)}. Name a shared folder as output_dir, or "
            f"{remedy}."
        )
