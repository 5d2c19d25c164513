"""Python without the seconds of a start: a process that has imported torch and timm is forked for each program.

    python forks.py serve SOCKET                    # imports, then waits; ends with its standard input
    python -I -S forks.py run SOCKET [-u] SCRIPT | -m MODULE | -c CODE  ARGUMENTS...

`run` is as `python` for whoever starts it: working directory, environment, standard streams, signals and exit status
are those of the program. The package under test is not imported beforehand: the program finds it, or does not, by its
own path. What is read from the environment while torch, timm or huggingface_hub are imported is that of `serve`.
"""

import json
import os
import signal
import socket
import sys

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)


def run(path: str, words: list[str]) -> None:
    """Asks for a program, hands signals on to it, and ends as it ended."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    request = json.dumps({"words": words, "cwd": os.getcwd(), "env": dict(os.environ)}).encode()
    socket.send_fds(connection, [len(request).to_bytes(8, "little")], [0, 1, 2])
    connection.sendall(request)
    replies = connection.makefile()
    pid = int(replies.readline())
    for number in FORWARDED:
        signal.signal(number, lambda number, _: os.kill(pid, number))
    code = int(replies.readline())
    if code < 0:  # ended by a signal
        if -code in FORWARDED:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def serve(path: str) -> list[str]:
    """Forks a process for each request; returns the words of its program, in that process only."""
    import selectors

    listener, waiting = socket.socket(socket.AF_UNIX), selectors.DefaultSelector()
    listener.bind(path)
    listener.listen(64)
    waiting.register(listener, selectors.EVENT_READ)
    waiting.register(sys.stdin, selectors.EVENT_READ)
    running: dict[int, tuple[int, socket.socket]] = {}  # by file descriptor of the process
    print("ready", flush=True)
    while True:
        for key, _ in waiting.select():
            if key.fileobj is sys.stdin:  # who started this is gone
                for pid, _ in running.values():
                    os.kill(pid, signal.SIGKILL)
                os._exit(0)
            elif key.fileobj is listener:
                connection = listener.accept()[0]
                request, streams = _receive(connection)
                pid = os.fork()
                if pid == 0:
                    waiting.close()
                    listener.close()
                    for process, (_, other) in running.items():
                        os.close(process)
                        other.close()
                    connection.close()
                    _become(request, streams)
                    return request["words"]
                for stream in streams:
                    os.close(stream)
                connection.sendall(f"{pid}\n".encode())
                process = os.pidfd_open(pid)
                running[process] = pid, connection
                waiting.register(process, selectors.EVENT_READ)
                waiting.register(connection, selectors.EVENT_READ, pid)
            elif key.fd in running:  # a program ended
                pid, connection = running.pop(key.fd)
                waiting.unregister(key.fd)
                if connection.fileno() in waiting.get_map():
                    waiting.unregister(connection)
                    connection.sendall(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n".encode())
                connection.close()
                os.close(key.fd)
            else:  # who asked for it was killed: so is the program
                waiting.unregister(key.fileobj)
                os.kill(key.data, signal.SIGKILL)


def _receive(connection: socket.socket) -> tuple[dict, list[int]]:
    """A request, and the streams of who asks."""
    head, streams, _, _ = socket.recv_fds(connection, 8, 3)
    request = b""
    while len(request) < int.from_bytes(head, "little"):
        request += connection.recv(1 << 20)
    return json.loads(request), list(streams)


def _become(request: dict, streams: list[int]) -> None:
    """Streams, working directory and environment of who asked."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])


def program(words: list[str]) -> None:
    """Runs the program in this process and ends as `python` does, but for seconds of taking modules apart."""
    import atexit
    import threading

    code: object = 1
    try:
        _execute(words)
        code = 0
    except SystemExit as e:
        code = 0 if e.code is None else e.code
        if not isinstance(code, int):
            print(code, file=sys.stderr)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code if isinstance(code, int) else 1)


def _execute(words: list[str]) -> None:
    import runpy

    if words[0] == "-u":
        words = words[1:]
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.orig_argv = [sys.executable, *words]
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = paths + [path for path in sys.path if path not in paths]
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        sys.path.insert(0, "")
        exec(compile(words[1], "<string>", "exec"), sys.modules["__main__"].__dict__)
    else:
        sys.argv = words
        sys.path.insert(0, os.path.dirname(os.path.realpath(words[0])))
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "run":
        run(sys.argv[2], sys.argv[3:])
    import gc

    import matplotlib.backends.backend_agg
    import matplotlib.figure
    import matplotlib.pyplot  # noqa: F401
    import timm  # noqa: F401
    import torch
    import torch.distributed.run  # noqa: F401

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    del sys.modules["torch.distributed.run"], sys.path[0]  # a module to run, and the tests' folder
    torch.compiler.list_backends()
    gc.collect()
    gc.freeze()  # what is collected in a program is its own
    program(serve(sys.argv[2]))
