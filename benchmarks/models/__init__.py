"""Whole models beside other libraries' models."""
