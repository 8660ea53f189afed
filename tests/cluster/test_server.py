"""Servers start at the address in TF_CONFIG and wait for the servers of other tasks."""

import contextlib
import socket
import time

import pytest

from support.base.errors import UserError
from support.cluster import server
from support.cluster.server import is_reachable, start_server, wait_for_peers
from support.cluster.task import Task
from support.ops import tensorflow_v1
from support.ops.tensorflow_v1 import session_config


def free_addresses(count):
    """Returns loopback addresses whose ports are free."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]


def single(address, type_="ps"):
    """Returns the only task of a cluster."""
    return Task({type_: [address]}, type_, 0)


# Servers cannot be stopped, and each starts dozens of threads: these tests start few of them.


@pytest.mark.parametrize(("host", "address"), [("localhost", "127.0.0.1"), ("[::1]", "::1")])
def test_a_server_starts_at_a_host_name_and_at_an_ipv6_address(host, address):
    port = free_addresses(1)[0].rpartition(":")[2]
    start_server(single(f"{host}:{port}"), session_config())
    socket.create_connection((address, int(port)), timeout=2.0).close()
    assert is_reachable(f"{host}:{port}")


@pytest.mark.parametrize(("type_", "gpus"), [("ps", {"GPU": 0}), ("chief", {})])
def test_a_parameter_server_uses_no_gpu(monkeypatch, type_, gpus):
    monkeypatch.setattr(tensorflow_v1, "_CAN_HAVE_GPUS", True)
    config = session_config()
    started = start_server(single(free_addresses(1)[0], type_), config)
    used = started.server_def.default_session_config
    assert used.device_count == gpus
    assert used.gpu_options.allow_growth
    assert config == session_config()  # the caller's own object is unchanged


def test_a_port_in_use_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(UserError, match=f"^cannot start a server at {address}: port in use$"):
            start_server(single(address), session_config())


def test_a_port_in_use_at_another_address_of_the_machine_is_refused():
    with socket.create_server(("127.0.0.2", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(UserError, match=f"^cannot start a server at {address}: ") as error:
            start_server(single(address), session_config())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("198.51.100.1:9999", r"198\.51\.100\.1:9999, which does not belong to this machine$"),
        ("0.0.0.0:9999", r"0\.0\.0\.0:9999, which other machines cannot connect to"),
        ("[::]:9999", r"\[::\]:9999, which other machines cannot connect to"),
        ("nowhere.invalid:9999", r"^cannot resolve nowhere\.invalid:9999 from TF_CONFIG: "),
    ],
)
def test_an_address_that_this_machine_does_not_have_is_refused(address, message):
    with pytest.raises(UserError, match=message):
        start_server(single(address), session_config())


@pytest.fixture
def hide_host(monkeypatch):
    """A function that makes a host name unknown for a number of look-ups."""
    look_up = socket.getaddrinfo

    def hide_host(host, count):
        def fail_at_first(name, *arguments, **options):
            nonlocal count
            if name == host and count > 0:
                count -= 1
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            return look_up(name, *arguments, **options)

        monkeypatch.setattr(socket, "getaddrinfo", fail_at_first)

    return hide_host


def test_a_task_waits_until_its_own_host_name_is_known(capsys, monkeypatch, hide_host):
    monkeypatch.setattr(server, "NOTICE_DELAY", 0.0)
    port = free_addresses(1)[0].rpartition(":")[2]
    hide_host("localhost", count=2)
    start_server(single(f"localhost:{port}"), session_config(), timeout=60)
    assert is_reachable(f"localhost:{port}")
    notice = f"Waiting until the host name of localhost:{port} can be resolved\n"
    assert capsys.readouterr().err == notice


def test_a_host_name_that_stays_unknown_is_an_error_after_the_timeout(hide_host):
    hide_host("localhost", count=1000)
    start = time.monotonic()
    with pytest.raises(
        UserError,
        match=r"^cannot resolve localhost:9999 from TF_CONFIG: .*service not known; correct",
    ):
        start_server(single("localhost:9999"), session_config(), timeout=1)
    assert 1 <= time.monotonic() - start < 30


def test_a_peer_whose_host_name_is_not_known_yet_is_waited_for(hide_host):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"localhost:{listener.getsockname()[1]}"
        hide_host("localhost", count=2)
        wait_for_peers(single(address), [("ps", 0)], timeout=60)


def test_float16_is_refused_for_workers_only():
    config = session_config()  # as session_config(use_fp16=True) returns it on GPUs
    rewrites = config.graph_options.rewrite_options
    rewrites.auto_mixed_precision = rewrites.ON
    with pytest.raises(UserError, match="--use_fp16 does not work with TF_CONFIG on GPUs"):
        start_server(single(free_addresses(1)[0], "chief"), config)
    start_server(single(address := free_addresses(1)[0]), config)
    assert is_reachable(address)


def test_a_server_is_reachable_only_while_it_listens():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        assert is_reachable(address)
    assert not is_reachable(address)
    assert not is_reachable("nowhere.invalid:9999")


def test_waiting_ends_as_soon_as_all_peers_respond(capsys):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        here = f"127.0.0.1:{listener.getsockname()[1]}"
        task = Task({"ps": ["127.0.0.1:1"], "chief": [here]}, "chief", 0)
        start = time.monotonic()
        wait_for_peers(task, [("chief", 0)], timeout=60)
    assert time.monotonic() - start < 30
    assert capsys.readouterr().err == ""


def test_missing_peers_are_listed_after_the_timeout(capsys, monkeypatch):
    monkeypatch.setattr(server, "NOTICE_DELAY", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        here = f"127.0.0.1:{listener.getsockname()[1]}"
        first, second = free_addresses(2)
        task = Task({"ps": [first], "chief": [here], "worker": [second]}, "chief", 0)
        start = time.monotonic()
        with pytest.raises(UserError) as error:
            wait_for_peers(task, [("ps", 0), *task.workers], timeout=1)
    assert time.monotonic() - start >= 1
    assert str(error.value) == (
        f"no response from ps 0 ({first}), worker 0 ({second}) for 1 s (--cluster_timeout_secs); "
        "start the missing tasks, or correct their addresses in TF_CONFIG"
    )
    assert capsys.readouterr().err == f"Waiting for ps 0 ({first}), worker 0 ({second})\n"
