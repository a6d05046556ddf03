"""A virtual environment for each peer, so that no one's pins disturb another's."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console


class PeerError(Exception):
    """A peer cannot be installed, started or asked; the text says why and where its log is."""


@dataclass(frozen=True, slots=True)
class Environment:
    """What a peer needs installed.

    Args:
        name: folder name.
        pip: arguments of successive pip calls, such as ``("install", "torch==2.13.0")``.
        distributions: whose versions a report names.
        finish: last touches to the environment, given its folder.
    """

    name: str
    pip: tuple[tuple[str, ...], ...]
    distributions: tuple[str, ...]
    finish: Callable[[Path], None] | None = None

    def ensure(self, root: Path, console: Console) -> Path:
        """Makes the environment under ``root`` unless this very recipe was finished there before.

        Returns:
            Its folder.

        Raises:
            PeerError: a pip call failed.
        """
        folder, stamp = root / self.name, root / self.name / "recipe"
        recipe = hashlib.sha256(repr((self.pip, sys.version_info[:2])).encode()).hexdigest()
        if stamp.is_file() and stamp.read_text() == recipe:
            return folder
        if folder.exists():
            shutil.rmtree(folder)
        root.mkdir(parents=True, exist_ok=True)
        log = root / f"{self.name}-install.log"
        python = str(folder / "bin" / "python")
        with log.open("w") as output:
            for command in (
                [sys.executable, "-m", "venv", str(folder)],
                *([python, "-m", "pip", "--disable-pip-version-check", *arguments] for arguments in self.pip),
            ):
                with console.status(f"{self.name}: {' '.join(command[2:])[:100]}"):
                    done = subprocess.run(command, stdout=output, stderr=output, check=False)
                if done.returncode != 0:
                    raise PeerError(f"{' '.join(command)} failed; see {log}")
        if self.finish is not None:
            self.finish(folder)
        stamp.write_text(recipe)
        console.print(f"{self.name}: environment made in {folder}")
        return folder

    def versions(self, folder: Path) -> dict[str, str]:
        """Installed version of each distribution that counts."""
        code = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
        command = [str(folder / "bin" / "python"), "-c", code, *self.distributions]
        return dict(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def site_packages(folder: Path) -> Path:
    """Where an environment keeps its packages."""
    return next((folder / "lib").glob("python3*")) / "site-packages"
