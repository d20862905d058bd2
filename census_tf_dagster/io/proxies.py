"""Chooses the HTTP proxy for a URL from the environment (HTTP_PROXY, HTTPS_PROXY, NO_PROXY); none for this machine."""

from ipaddress import ip_address
from urllib.parse import unquote, urlsplit

from requests.utils import get_environ_proxies, select_proxy


def is_loopback(url: str) -> bool:
    """Tell whether a URL belongs to this machine itself, which no proxy can reach."""
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def proxy_for(url: str) -> str | None:
    """Return the URL of the proxy for a URL, with its password; None if there is none."""
    if is_loopback(url):
        return None
    found = select_proxy(url, get_environ_proxies(url))
    return found if not found or "://" in found else f"http://{found}"


def tiledb_proxy(url: str) -> dict[str, str]:
    """Return TileDB's configuration of the proxy for a URL, because TileDB reads no environment variables."""
    parsed = urlsplit(proxy_for(url) or "")
    if parsed.scheme not in ("http", "https") or not parsed.hostname:
        return {}
    config = {
        "vfs.s3.proxy_scheme": parsed.scheme,
        "vfs.s3.proxy_host": parsed.hostname,
        "vfs.s3.proxy_port": str(parsed.port or (443 if parsed.scheme == "https" else 80)),
    }
    if parsed.username:
        config["vfs.s3.proxy_username"] = unquote(parsed.username)
        config["vfs.s3.proxy_password"] = unquote(parsed.password or "")
    return config
