"""Tests: one file per room."""
