"""Pictures in columns, by the names of sparkdl."""
