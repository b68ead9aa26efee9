"""A missing network is noticed at once, not after minutes of retries."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlparse

from tulle.errors import UserError


def require_hub(what: str, instead: str, timeout: float = 3.0) -> None:
    """Raises ``UserError`` unless the model hub answers within ``timeout`` seconds.

    ``what`` names the thing that was asked for, ``instead`` what to try without a network.
    """
    from huggingface_hub import constants

    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise UserError(f"expected {what} on this machine, found none, and HF_HUB_OFFLINE is set; {instead}")
    address = urlparse(constants.ENDPOINT)
    try:
        socket.create_connection((address.hostname or "", address.port or 443), timeout).close()
    except OSError:
        raise UserError(f"expected {what} on this machine or a network to fetch it, found neither; {instead}") from None
