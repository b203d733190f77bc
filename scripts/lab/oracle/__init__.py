"""kvpress's answers, as reference data of the tests."""
