"""Figures as people look at them: terminal, tables, charts, one HTML page."""
