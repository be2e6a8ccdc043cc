"""Shell completion: a script that bash runs, with every command and key."""

import subprocess

import pytest

from vqscale import cli
from vqscale.fields import keys_of


@pytest.fixture(scope="module")
def script() -> str:
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda text: printed.append(text))
        assert cli.main(["completion", "bash"]) == 0
    return printed[0]


def completed(script: str, *words: str) -> list[str]:
    """What bash offers for the last word."""
    line = f'COMP_WORDS=({" ".join(map(repr, words))}); COMP_CWORD={len(words) - 1}; _vqscale; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", f"{script}\n{line}"], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


def test_every_command_is_offered(script: str) -> None:
    assert sorted(completed(script, "vqscale", "")) == sorted(cli.STAGES | cli.TOOLS)
    assert completed(script, "vqscale", "pac") == ["pack"]


def test_keys_follow_the_config_and_values_are_left_alone(script: str) -> None:
    keys = [f"{key.name}=" for key in keys_of(cli.stage_module("train_vqvae").Config)]
    assert completed(script, "vqscale", "train_vqvae", "a.yaml", "") == keys
    assert completed(script, "vqscale", "train_vqvae", "a.yaml", "model.hid") == ["model.hidden="]
    assert completed(script, "vqscale", "train_vqvae", "") == []  # a path, which bash completes itself
    assert completed(script, "vqscale", "pack", "a.yaml", "source", "=", "s") == []


def test_another_shell_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "fish"]) == 1
    assert capsys.readouterr().err == "vqscale: error: completion is for bash and zsh, not for 'fish'\n"
    assert cli.main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("autoload -U +X bashcompinit")
