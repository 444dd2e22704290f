"""The applications: options to stages to report, one file a command."""
