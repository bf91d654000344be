"""Formats of data sets, one a file."""
