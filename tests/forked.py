"""
Programs in forked processes, for tests/kill.py, tests/damage.py, tests/cases.py and tests/disk.py.

A forked process has its own signals, streams, locks and memory, as one that a shell starts, but
torch is imported already: it begins in milliseconds instead of three seconds. The parent must not
train, because torch's threads do not survive a fork.
"""
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import matplotlib.figure  # noqa: F401  imported once, before any fork
import torch

torch.set_num_threads(1)


class Ended(NamedTuple):
    """How a process ended."""
    code: int | None            # exit code, minus the number of a signal; None: it was hung
    out: str
    err: str
    seconds: float
    memory: int                 # the most bytes that it held
    spent: float                # seconds of a processor that it used


class Process:
    """A call of main(argv) in a forked process; what it prints goes to files in `folder`."""

    def __init__(self, main, argv, folder, prepare=None, cwd=None, stdin=os.devnull):
        """prepare: called in the new process before main, e.g. to replace a function."""
        self.out = Path(folder) / "stdout.txt"
        self.err = Path(folder) / "stderr.txt"
        self.begun = time.perf_counter()
        self.code = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                self.redirect(stdin)
                if cwd:
                    os.chdir(cwd)
                if prepare:
                    prepare()
                code = call(main, argv)
            finally:
                os._exit(code)

    def redirect(self, stdin):
        """Connect the three streams of the new process."""
        for number, path, mode in ((0, stdin, "r"), (1, self.out, "w"), (2, self.err, "w")):
            flags = os.O_RDONLY if mode == "r" else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            handle = os.open(path, flags)
            os.dup2(handle, number)
            name = ("stdin", "stdout", "stderr")[number]
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))

    def running(self):
        """Has it not ended yet?"""
        if self.code is None:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
                self.usage = usage
        return self.code is None

    def kill(self):
        """SIGKILL, unless it has ended."""
        if self.running():
            os.kill(self.pid, signal.SIGKILL)

    def spent(self):
        """Seconds of a processor that it has used so far."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            return 0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def wait(self, limit=120):
        """`Ended`. A process that takes more than limit seconds is hung, and killed.

        Seconds of a processor count, so that other work on the machine does not matter; or twice
        as many in which it does nothing, or ten times as many in all.
        """
        spent, idle_since = 0, self.begun
        hung = False
        while self.running() and not hung:
            time.sleep(0.005)
            now = time.perf_counter()
            if self.spent() > spent + 0.01:
                spent, idle_since = self.spent(), now
            hung = spent > limit or now - idle_since > 2 * limit or now - self.begun > 10 * limit
        seconds = time.perf_counter() - self.begun
        hung = self.running()
        self.kill()
        while self.running():
            time.sleep(0.002)
        code = None if hung else self.code
        texts = [path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
                 for path in (self.out, self.err)]
        spent = self.usage.ru_utime + self.usage.ru_stime
        return Ended(code, *texts, seconds, self.usage.ru_maxrss * 1024, spent)


def call(main, argv):
    """The exit code of main(argv), as Python would end with it."""
    code = 0
    try:
        main(argv)
    except SystemExit as stop:
        code = 0 if stop.code is None else stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = 120
    return code
