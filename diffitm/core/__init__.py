"""What everything stands on: options, errors, schemas, files by path or URI. It knows nothing above."""
