"""Memory between tests."""

from __future__ import annotations

from pipeline.compute import buffers


def release() -> None:
    """Give this thread's buffers back to the allocator."""
    buffers._kept.__dict__.clear()
    buffers._spare.__dict__.clear()
