"""Asks a router for its fleet: `top`, `tap` and `drain` begin so."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any

from penstock.common.errors import ConfigError

TIMEOUT_S = 10.0


def ask_fleet(url: str, api_key: str) -> dict[str, Any]:
    """What the router's GET /fleet tells.

    Raises:
        ConfigError: it does not answer, or not so; the message has the router's own reason.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        request = urllib.request.Request(f"{url}/fleet", headers=headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            found: dict[str, Any] = json.load(answer)
        if found["object"] != "fleet":
            raise ValueError("the answer is not a fleet's")
        return found
    except (OSError, HTTPException, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{url} does not tell of its fleet: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What the router said, or what kept it from saying anything."""
    if isinstance(error, urllib.error.HTTPError):
        try:
            return str(json.load(error)["error"]["message"])
        except (OSError, HTTPException, ValueError, KeyError, TypeError):
            return f"{error.code} {error.reason}"
    if isinstance(error, (KeyError, TypeError)):
        return "the answer is not a fleet's"
    return str(error.reason if isinstance(error, urllib.error.URLError) else error) or type(error).__name__
