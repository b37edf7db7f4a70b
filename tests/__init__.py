"""Tests, laid out as the package is; `tiny` has the models they share."""
