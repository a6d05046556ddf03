"""Run as a program: a supervised command that starts processes which heed no signal and write into its folder.

Prints the folder and the processes' ids once all of that runs. What the command then does is its argument: ``serve``
sleeps, ``crash`` ends by a signal, ``fail`` raises an exception, ``bare`` sleeps and has no orphans, ``headless`` ends
and leaves a process whose main thread has ended before its others.
"""

import os
import signal
import subprocess
import sys
import time

from flexpipe_serve.supervised import supervised

_WRITER = """
import os, pathlib, signal, sys, time
os.setsid()
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
if os.fork():
    if sys.argv[2] == "orphan":
        os._exit(0)
print(os.getpid(), flush=True)
number = 0
while True:
    path = pathlib.Path(sys.argv[1]) / f"{os.getpid()}-{number % 50}" / "logs"
    path.mkdir(parents=True, exist_ok=True)
    (path / "log").write_text("x" * number)
    number += 1
    time.sleep(0.0005)
"""

# Its standard error stays open as long as a thread of it lives.
_HEADLESS = """
import ctypes, sys, threading, time
threading.Thread(target=time.sleep, args=(3600,)).start()
print(flush=True)
ctypes.CDLL(None).syscall(60)  # exit, of this thread alone
"""


def run(folder: str) -> int:
    if sys.argv[1] == "headless":
        process = subprocess.Popen([sys.executable, "-c", _HEADLESS], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        print(folder, process.pid, flush=True)
        return 0
    pids = [str(os.getpid())]
    for kind, num_processes in (("child", 2), ("orphan", 1)):
        if kind == "orphan" and sys.argv[1] == "bare":
            continue
        writer = subprocess.Popen([sys.executable, "-c", _WRITER, folder, kind], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        pids += [writer.stdout.readline().strip() for _ in range(num_processes)]
    print(folder, *pids, flush=True)
    if sys.argv[1] == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[1] == "fail":
        raise ValueError("no")
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    status = supervised(run, prefix="flexpipe-test-")
    print("interrupted" if status is None else status, flush=True)
