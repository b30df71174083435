"""The processes of a job come together before JAX connects them, so that who is missing or strange is told in a line.

Process 0 listens where JAX's coordinator will, each other process says there which it is, and all go on once all have
come. JAX's own service ends the whole job where a stranger joins it, and lets every process abort where one stays away.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator

from gpt4moe.config.check import CallerError, RunError
from gpt4moe.parallel.cluster import Cluster

JOIN_SECONDS = 300
FIRST_REMINDER_SECONDS, REMINDER_SECONDS = 5, 30
# Process 0 knows who is missing: the others wait a little longer, for its word.
GRACE_SECONDS = 10
# How long one look for news takes, and how long a greeting may.
LOOK_SECONDS, GREETING_SECONDS = 0.5, 5
MOST_BYTES = 4096


def muster(cluster: Cluster, say: Callable[[str], None]) -> None:
    """Returns when all processes of `cluster` have come; `say` hears whom it waits for.

    Raises `CallerError` where processes contradict each other, `RunError` where some have not come in `JOIN_SECONDS`,
    or process 0 cannot listen.
    """
    patience = _Patience(say)
    if cluster.process_id == 0:
        _gather(cluster, patience)
    else:
        _come(cluster, patience)


class _Patience:
    """How long there is to wait, and when to say so."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._began = say, time.monotonic()
        self._remind_at = self._began + FIRST_REMINDER_SECONDS

    def lasts(self, waiting: str, grace: float = 0) -> bool:
        """Whether there is time left, with `grace` more; now and then says what for."""
        now = time.monotonic()
        if now > self._remind_at:
            self._say(f"waiting for {waiting}, at most {JOIN_SECONDS} s")
            self._remind_at = now + REMINDER_SECONDS
        return now < self._began + JOIN_SECONDS + grace


# ---------------------------------------------------------------------------------------------------------- process 0


def _gather(cluster: Cluster, patience: _Patience) -> None:
    present: dict[int, socket.socket] = {}
    with _listening(cluster) as listener, contextlib.ExitStack() as connections:
        while missing := _missing(cluster, present):
            if not patience.lasts(f"{missing} of {cluster.num_processes} at {cluster.coordinator}"):
                start = f"start each --process_id from 0 to {cluster.num_processes - 1} once"
                line = f"{missing} of {cluster.num_processes} did not join within {JOIN_SECONDS} s; {start}"
                _answer_all(present, {"refused": line})
                raise RunError(line)
            with contextlib.suppress(TimeoutError):
                connection = connections.enter_context(listener.accept()[0])
                _greet(connection, cluster, present)
        _answer_all(present, {"go": True})


@contextlib.contextmanager
def _listening(cluster: Cluster) -> Iterator[socket.socket]:
    (_, port), both = cluster.address, socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        listener = socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except OSError as error:
        line = f"port {port} cannot be listened on ({error.strerror}); another job may use it: choose another port"
        raise RunError(f"--coordinator={cluster.coordinator}: {line}") from error
    with listener:
        listener.settimeout(LOOK_SECONDS)
        yield listener


def _missing(cluster: Cluster, present: dict[int, socket.socket]) -> str:
    """Names the processes that are not here, those that have gone again among them; "" for none."""
    for number in [number for number, connection in present.items() if _has_gone(connection)]:
        del present[number]
    numbers = [str(number) for number in range(1, cluster.num_processes) if number not in present]
    return f"process{'es' if len(numbers) > 1 else ''} {', '.join(numbers)}" if numbers else ""


def _has_gone(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _greet(connection: socket.socket, cluster: Cluster, present: dict[int, socket.socket]) -> None:
    """Takes a process in, or tells it why not; what does not speak our language is left alone."""
    connection.settimeout(GREETING_SECONDS)
    try:
        told = json.loads(_line(connection))
        number, count = int(told["process_id"]), int(told["num_processes"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    line = ""
    if count != cluster.num_processes:
        line = (
            f"--num_processes={count} of process {number} is {cluster.num_processes} for process 0; give both the same"
        )
    elif not 0 < number < count or (number in present and not _has_gone(present[number])):
        line = f"--process_id={number} has been started twice; start each from 0 to {count - 1} once"
    if line:
        _answer_all({number: connection}, {"refused": line, "by_caller": True})
    else:
        present[number] = connection


def _answer_all(present: dict[int, socket.socket], answer: dict) -> None:
    """Sends the answer; the other side hangs up first, so that the port is free at once."""
    for connection in present.values():
        with contextlib.suppress(OSError):
            connection.settimeout(GREETING_SECONDS)
            connection.sendall(json.dumps(answer).encode() + b"\n")
            connection.recv(1)


# -------------------------------------------------------------------------------------------------------- all others


def _come(cluster: Cluster, patience: _Patience) -> None:
    while trouble := _ask(cluster, patience):
        if not patience.lasts(f"process 0 at {cluster.coordinator} ({trouble})"):
            raise RunError(f"--coordinator={cluster.coordinator}: {trouble}, and that for {JOIN_SECONDS} s")
        time.sleep(LOOK_SECONDS)


def _ask(cluster: Cluster, patience: _Patience) -> str:
    """Tells process 0 that this one is there; "" when all are, else what stands in the way."""
    try:
        connection = socket.create_connection(cluster.address, timeout=GREETING_SECONDS)
    except socket.gaierror:
        return f"no host is known by the name {cluster.address[0]}"
    except OSError:
        return "process 0 is not there"
    with connection:
        try:
            hello = {"process_id": cluster.process_id, "num_processes": cluster.num_processes}
            connection.sendall(json.dumps(hello).encode() + b"\n")
            connection.settimeout(LOOK_SECONDS)
            answer = json.loads(_line(connection, lambda: patience.lasts("the other processes", GRACE_SECONDS)))
            refused, by_caller = answer.get("refused"), answer.get("by_caller")
        except OSError:
            return "process 0 has gone"
        except (ValueError, AttributeError):
            return "a job that runs already, or another program, listens there"
    if refused:
        raise CallerError(refused) if by_caller else RunError(refused)
    return ""


def _line(connection: socket.socket, goes_on: Callable[[], bool] = lambda: False) -> bytes:
    """One line of JSON. Raises `TimeoutError` where a silence does not go on, other `OSError`s where it is cut."""
    line = b""
    while not line.endswith(b"\n") and len(line) < MOST_BYTES:
        try:
            piece = connection.recv(MOST_BYTES)
        except TimeoutError:
            if not goes_on():
                raise
            continue
        if not piece:
            raise ConnectionResetError
        line += piece
        if not line.startswith(b"{"):
            raise ValueError(line)
    return line
