"""Python programs in processes of their own that start at once: forks of a process that has imported torch and timm.

    python warm.py serve SOCKET           waits for programs to run, until stdin is closed
    python warm.py run SOCKET WORDS...    `python WORDS...` as a fork of the former, here and with these streams

`helpers.python()` runs the second. It passes signals on, ends as the program ends, and if it is killed, the program is
killed too. Not for tests of imports or of variables that imports read: they need an interpreter of their own.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import sys
import time

# not the package: a program may be about timm without it
PRELOADED = ("timm.task", "torch.distributed.launcher.api", "torchvision.transforms.v2", "matplotlib.pyplot")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
Request = tuple[list[str], str, dict[str, str]]  # words after `python`, folder, environment


def run(path: str, words: list[str]) -> int:
    """Has the server run a program; returns its status, negative for a signal."""
    with socket.socket(socket.AF_UNIX) as server:
        while True:
            try:
                server.connect(path)
                break
            except OSError:  # it has only just been started
                time.sleep(0.01)
        request = json.dumps([words, os.getcwd(), dict(os.environ)]).encode()
        socket.send_fds(server, [struct.pack("i", len(request))], [0, 1, 2])
        server.sendall(request)
        (pid,) = struct.unpack("i", server.recv(4))

        def forward(number: int, _frame: object) -> None:
            with contextlib.suppress(ProcessLookupError):  # as from a terminal, SIGINT reaches the program's workers
                os.killpg(pid, number) if number == signal.SIGINT else os.kill(pid, number)

        for number in SIGNALS:
            signal.signal(number, forward)
        return struct.unpack("i", server.recv(4))[0]


def serve(path: str) -> Request:
    """Waits for requests; returns each in a fork, which then runs it."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        for name in PRELOADED:
            importlib.import_module(name)
        gc.freeze()  # forks end in a moment: they do not free what they share
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks here
        while listener in select.select([listener, 0], [], [])[0]:
            client, _ = listener.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listener.close()
                with client:
                    length, streams, *_ = socket.recv_fds(client, 4, 3)
                    request = client.recv(struct.unpack("i", length)[0], socket.MSG_WAITALL)
                    if pid := os.fork():
                        _keep(client, pid)
                        os._exit(0)
                os.setsid()
                for number, stream in enumerate(streams):
                    os.dup2(stream, number)
                    os.close(stream)
                return tuple(json.loads(request))
            client.close()
    sys.exit()


def _keep(client: socket.socket, pid: int) -> None:
    """Sends the number of a program and, when it has ended, its status; kills it if nobody waits for it any more."""
    client.sendall(struct.pack("i", pid))
    handle = os.pidfd_open(pid)
    if handle not in select.select([client, handle], [], [])[0]:
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(OSError):
        client.sendall(struct.pack("i", status))


def become(words: list[str], folder: str, environment: dict[str, str]) -> None:
    """Runs `python WORDS...` in this process."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if words[0] == "-u":
        words = words[1:]
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(write_through=True)
    how, sys.argv = words[0], words if words[0] not in ("-m", "-c") else [words[0], *words[2:]]
    sys.path[0] = "" if how in ("-m", "-c") else os.path.dirname(os.path.abspath(how))
    if how == "-c":
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    elif how == "-m":
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(how, run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        become(*serve(sys.argv[2]))
    else:
        status = run(sys.argv[2], sys.argv[3:])
        if status < 0:  # as the program
            signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
            os.kill(os.getpid(), -status)
        sys.exit(status)
