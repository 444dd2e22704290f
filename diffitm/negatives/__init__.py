"""Hard negative captions: by rule, from proposals, merged into rows."""
