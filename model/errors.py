"""The one exception of this package that a person can mend."""


class WeightsError(Exception):
    """Weights do not fit the model: a tensor is missing, extra, misshaped or of an unknown layout."""
