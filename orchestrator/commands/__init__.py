"""Implementations of the commands that do not run trials. They return data and print nothing."""
