"""What the machines of the test bed do: the host around the guests, and the guests."""

import subprocess
import threading
from pathlib import Path

import ivsmc.__main__
from processes import Here

BRIDGE = "ivsmc-test"
HOST_ADDRESS = "10.77.0.254"


def guest_address(number: int) -> str:
    return f"10.77.0.{number}"


def run(*command: str) -> str:
    """Run a command to its end; return what it says."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


def run_program(here: Here, command: list[str], log: str) -> int:
    """Run a command, what it says appended to ``log``; send its process id, return its status."""
    with open(log, "ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
    here.send(process.pid)
    return process.wait()


def set_up_network(taps: list[str]) -> None:
    """Make the bridge that joins the guests and the host."""
    run("ip", "link", "set", "lo", "up")
    run("ip", "link", "add", BRIDGE, "type", "bridge")
    run("ip", "address", "add", f"{HOST_ADDRESS}/24", "dev", BRIDGE)
    run("ip", "link", "set", BRIDGE, "up")
    for tap in taps:
        run("ip", "tuntap", "add", "dev", tap, "mode", "tap")
        run("ip", "link", "set", tap, "master", BRIDGE, "up")


def set_up_guest(address: str, devices: list[str]) -> None:
    """Give the guest its address, and its ivshmem devices to user space."""
    run("modprobe", "virtio_net")
    run("udevadm", "settle")  # it may give the interface another name
    [interface] = [path.name for path in Path("/sys/class/net").iterdir() if path.name != "lo"]
    run("ip", "address", "add", f"{address}/24", "dev", interface)
    run("ip", "link", "set", interface, "up")
    for device in devices:
        ivsmc_here("bind", device)


def ivsmc_here(*arguments: str) -> None:
    """Run a command of ivsmc in this process: a guest takes long to start another Python."""
    status = ivsmc.__main__.main([*arguments])
    assert status == 0, f"ivsmc {' '.join(arguments)}: {status}"


def run_server(here: Here, command: list[str]) -> int:
    """Run an ivshmem server until told to stop; send its first line, return its status."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        here.send(server.stderr.readline())
        # It says who comes and goes: read on, or it would wait for room in the pipe.
        reader = threading.Thread(target=server.stderr.read)
        reader.start()
        here.receive()
        server.terminate()
        reader.join()
    return server.returncode
