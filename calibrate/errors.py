"""The two ways a run can end early, and the exit code each one has."""


class UserError(ValueError):
    """The user's input is wrong: exit code 2. The message states the law, the value and the cure."""


class WorkFailed(RuntimeError):
    """The input was fine but the work did not succeed (budget not met, nothing skipped): exit code 1."""
