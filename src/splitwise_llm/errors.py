"""Every error a person can meet, drawn as a tree; it knows nothing of the code that raises them.

```
SplitwiseError
├── UserError              the person who called can mend it; exit code 2
│   ├── PartitionError     a partition that cannot be: text, wire bytes, vector, or against this model
│   ├── ModelError         a model directory that is missing, incomplete or of an unknown family
│   ├── MemoryTooSmall     what was assigned does not fit, said before anything is loaded
│   ├── RequestError       a prompt, sampling or session option that cannot be served
│   ├── SpecError          a device, link or trace file, or a number with a unit, that cannot be right
│   ├── ListenError        an address that cannot be listened on (taken, or open without TLS)
│   ├── KeysError          certificates that are missing, expired or do not match
│   └── JournalError       a journal of another model or version, damaged, in the way, or in use
├── PeerError              the other machine or the link between; exit code 3
│   ├── Unreachable        nobody answers at this address
│   ├── LinkDied           the link ended while it was in use
│   ├── PeerMismatch       another protocol version, another model
│   ├── ProtocolError      bytes that are no message, or a message out of place
│   └── WorkerFailed       the worker said what went wrong on its side
└── BrokenInvariant        our own fault; exit code 70
```

A message says what was given, what was expected, and what to do.
"""

from __future__ import annotations


class SplitwiseError(Exception):
    """Root of every error raised on purpose here."""

    exit_code = 1


class UserError(SplitwiseError):
    """The caller gave something that cannot work; the message says what to give instead."""

    exit_code = 2


class PartitionError(UserError):
    """A partition that no machine set or model could execute, or text that is no partition."""


class ModelError(UserError):
    """A model that cannot be loaded: missing files or tensors, wrong shapes, an unknown family."""


class MemoryTooSmall(UserError):
    """The assigned weights and cache exceed the memory of a machine; when to ask again, if others hold what is
    missing."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RequestError(UserError):
    """A prompt or an option of one request that cannot be served."""


class SpecError(UserError):
    """A specification (device, link, trace, quantity) that cannot be read or cannot be true."""


class ListenError(UserError):
    """An address that cannot, or must not, be listened on."""


class KeysError(UserError):
    """Certificates or keys that are missing or cannot be used."""


class JournalError(UserError):
    """A session's journal that cannot be gone on with, or cannot be begun."""


class PeerError(SplitwiseError):
    """Another machine, or the link to it, failed; the caller did nothing wrong."""

    exit_code = 3


class Unreachable(PeerError):
    """No worker answers at the address."""


class LinkDied(PeerError):
    """A link that worked has ended without a good-bye."""


class PeerMismatch(PeerError):
    """The peer speaks another protocol version or holds another model."""


class ProtocolError(PeerError):
    """Bytes that are not a message of this protocol, or a message that does not belong here."""


class WorkerFailed(PeerError):
    """A worker reported an error of its own and ended the session, or has no place now (and says when to ask again)."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class BrokenInvariant(SplitwiseError):
    """Something that must hold by construction does not: a bug of this project."""

    exit_code = 70
