"""`python -m vqscale …` = the `vqscale` command."""

from vqscale.cli import entry

if __name__ == "__main__":
    entry()
