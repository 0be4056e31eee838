"""TCP ports of the gateway and the console: checked, or chosen, before anything starts."""

import errno
import socket

from services.errors import Unavailable


def reserve(host: str, port: int, option: str) -> socket.socket:
    """A socket bound to the port, or with port 0 to a free one; it never listens.

    Keep it open while the platform runs: nobody else is then given the port, while a server that sets SO_REUSEADDR
    (all of ours do) may still bind and listen. Raises Unavailable when the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    held = socket.socket(family, socket.SOCK_STREAM)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        held.bind((host, port))
    except OSError as error:
        held.close()
        if error.errno == errno.EADDRINUSE:
            raise Unavailable(
                f"port {port} on {host} is used by another program: stop it, or choose another with {option}"
            ) from None
        raise Unavailable(f"cannot listen on {host}:{port}: {error.strerror}") from None
    return held
