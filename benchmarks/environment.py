"""The environment that the benchmarks run in: fmxnn, its peers and the pinned torch, made once in `.venv-bench`."""

import hashlib
import subprocess
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".venv-bench"
STAMP = FOLDER / "requirements.sha256"
OURS = ["-e", ".[harvest,plots]", "tabulate"]
PEERS = ["sae-lens==6.54.12", "eai-sparsify==1.3.3", "tensorly==0.10.0"]
ALONE = ["dictionary-learning==0.1.0"]
"""Without its dependencies, which bring torchvision, umap and more: its trainers need torch, einops and tqdm. See
peers.py for nnsight.
"""


def ensure() -> Path:
    """The Python of the environment, which is made again where a requirement or a pinned version has changed."""
    python = FOLDER / "bin" / "python"
    key = _key()
    if python.exists() and STAMP.exists() and STAMP.read_text() == key:
        return python
    print(f"making {FOLDER.name}: torch and the peers, a few minutes once", flush=True)
    venv.create(FOLDER, with_pip=True, clear=True)
    (FOLDER / ".gitignore").write_text("*\n")
    install = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "-c", "constraints.txt"]
    subprocess.run([*install, *OURS, *PEERS], cwd=ROOT, check=True)
    subprocess.run([*install, "--no-deps", *ALONE], cwd=ROOT, check=True)
    STAMP.write_text(key)
    return python


def _key() -> str:
    files = [ROOT / "pyproject.toml", ROOT / "constraints.txt"]
    text = b"".join(file.read_bytes() for file in files) + " ".join(OURS + PEERS + ALONE).encode()
    return hashlib.sha256(text).hexdigest()


if __name__ == "__main__":
    print(ensure())
