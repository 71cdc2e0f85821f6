"""Write the hashes of what constraints.txt pins: `python tools/lock.py`, with uv on the path.

Without PyTorch and what its CUDA build alone needs: the CPU build comes from another index, and a
hash would refuse it.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
TORCH = re.compile(r"torch|triton|nvidia-(?!ml-py)|cuda-")
HEAD = "# Every file of every pinned version but PyTorch's. Made by tools/lock.py, for `make`.\n"


def blocks(text: str) -> list[str]:
    """The requirements of a lock, each with the lines of its hashes."""
    return re.findall(r"^[a-z0-9].*(?:\n    --hash.*)*\n", text, re.M)


def main() -> None:
    words = ["uv", "pip", "compile", "--universal", "--python-version", "3.11", "--no-annotate"]
    words += ["--no-header", "--generate-hashes", "--constraints", "constraints.txt"]
    done = subprocess.run(
        [*words, "requirements-dev.txt"], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    chosen = [block for block in blocks(done.stdout) if not TORCH.match(block)]
    LOCK.write_text(HEAD + "".join(chosen), "utf-8", newline="\n")


if __name__ == "__main__":
    main()
