"""Runs one program inside the sandbox and says how it ended.  Its text is passed to ``python -c`` by the launcher.

Standard input is what :func:`ladir.tasks.sandbox.run_program` has packed; the descriptor of the first argument gets the
secret word when the tests ran to their end, else why they did not.  A program that ends the process itself has therefore
not passed, nor has one that changed what its tests use.
"""

from __future__ import annotations
import __future__

import builtins
import marshal
import os
import sys
import types

TYPE_CHECKING = False  # typing's own would cost a third of the start
if TYPE_CHECKING:
    from typing import Any

    Snapshot = list[tuple[str, types.ModuleType, dict[str, Any]]]

# What the functions below call is theirs, whatever a program does to Python's own.
globals()["__builtins__"] = dict(vars(builtins))

_PROGRAM, _TESTS = "program.py", "tests.py"
_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")  # more would be processes to the limit
_FUTURE = {getattr(__future__, name).compiler_flag for name in __future__.all_feature_names}
_LONGEST = 250  # characters of a name, a line and a message that are told


class _Source:
    """The text of the program, which :mod:`inspect` asks for."""

    def __init__(self, text: str, before: int) -> None:
        self.text, self.before = text, before
        """``before``: lines of the set-up, at its beginning."""

    def get_source(self, name: str) -> str:
        return self.text

    def place(self, line: int) -> str:
        return f"set-up, line {line}" if line <= self.before else f"answer, line {line - self.before}"


class _Packages:
    """Finds the packages that programs may import beside the standard library, and no others that lie by them."""

    def __init__(self, folder: str, names: list[str]) -> None:
        self.folder, self.names = folder, names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        from importlib.machinery import PathFinder

        return PathFinder.find_spec(name, [self.folder]) if path is None and name in self.names else None


class _Changed(Exception):
    """A program changed what its tests use."""


def _read(readings: list[tuple[str, str, int]]) -> tuple[_Source, list[types.CodeType]]:
    """The first reading that compiles: its text, and the code of its parts.  Raises what the first one raises where none does."""
    failure: Exception | None = None
    for setup, answer, before in readings:
        try:
            if not setup:
                return _Source(answer, before), [_compiled(answer, _PROGRAM)]
            first = _compiled(setup, _PROGRAM)
            # At its place in the whole text, which inspect and messages refer to.
            parts = [first, _compiled("\n" * before + answer, _PROGRAM, _futures(first))]
            return _Source(f"{setup}\n{answer}", before), parts
        except Exception as error:  # SyntaxError, and what texts that are no programs raise beside it
            failure = failure or error
    raise failure or ValueError("no program")


def _compiled(text: str, name: str, flags: int = 0) -> types.CodeType:
    return compile(text, name, "exec", flags, dont_inherit=True)


def _futures(code: types.CodeType) -> int:
    """What code imports from the future, for parts behind it."""
    return sum(flag for flag in _FUTURE if code.co_flags & flag)


def _compiled_tests(request: dict[str, Any], setup: list[types.CodeType]) -> types.CodeType:
    """Long tests come compiled, where this is the Python that did it."""
    if request["compiled"] and request["version"] == sys.version:
        code: types.CodeType = marshal.loads(request["compiled"])  # from the evaluation
        return code
    return _compiled(request["tests"], _TESTS, _futures(setup[0]) if setup else 0)


def _snapshot(modules: list[str]) -> Snapshot:
    """The functions and classes of the modules that tests import, as they are now."""
    kept: Snapshot = []
    for name in modules:
        try:
            __import__(name)
        except Exception:  # the tests will say so
            continue
        module = sys.modules[name]
        kept.append((name, module, {key: value for key, value in vars(module).items() if callable(value)}))
    return kept


def _refuse_changed(kept: Snapshot) -> None:
    for name, module, values in kept:
        if sys.modules.get(name) is not module:
            raise _Changed(f"module {name}")
        _refuse_others(name, module.__dict__, values)


def _refuse_others(name: str, now: dict[str, Any], before: dict[str, Any]) -> None:
    for key, value in before.items():
        if now.get(key) is not value:
            raise _Changed(f"{name}.{key}")


