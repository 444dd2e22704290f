"""Numbers to numbers: the score of errors, credits of decisions, figures, intervals, paired tests."""
