"""A reward that a server of yours computes: JSON over HTTP, with a time limit, retries and a circuit breaker."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field
from torch import Tensor

from unveil.registry import UserError
from unveil.rewards.base import Metadata, Reward, RewardError, Score, checked, failure_of, within
from unveil.rewards.images import data_url

_LARGEST = 1 << 24
"""Bytes of an answer."""
_PASSING = {408, 425, 429, 500, 502, 503, 504}
"""Statuses that may be gone at the next try."""


@dataclass(kw_only=True)
class Remote(Reward, name="remote"):
    """Posts ``{"prompts": [..], "completions": [..], "metadata": [{..}, ..]}`` and reads ``{"scores": [..]}``: numbers,
    or null where the reward does not apply. Images are sent as ``data:`` URLs of PNGs. Redirects are not followed."""

    url: str
    """``http://`` or ``https://`` address that is posted to."""
    timeout: Annotated[float, Field(gt=0)] = 10.0
    """Seconds for one try, from connecting to the last byte."""
    retries: Annotated[int, Field(ge=0)] = 2
    """Further tries of a request after a time-out, a broken connection or a status such as 429, 500 or 503."""
    backoff: Annotated[float, Field(ge=0)] = 0.5
    """Seconds before the first further try; doubled before each one after it."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    """Completions per request; requests fail one by one."""
    breaker_failures: Annotated[int, Field(ge=1)] = 5
    """After so many failed requests in a row the breaker opens: nothing is sent, all completions fail at once."""
    breaker_seconds: Annotated[float, Field(gt=0)] = 30.0
    """How long it stays open. The next request is then a trial of one try: it closes the breaker or opens it again."""
    failed: int = field(init=False, repr=False, compare=False, default=0)
    """Failed requests in a row."""
    closed_at: float = field(init=False, repr=False, compare=False, default=0.0)
    """When an open breaker lets a trial through, on the monotonic clock."""

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            fits = parts.scheme in ("http", "https") and parts.hostname and parts.username is None
            self._connection_of = (parts.scheme, parts.hostname or "", parts.port)
        except ValueError:  # a port or an IPv6 address that is none
            fits = False
        if not fits or not self.url.isascii() or any(character <= " " for character in self.url):
            raise UserError(f"url: should be http://HOST[:PORT]/PATH or https://..., got {self.url!r}")
        self._target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")

    def scores(self, completions: list[Any], prompts: list[str], metadata: list[Metadata]) -> Sequence[Score]:
        found: list[Score] = []
        for start in range(0, len(completions), self.batch_size):
            part = slice(start, start + self.batch_size)
            count = len(completions[part])
            try:
                sent = [data_url(one) if isinstance(one, Tensor) else one for one in completions[part]]
                body = {"prompts": prompts[part], "completions": sent, "metadata": metadata[part]}
                found += self._guarded(json.dumps(body, allow_nan=False).encode(), count)
            except Exception as error:
                found += [failure_of(error)] * count
        return found

    def _guarded(self, body: bytes, count: int) -> list[Score]:
        """One request, if the breaker lets it through."""
        trial = self.failed >= self.breaker_failures
        if trial and time.monotonic() < self.closed_at:
            raise RewardError("breaker", f"not asked: the last {self.failed} requests failed")
        try:
            scores = self._tried(body, count, 0 if trial else self.retries)
        except Exception:
            self.failed += 1
            self.closed_at = time.monotonic() + self.breaker_seconds
            raise
        self.failed = 0
        return scores

    def _tried(self, body: bytes, count: int, retries: int) -> list[Score]:
        """One request with its further tries."""
        for number in range(retries + 1):
            if number:
                time.sleep(self.backoff * 2 ** (number - 1))
            try:
                status, answer = within(self.timeout, lambda: self._post(body))
            except (OSError, http.client.HTTPException) as error:  # a time-out is an OSError
                if number < retries:
                    continue
                if isinstance(error, TimeoutError):
                    raise
                raise RewardError("connection", f"{self.url}: {type(error).__name__}: {error}") from error
            if status in _PASSING and number < retries:
                continue
            break
        if status != 200:
            raise RewardError("status", f"{self.url} answered with status {status}")
        return _read(answer, count)

    def _post(self, body: bytes) -> tuple[int, bytes]:
        """One try: status and body of the answer."""
        scheme, host, port = self._connection_of
        kind = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
        connection = kind(host, port, timeout=self.timeout)
        try:
            connection.request("POST", self._target, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read(_LARGEST + 1)
        finally:
            connection.close()


def _read(answer: bytes, count: int) -> list[Score]:
    """The scores of an answer.

    Raises:
        RewardError: it is not what was agreed on.
    """
    if len(answer) > _LARGEST:
        raise RewardError("malformed", f"an answer of more than {_LARGEST} bytes")
    try:
        data: Any = json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise RewardError("malformed", f"not JSON: {error}") from error
    scores = data.get("scores") if isinstance(data, dict) else None
    if not isinstance(scores, list) or not all(
        one is None or (isinstance(one, int | float) and not isinstance(one, bool)) for one in scores
    ):
        raise RewardError("malformed", 'should be {"scores": [numbers or null]}')
    return checked(scores, count)
