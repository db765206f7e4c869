"""Tests of `core/nn`."""
