"""Tests of `core/imaging`."""
