"""The errors kvlab raises. All of them are `KVLabError`.

They are for the caller's mistakes: a wrong argument, a folder that holds no model. Faults
of the world (a store that is down, a record that is damaged) are never errors: the cache
counts them as misses and the request goes on.
"""


class KVLabError(Exception):
    """Base of every error of this package. The message says what was expected, what came, and what to do."""


class ConfigError(KVLabError, ValueError):
    """A setting cannot be used: an unknown URL scheme, an unknown precision, a negative TTL."""


class InputError(KVLabError, ValueError):
    """A call's data cannot be used: an empty prompt, a token out of the vocabulary, a tensor of the wrong shape."""


class ModelError(KVLabError):
    """A folder does not hold a model that this package can run."""
