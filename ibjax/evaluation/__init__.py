"""Attacks by name, scoring, result records, and the report."""
