"""Servers start at the address in TF_CONFIG and wait for the servers of other tasks."""

import re
import socket

import pytest
from conftest import free_addresses, listen

from support.base.errors import UserError
from support.cluster.server import (
    is_reachable,
    make_chief_check,
    start_server,
    wait_for_peers,
)
from support.cluster.task import Task
from support.ops import tensorflow_v1
from support.ops.tensorflow_v1 import session_config


def single(address, type_="ps"):
    """Returns the only task of a cluster."""
    return Task({type_: [address]}, type_, 0)


# Servers cannot be stopped, and each starts dozens of threads: these tests start few of them.


@pytest.mark.parametrize(("host", "address"), [("localhost", "127.0.0.1"), ("[::1]", "::1")])
def test_a_server_starts_at_a_host_name_and_at_an_ipv6_address(host, address, capsys):
    port = free_addresses(1)[0].rpartition(":")[2]
    start_server(single(f"{host}:{port}"), session_config())
    socket.create_connection((address, int(port)), timeout=2.0).close()
    assert is_reachable(f"{host}:{port}")
    # It listens at all addresses, and nothing in TensorFlow limits that.
    warning = capsys.readouterr().err
    assert re.match(rf"Warning: .*:{port} is a private address, but .* firewall$", warning)


@pytest.mark.parametrize(("type_", "gpus"), [("ps", {"GPU": 0}), ("chief", {})])
def test_a_parameter_server_uses_no_gpu(monkeypatch, type_, gpus):
    monkeypatch.setattr(tensorflow_v1, "_CAN_HAVE_GPUS", True)
    config = session_config()
    started = start_server(single(free_addresses(1)[0], type_), config)
    used = started.server_def.default_session_config
    assert used.device_count == gpus
    assert used.gpu_options.allow_growth
    assert config == session_config()  # the caller's own object is unchanged


def test_an_address_that_cannot_be_used_is_refused_with_the_reason():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        used = f"127.0.0.1:{listener.getsockname()[1]}"
        # localhost may also be ::1, where the port is free.
        for address in (used, used.replace("127.0.0.1", "localhost"), "198.51.100.1:9999"):
            with pytest.raises(
                UserError,
                match=f"^cannot start a server at {address}: (Address already in use|"
                "Can.*t assign requested address); TF_CONFIG must give this task the address of ",
            ):
                start_server(single(address), session_config())


def test_an_address_that_is_no_host_name_cannot_be_resolved_or_reached():
    with pytest.raises(UserError, match="^cannot resolve a..b:1 from TF_CONFIG: "):
        start_server(single("a..b:1"), session_config())
    assert not is_reachable("a..b:1")


def test_a_port_in_use_at_another_address_of_this_machine_is_refused():
    with socket.create_server(("127.0.0.2", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(UserError, match=f"^cannot start a server at {address}: "):
            start_server(single(address), session_config())


def test_a_task_waits_until_its_own_host_name_is_known(capsys, set_time, monkeypatch):
    address = free_addresses(1)[0].replace("127.0.0.1", "localhost")
    look_up, failures = socket.getaddrinfo, 30

    def fail_at_first(name, *arguments, **options):
        nonlocal failures
        if name == "localhost" and failures > 0:
            failures -= 1
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return look_up(name, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", fail_at_first)
    start_server(single(address), session_config(), timeout=60)
    assert is_reachable(address)
    notice = f"Waiting until the host name of {address} can be resolved\n"
    assert capsys.readouterr().err.startswith(f"{notice}Warning: ")
    failures = 1000
    assert not is_reachable(address)
    with pytest.raises(UserError, match=f"^cannot resolve {address} from TF_CONFIG: .*; correct"):
        start_server(single(address), session_config(), timeout=60)


def test_float16_is_refused_for_workers_only():
    config = session_config()  # as session_config(use_fp16=True) returns it on GPUs
    rewrites = config.graph_options.rewrite_options
    rewrites.auto_mixed_precision = rewrites.ON
    with pytest.raises(UserError, match="--use_fp16 does not work with TF_CONFIG on GPUs"):
        start_server(single(free_addresses(1)[0], "chief"), config)
    start_server(single(address := free_addresses(1)[0]), config)
    assert is_reachable(address)


def test_missing_peers_are_listed_after_a_delay_and_after_the_timeout(capsys, set_time):
    first, here, second = free_addresses(3)
    task = Task({"ps": [first], "chief": [here], "worker": [second]}, "chief", 0)
    names = f"ps 0 ({first}), worker 0 ({second})"
    with listen(here), pytest.raises(UserError) as error:
        wait_for_peers(task, [("ps", 0), *task.workers], timeout=10)
    assert str(error.value) == (
        f"no response from {names} for 10 s (--cluster_timeout_secs); start the missing tasks, or "
        "correct their addresses in TF_CONFIG"
    )
    assert capsys.readouterr().err == f"Waiting for {names}\n"


def test_the_chief_may_be_missing_until_the_timeout(capsys, set_time):
    (address,) = free_addresses(1)
    check_chief = make_chief_check(Task({"ps": ["a:1"], "chief": [address]}, "ps", 0), timeout=60)
    check_chief()
    set_time(60.0)
    with listen(address):
        check_chief()
    check_chief()
    assert capsys.readouterr().err == ""
    set_time(70.0)
    check_chief()
    check_chief()
    assert capsys.readouterr().err == f"Waiting for chief 0 ({address})\n"
    set_time(120.0)
    with pytest.raises(UserError, match=rf"no response from chief 0 \({address}\) for 60 s \(--cl"):
        check_chief()


def test_a_chief_without_parameter_servers_is_not_checked(capsys, set_time):
    # It trains without a server of its own, so its address never responds.
    for cluster in ({"chief": free_addresses(1)}, {}):
        set_time(0.0)
        check_chief = make_chief_check(Task(cluster, "evaluator", 0), timeout=60)
        set_time(1000.0)
        check_chief()
    assert capsys.readouterr().err == ""
