"""Runs one program inside the sandbox and says how it ended.  Its text is passed to ``python -c`` by the launcher.

Standard input is ``{"source": program, "token": secret}``; the descriptor of the first argument gets the token when the
program ran to its end, else ``error TYPE``.  A program that ends the process itself therefore has not passed.
"""

from __future__ import annotations

import json
import os
import sys
import types


def main(verdict: int) -> None:
    """Run the program as a module of its own, not as ``__main__``: its command-line part is none of the tests."""
    request = json.loads(sys.stdin.buffer.read())
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    module = sys.modules["program"] = types.ModuleType("program")
    try:
        exec(compile(request["source"], "program.py", "exec"), module.__dict__)  # noqa: S102 (what the sandbox is for)
        sys.stdout.flush()
    except BaseException as error:  # SystemExit and KeyboardInterrupt are failures, too
        os.write(verdict, f"error {type(error).__name__[:200]}\n".encode(errors="replace"))
        os._exit(1)
    os.write(verdict, request["token"].encode())
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
