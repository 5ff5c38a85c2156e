"""The efficiencies of this machine, measured."""
