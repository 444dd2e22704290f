"""Objectives and update steps of tuning, pure torch."""
