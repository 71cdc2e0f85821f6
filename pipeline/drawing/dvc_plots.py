"""The JavaScript that draws DVC's plots, kept on disk so that their page works offline."""

from __future__ import annotations

import logging
import os
from importlib.metadata import version
from pathlib import Path

from pipeline import paths

log = logging.getLogger(__name__)

WHEEL = "vl-convert-python"  # carries vega, vega-lite and vega-embed


def script() -> Path:
    """The script's path, where .dvc/plots/page.html looks: below the main root."""
    return paths.root() / ".dvc" / "tmp" / "vega.js"


def keep_script() -> None:
    """Write the script, unless that of the installed version is there; this takes two seconds.

    A failure is only a warning: no run may fail over a view, and the page then takes the scripts
    from the network.
    """
    try:
        path = script()
        head = f"// vega, vega-lite and vega-embed, from {WHEEL} {version(WHEEL)}\n"
        if not path.exists() or not path.read_text("utf-8", "replace").startswith(head):
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}.part")  # others may write or read it, too
            part.write_text(head + _bundle(), "utf-8", newline="\n")
            os.replace(part, path)
    except Exception as error:  # a wheel may be missing, a disk full, ...
        log.warning("DVC's plots will need a network: %s: %s", type(error).__name__, error)


def _bundle() -> str:
    import vl_convert

    # Its stub asks for the snippet that it takes by default.
    return vl_convert.javascript_bundle()  # type: ignore[call-arg]
