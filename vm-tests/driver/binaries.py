"""The binaries that the guests run: by default those that cargo built last."""

import os
import shutil
import subprocess
from pathlib import Path

# Folders of cargo's profiles in its target folder.
PROFILES = ("debug", "release", "dist")
TOOLS = ("atproto-relay", "atproto-devnet")


class NoBinaries(Exception):
    """Not all binaries exist."""


def find(repository, profile):
    """The folder with both binaries: that of `profile`, or the one built last."""
    target = Path(os.environ.get("CARGO_TARGET_DIR", repository / "target"))
    folders = [target / name for name in ([profile] if profile else PROFILES)]
    complete = [folder for folder in folders if all((folder / tool).is_file() for tool in TOOLS)]
    if not complete:
        raise NoBinaries(f"{' and '.join(TOOLS)} are not in {target}: run `cargo build --locked` first")
    return max(complete, key=lambda folder: max((folder / tool).stat().st_mtime for tool in TOOLS))


def collect(source, folder):
    """Copies the binaries without debug information, which guests do not need."""
    folder.mkdir(parents=True)
    for tool in TOOLS:
        if shutil.which("strip"):
            subprocess.run(["strip", "-o", str(folder / tool), str(source / tool)], check=True)
        else:
            shutil.copy(source / tool, folder / tool)
        (folder / tool).chmod(0o755)
    folder.chmod(0o755)
    return folder
