"""The first process of a pod: `pod_init.py COMMAND...`. Whatever the command starts ends with it, orphans too.

When its standard input ends, which is when the test kills the pod or is itself killed, everything is killed at once.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading

import psutil

PR_SET_CHILD_SUBREAPER = 36
KILLED = 137


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    command = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
    signal.signal(signal.SIGTERM, lambda number, _: os.kill(command, number))
    watch = threading.Thread(target=_watch, daemon=True)
    watch.start()
    ended, status = 0, 0
    while ended != command:
        try:
            ended, status = os.wait()
        except ChildProcessError:  # the watch has reaped them all
            watch.join()
    _kill_all()
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _watch() -> None:
    sys.stdin.buffer.read()
    _kill_all()
    os._exit(KILLED)


def _kill_all() -> None:
    """A process that is killed may have started another meanwhile, which is ours then."""
    me = psutil.Process()
    while family := me.children(recursive=True):
        for each in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


if __name__ == "__main__":
    main()
