"""Tell somebody how a run ended: a program that reads the summary, or a webhook it is posted to.

What goes wrong here is logged and changes nothing. No line shows the URL or the arguments: they
may hold a token.
"""

import http.client
import json
import logging
import os
import ssl
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline import __version__
from pipeline.config import NotifyConfig
from pipeline.errors import ConfigError

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S = 1.0  # before the second attempt; doubled before each further one
_MAX_OUTPUT_LINES = 20  # of a command that are logged


@dataclass(frozen=True, kw_only=True)
class Notifier:
    """Whom to tell; made before a run starts, so that a mistake in it is found by then."""

    command: tuple[str, ...] = ()
    webhook: str | None = field(default=None, repr=False)
    timeout_s: float = 10.0
    max_attempts: int = 3

    @classmethod
    def from_config(cls, config: NotifyConfig) -> "Notifier":
        """Check a config.

        Raises:
            ConfigError: names what is wrong; never the URL.
        """
        return cls(
            command=tuple(config.command),
            webhook=_webhook(config),
            timeout_s=config.timeout_s,
            max_attempts=config.max_attempts,
        )

    def send(self, summary: Mapping[str, Any]) -> None:
        """Tell everybody; takes no longer than its timeouts and never raises."""
        body = json.dumps(summary, sort_keys=True, allow_nan=False).encode()
        if self.command:
            self._run_command(body)
        if self.webhook is not None:
            self._post(self.webhook, body)

    def _run_command(self, body: bytes) -> None:
        program = os.path.basename(self.command[0])
        try:
            done = subprocess.run(
                self.command,
                input=body,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=self.timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            logger.error("notify.command: %s was ended after %.0f s", program, self.timeout_s)  # noqa: TRY400
            return
        except OSError as err:
            logger.error("notify.command: %s cannot be started: %s", program, err.strerror)  # noqa: TRY400
            return
        for line in done.stdout.decode(errors="replace").splitlines()[-_MAX_OUTPUT_LINES:]:
            logger.info("notify.command: %s: %s", program, line)
        if done.returncode:
            logger.error("notify.command: %s ended with %d", program, done.returncode)

    def _post(self, url: str, body: bytes) -> None:
        pause_s = _FIRST_PAUSE_S
        for attempt in range(1, self.max_attempts + 1):
            problem, may_pass = _post_once(url, body, self.timeout_s)
            if not problem:
                return
            if not may_pass or attempt == self.max_attempts:
                logger.error("notify.webhook: %s (attempt %d)", problem, attempt)
                return
            logger.warning("notify.webhook: %s; again in %.0f s", problem, pause_s)
            time.sleep(pause_s)
            pause_s *= 2


def _webhook(config: NotifyConfig) -> str | None:
    if config.webhook is not None and config.webhook_env is not None:
        raise ConfigError("notify: webhook and webhook_env cannot both be given")
    where = "notify.webhook"
    url = config.webhook.get_secret_value() if config.webhook is not None else None
    if config.webhook_env is not None:
        where = f"the environment variable {config.webhook_env} (notify.webhook_env)"
        url = os.environ.get(config.webhook_env, "")
        if not url:
            raise ConfigError(f"{where} is not set")
    if url is not None and not _is_http(url):
        raise ConfigError(f"{where} must hold an http:// or https:// URL with a host")
    return url


def _is_http(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        _ = parts.port
    except ValueError:
        return False
    plain = url.isascii() and url.isprintable() and " " not in url
    return plain and parts.scheme in ("http", "https") and bool(parts.hostname)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A summary goes where the config says and nowhere else."""

    def redirect_request(self, *_: object) -> None:
        return None


def _post_once(url: str, body: bytes, timeout_s: float) -> tuple[str, bool]:
    """Return what went wrong ("" for nothing), and whether it may pass by itself."""
    headers = {"Content-Type": "application/json", "User-Agent": f"carvecache/{__version__}"}
    request = urllib.request.Request(url, data=body, headers=headers, method="POST")
    opener = urllib.request.build_opener(_NoRedirect)
    try:
        with opener.open(request, timeout=timeout_s):
            return "", False
    except urllib.error.HTTPError as err:
        with err:
            return f"HTTP status {err.code}", err.code in (408, 425, 429) or err.code >= 500
    except urllib.error.URLError as err:
        kind = type(err.reason).__name__ if isinstance(err.reason, Exception) else "URLError"
        return f"not reachable ({kind})", not isinstance(err.reason, ssl.SSLCertVerificationError)
    except (OSError, http.client.HTTPException) as err:
        return f"no answer ({type(err).__name__})", True
