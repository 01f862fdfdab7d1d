"""The errors of kvlab. All of them derive from `KVLabError`.

They report mistakes of the caller, such as a wrong argument or a folder without a model. Faults
of the environment, such as an unreachable store or a damaged record, raise no error: the cache
counts them as misses or drops, and the request continues.
"""


class KVLabError(Exception):
    """Base class of all errors of this package. A message states what was expected, what was received and a remedy."""


class ConfigError(KVLabError, ValueError):
    """A setting is invalid, such as an unknown URL scheme, an unknown precision or a negative TTL."""


class InputError(KVLabError, ValueError):
    """The data of a call is invalid, such as an empty prompt, an unknown token or a tensor of the wrong shape."""


class ModelError(KVLabError):
    """A folder or a config does not describe a model that this package can run."""
