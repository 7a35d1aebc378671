"""Whom transfuse is measured against in whole models: each contender in a process of its own (see process.py)."""
