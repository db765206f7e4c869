"""Tests of `core/diffusion`."""
