"""Breaks the sources on purpose and shows that the tests notice.

    python -m tests.mutants.run rows                    the mutants of tests/mutants/rows.py
    python -m tests.mutants.run                         all of them
    python -m tests.mutants.run rows --match csrc/cuda  those in files whose path has that in it

A list of mutants is a file here with MUTANTS, tuples of a file, a text that it has once, what takes its place, and the
arguments of pytest that must fail then: a file of tests, and options. Everything happens in a copy of the tree. What is
compiled is compiled again where a source of it changed; the CUDA sources are compiled by their own tests. Exits with 1
if a mutant survives."""

import argparse
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")


def lists(names):
    paths = [Path(name) if name.endswith(".py") else HERE / f"{name}.py" for name in names]
    paths = paths or sorted(path for path in HERE.glob("*.py") if path != Path(__file__))
    return [mutant for path in paths for mutant in runpy.run_path(str(path))["MUTANTS"]]


class Tree:
    """A copy of the tree to break things in."""

    def __init__(self, root):
        self.root, self.stale = Path(shutil.copytree(ROOT, root, ignore=LEFT_OUT)), False
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.environment = {**os.environ, "PYTHONPATH": str(root), "PATH": path, "DRLLM_FAST_BUILD": "cpu"}
        self.environment["PYTHONDONTWRITEBYTECODE"] = "1"  # a mutant may have the size and the second of the original

    def run(self, *command):
        return subprocess.run(
            [sys.executable, *command],
            cwd=self.root,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def compile(self):
        ran = self.run("setup.py", "build_ext", "--inplace")
        if ran.returncode:
            raise SystemExit(f"this does not compile:\n{ran.stdout}")
        self.stale = False

    def test(self, selection):
        return self.run("-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *shlex.split(selection))

    def survives(self, file, old, new, selection):
        """(whether the tests pass with this change, how they ended)."""
        path = self.root / file
        text = path.read_text()
        if text.count(old) != 1:
            raise SystemExit(f"{file} must have this once, and has it {text.count(old)} times:\n{old}")
        compiled = file.startswith("csrc/") and not file.startswith("csrc/cuda/")
        path.write_text(text.replace(old, new))
        try:
            if compiled or self.stale:
                self.compile()
            ran = self.test(selection)
        finally:
            path.write_text(text)
            self.stale |= compiled
        said = ran.stdout.strip().splitlines() or ["nothing"]
        reason = next((line for line in said if line.startswith(("FAILED", "ERROR"))), said[-1])
        if ran.returncode > 1 and "Fatal Python error" not in ran.stdout and ran.returncode != 139:
            raise SystemExit(f"pytest {selection} could not run:\n{ran.stdout}")
        return ran.returncode == 0, reason


def main(arguments):
    parser = argparse.ArgumentParser(prog="python -m tests.mutants.run", description=__doc__.splitlines()[0])
    parser.add_argument("lists", nargs="*", help="stems of files in tests/mutants, or paths")
    parser.add_argument("--match", default="", help="only mutants of files whose path contains this")
    options = parser.parse_args(arguments)
    mutants = [mutant for mutant in lists(options.lists) if options.match in mutant[0]]
    files = " ".join(dict.fromkeys(shlex.split(selection)[0] for *_, selection in mutants))
    with tempfile.TemporaryDirectory() as folder:
        tree = Tree(Path(folder) / "tree")
        tree.compile()
        ran = tree.test(files)
        if ran.returncode:
            raise SystemExit(f"pytest {files} fails without any mutant:\n{ran.stdout}")
        survivors = 0
        for number, (file, old, new, selection) in enumerate(mutants, 1):
            survived, reason = tree.survives(file, old, new, selection)
            survivors += survived
            change = f"{' '.join(old.split())}  ->  {' '.join(new.split()) or 'nothing'}"
            print(f"{number:3} {'SURVIVED' if survived else 'killed':8} {file}: {change}\n{'':12} {reason}", flush=True)
    print(f"{len(mutants) - survivors} of {len(mutants)} mutants killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
