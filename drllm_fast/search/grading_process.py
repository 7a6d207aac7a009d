"""The mathematical graders in a process of their own, because no time limit inside Python stops 9**9**9**9.

The process is this file, run as a script: it imports a grader and not torch, reads one JSON object a line and answers
with one. Before each it arms a watchdog that ends the process when the limit has passed, whatever the interpreter is
doing; for the caller the answer was then wrong, and the next question starts a new process. It also ends with the
caller. A second process may run for as long as its first question waits for the imports (about 1 s).
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable

LIMIT = 3.0  # seconds for one verdict; an ordinary one takes a millisecond, the first up to 0.1 s
MEMORY = 4 << 30  # bytes of address space, where the system can limit it


class Grader:
    """One process for one kind of grader, started when first asked, which threads can share."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None

    def ask(self, text: str, answer: str, limit: float) -> bool:
        """Whether `text` holds `answer`; False when the limit or the memory does not suffice. OSError if the process
        cannot start."""
        with self.lock:
            for _ in range(2):
                start = time.monotonic()
                if reply := self._reply(json.dumps([text, answer, limit]) + "\n"):
                    return json.loads(reply)
                # Ended before its time: by another's hand, and then once more decides, or by this very text.
                if time.monotonic() - start >= limit:
                    break
            return False

    def close(self) -> None:
        """Ends the process."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()
            with contextlib.suppress(BrokenPipeError):  # what was still to be written
                process.stdin.close()
            process.stdout.close()

    def _reply(self, question: str) -> str:
        process = self._running()
        try:
            process.stdin.write(question)
            process.stdin.flush()
            reply = process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        except BaseException:  # an interrupt before the reply, which the next question would take for its own
            self.close()
            raise
        if not reply:
            self.close()
        return reply

    def _running(self) -> subprocess.Popen[str]:
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, os.path.abspath(__file__), self.kind],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="ascii",
                start_new_session=True,  # an interrupt at the terminal is for the parent alone
                # The parent may have paths that the interpreter does not find by itself.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
            try:
                ready = self.process.stdout.readline()
            except BaseException:
                self.close()
                raise
            if ready != "true\n":
                self.close()
                reason = json.loads(ready) if ready else "it ended at once"
                raise OSError(f"the process of the grader {self.kind} cannot start: {reason}")
        return self.process


_graders: dict[str, Grader] = {}
_lock = threading.Lock()


def _forget() -> None:
    """After a fork the processes, and locks that another thread may have held, are the parent's."""
    global _lock
    _lock = threading.Lock()
    _graders.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def ask(kind: str, text: str, answer: str, *, limit: float | None = None) -> bool:
    """The verdict of `kind`, 'math-verify' or 'mathruler', within `limit` seconds (`LIMIT`). OSError if its process
    cannot start."""
    with _lock:
        grader = _graders.setdefault(kind, Grader(kind))
    return grader.ask(text, answer, LIMIT if limit is None else limit)


@atexit.register
def _close_all() -> None:
    for grader in _graders.values():
        grader.close()


def _judge(kind: str) -> Callable[[str, str], bool]:
    if kind == "math-verify":
        from math_verify import parse, verify

        def judge(text: str, answer: str) -> bool:
            # Their time-outs are signals, which the watchdog makes needless.
            gold = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
            return verify(gold, parse(text, parsing_timeout=None), timeout_seconds=None)

        return judge
    from mathruler.grader import extract_boxed_content, grade_answer

    return lambda text, answer: grade_answer(extract_boxed_content(text), answer)


def _serve(kind: str) -> None:
    import faulthandler
    import logging

    # What a grader prints must not be taken for a reply.
    replies, sys.stdout = sys.stdout, sys.stderr
    logging.disable()
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        judge = _judge(kind)
    except Exception as error:
        print(json.dumps(f"{type(error).__name__}: {error}"), file=replies, flush=True)
        return
    print("true", file=replies, flush=True)
    for line in sys.stdin:
        text, answer, limit = json.loads(line)
        faulthandler.dump_traceback_later(limit, exit=True)
        try:
            right = bool(judge(text, answer))
        except Exception:  # a parser's or sympy's own: such an answer is not the right one
            right = False
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(right), file=replies, flush=True)


if __name__ == "__main__":
    del sys.path[0]  # this folder, whose names are not meant to be top-level modules
    _serve(sys.argv[1])
