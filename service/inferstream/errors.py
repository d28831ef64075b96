"""The error types that end a worker, each with its exit code.

They are raised where the fact is known, with one line that tells the user what to do, and turned into an
exit code in one place (:mod:`inferstream.cli`).  Anything else that escapes is a bug: exit code 1.
"""

from __future__ import annotations


class InferstreamError(Exception):
    """An error with a message for the user and an exit code; never printed as a traceback."""

    exit_code = 1


class SettingsError(InferstreamError):
    """A setting or argument is wrong, or two of them cannot be had together."""

    exit_code = 2


class KafkaRefused(InferstreamError):
    """Kafka is unreachable at start, or refuses authentication, rights or a topic."""

    exit_code = 3


class ModelError(InferstreamError):
    """The model could not be loaded."""

    exit_code = 4


class DeviceFailed(InferstreamError):
    """The device failed for good (a poisoned context): the orchestrator has to restart the process."""

    exit_code = 5


class DrainTimeout(InferstreamError):
    """The drain passed its deadline; nothing was committed that was not acknowledged."""

    exit_code = 6


class DeadLetterRefused(InferstreamError):
    """A dead letter was refused by its topic and ``dead_letter.oversize`` is ``stop``."""

    exit_code = 7


class NoProgress(InferstreamError):
    """The watchdog saw work waiting and nothing moving."""

    exit_code = 8


class Incomplete(InferstreamError):
    """``publish``, ``consume`` or ``dead-letters`` did not do all of it."""

    exit_code = 9


class OutOfMemory(Exception):
    """A batch did not fit the device's memory: it is halved and tried again."""
