"""Configuration files are checked before the parser reads them: a mistake in one is one line that names it.

YAML is generous: a few lines of aliases expand to gigabytes, a pipe never ends, and a parser's own message may quote
another file. What is let through is a small, plain mapping.
"""

import stat
from pathlib import Path

from libmoe_fast.errors import ConfigError, in_one_line

LARGEST = 2**20  # bytes
DEEPEST = 20  # levels of nesting
MOST_NODES = 10_000  # values, aliases written out


def check_config_file(path: Path) -> None:
    """Refuses a configuration file that is not a YAML mapping of a sensible size.

    Raises:
        ConfigError: with the file's name and what is wrong with it.
    """
    import yaml

    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise ConfigError(f"{path} is a {'folder' if stat.S_ISDIR(mode) else 'pipe or device'}; give a YAML file")
    if path.stat().st_size > LARGEST:
        raise ConfigError(f"{path} is {path.stat().st_size:,} bytes long; a configuration has at most {LARGEST:,}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text; save it in that encoding") from error
    try:
        depth = 0
        for event in yaml.parse(text):  # before nodes are built of it, which takes a stack as deep
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise ConfigError(f"{path} is nested more than {DEEPEST} levels deep; options are not")
        if _count(yaml.compose(text), {}) > MOST_NODES:
            raise ConfigError(f"{path} comes to more than {MOST_NODES:,} values once its aliases are written out")
        options = yaml.safe_load(text)
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # a ValueError: a date that is none, a number of 5,000 digits
        raise ConfigError(f"{path} is not YAML: {in_one_line(error)}") from error
    if not isinstance(options, dict):
        found = "is empty" if options is None else f"holds a {type(options).__name__}"
        raise ConfigError(f"{path} {found}; expected sections of options, such as model: {{router: cosine}}")
    if "config" in options:
        raise ConfigError(f"{path} has an option 'config'; name each file on the command line: --config A --config B")


def _count(node, counted: dict[int, int]) -> int:
    """How many nodes a node comes to with its aliases written out, which are the same nodes again."""
    if node is None:
        return 0
    if id(node) not in counted:
        counted[id(node)] = MOST_NODES + 1  # an alias inside of what it stands for has no end
        children = node.value if isinstance(node.value, list) else []
        flat = [each for child in children for each in (child if isinstance(child, tuple) else (child,))]
        counted[id(node)] = 1 + sum(_count(child, counted) for child in flat)
    return counted[id(node)]
