"""Code lines per folder, without blanks, comments and docstrings: `python tests/support/code_lines.py [PACKAGE]`."""

import ast
import io
import sys
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
_NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(source: str) -> int:
    """The lines of a module that hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                lines -= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return len(lines)


def by_folder(package: Path = ROOT / "vqscale") -> Counter[str]:
    """Code lines of each folder of the package; "." has the modules at its top."""
    counts: Counter[str] = Counter()
    for path in package.rglob("*.py"):
        counts[path.relative_to(package).parent.as_posix()] += code_lines(path.read_text())
    return counts


if __name__ == "__main__":
    found = by_folder(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "vqscale")
    for folder, count in sorted(found.items()):
        print(f"{count:6,} {folder}")
    print(f"{found.total():6,} in all")
