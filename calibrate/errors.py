"""The three ways a command can end early, and the exit code of each."""

from skip_softmax.thresholds.yaml_file import FileError

__all__ = ["FileError", "UserError", "WorkFailed"]
# `FileError`, exit code 2: a YAML file breaks its schema; the message names file, line and key.


class UserError(ValueError):
    """The user's input is wrong: exit code 2. The message states the law, the value and the cure."""


class WorkFailed(RuntimeError):
    """The input was fine but the work did not succeed (budget not met, nothing skipped): exit code 1."""
