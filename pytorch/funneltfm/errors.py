"""The one kind of error that is meant for the person at the keyboard."""


class InputError(ValueError):
    """Input or configuration that cannot be used.

    The message is one paragraph: what was expected, what came, where (file and line), and what to do.
    The command line prints it without a traceback; every other exception is a defect of ours and keeps its traceback.
    """


class Diverged(InputError):
    """The loss of a training run is no number any more. The command ends with the exit code 3."""

    exit_code = 3


class Stopped(KeyboardInterrupt):
    """A signal ended the run. `signum` is the signal; the message says what was saved and how to go on."""

    def __init__(self, signum: int, message: str = ""):
        super().__init__(message)
        self.signum = signum


def brief(text: str, limit: int = 160) -> str:
    """What came, for a message: on one line, cut where it is long."""
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= limit else text[:limit] + "..."
