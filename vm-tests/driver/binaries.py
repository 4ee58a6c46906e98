"""The binaries that the guests run: those that cargo has built last."""

import os
import shutil
import subprocess
from pathlib import Path

TOOLS = ("atproto-relay", "atproto-devnet")


class NoBinaries(Exception):
    """There are none, or not all."""


def find(repository, profile):
    """The folder with both binaries: of a profile, or the one built last."""
    target = Path(os.environ.get("CARGO_TARGET_DIR", repository / "target"))
    folders = [target / name for name in ([profile] if profile else ["debug", "release"])]
    complete = [folder for folder in folders if all((folder / tool).is_file() for tool in TOOLS)]
    if not complete:
        raise NoBinaries(f"{' and '.join(TOOLS)} are not in {target}: run `cargo build --locked` first")
    return max(complete, key=lambda folder: max((folder / tool).stat().st_mtime for tool in TOOLS))


def collect(source, folder):
    """Copies of the binaries without their debug information, which guests have no use for."""
    folder.mkdir(parents=True)
    for tool in TOOLS:
        if shutil.which("strip"):
            subprocess.run(["strip", "-o", str(folder / tool), str(source / tool)], check=True)
        else:
            shutil.copy(source / tool, folder / tool)
        (folder / tool).chmod(0o755)
    folder.chmod(0o755)
    return folder
