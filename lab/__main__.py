"""List the tools: the first line of each module's docstring."""

import ast
from pathlib import Path

for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
    first, _, _ = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8"):
        print(f"python -m lab.{path.stem:<14} {first}")
