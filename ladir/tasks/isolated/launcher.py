"""Shuts itself in, then becomes the runner of a program that nobody trusts.  Started by :mod:`ladir.tasks.sandbox`.

A script of its own (``python -I -S launcher.py SETTINGS``) and not a ``preexec_fn``: that would run Python between fork
and exec of a process with threads.  Standard library only.  Standard input holds the program; the descriptor
``verdict`` is told either ``unavailable REASON`` or ``ready``, and then belongs to the runner.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4  # of mount_setattr
_AT_FDCWD, _AT_RECURSIVE, _MNT_DETACH = -100, 0x8000, 2
_NEW_MOUNT, _NEW_UTS, _NEW_IPC, _NEW_USER, _NEW_PID, _NEW_NET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 36, 38
# Root's programs run as one of these users, which systemd's ranges leave free; the process limit then counts only theirs.
_FIRST_USER, _USERS = 60_706, 478

_SYSTEM = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(name: str, *arguments: Any) -> None:
    """Call a function of libc.  Raises OSError naming it where it fails or is missing."""
    try:
        function = getattr(_libc, name)
    except AttributeError:
        raise OSError(f"{name}: not in this libc") from None
    if function(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind, options)]
    _checked("mount", encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3])


class _MountAttributes(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd"))


def _bind(source: str, target: str, attributes: int) -> None:
    """Show ``source`` (a folder, file or link) as ``target``, read-only with all that is mounted in it."""
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    if Path(source).is_symlink():
        Path(target).symlink_to(Path(source).readlink())
        return
    if Path(source).is_dir():
        Path(target).mkdir(exist_ok=True)
    else:
        Path(target).touch()
    _mount(source, target, None, _MS_BIND | _MS_REC)
    wanted = _MountAttributes(attr_set=attributes)
    _checked(
        "mount_setattr",
        _AT_FDCWD,
        os.fsencode(target),
        _AT_RECURSIVE,
        ctypes.byref(wanted),
        ctypes.c_size_t(ctypes.sizeof(wanted)),
    )


def _die_with_parent() -> None:
    _checked("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _enter_namespaces(root: str, prefix: str, packages: dict[str, str], disk: int) -> None:
    """Leave network, processes and files behind: what is left is the interpreter and ``packages`` (where they are: where they
    are shown), read-only, and a small memory disk."""
    uid, gid = os.geteuid(), os.getegid()
    _checked("unshare", _NEW_MOUNT | _NEW_UTS | _NEW_IPC | _NEW_PID | _NEW_NET | (_NEW_USER if uid else 0))
    if uid:
        for name, content in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            Path("/proc/self", name).write_text(content)
    # System V's objects are memory of no process.  Only root may forbid them.
    for name, most in (("shmmni", "0"), ("msgmni", "0"), ("sem", "0 0 0 0")):
        with contextlib.suppress(OSError):
            Path("/proc/sys/kernel", name).write_text(most, encoding="ascii")
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={disk},nr_inodes=4096,mode=0755")
    jail = f"{root}/jail"
    covered: list[str] = []
    for source in (*_SYSTEM, prefix):
        if Path(source).exists() and not any(Path(source).is_relative_to(folder) for folder in covered):
            _bind(source, jail + source, _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV)
            covered.append(source)
    for source, target in packages.items():
        _bind(source, jail + target, _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV)
    for source in _DEVICES:
        _bind(source, jail + source, _ATTR_RDONLY | _ATTR_NOSUID)
    for place in ("tmp", "dev/shm"):  # the second for semaphores between processes
        Path(jail, place).mkdir(exist_ok=True)
        Path(jail, place).chmod(0o777)
    os.chdir(root)
    _checked("pivot_root", b".", b".")
    _checked("umount2", b".", _MNT_DETACH)
    # Below the root of its namespace a process cannot make namespaces of its own, with memory disks without limit.
    os.chroot("/jail")
    os.chdir("/tmp")


def _drop_root(interpreter: str) -> None:
    """Become a user that owns nothing.  Raises OSError where the interpreter is out of that user's reach."""
    user = _FIRST_USER + os.getpid() % _USERS
    os.chown(".", user, user)
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    if not os.access(interpreter, os.X_OK):
        raise PermissionError(f"{interpreter} cannot be run by an unprivileged user, and programs are never run as root")


def _tasks_of(user: int) -> int:
    """Processes and threads of a user now: its process limit counts them all."""
    count = 0
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdigit() and process.stat().st_uid == user:
                count += len(list((process / "task").iterdir()))
    return count


def _limit(limits: dict[str, int]) -> None:
    """Processor time ends with a signal that tells of it, a second later with one that cannot be caught."""
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most + 1 if name == "CPU" else most))


def _become_runner(settings: dict[str, Any], runner: str) -> NoReturn:
    _limit(settings["limits"])
    verdict = settings["verdict"]
    os.write(verdict, b"ready\n")
    os.set_inheritable(verdict, True)
    # Each thread's memory of its own would be address space to the limit.
    os.execve(settings["interpreter"], ["python", "-I", "-S", "-c", runner, str(verdict)], {"MALLOC_ARENA_MAX": "1"})


def _be_init(settings: dict[str, Any], runner: str) -> NoReturn:
    """Process 1 of the namespace: start the runner and end with it; the kernel then ends whatever it left behind."""
    _die_with_parent()
    program = os.fork()
    if program == 0:
        _become_runner(settings, runner)
    os.close(settings["verdict"])
    while (ended := os.wait())[0] != program:
        pass
    os._exit(_shell_code(os.waitstatus_to_exitcode(ended[1])))


def _shell_code(code: int) -> int:
    """128 and the signal's number, as shells say it, where a process was killed."""
    return code if code >= 0 else 128 - code


def _isolate(settings: dict[str, Any]) -> None:
    """Everything up to the forks.  Raises OSError where this machine does not permit it."""
    _die_with_parent()
    with contextlib.suppress(OSError):  # its processes together may want more memory than there is: they go first then
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    _checked("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if settings["isolation"] == "namespaces":
        _enter_namespaces(settings["root"], settings["prefix"], settings["packages"], settings["disk"])
    else:
        _checked("prctl", _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # whose parent ends stays in the program's family
    if os.geteuid() == 0:
        _drop_root(settings["interpreter"])
        _die_with_parent()  # forgotten when the user changes
    elif settings["isolation"] == "limits":
        settings["limits"]["NPROC"] += _tasks_of(os.geteuid())


def main() -> None:
    """Isolate, then run; process limits count the processes from here on."""
    settings = json.loads(sys.argv[1])
    os.umask(0o022)  # whoever runs the program may enter the folders made here
    runner = Path(__file__).with_name("runner.py").read_text(encoding="utf-8")
    try:
        _isolate(settings)
    except OSError as error:
        os.write(settings["verdict"], f"unavailable {error}".encode(errors="replace"))
        sys.exit(1)
    if settings["isolation"] == "limits":
        _become_runner(settings, runner)
    init = os.fork()
    if init == 0:
        _be_init(settings, runner)
    os.close(settings["verdict"])
    sys.exit(_shell_code(os.waitstatus_to_exitcode(os.waitpid(init, 0)[1])))


if __name__ == "__main__":
    main()
