"""Write the hashes of what constraints.txt pins: `python tools/lock.py`, with uv on the path.

PyTorch and what its CUDA build alone needs are in a file of their own: whoever takes the CPU build
gets it from another index and needs none of them.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = {"torch.lock": True, "requirements.lock": False}  # whether it is PyTorch's own
TORCH = re.compile(r"torch|triton|nvidia-|cuda-")
HEAD = "# Every file of every pinned version. Made by tools/lock.py; read by `make`.\n"


def blocks(text: str) -> list[str]:
    """The requirements of a lock, each with the lines of its hashes."""
    return re.findall(r"^[a-z0-9].*(?:\n    --hash.*)*\n", text, re.M)


def main() -> None:
    words = ["uv", "pip", "compile", "--universal", "--python-version", "3.11", "--no-annotate"]
    words += ["--no-header", "--generate-hashes", "--constraints", "constraints.txt"]
    done = subprocess.run(
        [*words, "requirements-dev.txt"], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    for name, torch in LOCKS.items():
        chosen = [block for block in blocks(done.stdout) if bool(TORCH.match(block)) == torch]
        (ROOT / name).write_text(HEAD + "".join(chosen), "utf-8", newline="\n")


if __name__ == "__main__":
    main()
