"""Manages an environment for each peer below `.peers/`, which git ignores; installs only on request."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
FOLDER = HERE.parents[1] / ".peers"
TORCH = "torch==2.13.0"  # the package index's build of this version, as in constraints.txt
STAND_INS = HERE / "stand_ins"


@dataclass(frozen=True)
class Peer:
    name: str
    probe: str
    """An import that fails where the peer is not, or not wholly, installed."""
    packages: tuple[str, ...]
    alone: tuple[str, ...] = field(default=())
    """Packages that are installed without what they require."""
    path: str = ""

    @property
    def python(self) -> Path:
        return FOLDER / self.name / "bin" / "python"

    def missing(self) -> str:
        """The reason why the peer cannot run; empty if it can."""
        if not self.python.exists():
            return "not installed (--install does it)"
        command = [str(self.python), "-c", self.probe]
        done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": self.path}, check=False)
        return "" if done.returncode == 0 else f"does not import: {done.stderr.strip().splitlines()[-1]}"

    def install(self) -> None:
        subprocess.run([sys.executable, "-m", "venv", str(self.python.parents[1])], check=True)
        pip = [str(self.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        constraint = FOLDER / "constraints.txt"
        constraint.write_text(TORCH + "\n")
        if self.alone:
            subprocess.run([*pip, "--no-deps", *self.alone], check=True)
        subprocess.run([*pip, "--constraint", str(constraint), *self.packages], check=True)


FLOWER = Peer("flower", "import flwr.serverapp, torch", ("flwr==1.42.0", "numpy", TORCH))
APPFL = Peer(
    "appfl",
    "import appfl.agent, appfl.comm.grpc",
    # Only what APPFL's agents and gRPC modules import: APPFL declares about 180 packages, including CUDA.
    (
        TORCH, "numpy", "omegaconf", "grpcio", "grpcio-tools", "PyJWT[crypto]", "requests", "lz4", "zstd", "blosc",
        "python-xz", "scikit-learn", "pandas", "colorama", "wandb==0.31.0", "opacus==1.6.0", "matplotlib", "seaborn",
        "globus-sdk", "boto3", "proxystore",
    ),
    alone=("appfl==1.12.0",),
    path=str(STAND_INS),
)  # fmt: skip
PEERS = {peer.name: peer for peer in (FLOWER, APPFL)}
