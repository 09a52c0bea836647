"""Models of pictures as functions of SQL."""
