"""Processes that come together, or do not: each case over real sockets, a thread for each process."""

import concurrent.futures
import socket
import time

import pytest

from gpt4moe.config.check import CallerError, RunError
from gpt4moe.parallel import muster
from gpt4moe.parallel.cluster import Cluster


@pytest.fixture
def address():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return f"localhost:{listener.getsockname()[1]}"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(muster, "JOIN_SECONDS", 4)
    monkeypatch.setattr(muster, "FIRST_REMINDER_SECONDS", 1)
    monkeypatch.setattr(muster, "GRACE_SECONDS", 4)


def outcomes(address, *processes, apart=0.0) -> tuple[list, list]:
    """What `muster` raised (None: all had come) for each (process_id, num_processes), and what was said meanwhile."""
    said = []

    def come(number, count):
        try:
            muster.muster(Cluster(address, count, number), said.append)
        except (CallerError, RunError) as error:
            return error
        return None

    with concurrent.futures.ThreadPoolExecutor(len(processes)) as threads:
        futures = []
        for process in processes:
            futures.append(threads.submit(come, *process))
            time.sleep(apart)
        return [future.result() for future in futures], said


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_all_go_on_once_all_have_come_in_any_order(address, order):
    assert outcomes(address, *((number, 3) for number in order), apart=0.2)[0] == [None, None, None]
    assert outcomes(address, *((number, 3) for number in order))[0] == [None, None, None]  # the port is free again


def test_who_is_missing_is_told_to_all(address):
    (first, second), said = outcomes(address, (0, 4), (2, 4))
    assert type(first) is type(second) is RunError
    line = "processes 1, 3 of 4 did not join within 4 s; start each --process_id from 0 to 3 once"
    assert str(first) == str(second) == line
    assert f"waiting for processes 1, 3 of 4 at {address}, at most 4 s" in said


def test_a_process_started_twice_is_refused_and_the_others_go_on(address):
    found, _ = outcomes(address, (0, 3), (1, 3), (1, 3), (2, 3), apart=0.3)
    assert [type(error) for error in found] == [type(None), type(None), CallerError, type(None)]
    assert str(found[2]) == "--process_id=1 has been started twice; start each from 0 to 2 once"


def test_a_process_of_a_job_of_another_size_is_refused(address):
    found, _ = outcomes(address, (0, 2), (1, 3), (1, 2), apart=0.3)
    assert [type(error) for error in found] == [type(None), CallerError, type(None)]
    assert str(found[1]).startswith("--num_processes=3 of process 1 is 2 for process 0;")


def test_a_process_that_has_gone_may_come_again(address):
    """A connection that broke while others were awaited leaves its number free; other words are no hello."""
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        first = threads.submit(outcomes, address, (0, 3))
        for words in (b'{"process_id": 1, "num_processes": 3}\n', b"GET / HTTP/1.1\n"):
            time.sleep(0.3)
            with socket.create_connection(Cluster(address, 3, 1).address) as connection:
                connection.sendall(words)
        assert outcomes(address, (2, 3), (1, 3), apart=0.3)[0] == [None, None]
        assert first.result()[0] == [None]


def test_nobody_and_strangers_are_told_apart(address):
    (error,), said = outcomes(address, (1, 2))
    assert str(error) == f"--coordinator={address}: process 0 is not there, and that for 4 s"
    assert f"waiting for process 0 at {address} (process 0 is not there), at most 4 s" in said
    (error,), _ = outcomes("nosuchhost.invalid:1234", (1, 2))
    assert "no host is known by the name nosuchhost.invalid" in str(error)
    with socket.create_server(("localhost", int(address.rpartition(":")[2]))) as stranger:
        stranger.settimeout(10)

        def answer():
            while True:
                connection = stranger.accept()[0]
                connection.sendall(b"\x00\x00\x12 this is no gpt4moe")
                connection.close()

        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            answering = threads.submit(answer)
            (error,), _ = outcomes(address, (1, 2))
            stranger.close()
            assert isinstance(answering.exception(), OSError)
    assert "a job that runs already, or another program, listens there" in str(error)
