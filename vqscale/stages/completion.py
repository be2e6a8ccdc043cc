"""A script by which a shell completes commands, keys and paths.

In: bash or zsh.  Out: the script, on standard output. It has the keys of this version: completing starts no Python.
"""

import importlib
import pkgutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vqscale import stages
from vqscale.config import Request, StageConfig, read_request
from vqscale.fields import keys_of

USAGE = "bash|zsh"
_FOR_ZSH = "autoload -U +X bashcompinit && bashcompinit\n"
# bash splits `key=value` at the sign, and completes paths where this finds nothing.
_SCRIPT = """_vqscale() {{
  local words= word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}}
  if [ "$COMP_CWORD" -eq 1 ]; then words="{commands}"
  elif [ "$COMP_CWORD" -gt 2 ] && [ "$before" != "=" ] && [ "$word" != "=" ]; then
    compopt -o nospace 2>/dev/null
    case ${{COMP_WORDS[1]}} in
{cases}
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _vqscale vqscale"""


@dataclass(frozen=True)
class CompletionConfig:
    """Nothing: the shell is all there is to say."""


Config = CompletionConfig


def load(words: Sequence[str]) -> Request[CompletionConfig]:
    """From `bash` or `zsh`; see `read_request`. Raises ValueError for another shell."""
    request = read_request(CompletionConfig, words, f"completion {USAGE}", paths=1)
    if (shell := str(request.paths[0])) not in USAGE.split("|"):
        raise ValueError(f"completion is for bash and zsh, not for {shell!r}")
    return request


def main(request: Request[CompletionConfig]) -> None:
    """Print the script."""
    keys = dict(_keys_by_command())
    cases = "\n".join(f'      {name}) words="{" ".join(own)}" ;;' for name, own in keys.items() if own)
    script = _SCRIPT.format(commands=" ".join(keys), cases=cases)
    print((_FOR_ZSH if str(request.paths[0]) == "zsh" else "") + script)


def _keys_by_command() -> Iterator[tuple[str, list[str]]]:
    """Of each command its keys, each with its sign; tools write a hyphen where their module has none."""
    for found in pkgutil.iter_modules(stages.__path__):
        config = getattr(importlib.import_module(f"{stages.__name__}.{found.name}"), "Config", None)
        if config is not None:
            name = found.name if issubclass(config, StageConfig) else found.name.replace("_", "-")
            yield name, [f"{key.name}=" for key in keys_of(config)]
