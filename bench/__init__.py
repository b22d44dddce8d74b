"""Measures the server and prints a table: `make bench`, `python -m bench --help`."""
