"""Images with their texts as people keep them: tables, folders and shards, read strictly and alike."""
