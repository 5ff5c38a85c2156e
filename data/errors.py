"""The one exception of this package that a person can mend."""


class DataError(Exception):
    """Text, shards or a tokenizer that cannot be used; the message says which, why and what to do."""
