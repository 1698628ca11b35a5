"""The one kind of error that is meant for the person at the keyboard."""


class InputError(ValueError):
    """Input or configuration that cannot be used.

    The message is one paragraph: what was expected, what came, where (file and line), and what to do.
    The command line prints it without a traceback; every other exception is a defect of ours and keeps its traceback.
    """
