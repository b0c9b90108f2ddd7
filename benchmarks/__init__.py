"""Measurements; each is a script that prints a table and writes JSON."""
