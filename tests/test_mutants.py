"""The lists of mutants are true to the sources: what each is to change is there, once. `make mutants` runs them."""

import runpy
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LISTS = sorted(path for path in (ROOT / "tests/mutants").glob("*.py") if path.name not in ("run.py", "__init__.py"))


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.stem)
def test_every_mutant_has_its_place(path):
    for file, old, new, selection in runpy.run_path(str(path))["MUTANTS"]:
        assert (ROOT / file).read_text().count(old) == 1 and new != old, (file, old)
        assert (ROOT / shlex.split(selection)[0].split("::")[0]).is_file(), selection
