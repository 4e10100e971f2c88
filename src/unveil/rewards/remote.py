"""Rewards that a server computes: JSON over HTTP, with a time limit, retries and a circuit breaker; and the pickled
bodies of Flow-GRPO's reward servers, read without running anything."""

from __future__ import annotations

import http.client
import io
import json
import pickle
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field
from torch import Tensor

from unveil.registry import UserError
from unveil.rewards.base import Metadata, Reward, RewardError, Score, checked, failure_of, within
from unveil.rewards.images import data_url, jpeg

_LARGEST = 1 << 24
"""Bytes of an answer."""
_PASSING = {408, 425, 429, 500, 502, 503, 504}
"""Statuses that may be gone at the next try."""


@dataclass(kw_only=True)
class Remote(Reward, name="remote"):
    """Posts ``{"prompts": [..], "completions": [..], "metadata": [{..}, ..]}`` and reads ``{"scores": [..]}``: numbers,
    or null where the reward does not apply. Images are sent as ``data:`` URLs of PNGs. Redirects are not followed."""

    kind: ClassVar[str] = "application/json"
    """Of the request's body."""

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
    prompts_as: str = "prompts"
    """The request's key of the prompts."""
    completions_as: str = "completions"
    """Of the completions."""
    metadata_as: str | None = "metadata"
    """Of the metadata; null: they are not sent."""
    scores_as: str = "scores"
    """The answer's key of the scores."""
    images: Literal["data_url", "base64"] = "data_url"
    """What an image is sent as: a ``data:`` URL of a PNG, or the PNG in base64 alone."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further keys of every request and their values."""
    failed: int = field(init=False, repr=False, compare=False, default=0)
    """Failed requests in a row."""
    closed_at: float = field(init=False, repr=False, compare=False, default=0.0)
    """When an open breaker lets a trial through, on the monotonic clock."""

    def __post_init__(self) -> None:
        keys = [self.prompts_as, self.completions_as, *([self.metadata_as] if self.metadata_as else []), *self.extra]
        if len(set(keys)) < len(keys):
            raise UserError(f"extra: two keys of a request have one name ({', '.join(keys)})")
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
                body = {self.prompts_as: prompts[part], self.completions_as: self._sent(completions[part])}
                if self.metadata_as:
                    body[self.metadata_as] = metadata[part]
                found += self._guarded(self._packed(body | self.extra), count)
            except Exception as error:
                found += [failure_of(error)] * count
        return found

    def _sent(self, completions: list[Any]) -> list[Any]:
        urls = [data_url(one) if isinstance(one, Tensor) else one for one in completions]
        if self.images == "data_url":
            return urls
        pairs = zip(completions, urls, strict=True)
        return [url.partition(",")[2] if isinstance(one, Tensor) else url for one, url in pairs]

    def _packed(self, body: dict[str, Any]) -> bytes:
        return json.dumps(body, allow_nan=False).encode()

    def _unpacked(self, answer: bytes) -> Any:
        """What an answer says.

        Raises:
            RewardError: it cannot be read.
        """
        try:
            return json.loads(answer)
        except (ValueError, RecursionError) as error:
            raise RewardError("malformed", f"not JSON: {error}") from error

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
        return self._read(answer, count)

    def _post(self, body: bytes) -> tuple[int, bytes]:
        """One try: status and body of the answer."""
        scheme, host, port = self._connection_of
        kind = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
        connection = kind(host, port, timeout=self.timeout)
        try:
            connection.request("POST", self._target, body, {"Content-Type": self.kind})
            response = connection.getresponse()
            return response.status, response.read(_LARGEST + 1)
        finally:
            connection.close()

    def _read(self, answer: bytes, count: int) -> list[Score]:
        """The scores of an answer.

        Raises:
            RewardError: it is not what was agreed on.
        """
        if len(answer) > _LARGEST:
            raise RewardError("malformed", f"an answer of more than {_LARGEST} bytes")
        data = self._unpacked(answer)
        scores = data.get(self.scores_as) if isinstance(data, dict) else None
        if not isinstance(scores, list) or not all(
            one is None or (isinstance(one, int | float) and not isinstance(one, bool)) for one in scores
        ):
            raise RewardError("malformed", f'should be {{"{self.scores_as}": [numbers or null]}}')
        return checked(scores, count)


@dataclass(kw_only=True)
class Pickled(Remote, name="pickled"):
    """A reward server of Flow-GRPO and its relatives (GenEval, DeQA, UnifiedReward): the same request as a pickled
    dictionary, images as JPEGs. An answer of plain values is read; one that names a class or a function is refused."""

    medium = "image"
    kind = "application/octet-stream"

    completions_as: str = "images"
    """The request's key of the images."""
    metadata_as: str | None = None
    """Of the metadata (GenEval: ``meta_datas``); null: they are not sent."""
    scores_as: str = "outputs"
    """The answer's key of the scores (GenEval: ``scores``, ``rewards`` or ``strict_rewards``)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images != "data_url":
            raise UserError(f"images: 'pickled' sends JPEGs, got {self.images!r}")

    def _sent(self, completions: list[Any]) -> list[Any]:
        return [jpeg(one) for one in completions]

    def _packed(self, body: dict[str, Any]) -> bytes:
        images = body.pop(self.completions_as)
        plain = json.loads(super()._packed(body))  # the values that JSON has, whatever class they were of
        return pickle.dumps(plain | {self.completions_as: images})

    def _unpacked(self, answer: bytes) -> Any:
        try:
            return _Plain(io.BytesIO(answer)).load()
        except Exception as error:  # whatever a broken pickle does
            raise RewardError("malformed", f"not a pickle of plain values: {error}") from error


class _Plain(pickle.Unpickler):
    """Reads numbers, texts, lists and dictionaries. Everything else a pickle has to look up by name."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is not a plain value")
