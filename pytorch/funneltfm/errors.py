"""The one kind of error that is meant for the person at the keyboard."""


class InputError(ValueError):
    """Input or configuration that cannot be used.

    The message is one paragraph: what was expected, what came, where (file and line), and what to do.
    The command line prints it without a traceback; every other exception is a defect of ours and keeps its traceback.
    """


def brief(text: str, limit: int = 160) -> str:
    """What came, for a message: on one line, cut where it is long."""
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= limit else text[:limit] + "..."
