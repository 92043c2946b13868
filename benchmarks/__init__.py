"""Measurements of speed and memory; see README.md. Not part of the installed package."""
