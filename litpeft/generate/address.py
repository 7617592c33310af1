"""Where a server listens, and who can reach it there."""

import socket
from ipaddress import ip_address
from urllib.parse import urlsplit

from litpeft.core.errors import ResourceError, quoted

LOCAL = ("localhost", "127.0.0.1", "::1")


def is_local(host: str) -> bool:
    """Returns whether only this machine reaches an address."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def hostname(address: str) -> str | None:
    """Returns the name in a `Host` header."""
    try:
        return urlsplit(f"//{address}").hostname
    except ValueError:
        return None


def bound(host: str, port: int) -> socket.socket:
    """Returns a socket that is bound to an address, and does not listen yet."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        place = socket.socket(family, kind, protocol)
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind(address)
    except (OSError, UnicodeError) as error:
        what = f"cannot listen at {quoted(host)}, port {port}: {getattr(error, 'strerror', None) or error}"
        raise ResourceError(what, where="port", hint="--port 0 takes a free one") from None
    return place