def _refuse_other_tests(tests: types.CodeType, own: list[str], names: dict[str, Any]) -> None:
    """Tests' functions are still those that the tests define."""
    for code in tests.co_consts:
        if type(code) is types.CodeType and code.co_name in own and code.co_name in names:
            function = names[code.co_name]
            if type(function) is not types.FunctionType or function.__code__ is not code:
                raise _Changed(f"the tests' {code.co_name}")


def _run(request: dict[str, Any]) -> None:
    """Program, then tests.  They share a module, as if they were one file, but not the names that are Python's own."""
    module = types.ModuleType("program")
    # Not as the main program: its command-line part is none of the tests.
    sys.modules["program"] = sys.modules["__main__"] = module
    names = module.__dict__
    source, parts = _read(request["readings"])
    request["source"] = source
    names |= {"__file__": _PROGRAM, "__loader__": source, "__builtins__": vars(builtins)}
    for setup in parts[:-1]:
        exec(setup, names)  # noqa: S102 (what the sandbox is for)
    kept = _snapshot(request["modules"])
    own = dict(vars(builtins))
    exec(parts[-1], names)  # noqa: S102
    _refuse_changed(kept)
    names |= {"__builtins__": (used := dict(own)), "__name__": "__main__"}
    tests = _compiled_tests(request, parts[:-1])
    exec(tests, names)  # noqa: S102
    _refuse_others("builtins", used, own)
    _refuse_other_tests(tests, request["functions"], names)
    if not request["patches"]:
        _refuse_changed(kept)


def _place(error: BaseException) -> tuple[str, int]:
    """File and line of the program or its tests where something was raised last; 0 where it was nowhere in them."""
    if isinstance(error, SyntaxError) and error.filename in (_PROGRAM, _TESTS):
        return error.filename, error.lineno or 0
    file, line = "", 0
    trace = sys.exc_info()[2]
    while trace is not None:
        if trace.tb_frame.f_code.co_filename in (_PROGRAM, _TESTS):
            file, line = trace.tb_frame.f_code.co_filename, trace.tb_lineno
        trace = trace.tb_next
    return file, line


def _told(error: BaseException, request: dict[str, Any]) -> bytes:
    """Type, place and message of what a program raised, a line each: its own words, which nobody trusts."""
    file, line = _place(error)
    _, answer, before = request["readings"][0]
    source = request.get("source") or _Source("\n" * before + answer, before)
    text = (request["tests"] if file == _TESTS else source.text).split("\n")
    place = f"tests, line {line}" if file == _TESTS else source.place(line)
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    kind = f"{'changed' if type(error) is _Changed else 'error'} {type(error).__name__}"
    facts = [kind, place if line else "", text[line - 1] if 0 < line <= len(text) else "", message]
    return "\n".join(" ".join(fact[:_LONGEST].split()) for fact in facts).encode(errors="replace")


def _failure(request: dict[str, Any]) -> bytes:
    """Why the tests did not run to their end; empty where they did.  What a program forks does not speak for it."""
    leave, getpid = os._exit, os.getpid
    first = getpid()
    said = b""
    try:
        _run(request)
    except BaseException as error:  # SystemExit and KeyboardInterrupt are failures, too
        try:
            said = _told(error, request)
        except BaseException:  # what hostile exceptions do when they are asked for their text
            said = b"error Exception"
    if getpid() != first:
        leave(1 if said else 0)
    return said


def _hear_signals() -> None:
    import signal

    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def main(verdict: int) -> None:
    """Run the program and write the verdict."""
    request = marshal.loads(sys.stdin.buffer.read())  # from the evaluation
    # A pool ends its processes by signals; the first one hears none that mean the evaluation.
    os.register_at_fork(after_in_child=_hear_signals)
    for name in list(os.environ):
        del os.environ[name]
    for name in _THREADS:
        os.putenv(name, "1")  # for libraries, not seen by the program
    null = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(null, standard)
    os.close(null)
    sys.meta_path.append(_Packages(request["folder"], request["packages"]))
    write, leave = os.write, os._exit
    # The word waits on the interpreter's stack, where no frame shows it.
    write(verdict, _either(request.pop("token"), _failure(request)))
    leave(0)


def _either(token: bytes, failure: bytes) -> bytes:
    return failure or token


if __name__ == "__main__":
    main(int(sys.argv[1]))
