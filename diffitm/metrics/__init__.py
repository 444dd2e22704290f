"""Credits of decisions, means with intervals, paired tests. numpy and scipy."""
