"""The hot loops of the model; every kernel stands beside a plain reference (`reference.py`)."""
