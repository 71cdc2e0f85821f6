"""A params file's text before values are read from it: one mapping, read alike by every reader."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from pipeline import regular
from pipeline.errors import ConfigError, InputError

MOST_BYTES = 1 << 20  # a params file has three thousand
MOST_BRACKETS = 1000  # PyYAML's time grows with the square of the open ones

# Plain scalars that YAML 1.1 (OmegaConf) and YAML 1.2 (DVC) read differently: 8 or 10, 90 or text.
_AMBIGUOUS = re.compile(
    r"""[-+]?0\d[\d_]*(\.[\d_]*)?          # 010
      | [-+]?\d[\d_]*(:[0-5]?\d)+(\.\d*)?  # 1:30
      | [-+]?0o[0-7_]+                     # 0o10
      | on | off | yes | no""",
    re.IGNORECASE | re.VERBOSE,
)
_CLEARLY = "YAML readers disagree; expected a decimal number, true or false, or quoted text"


def read(path: Path) -> str:
    """The text of a params file; raises ConfigError, with the line where there is one."""
    try:
        content = regular.read(path, MOST_BYTES)
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; run from the repository root") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}, line {line}: not UTF-8 text: {error.reason}") from None
    except InputError as error:
        raise ConfigError(str(error)) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None


def check(text: str, where: str) -> list[str]:
    """The values, with line and name, that are read in two ways.

    Raises ConfigError, with the line, where `text` is not one YAML mapping of plain values.
    """
    if text.count("[") + text.count("{") > MOST_BRACKETS:
        raise ConfigError(f"{where}: nested too deeply to be settings")
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):  # a few lines of them can mean gigabytes
                line = event.start_mark.line + 1
                raise ConfigError(f"{where}, line {line}: *{event.anchor}: write the value itself")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}{words(error, text)}") from None
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply to be settings") from None
    if root is None:
        raise ConfigError(f"{where}: empty; expected settings by name, as in recipes/nano.yaml")
    if not isinstance(root, yaml.MappingNode):
        kind = "a list" if isinstance(root, yaml.SequenceNode) else "a single value"
        line = root.start_mark.line + 1
        raise ConfigError(f"{where}, line {line}: settings by name are expected, not {kind}")
    return [f"{where}, line {line}: {said}" for line, said in _ambiguous(root, "")]


def check_changes(changes: list[str]) -> list[str]:
    """The same for changes as by `-S`, such as "train.lr=0.001"."""
    pairs = [change.partition("=") for change in changes]
    return [f"{n}={v}: {_CLEARLY}" for n, _, v in pairs if _AMBIGUOUS.fullmatch(v.strip())]


def words(error: yaml.YAMLError, text: str) -> str:
    """Line and reason of one of PyYAML's errors, to follow the file's name."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        context = f", {error.context}" if error.context else ""
        line = error.problem_mark.line + 1
        return f", line {line}: not valid YAML: {error.problem}{context}"
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return f", line {line}: not valid YAML: U+{error.character:04X} is no character of a text"
    return f": not valid YAML: {error}"


def _ambiguous(node: yaml.Node, name: str) -> Iterator[tuple[int, str]]:
    """(line, what is wrong) of every plain scalar below that is read in two ways."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _ambiguous(value, f"{name}.{key.value}".lstrip("."))
    elif isinstance(node, yaml.SequenceNode):
        for place, value in enumerate(node.value):
            yield from _ambiguous(value, f"{name}[{place}]")
    elif node.style is None and _AMBIGUOUS.fullmatch(node.value):
        yield node.start_mark.line + 1, f"{name}={node.value}: {_CLEARLY}"
