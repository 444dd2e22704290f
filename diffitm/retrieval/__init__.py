"""Candidate lists, and the exact nearest neighbours that they are made of."""
