"""A small client of a policy server: NumPy, msgpack and websockets, no torch; Python 3.10 or later.

    with Client("ws://127.0.0.1:8000", api_key="...") as client:
        print(client.metadata["views"])
        actions = client.infer({"observation/image": image, ..., "prompt": "lift the red cube"})["actions"]

It speaks openpi's protocol, so any server of that answers it. A server keeps nothing between requests: when a
connection is lost, the next `infer` connects again.
"""

import contextlib
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from websockets.exceptions import InvalidStatus, WebSocketException
from websockets.sync.client import ClientConnection, connect

from worldvla.serve.protocol import DEADLINE_KEY, MAX_BYTES, pack, unpack


class ServerError(RuntimeError):
    """The server's own words: it refused a request, failed, or would have answered after the deadline."""


class Client:
    """Connects at once. A server that is not there or goes away raises ConnectionError, one that is silent
    for `timeout_s` TimeoutError, one that reports an error ServerError. `certificate`: for wss://, the PEM
    file of a server that the system does not trust.
    """

    def __init__(
        self,
        address: str = "ws://127.0.0.1:8000",
        *,
        api_key: str = "",
        timeout_s: float = 60.0,
        certificate: Path | str | None = None,
    ) -> None:
        self.address, self.timeout_s = address, timeout_s
        self.metadata: dict[str, Any] = {}
        self._options: dict[str, Any] = {"compression": None, "max_size": MAX_BYTES, "proxy": None}
        if api_key:
            self._options["additional_headers"] = {"Authorization": f"Api-Key {api_key}"}
        if certificate is not None:
            self._options["ssl"] = ssl.create_default_context(cafile=certificate)
        self._stack = contextlib.ExitStack()
        self._connection: ClientConnection | None = None
        self.connect()

    def connect(self) -> None:
        """Connect anew and read the metadata."""
        self.close()
        try:
            self._connection = self._stack.enter_context(connect(self.address, **self._options))
        except InvalidStatus as error:
            body = error.response.body.decode(errors="replace").strip()
            status = error.response.status_code
            raise ConnectionError(f"{self.address} refuses with HTTP {status}: {body}") from None
        except (OSError, WebSocketException) as error:
            raise ConnectionError(
                f"no policy server at {self.address} ({error}): start it by `worldvla serve CHECKPOINT`"
            ) from None
        self.metadata = self._receive()

    def infer(self, observation: Mapping[str, Any], *, deadline_ms: float | None = None) -> dict[str, Any]:
        """Return the server's answer, `actions` (K, 7) and `server_timing`. An answer that would come later
        than `deadline_ms` after the request is a ServerError instead of an old action.
        """
        if self._connection is None:
            self.connect()
        assert self._connection is not None
        extra = {} if deadline_ms is None else {DEADLINE_KEY: deadline_ms}
        data = pack({**observation, **extra})
        with contextlib.suppress(OSError, WebSocketException):  # if it has gone, receiving says why
            self._connection.send(data)
        return self._receive()

    def close(self) -> None:
        """Say goodbye; `infer` connects again."""
        self._connection = None
        with contextlib.suppress(OSError, WebSocketException):
            self._stack.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _receive(self) -> dict[str, Any]:
        assert self._connection is not None
        try:
            data = self._connection.recv(timeout=self.timeout_s)
        except TimeoutError:
            self.close()  # its answer would be taken for that of the next request
            raise TimeoutError(f"{self.address} has not answered within {self.timeout_s:g} s") from None
        except (OSError, WebSocketException) as error:
            self.close()
            raise ConnectionError(f"{self.address} went away ({error}): infer() connects again") from None
        if isinstance(data, str):
            raise ServerError(" ".join(data.split())[-500:])
        return unpack(data)
