"""GPT-2's vocabulary: its size and its one special token."""

from __future__ import annotations

VOCAB_SIZE = 50257  # byte-pair tokens and end-of-text
EOT = VOCAB_SIZE - 1
