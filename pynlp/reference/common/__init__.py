"""Dtypes and random numbers: what the references of all families share."""
