"""A guided model behind OpenAI's interface: `engine` writes, `protocol` says what may be asked, `app` answers."""

LOCAL = ("127.0.0.1", "localhost", "::1")  # hosts of this machine alone
SHOWN = 20  # candidates that a client may ask to see, at most
