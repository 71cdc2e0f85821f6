"""The ways a run ends that are not bugs, each with the exit code of the stage that meets it."""


class UserError(ValueError):
    """Something the user can mend; shown as one message without a traceback."""

    exit_code = 1


class ConfigError(UserError):
    """A setting is unknown, missing, of the wrong type or out of range."""

    exit_code = 2


class InputError(UserError):
    """A corpus, token file or model directory cannot be used as it is."""

    exit_code = 3


class NumericsError(UserError):
    """The computation left the finite numbers."""

    exit_code = 4


class StorageError(UserError):
    """The disk or the memory does not suffice."""

    exit_code = 5


class BusyError(UserError):
    """Another process trains this very configuration, and this one was asked not to wait."""

    exit_code = 6


class ResumeError(UserError):
    """A checkpoint to go on from was asked for, and none fits these settings, data and code."""

    exit_code = 7
