"""Hard negative captions: by rule, from proposals, and merged into rows."""
