"""Where ivshmem servers and agents of this machine have their sockets, for all to find them."""

__all__ = ["AGENT", "DIRECTORY", "SERVER", "agent_of", "is_agent"]

DIRECTORY = "/run/ivsmc"
"""The sockets in it are ``*.sock``."""
SERVER = f"{DIRECTORY}/ivs0.sock"
"""That of the only ivshmem server."""
AGENT = f"{DIRECTORY}/agent.sock"
"""That of the agent of a VM's only device."""


def agent_of(address: str) -> str:
    """Return the socket of the agent of one of several devices, by its PCI address."""
    return f"{DIRECTORY}/agent-{address}.sock"


def is_agent(name: str) -> bool:
    """Whether a socket of this name is an agent's: of a VM's only device, or of one of them."""
    return name == "agent.sock" or (name.startswith("agent-") and name.endswith(".sock"))
